"""The page "What it costs": the counts of cost.py beside the speeds that records have, and the reader's own.

No speed is on it that was not measured here or given by the reader."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from companion import cost
from companion.bases import Record
from companion.cost import Passes, Reader, total
from companion.evidence import deviations, grids, has_curves, is_full
from companion.kinds import BenchmarkRecord, EvaluateRecord, FinetuneRecord
from companion.settings import PAPER_NETWORKS
from companion.words import HOW, NOTHING, markdown, name_of, plural

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ATTACK, BARE = "W_2 attack, CE", "bare passes"  # a row of a benchmark: under CE no image is skipped
NETWORKS, COLUMNS = len(PAPER_NETWORKS), 8  # of the paper's grid


@dataclass(frozen=True)
class Source:
    """How many passes a second a network was measured to take on a device."""

    name: str  # of the network, as it is shown
    device: str
    rate: float
    how: str
    gpu: bool = False


@dataclass(frozen=True)
class Run:
    """A row of the table: how many passes, and in how many steps processes share something."""

    name: str
    passes: Passes
    columns: dict[str, int] = field(default_factory=dict)  # how many, by what is trained
    images: int = 0  # of an evaluation

    @property
    def sgd_steps(self) -> int:
        return cost.sgd_steps(sum(self.columns.values()))

    def step(self, parameters: int) -> int:
        """Bytes that are added up at a step of SGD, at most; without one, at a step of an attack."""
        bytes_of = [cost.step_bytes(_trained(how, parameters)) for how in self.columns]
        return max(bytes_of, default=cost.STEP_MESSAGES * cost.MESSAGE_BYTES)

    def shared(self, parameters: int) -> int:
        """The same of the whole run; the small messages of a column's evaluations are left out."""
        each = [cost.sgd_steps(n) * cost.step_bytes(_trained(how, parameters)) for how, n in self.columns.items()]
        return sum(each) if each else cost.evaluation_bytes(self.images)


def _trained(how: str, parameters: int) -> int:
    """How many of a network's parameters have gradients that are added up."""
    return min(parameters, cost.LAST_LAYER) if how == "last_layer" else parameters


