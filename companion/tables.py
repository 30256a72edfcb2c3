"""Tables and paragraphs of Markdown, drawn from records alone."""

from __future__ import annotations

import functools
import html
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from companion.evidence import (
    ALONG,
    accuracy,
    along,
    best_setting,
    bits,
    change,
    columns_of,
    estimate_of,
    of_networks,
    paper_value,
    relative_errors,
    settings_of,
    span,
    studies,
    table_rows,
    unusual,
)
from companion.records import LATER, Record, core_digest, pack, record_name
from companion.records import provenance as made_by
from companion.settings import FINETUNED, METRICS, PAPER_NETWORKS, STAND_INS, STRONGER, ParameterError

if TYPE_CHECKING:
    from wdat_core import Scores

HOW = {"whole": "whole network", "last_layer": "last layer"}
# Section 7 says which setting Table 5 reports.
PAPER_BEST = dict.fromkeys(list(PAPER_NETWORKS)[:3], ("whole", 0.01, 1.0))
PAPER_BEST |= dict.fromkeys(list(PAPER_NETWORKS)[3:], ("last_layer", 0.1, 1.0))


def network_table(
    table: int, records: Sequence[Record], recorded: Sequence[Record], parts: Sequence[str] = ("test",)
) -> Any:
    """Table 1 or 2 as Markdown: accuracy in per cent by network, kind of evidence and part of the images."""
    rows = of_networks(table, parts[0], records, recorded)
    for part in parts[1:]:
        rows += [row for row in of_networks(table, part, records, recorded) if row["source"] != "paper"]
    names = list(dict.fromkeys(row["network"] for row in rows))
    rows.sort(key=lambda row: names.index(row["network"]))  # the rows of a network stand together
    measured = {row["network"] for row in rows if row["source"] != "paper"}
    labels = METRICS | {"budget": "W-PGD-budget"}
    lines = []
    for row in rows:
        images = row["images"] or ("10,000 test images, CIFAR-10" if table == 1 else "not stated")
        values = ["–" if cell is None else cell.text() for cell in row["cells"].values()]
        if table == 2:
            values.append("–" if row["upsilon"] is None else f"{row['upsilon']:.1f}")
        lines.append([short_name(row["network"]), row["source"], images, *values])
        if row["source"] == "paper" and row["network"] not in measured:
            lines.append(["", "recorded here", "–", *("–" for _ in values)])
    columns = ["network", "evidence", "images", *(labels[m] for m in rows[0]["cells"]), *(["Υ"] if table == 2 else [])]
    return markdown(columns, lines)


def best_table(records: Sequence[Record], recorded: Sequence[Record]) -> Any:
    """Table 5 as Markdown: for each network the best setting, its accuracies, and the change against the baseline."""
    lines = []
    for name in PAPER_NETWORKS:
        cells = []
        for metric in METRICS:
            value, base = paper_value(5, name, metric), paper_value(1, name, metric)
            cells.append("–" if value is None or base is None else f"{value:.2f} ({value - base:+z.2f})")
        lines.append([short_name(name), "paper", _setting(*PAPER_BEST[name]), *cells])
    for source, those in (("recorded here", recorded), ("this run", records)):
        for study in studies(those):
            best = best_setting(study)
            config, data, name = best[0]["config"], best[0]["data"], best[0]["network"]["name"]
            size = f"{data['train']:,} training images, {config['epochs']} epochs, {_seeds(best)}{unusual(best[0])}"
            n = len(settings_of(study))
            choice = f"best of {n}" if n > 1 else "the only one"
            cells = [f"{accuracy(best, 'after', m).value:.2f} ({change(best, m).text(signed=True)})" for m in METRICS]
            setting = f"{_setting(config['perturb'], config['tau'], config['eta'])} ({choice})"
            lines.append([short_name(name), f"{source}: {size}", setting, *cells])
    return markdown(["network", "evidence", "best setting", *METRICS.values()], lines)


