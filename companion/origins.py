"""Where the numbers of a page come from: what was run, and which records and which code made it."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any

from companion import frontiers
from companion.bases import Record
from companion.evidence import columns_of, has_curves, is_current
from companion.kinds import FinetuneRecord
from companion.machine import made_on
from companion.records import LATER, record_name
from companion.settings import STAND_INS
from companion.words import NOTHING, column_words, listed, plural, seeds_words


def describe(records: Sequence[FinetuneRecord], title: str) -> Any:
    """What was run, in one paragraph of Markdown: network, images, training, device, time, versions, code."""
    from IPython.display import Markdown

    if not records:
        return Markdown(f"**{title}.** Nothing is recorded for these parameters yet.")
    r, config, data = records[0], records[0].config, records[0].data
    # Measuring curves takes time of its own.
    seconds = [x.seconds for x in records if not has_curves(x)] or [x.seconds for x in records]
    columns = columns_of(records)
    column = "" if len(columns) > 1 else f" {column_words(config.tau, config.eta)},"
    devices, cores = {x.device for x in records}, {x.core for x in records}
    searches = [str(steps) for steps in sorted({x.boundary.steps for x in records if x.boundary})]
    search = f" {listed(searches)} gradients an image for the worst case." if searches else ""
    stand_in, norm = r.network.name in STAND_INS, "" if config.threat.r == math.inf else f" in l_{config.threat.r:g}"
    others = "".join(f", `{k}={getattr(config, k)}`" for k, usual in LATER.items() if getattr(config, k) != usual)
    return Markdown(
        f"**{title}.** Network `{r.network.name}` ({r.network.source}"
        f"{'; a stand-in, none of the paper’s networks' if stand_in else ''}), {data.source}: {data.train:,} for"
        f" training, {data.val:,} for validation, {data.test:,} for test. {plural(config.epochs, 'epoch')} at"
        f" batch size {config.batch_size},{column} `perturb={config.perturb}`,"
        f" `consistency={config.consistency}`{others},"
        f" β = {config.beta:g}, δ = {255 * config.threat.delta:.4g}/255{norm}, {config.steps} steps,"
        f" {seeds_words(records)}.{search} On {' and '.join(sorted(devices))}:"
        f" {sum(s['finetune'] for s in seconds) / len(seconds):.0f} s of fine-tuning and"
        f" {sum(s['evaluate'] for s in seconds) / len(seconds):.0f} s of evaluation a column on average;"
        f" {seconds[0]['baseline']:.0f} s for the baseline. torch {r.versions['torch']}, Python"
        f" {r.versions['python']}, core {', '.join(sorted(core[:8] for core in cores))}."
    )


def trained(records: Sequence[Record], studies: Sequence[frontiers.Study] | None = None) -> Any:
    """How each study was run, by default those of "Training for the worst case", in one line of Markdown."""
    from IPython.display import Markdown

    lines, every = [], frontiers.studies(records) if studies is None else studies
    for study in every:
        data, config = study[0].data, study[0].config
        devices = sorted({record.device for record in study})
        versions = sorted({f"torch {r.versions['torch']}, Python {r.versions['python']}" for r in study})
        known = [
            f"{words} images" for part, words in frontiers.PARTS.items() if frontiers.as_it_is(study, part, records)
        ]
        recipe, start = "", f" The frontier includes the network as it is on {listed(known) or 'no images'}."
        if frontiers.is_from_scratch(study[0]):
            recipe = f" schedule {config.schedule}, momentum {config.momentum:g}, weight decay {config.weight_decay:g},"
            recipe, start = f"{recipe} Υ from the {config.upsilon_from},", ""
        lines.append(
            f"- {frontiers.label(study, every, code=True)}: {data.train:,} training, {data.val:,} validation and"
            f" {data.test:,} test images of {data.source}; {plural(config.epochs, 'epoch')} at batch size"
            f" {config.batch_size}, τ = {config.tau:g}, η = {config.eta:g},{recipe} {config.steps} steps of an attack,"
            f" gradient clipped at norm {config.clip:g}, {seeds_words(study)}; {config.found_steps} gradients an image"
            f" for the distances.{start} On {listed(devices)}; {listed(versions)}."
        )
    return Markdown("\n".join(lines) or NOTHING)


def drawn_from(records: Sequence[Record]) -> Any:
    """The last line of a page: the records that it draws on, what made them, and which are older than the code."""
    from IPython.display import HTML

    if not records:
        return HTML('<p class="provenance">Drawn from no record: there is none yet.</p>')
    columns = ("record", "command", "code", "versions", "device", "finished", "seconds")
    old = {record.core for record in records if not is_current(record)}
    rows = []
    for record in records:
        versions = ", ".join(f"{name} {version}" for name, version in record.versions.items())
        code = record.core[:8] + (" †" if record.core in old else "")
        finished, seconds = record.created[:16].replace("T", " "), sum(record.seconds.values())
        cells = (f"results/{record_name(record)}", record.command, code, versions, record.device, finished)
        rows.append("".join(f"<td>{html.escape(cell)}</td>" for cell in (*cells, f"{seconds:.0f}")))
    some = plural(len(records), "record")
    first, last = (f(record.created[:10] for record in records) for f in (min, max))
    when = first if first == last else f"{first} to {last}"
    earlier = "† Made by an earlier version of wdat_core.py, which is not known to give the same numbers as this one."
    mark = f" {earlier}" if old else ""
    return HTML(
        f'<details class="provenance"><summary>Drawn from {some} of {when}, code'
        f" {', '.join(sorted({r.core[:8] + (' †' if r.core in old else '') for r in records}))}.{mark}</summary>"
        f"<table><thead><tr>{''.join(f'<th>{column}</th>' for column in columns)}</tr></thead>"
        f"<tbody>{''.join(f'<tr>{row}</tr>' for row in rows)}</tbody></table></details>"
    )


def made_here(command: str) -> Any:
    """The last line of a page that draws on no record: what made the numbers on it."""
    import torch
    from IPython.display import HTML

    made = made_on(torch.device("cpu"), command)
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    line = f"Made by {command} on {made['device']}, {made['created'][:10]}: code {made['core'][:8]}, {versions}."
    return HTML(f'<p class="provenance">{html.escape(line)} Nothing on this page is a record.</p>')