def runs() -> list[Run]:
    """What the page is about; the last two are not of the paper."""
    test, found = cost.PAPER["test"], cost.PAPER["found_steps"]
    grid = dict.fromkeys(HOW, NETWORKS * COLUMNS // len(HOW))
    few, every = cost.IMAGENET_FEW, cost.IMAGENET
    return [
        *(Run(f"a column, {words}", total(cost.column(how)), {how: 1}) for how, words in HOW.items()),
        Run("a network before its columns", cost.before(test, found_steps=found), images=test),
        Run(f"the paper's grid: {NETWORKS} networks, {COLUMNS} columns each", cost.grid(), grid),
        Run(f"ImageNet evaluation, {every:,} images", cost.imagenet(), images=every),
        Run(f"ImageNet evaluation, {few:,} images as in RobustBench", cost.imagenet(few), images=few),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# What was measured
# ---------------------------------------------------------------------------------------------------------------------


def sources(records: Sequence[Record]) -> list[Source]:
    """Every measured speed: GPUs first, then whole columns, then the attacks of benchmarks on a CPU."""
    benchmarks = _newest([r for r in records if isinstance(r, BenchmarkRecord) and not r.is_quick])
    cards = [source for record in benchmarks for source in _throughput(record)]
    cards.sort(key=lambda s: ("WRN-34-10" not in s.name, "WRN" not in s.name, -s.rate))
    columns = sorted(_columns(records), key=lambda source: not source.gpu)
    return [*cards, *columns, *(source for record in benchmarks for source in _attacks(record))]


def _newest(records: Sequence[BenchmarkRecord]) -> list[BenchmarkRecord]:
    """The newest of each device."""
    return list({record.device: record for record in sorted(records, key=lambda r: r.created)}.values())


def _throughput(record: BenchmarkRecord) -> list[Source]:
    each = cost.attack(1).whole
    how = f"attack of {cost.STEPS} steps under CE, `{record.command}`"
    return [
        Source(name, record.device, figures["images_per_second"] * each, how, gpu=True)
        for name, figures in record.throughput.items()
        if "images_per_second" in figures
    ]


def _attacks(record: BenchmarkRecord) -> list[Source]:
    found = {}
    for row in record.rows if not record.throughput else []:  # a card's attacks are in its throughput
        if (row["name"], row["baseline"]) == (ATTACK, BARE) and row["seconds"] and row["images"]:
            rate = cost.attack(row["images"]).whole / row["seconds"]
            how = f"attack of {cost.STEPS} steps under CE on {row['images']} images, `{record.command}`"
            name = row["network"] if " " in row["network"] else f"`{row['network']}`"
            found[name] = Source(name, record.device, rate, how)
    return list(found.values())


def _columns(records: Sequence[Record]) -> list[Source]:
    """Of each network whose columns are recorded by the whole protocol; passes that ReDLR skips count as made."""
    found = []
    for those in _full(records, "whole"):
        seconds = [record.seconds["finetune"] for record in those]
        rate = _passes(those[0]).whole / statistics.median(seconds)
        spread = f"{min(seconds):,.0f} to {max(seconds):,.0f} s" if len(seconds) > 1 else f"{seconds[0]:,.0f} s"
        how = f"fine-tuning of {plural(len(those), 'column')}, {spread}; passes that ReDLR skips are counted as made"
        gpu = " thread" not in those[0].device  # of a processor the number of threads is said
        found.append(Source(name_of(those[0]), those[0].device, rate, how, gpu))
    return found


def _full(records: Sequence[Record], perturb: str) -> list[list[FinetuneRecord]]:
    """The columns of each network and device by the whole protocol; those with curves took time for these."""
    every = [r for r in records if isinstance(r, FinetuneRecord) and not has_curves(r)]
    studies = [study for study in grids(perturb, every) if is_full(study[0])]
    return [
        [r for r in study if r.device == device]
        for study in studies
        for device in dict.fromkeys(r.device for r in study)
    ]


def _passes(record: FinetuneRecord) -> Passes:
    """Of the training of a record, if none were skipped."""
    data, config = record.data, record.config
    sizes = (data.train or 0, data.val or 0, config.epochs, config.batch_size, config.steps)
    return total(cost.training(config.perturb, *sizes))


def checks(records: Sequence[Record]) -> list[tuple[Source, str, float, float]]:
    """What the formula says beside what records say, in seconds: source of the speed, of what, formula, record."""
    found: list[tuple[Source, str, float, float]] = []
    for source in sources(records):
        if not (source.gpu and source.how.startswith("attack")):
            found += [(source, what, passes.whole / source.rate, s) for what, passes, s in _recorded(source, records)]
    for record in _newest([r for r in records if isinstance(r, BenchmarkRecord) and not r.is_quick]):
        parts = cost.column()
        passes = total({name: parts[name] for name in ("estimate of Υ", "attack", "update")}).whole
        for source in _throughput(record):
            if minutes := record.throughput[source.name].get("projected_minutes"):
                found.append((source, "training, from timed steps of SGD", passes / source.rate, 60 * minutes))
    return found


def _recorded(source: Source, records: Sequence[Record]) -> list[tuple[str, Passes, float]]:
    """Runs of the network of a speed on its device, other than those that the speed is from."""
    found = []
    like = [r for r in records if isinstance(r, FinetuneRecord | EvaluateRecord) and r.device == source.device]
    like = [r for r in like if name_of(r) == source.name]
    tuned = [r for r in like if isinstance(r, FinetuneRecord) and not has_curves(r)]
    columns = "fine-tuning" in source.how
    for perturb in ("last_layer",) if columns else ("whole",):
        for study in grids(perturb, tuned)[:1]:  # of the longest training
            seconds = statistics.median(r.seconds["finetune"] for r in study)
            found.append((f"fine-tuning, {HOW[perturb]}, median of {len(study)}", _passes(study[0]), seconds))
    after = [r for r in tuned if is_full(r) and not r.boundary] if columns else []
    if after:
        seconds = statistics.median(r.seconds["evaluate"] for r in after)
        passes = total(cost.evaluation(cost.PAPER["test"]))
        found.append((f"W∞ and W₂ attack after it, median of {len(after)}", passes, seconds))
    for r in like:
        if isinstance(r, EvaluateRecord) and _with_worst_case(r):
            assert r.boundary is not None
            n = r.data.test or 0
            passes = cost.before(n, r.config.steps, r.boundary.steps, round(r.metrics["test"]["clean"] * n))
            found.append(("measurement before, with the worst case", passes, r.seconds["evaluate"]))
    return found


def used(records: Sequence[Record]) -> list[Record]:
    """The records that the page draws on."""
    measured = {source.name for source in sources(records)}
    benchmarks = _newest([r for r in records if isinstance(r, BenchmarkRecord) and not r.is_quick])
    of_networks = [r for r in records if isinstance(r, FinetuneRecord | EvaluateRecord) and name_of(r) in measured]
    tuned = [r for r in of_networks if isinstance(r, FinetuneRecord) and not has_curves(r) and not deviations(r)]
    whole = [r for r in tuned if r.data.train == cost.PAPER["train"]]
    return [*benchmarks, *whole, *(r for r in of_networks if isinstance(r, EvaluateRecord) and _with_worst_case(r))]


def _with_worst_case(record: EvaluateRecord) -> bool:
    return is_full(record) and record.boundary is not None and "test" in record.metrics


# ---------------------------------------------------------------------------------------------------------------------
# What the page shows
# ---------------------------------------------------------------------------------------------------------------------


def cost_answer(records: Sequence[Record]) -> str:
    """The page's first sentence, for 1, 8 and 64 devices, and whether a GPU was measured."""
    grid, measured = cost.grid(), sources(records)
    what = f"The paper's grid, {NETWORKS} networks with {COLUMNS} columns each, is at most {many(grid.whole)} passes"
    if not measured:
        return f"{what}; how long a pass takes was not measured: {NOTHING[:1].lower()}{NOTHING[1:]}"
    one = measured[0]
    times = [duration(cost.hours(grid, one.rate, devices)) for devices in (1, 8, 64)]
    text = (
        f"{what}. At the {one.rate:,.0f} passes a second measured with {one.name} on {one.device}, it would take"
        f" {times[0]} on one such device, {times[1]} on 8 and {times[2]} on 64, if the work divides perfectly."
    )
    if one.gpu:
        return text
    slow = min(measured, key=lambda source: source.rate)
    hours = duration(cost.hours(grid, slow.rate))
    return (
        f"{text} That is a small network: at the speed of {slow.name}, the slowest measured, one device would take"
        f" {hours}. No GPU was measured, and the paper's networks are larger still."
    )


def reader_words(reader: Reader, records: Sequence[Record]) -> Any:
    """Whose speed the hours of the table are of, and what they leave out."""
    from IPython.display import Markdown

    parameters = f"{_parameters(reader):,} parameters" + (" (WRN-34-10)" if reader.parameters is None else "")
    source = _source(reader, records)
    whose = "No times: nothing was measured, and `images_per_second` is not given."
    if reader.images_per_second is not None:
        whose = f"Times at your {reader.images_per_second:,g} images a second on one device."
    elif source:
        whose = (
            f"Times at the {source.rate:,.0f} passes a second of {source.name} on {source.device}. Give yours with"
            " `-p images_per_second`; those of ImageNet are shown then."
        )
    if reader.bandwidth is None:
        sends = "Communication is not in the times: `bandwidth` is not given."
    else:
        sends = f"Communication is in the times, at your {size(reader.bandwidth)} a second."
    return Markdown(f"{whose} {sends} Bytes are those of {parameters}.")


def _parameters(reader: Reader) -> int:
    return reader.parameters or cost.PARAMETERS_OF["WRN-34-10"]


def _source(reader: Reader, records: Sequence[Record]) -> Source | None:
    if reader.images_per_second is not None:
        return Source("your network", "your device", reader.images_per_second, "given")
    return next(iter(sources(records)), None)


def cost_table(reader: Reader, records: Sequence[Record]) -> Any:
    """Passes, steps, bytes and hours of each of `runs`, as Markdown."""
    source, parameters = _source(reader, records), _parameters(reader)
    columns = ["run", "passes, at most", "steps", "added up at a step, at most", "added up in all"]
    columns += [f"on {plural(devices, 'device')}" for devices in reader.counts]
    lines = []
    for run in runs():
        steps = f"{run.sgd_steps:,} of SGD" if run.sgd_steps else f"{2 * cost.STEPS} of attacks"
        shared, bandwidth = run.shared(parameters), reader.bandwidth or math.inf
        cells = [run.name, many(run.passes.whole), steps, size(run.step(parameters)), size(shared)]
        measured = None if run.images and "ImageNet" in run.name and reader.images_per_second is None else source
        for devices in reader.counts:
            rate = measured.rate if measured else math.nan
            cells.append(duration(cost.hours(run.passes, rate, devices, shared, bandwidth)))
        lines.append(cells)
    return markdown(columns, lines)


def parts_table() -> Any:
    """The passes of a column, part by part and kind by kind, as Markdown."""
    lines = []
    for how, words in HOW.items():
        parts = cost.column(how)
        for name, p in (parts | {"together": total(parts)}).items():
            share = f"{100 * p.whole / total(parts).whole:.1f} %"
            kinds = (f"{n:,}" if n else "–" for n in (p.forward, p.gradient, p.update))
            lines.append([words, name, *kinds, many(p.whole), share])
    return markdown(
        ["column", "part", "forward alone", "to the input", "to the weights", "passes", "of the column"], lines
    )


def communication_table(reader: Reader) -> Any:
    """What each device has to send at a step of SGD, by how many devices there are, as Markdown."""
    from IPython.display import Markdown

    added = cost.step_bytes(_parameters(reader))
    lines = [[f"{n:,}", size(cost.sent(added, n)), size(cost.sent(added, n) * cost.sgd_steps())] for n in reader.counts]
    table = markdown(["devices", "each sends at a step of SGD, whole network", "in a column"], lines).data
    return Markdown(
        f"{table}\n\nA step of SGD adds up the gradients, 4 bytes for each of {_parameters(reader):,} parameters, and"
        f" {cost.messages()} small messages of at most {cost.MESSAGE_BYTES} bytes (one has 4 bytes for each tensor of"
        f" parameters). Running statistics of BatchNorm add 8 bytes each. A step of the attack alone has"
        f" {plural(cost.STEP_MESSAGES, 'small one')}. Where the last layer alone is trained, only its gradients are"
        f" added up: those of {cost.LAST_LAYER:,} parameters in the paper's networks."
    )


def sources_table(reader: Reader, records: Sequence[Record]) -> Any:
    """Every measured speed, and what the paper's grid would take at it, as Markdown."""
    columns = ["network", "device", "passes a second", "a column"]
    columns += [f"the grid on {devices}" for devices in reader.counts]
    whole, grid, lines = total(cost.column()), cost.grid(), []
    for s in sources(records):
        times = [duration(cost.hours(grid, s.rate, devices)) for devices in reader.counts]
        lines.append([s.name, s.device, f"{s.rate:,.0f}", duration(cost.hours(whole, s.rate)), *times, s.how])
    return markdown([*columns, "measured in"], lines or [[NOTHING, *["–"] * len(columns)]])


def checks_table(records: Sequence[Record]) -> Any:
    """The formula beside records, as Markdown."""
    lines = []
    for source, what, formula, recorded in checks(records):
        kind = "its columns" if "fine-tuning" in source.how else "its attack in the benchmark"
        ratio = f"{recorded / formula:.2f}"
        lines.append([source.name, kind, what, f"{formula:,.0f} s", f"{recorded:,.0f} s", ratio])
    columns = ["network", "speed from", "predicted is", "formula", "record", "record / formula"]
    return markdown(columns, lines or [[NOTHING, *["–"] * (len(columns) - 1)]])


def plot_parts() -> Figure:
    """Where the passes go: a bar for each kind of column and for an ImageNet evaluation, stacked by part."""
    import matplotlib.pyplot as plt
    import seaborn as sns

    sns.set_theme(style="white", context="notebook", font_scale=0.85)
    images = cost.evaluation(cost.IMAGENET, found_steps=cost.IMAGENET_FOUND, classes=1000)
    bars = {f"a column,\n{words}": cost.column(how) for how, words in HOW.items()}
    bars |= {f"ImageNet evaluation,\n{cost.IMAGENET:,} images": images}
    figure, axis = plt.subplots(figsize=(6.2, 3.6), layout="constrained")
    left = dict.fromkeys(bars, 0.0)
    for part, (colour, hatch) in zip(cost.column(), STYLES, strict=True):
        values = [parts.get(part, Passes()).whole / 1e6 for parts in bars.values()]
        style: dict[str, Any] = {"color": colour, "hatch": hatch, "edgecolor": "white", "linewidth": 0.8}
        axis.barh(list(bars), values, left=list(left.values()), label=part, height=0.6, **style)
        left = {name: start + value for (name, start), value in zip(left.items(), values, strict=True)}
    axis.invert_yaxis()
    axis.set_xlabel("passes, millions")
    sns.despine(figure)
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    plt.close(figure)
    return figure


# Okabe and Ito's colours of plots.py, and hatches that tell them apart in grey.
STYLES = [
    ("#0072b2", ""),
    ("#4d4d4d", "//"),
    ("#d55e00", ""),
    ("#007a5a", "\\\\"),
    ("#a6467f", ""),
    ("#8a5a00", ".."),
]


def many(n: float) -> str:
    """A large number in words: "30.3 million"."""
    for least, word in ((1e9, "billion"), (1e6, "million")):
        if n >= least:
            return f"{n / least:.3g} {word}"
    return f"{n:,.0f}"


def size(n: float) -> str:
    """Bytes in the unit in which they are easiest to read."""
    for least, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if n >= least:
            return f"{n / least:,.3g} {unit}" if n < 1e15 else f"{n / least:,.0f} {unit}"
    return f"{n:,.0f} B"


def duration(hours: float) -> str:
    """Hours in the unit in which they are easiest to read; a dash where they are not known."""
    if math.isnan(hours):
        return "–"
    for least, unit in ((1, "h"), (1 / 60, "min")):
        if hours >= least:
            return f"{hours / least:,.0f} {unit}" if hours >= 100 * least else f"{hours / least:.3g} {unit}"
    return f"{3600 * hours:.2g} s"