def markdown(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> Any:
    """A table of Markdown."""
    from IPython.display import Markdown

    rows = [columns, ["---"] * len(columns), *lines]
    return Markdown("\n".join("| " + " | ".join(row) + " |" for row in rows))


def grid_table(table: int | None, records: Sequence[Record], recorded: Sequence[Record]) -> Any:
    """A fine-tuning table as Markdown: accuracy in per cent, in brackets the change against the baseline.

    Args:
        table: of the paper; None leaves the paper out.
    """
    grid, lines = list(columns_of(records or recorded)), []
    for row in table_rows(table, records, recorded):
        cells = [
            METRICS[row["metric"]],
            f"{row['source']}: {short_name(row['network'])}",
            "–" if row["before"] is None else row["before"].text(),
        ]
        for cell in row["cells"].values():
            cells.append("–" if cell is None else f"{cell[0].value:.2f} ({cell[1].text(signed=True)})")
        lines.append(cells)
    columns = ["Accuracy, %", "evidence", "baseline", *(f"τ = {tau:g}, η = {eta:g}" for tau, eta in grid)]
    return markdown(columns, lines)


def _setting(perturb: str, tau: float, eta: float) -> str:
    return f"{HOW[perturb]}, τ = {tau:g}, η = {eta:g}"


def _seeds(records: Sequence[Record]) -> str:
    seeds = sorted({record["config"]["seed"] for record in records})
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"


def short_name(network: str) -> str:
    """The paper's own words for one of its networks, the name of any other."""
    return PAPER_NETWORKS[network]["paper"] if network in PAPER_NETWORKS else network


def compare(before: Scores, after: Scores) -> Any:
    """Two networks on the same images, as Markdown: accuracy in per cent, and the change, each with its 95 % interval.

    Needs no record: it is for networks of one's own. The interval of a change is that of the paired differences.
    """
    n = {len(scores.correct[m]) for scores in (before, after) for m in METRICS}
    if len(n) > 1:
        raise ParameterError(f"scores of {' and '.join(map(str, sorted(n)))} images cannot be paired")
    correct = {when: {m: pack(s.correct[m]) for m in METRICS} for when, s in (("before", before), ("after", after))}
    record = {"correct": correct, "data": {"test": n.pop()}}
    lines = []
    for m, label in METRICS.items():
        cells = [accuracy([record], when, m).text() for when in ("before", "after")]
        lines.append([label, *cells, change([record], m).text(signed=True)])
    return markdown(["Accuracy, %", "before", "after", "change"], lines)


def describe(records: Sequence[Record], title: str) -> Any:
    """What was run, in one paragraph of Markdown: network, images, training, device, time, versions, code."""
    from IPython.display import Markdown

    if not records:
        return Markdown(f"**{title}.** Nothing is recorded for these parameters yet.")
    r, config, data = records[0], records[0]["config"], records[0]["data"]
    # Measuring curves takes time of its own.
    seconds = [x["seconds"] for x in records if "start" not in x["history"]] or [x["seconds"] for x in records]
    columns = columns_of(records)
    column = "" if len(columns) > 1 else f" τ = {config['tau']:g}, η = {config['eta']:g},"
    devices, cores = ({x[key] for x in records} for key in ("device", "core"))
    stand_in = r["network"]["name"] in STAND_INS
    epochs = "epoch" if config["epochs"] == 1 else "epochs"
    others = "".join(f", `{k}={config[k]}`" for k, usual in LATER.items() if config.get(k, usual) != usual)
    return Markdown(
        f"**{title}.** Network `{r['network']['name']}` ({r['network']['source']}"
        f"{'; a stand-in, none of the paper’s networks' if stand_in else ''}), {data['source']}: {data['train']:,} for"
        f" training, {data['val']:,} for validation, {data['test']:,} for test. {config['epochs']} {epochs} at"
        f" batch size {config['batch_size']},{column} `perturb={config['perturb']}`,"
        f" `consistency={config['consistency']}`{others},"
        f" β = {config['beta']:g}, δ = {255 * config['threat']['delta']:.4g}/255, {config['steps']} steps,"
        f" {_seeds(records)}. On {' and '.join(sorted(devices))}:"
        f" {sum(s['finetune'] for s in seconds) / len(seconds):.0f} s of fine-tuning and"
        f" {sum(s['evaluate'] for s in seconds) / len(seconds):.0f} s of evaluation a column, in the mean;"
        f" {seconds[0]['baseline']:.0f} s for the baseline. torch {r['versions']['torch']}, Python"
        f" {r['versions']['python']}, core {', '.join(sorted(core[:8] for core in cores))}."
    )


def verdicts(table: int, recorded: Sequence[Record]) -> Any:
    """What the recorded runs say about each column of the paper, by rule, as Markdown.

    A change counts as "up" or "down" where its 95 % interval and every seed are on that side of 0 (the rule of the
    claims), else as "not visible".
    """
    from IPython.display import Markdown

    if not recorded:
        return Markdown("No verdict: nothing is recorded for these parameters yet.")
    rows = {(r["metric"], r["source"]): r["cells"] for r in table_rows(table, [], recorded)}
    lines = []
    for column, records in columns_of(recorded).items():
        for metric in ("w_2", "w_inf"):
            paper, here = rows[metric, "paper"][column], change(records, metric)
            spread = [change([r], metric).value for r in records]
            seeds = "1" if len(spread) == 1 else f"{len(spread)}: {span(spread)}"
            visible = abs(here.value) > (here.half or 0) and (min(spread) > 0 or max(spread) < 0)
            cells = [f"τ = {column[0]:g}, η = {column[1]:g}", METRICS[metric]]
            cells += [paper[1].text(signed=True) if paper else "–", here.text(signed=True), seeds]
            lines.append([*cells, ("up" if here.value > 0 else "down") if visible else "not visible"])
    return markdown(["column", "accuracy", "paper", "recorded here", "seeds", "verdict"], lines)


def estimates_table(records: Sequence[Record], recorded: Sequence[Record]) -> Any:
    """Figure 7.1 in numbers: Upsilon of the training set, and how far its estimates from samples are off."""
    from statistics import median

    lines = []
    for source, those in (("recorded here", recorded), ("this run", records)):
        for r in those:
            errors = relative_errors(r)
            sample = f"{r['config']['samples']} samples of {100 * r['config']['fraction']:g} %"
            images = f"{r['data']['train']:,}, {r['data']['source']}{unusual(r)}"
            cells = [short_name(r["network"]["name"]), source, images, sample]
            cells += [f"{r['reference']:.2f}", f"{min(r['estimates']):.2f} to {max(r['estimates']):.2f}"]
            lines.append([*cells, f"{100 * median(errors):.0f} %", f"{100 * max(errors):.0f} %"])
    columns = ["network", "evidence", "training images", "estimates", "Υ of all", "Υ of the samples", "median error"]
    return markdown([*columns, "greatest"], lines)


def stand_ins_table(recorded: Sequence[Record]) -> Any:
    """The networks that this project pre-trained: size, recipe, and accuracy in per cent on the test images."""
    from companion.architectures import new_stand_in

    lines = []
    for r in recorded:
        name, config = r["network"]["name"], r["config"]
        size = sum(p.numel() for p in new_stand_in(name).parameters())
        method = {"trades": f"TRADES, β = {config['beta']:g}", "pgd": "PGD"}[config.get("method", "trades")]
        recipe = f"{method}, {config['epochs']} epochs, {config['steps']} steps, batch {config['batch_size']}"
        recipe += f", averaging {config['average']:g}" if config["average"] else ", no averaging"
        recipe += f"; {r['seconds']['pretrain'] / 60:.0f} min on {r['device']}, {config['precision']}"
        network = f"{STAND_INS[name][0]}{STAND_INS[name][1]}, {size:,} parameters"
        lines.append([f"`{name}`", network, recipe, *(accuracy([r], "after", m).text() for m in METRICS)])
    return markdown(["name", "network", "pre-training", *METRICS.values()], lines)


def stronger_table(records: Sequence[Record], recorded: Sequence[Record]) -> Any:
    """Accuracy in per cent under every attack of the page: each network, beside it what was fine-tuned from it.

    Of a fine-tuned network also the change, with the interval of the paired differences on the same test images.
    """
    from IPython.display import Markdown

    parts = []
    for source, those in (("recorded here", recorded), ("this run", records)):
        given = [r for r in those if FINETUNED not in r["network"]["name"]]
        for before in given:
            name = before["network"]["name"]
            tuned = [r for r in those if r["network"]["name"] == name + FINETUNED and _same_test(r, before)]
            tuned.sort(key=lambda r: r["network"]["source"], reverse=True)  # the whole network before the last layer
            n = before["data"]["test"]
            parts.append(f"**{short_name(name)}**, {source}: {n:,} test images, {before['data']['source']}")
            heads, lines = ["attack", "as given"], []
            for i, after in enumerate(tuned, 1):
                parts.append(f"fine-tuned {i}: {after['network']['source']}")
                heads += [f"fine-tuned {i}", "change"]
            for label, bits_of in _attacks(before).items():
                cells = [label, estimate_of([bits_of(before)]).text()]
                for after in tuned:
                    difference = bits_of(after) - bits_of(before)
                    cells += [estimate_of([bits_of(after)]).text(), estimate_of([difference]).text(signed=True)]
                lines.append(cells)
            parts.append(markdown(heads, lines).data)
    return Markdown("\n\n".join(parts) or "Nothing is recorded yet.")


def _same_test(one: Record, other: Record) -> bool:
    return one["data"] == other["data"] and one["config"] == other["config"]


def _attacks(record: Record) -> dict[str, Callable[[Record], Any]]:
    """The attacks of a record of kind "stronger" in words, and of each which images it leaves right.

    Last of each kind stands the one that leaves fewest, for each network its own; of all the test images.
    """
    found: dict[str, Callable[[Record], Any]] = {}
    for p, kind in ((2, "W₂"), (math.inf, "W∞")):
        names = [name for name, attack in STRONGER.items() if attack.p == p]
        words = (STRONGER[name].words(record["config"]["steps"]) for name in names)
        found |= dict(zip(words, map(_left_by, names), strict=True))
        found[f"{kind}, the strongest of these"] = functools.partial(_fewest_left, names=names)
    if few := record["data"].get("autoattack"):
        found[f"W∞, AutoAttack, the first {few:,} images"] = _left_by("autoattack")
    return found


def _left_by(name: str) -> Callable[[Record], Any]:
    return functools.partial(bits, when=name, metric="accuracy")


def _fewest_left(record: Record, names: Sequence[str]) -> Any:
    return min((_left_by(name)(record) for name in names), key=sum)


def along_table(what: str, recorded: Sequence[Record]) -> Any:
    """Figure 7.2, 7.3 or 7.4 in numbers: by epoch the mean over seeds, and their spread."""
    if not recorded:
        return markdown(["epoch", *ALONG[what].values()], [["nothing is recorded for these parameters", "–", "–"]])
    columns, lines = ALONG[what], []
    for epoch, rows in enumerate(zip(*map(along, recorded), strict=True)):
        cells = [str(epoch) if epoch else "0, before fine-tuning"]
        for key in columns:
            values = [(1 if what == "upsilon" else 100) * row[key] for row in rows]
            spread = f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else ""
            cells.append(f"{sum(values) / len(values):.2f}{spread}")
        lines.append(cells)
    return markdown(["epoch", *columns.values()], lines)


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


def made_here(command: str) -> Any:
    """The last line of a page that draws on no record: what made the numbers on it."""
    import torch
    from IPython.display import HTML

    made = made_by(torch.device("cpu"), command)
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    line = f"Made by {command} on {made['device']}, {made['created'][:10]}: code {made['core'][:8]}, {versions}."
    return HTML(f'<p class="provenance">{html.escape(line)} Nothing on this page is a record.</p>')
