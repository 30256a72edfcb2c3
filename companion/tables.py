"""Tables and paragraphs of Markdown, drawn from records alone."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from companion.evidence import accuracy, change, columns_of, table_rows
from companion.records import LATER, Record, core_digest, pack, record_name
from companion.settings import METRICS, PAPER_NETWORKS, STAND_INS, ParameterError

if TYPE_CHECKING:
    from wdat_core import Scores


def show_table(table: int, records: Sequence[Record], recorded: Sequence[Record]) -> Any:
    """The fine-tuning table as Markdown: accuracy in per cent, in brackets the change against the baseline."""
    from IPython.display import Markdown

    grid = list(columns_of(records or recorded))
    lines = [
        " | ".join(["| Accuracy, %", "evidence", "baseline", *(f"τ = {tau:g}, η = {eta:g}" for tau, eta in grid)])
        + " |",
        "|---" * (3 + len(grid)) + "|",
    ]
    for row in table_rows(table, records, recorded):
        cells = [
            f"**{METRICS[row['metric']]}**" if row["source"] == "paper" else "",
            f"{row['source']}: {_short(row['network'])}",
            "–" if row["before"] is None else row["before"].text(),
        ]
        for cell in row["cells"].values():
            cells.append("–" if cell is None else f"{cell[0].value:.2f} ({cell[1].text(signed=True)})")
        lines.append("| " + " | ".join(cells) + " |")
    return Markdown("\n".join(lines))


def _short(network: str) -> str:
    """The paper's own words for one of its networks, the name of any other."""
    return PAPER_NETWORKS[network]["paper"] if network in PAPER_NETWORKS else network


def compare(before: Scores, after: Scores) -> Any:
    """Two networks on the same images, as Markdown: accuracy in per cent, and the change, each with its 95 % interval.

    Needs no record: it is for networks of one's own. The interval of a change is that of the paired differences.
    """
    from IPython.display import Markdown

    n = {len(scores.correct[m]) for scores in (before, after) for m in METRICS}
    if len(n) > 1:
        raise ParameterError(f"scores of {' and '.join(map(str, sorted(n)))} images cannot be paired")
    bits = {when: {m: pack(s.correct[m]) for m in METRICS} for when, s in (("before", before), ("after", after))}
    record = {"correct": bits, "data": {"test": n.pop()}}
    lines = ["| Accuracy, % | before | after | change |", "|---|---|---|---|"]
    for m, label in METRICS.items():
        cells = [accuracy([record], when, m).text() for when in ("before", "after")]
        lines.append(f"| {' | '.join([label, *cells, change([record], m).text(signed=True)])} |")
    return Markdown("\n".join(lines))


def describe(records: Sequence[Record], title: str) -> Any:
    """What was run, in one paragraph of Markdown: network, images, training, device, time, versions, code."""
    from IPython.display import Markdown

    if not records:
        return Markdown(f"**{title}.** Nothing is recorded for these parameters yet.")
    r = records[0]
    config, data, seconds = r["config"], r["data"], [x["seconds"] for x in records]
    seeds = sorted({x["config"]["seed"] for x in records})
    stand_in = r["network"]["name"] in STAND_INS
    epochs = "epoch" if config["epochs"] == 1 else "epochs"
    others = "".join(f", `{k}={config[k]}`" for k, usual in LATER.items() if config.get(k, usual) != usual)
    return Markdown(
        f"**{title}.** Network `{r['network']['name']}` ({r['network']['source']}"
        f"{'; a stand-in, none of the paper’s networks' if stand_in else ''}), {data['source']}: {data['train']:,} for"
        f" training, {data['val']:,} for validation, {data['test']:,} for test. {config['epochs']} {epochs} at"
        f" batch size {config['batch_size']}, `perturb={config['perturb']}`,"
        f" `consistency={config['consistency']}`{others},"
        f" β = {config['beta']:g}, δ = {255 * config['threat']['delta']:.4g}/255, {config['steps']} steps,"
        f" seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}. On {r['device']}:"
        f" {sum(s['finetune'] for s in seconds) / len(seconds):.0f} s of fine-tuning and"
        f" {sum(s['evaluate'] for s in seconds) / len(seconds):.0f} s of evaluation a column, in the mean;"
        f" {seconds[0]['baseline']:.0f} s for the baseline. torch {r['versions']['torch']}, Python"
        f" {r['versions']['python']}, core {r['core'][:8]}."
    )


def verdicts(table: int, recorded: Sequence[Record]) -> Any:
    """What the recorded runs say about each column of the paper, by rule, as Markdown.

    A change counts as "up" or "down" where its 95 % interval leaves out 0, else as "not visible". The spread is that of
    the seeds, each measured on the same test images.
    """
    from IPython.display import Markdown

    if not recorded:
        return Markdown("No verdict: nothing is recorded for these parameters yet.")
    rows = {(r["metric"], r["source"]): r["cells"] for r in table_rows(table, [], recorded)}
    lines = ["| column | accuracy | paper | recorded here | seeds | verdict |", "|---|---|---|---|---|---|"]
    for column, records in columns_of(recorded).items():
        for metric in ("w_2", "w_inf"):
            paper, here = rows[metric, "paper"][column], change(records, metric)
            spread = [change([r], metric).value for r in records]
            seeds = "1" if len(spread) == 1 else f"{len(spread)}: {min(spread):+.2f} to {max(spread):+.2f}"
            visible = abs(here.value) > (here.half or 0)
            lines.append(
                f"| τ = {column[0]:g}, η = {column[1]:g} | {METRICS[metric]} |"
                f" {paper[1].text(signed=True) if paper else '–'} | {here.text(signed=True)} | {seeds} |"
                f" {('up' if here.value > 0 else 'down') if visible else 'not visible'} |"
            )
    return Markdown("\n".join(lines))


def provenance(records: Sequence[Record]) -> Any:
    """The last line of a page: the records that it draws on, what made them, and which are older than the code."""
    from IPython.display import HTML

    if not records:
        return HTML('<p class="provenance">Drawn from no record: there is none yet.</p>')
    columns = ("record", "command", "code", "versions", "device", "finished", "seconds")
    old = {record["core"] for record in records} - {core_digest()}
    rows = []
    for record in records:
        versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
        code = record["core"][:8] + (" †" if record["core"] in old else "")
        finished, seconds = record["created"][:16].replace("T", " "), sum(record["seconds"].values())
        cells = (f"results/{record_name(record)}", record["command"], code, versions, record["device"], finished)
        rows.append("".join(f"<td>{html.escape(cell)}</td>" for cell in (*cells, f"{seconds:.0f}")))
    some = f"{len(records)} record{'s' * (len(records) > 1)}"
    first, last = (f(record["created"][:10] for record in records) for f in (min, max))
    when = first if first == last else f"{first} to {last}"
    mark = " † Made by an earlier version of wdat_core.py than the one beside this page." if old else ""
    return HTML(
        f'<details class="provenance"><summary>Drawn from {some} of {when}, code'
        f" {', '.join(sorted({r['core'][:8] + (' †' if r['core'] in old else '') for r in records}))}.{mark}</summary>"
        f"<table><thead><tr>{''.join(f'<th>{column}</th>' for column in columns)}</tr></thead>"
        f"<tbody>{''.join(f'<tr>{row}</tr>' for row in rows)}</tbody></table></details>"
    )
