"""Speed, memory, precision and Upsilon's estimates, drawn from the records of benchmarks/."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from companion.bases import Record
from companion.kinds import BenchmarkRecord, PrecisionRecord, UpsilonRecord
from companion.plots import PAPER, RECORDED, THIS_RUN
from companion.records import newest_last
from companion.settings import METRICS
from companion.words import NOTHING, listed, plural

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COUNTED = {"multiple of the baseline": "times their size", "points above the baseline": "points above it"}
SPEED = "times as fast as the baseline"
TIMED = {"time relative to the baseline": "times as long", SPEED: "times as fast"}
SPEEDS = (0.5, 1, 2, 5, 10, 20)  # ticks
UNITS = TIMED | COUNTED
BUDGETS = {"w_2_4": "W₂, δ = 4/255", "w_2_8": "W₂, δ = 8/255", "w_inf_8": "W∞, δ = 8/255"}
AT_MOST = {20: 0.045, 40: 0.010, 100: 0.003}  # of small_trades in W_2 at 8/255, by the gradients for each image
ROUNDING = 1e-9
ESTIMATES = {"sample": "a fresh 10 % (the paper)", "batch": "the latest minibatches"}


def performance_answer(records: Sequence[Record]) -> str:
    """How many of a benchmark's targets are met, in the newest record."""
    benchmarks = newest_last([r for r in records if isinstance(r, BenchmarkRecord) and not r.is_quick])
    if not benchmarks:
        return NOTHING
    rows = [row for row in benchmarks[-1].rows if row["target"] is not None]
    never = [row for row in rows if row["ratio"] is None]
    met, missed, open_ = ([r for r in rows if r["met"] is what and r not in never] for what in (True, False, None))
    text = f"{len(met)} of {plural(len(rows), 'target')} are met on {benchmarks[-1].device}."
    undecided = "Not decided, since the interval has the target inside"
    for words, those in (("Missed", missed), (undecided, open_), ("Not measured", never)):
        names = [f"{symbols(row['name'])} on {row['network']}" for row in those]
        text += f" {words}: {listed(names)}." if those else ""
    return text


def verdict(row: dict[str, Any]) -> str:
    """Whether a row of a benchmark meets its target, or by how much it misses it; empty without a target or a value."""
    if row["target"] is None or row["ratio"] is None:
        return ""
    if row["met"] is None:
        return "not decided, the interval has the target inside"
    return "met" if row["met"] else f"missed by {abs(row['ratio'] - float(row['target'].split()[-1])):.2f}"


def measured(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that can be shown: a ratio of times with its interval, or what is counted."""
    return [row for row in rows if row["ratio"] is not None and (row.get("wall") or row["unit"] in COUNTED)]


def missing(rows: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """What a benchmark could not measure, by reason."""
    found: dict[str, list[str]] = {}
    shown = measured(rows)
    for row in rows:
        if row not in shown:
            reason = row["reason"] or "an earlier version of the benchmark recorded it, without an interval"
            found.setdefault(reason, []).append(f"{row['name']} against {row['baseline']}")
    return {reason: list(dict.fromkeys(names)) for reason, names in found.items()}


def describe_benchmark(record: BenchmarkRecord) -> Any:
    """Where and with what a benchmark ran, in one paragraph of Markdown."""
    from IPython.display import Markdown

    libraries = ", ".join(f"{name} {version}" for name, version in record.versions.items())
    return Markdown(
        f"**{record.device}.** Recorded {record.created[:10]} by `{record.command}` in"
        f" {record.seconds['total'] / 60:.0f} min; at most {record.config.rounds} rounds after a warm-up."
        f"{_of_the_process(record)} {libraries}, core {record.core[:8]}."
    )


def _of_the_process(record: BenchmarkRecord) -> str:
    """How malloc was set, and which share of its time the process spent in the system."""
    setting, user, system = (record.config.model_dump().get("malloc"), *map(record.seconds.get, ("user", "system")))
    share = f" System time: {100 * system / (user + system):.0f} %." if user and system is not None else ""
    return (f" malloc: {setting}." if setting else "") + share


def benchmark_table(record: BenchmarkRecord) -> Any:
    """The ratios of a benchmark as Markdown, a table for each group, and what could not be measured."""
    from IPython.display import Markdown

    groups: dict[str, list[str]] = {}
    for row in measured(record.rows):
        remarks = [f"{row['images']:,} images, batches of {row['batch_size']}"]
        if row["baseline_accuracy"] is not None:
            remarks.append(f"accuracy {100 * row['accuracy']:.1f} % against {100 * row['baseline_accuracy']:.1f} %")
        remarks += [row["note"]] if row["note"] else []
        cells = [symbols(row["name"]), row["network"], symbols(row["baseline"])]
        if row["unit"] in COUNTED:
            cells += [f"**{row['ratio']:.2f}** {UNITS[row['unit']]} (counted)", "–", "–"]
        else:
            cells += [f"**{row['ratio']:.2f}** ({row['low']:.2f} to {row['high']:.2f}) {UNITS[row['unit']]}"]
            cells += ["{:.2f} ({:.2f} to {:.2f})".format(*row["wall"]), str(row["rounds"])]
        cells += [f"{row['target']}: {verdict(row)}" if row["target"] else "–", "; ".join(remarks)]
        groups.setdefault(row["group"], []).append("| " + " | ".join(cells) + " |")
    blocks = []
    for group, lines in groups.items():
        head = f"| {group} | network | against | ratio (95 % interval) | on the wall | rounds | target | remarks |"
        blocks.append("\n".join([head, "|---" * 8 + "|", *lines]))
    for reason, names in missing(record.rows).items():
        blocks.append(f"Not measured: {symbols('; '.join(names))}. Reason: {reason}.")
    return Markdown("\n\n".join(blocks))


def overhead(record: BenchmarkRecord) -> str:
    """One sentence in Markdown: what the attacks and Algorithm 1 take beyond the network's passes."""
    rows = [r for r in measured(record.rows) if r["unit"] == "time relative to the baseline" and r["target"]]
    if not rows:
        return "The overhead is not measured yet with an interval: `python make.py benchmark` measures it."
    parts = [
        f"{symbols(r['name'])} on {r['network']} **{r['ratio']:.2f}** ({r['low']:.2f} to {r['high']:.2f})" for r in rows
    ]
    met = sum(r["met"] is True for r in rows)
    return (
        f"Time relative to bare passes, with a 95 % interval: {'; '.join(parts)}. The target of 1.05 is met by"
        f" {met} of {len(rows)}."
    )


def rest_table(record: BenchmarkRecord) -> Any:
    """What an attack takes beyond its passes, by kind of operation, in per cent of the bare passes, as Markdown."""
    from IPython.display import Markdown

    if not record.rest:
        return Markdown("Where the rest goes is measured on a CPU alone: `python make.py benchmark` does it.")
    lines = []
    for name, shares in record.rest.items():
        each = {**shares, "together": sum(shares.values())}
        lines += ["| " + " | ".join([symbols(name), kind, f"{100 * s:.1f} %"]) + " |" for kind, s in each.items()]
    return Markdown("\n".join(["| attack | operations | beyond the bare passes |", "|---|---|---|", *lines]))


def strength_answer(record: BenchmarkRecord) -> str:
    """Markdown: whether `boundary` is as strong as was asked for, beside FMN, in numbers, and beside AutoAttack."""
    rows = record.worst.get("strength", [])
    parts = [_beside_fmn(rows), _in_numbers(rows), _beside_autoattack(record.rows)]
    if rows and rows[0]["images"] != 1000:
        parts.append(f"The targets are for 1,000 images, and this was measured on {rows[0]['images']:,}.")
    return "\n\n".join(filter(None, parts))


def _left(rows: Sequence[dict[str, Any]], attack: str) -> dict[tuple[str, str, int], float]:
    """The accuracies that an attack leaves, by network, budget and gradients for each image."""
    of_it = [row for row in rows if row["attack"] == attack]
    return {(r["network"], b, k): a for r in of_it for b in BUDGETS for k, a in zip(r["steps"], r[b], strict=True)}


def _beside_fmn(rows: Sequence[dict[str, Any]]) -> str:
    ours, theirs = _left(rows, "boundary"), _left(rows, "adv-lib FMN")
    both = [cell for cell in ours if cell in theirs]
    if not both:
        return "It is not measured beside adv-lib's FMN yet." if rows else ""
    weaker = [
        f"{network}, {BUDGETS[budget]}, {k} gradients ({100 * a:.1f} % against {100 * b:.1f} %)"
        for network, budget, k in both
        if (a := ours[network, budget, k]) > (b := theirs[network, budget, k]) + ROUNDING
    ]
    verdict = f"missed in {len(weaker)}: {'; '.join(weaker)}" if weaker else "met"
    more = f" {len(ours) - len(both)} more were not measured." if len(ours) > len(both) else ""
    return (
        "With as many gradients for each image, `boundary` should never be weaker than adv-lib's FMN. On"
        f" {rows[0]['images']:,} images, in {len(both)} cells of the table below: **{verdict}**.{more}"
    )


def _in_numbers(rows: Sequence[dict[str, Any]]) -> str:
    """Whether little enough is left of `AT_MOST`'s network."""
    left, parts = _left(rows, "boundary"), []
    for k, most in AT_MOST.items():
        if (a := left.get(("small_trades", "w_2_8", k))) is not None:
            met = "met" if a <= most + ROUNDING else "**missed**"
            parts.append(f"{100 * a:.1f} % with {k} gradients (at most {100 * most:.1f} %: {met})")
    return f"Of small_trades it leaves, at {BUDGETS['w_2_8']}: {'; '.join(parts)}." if parts else ""


def _beside_autoattack(rows: Sequence[dict[str, Any]]) -> str:
    shown = [row for row in measured(rows) if row["group"] == "Worst case: beside AutoAttack"]
    if not shown:
        return "It is not measured beside AutoAttack yet: `python make.py benchmark` does it."
    networks: dict[str, list[str]] = {}
    for row in shown:
        if row["unit"] in COUNTED:
            what = "{:.1f} % against {:.1f} %".format(100 * row["accuracy"], 100 * row["baseline_accuracy"])
            what += f", {row['ratio']:+.1f} points"
        else:
            what = f"**{row['ratio']:.1f}** ({row['low']:.1f} to {row['high']:.1f}) times as fast"
        networks.setdefault(row["network"], []).append(f"{what} ({row['target']}: {verdict(row)})")
    about = f"{shown[0]['name']}, beside AutoAttack's standard version, on {shown[0]['images']:,} images"
    lines = [f"- {network}: {'; '.join(parts)}" for network, parts in networks.items()]
    return "\n".join([f"The {about} at {BUDGETS['w_inf_8']}:\n", *lines])


def worst_table(record: BenchmarkRecord) -> Any:
    """What minimum-norm attacks leave of the accuracy, and what a stream of images holds, as Markdown."""
    from IPython.display import Markdown

    rows, stream = record.worst.get("strength", []), record.worst.get("stream", [])
    if not rows:
        return Markdown("The worst case is not measured yet: `python make.py benchmark` measures it.")
    lines = ["| network | attack | " + " | ".join(BUDGETS.values()) + " |", "|---" * (2 + len(BUDGETS)) + "|"]
    for row in rows:
        if row["steps"]:
            points = (
                "; ".join(f"{k}: {100 * a:.1f}" for k, a in zip(row["steps"], row[b], strict=True)) for b in BUDGETS
            )
            lines.append(f"| {row['network']} | {row['attack']} | " + " | ".join(points) + " |")
    lines.append(f"\nAccuracy left in per cent, by the gradients for each image, on {rows[0]['images']:,} images.")
    reasons = {row["reason"]: row["attack"] for row in rows if row["reason"]}
    lines += [f"\nNot measured: {attack}. Reason: {reason}." for reason, attack in reasons.items()]
    lines += [f"\n{stream_words(stream)}"] * bool(stream)
    return Markdown("\n".join(lines))


def stream_words(stream: Sequence[Sequence[int]]) -> str:
    """What a stream of made images holds, of pairs of a number of images and bytes, the fewest images first."""
    (few, least), (many, most) = stream[0], stream[-1]
    return (
        f"A stream of {many:,} made images ({many * 3 * 32 * 32 * 4 / 1e9:.1f} GB) through `boundary(keep=False)`: the"
        f" process holds at most {most / 1e6:.1f} MB more than with the first 2,000, and {least / 1e6:.1f} MB more with"
        f" {few:,} images."
    )


def throughput_table(record: BenchmarkRecord) -> Any:
    """What a GPU attains in absolute numbers, as Markdown."""
    from IPython.display import Markdown

    if not record.throughput:
        return Markdown("Images a second, operations a second and minutes of training are measured on a GPU alone.")
    columns = {
        "images_per_second": "images attacked a second",
        "tflop_per_second": "TFLOP/s",
        "attack_gib": "attack, GiB",
        "iteration_seconds": "iteration of Algorithm 1, s",
        "training_gib": "training, GiB",
        "projected_minutes": "the paper's fine-tuning, minutes (projected)",
    }
    lines = ["| | " + " | ".join(columns.values()) + " |", "|---" * (1 + len(columns)) + "|"]
    for name, figures in record.throughput.items():
        cells = [f"{figures[key]:g}" if key in figures else "–" for key in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return Markdown("\n".join(lines))


def growth_table(record: BenchmarkRecord) -> Any:
    """The points of `plot_growth` as Markdown."""
    from IPython.display import Markdown

    lines = ["| by | seconds | peak memory / images |", "|---|---|---|"]
    for axis in ("images", "steps", "epochs"):
        cells = [
            "; ".join(f"{x:,}: {y:.2f}" for x, y in getattr(record, key).get(axis, [])) for key in ("growth", "memory")
        ]
        lines.append(f"| {axis} | " + " | ".join(cell or "–" for cell in cells) + " |")
    return Markdown("\n".join(lines))


def plot_ratios(record: BenchmarkRecord) -> Figure:
    """The ratios of a benchmark with interval and target: times above, speeds below; at 1 is the baseline."""
    import matplotlib.pyplot as plt
    import seaborn as sns

    sns.set_theme(style="whitegrid", context="notebook")
    panels = {unit: [r for r in measured(record.rows) if r["unit"] == unit] for unit in TIMED}
    styles = {
        True: {"color": RECORDED, "fmt": "o", "label": "target met"},
        False: {"color": THIS_RUN, "fmt": "s", "label": "target missed"},
        None: {"color": PAPER, "fmt": "D", "label": "no target, or not decided"},
    }
    heights = [max(1, len(rows)) for rows in panels.values()]
    size = (10, 2 + 0.5 * sum(heights))
    figure, axes = plt.subplots(2, 1, figsize=size, height_ratios=heights, layout="constrained")
    for axis, (unit, rows) in zip(axes, panels.items(), strict=True):
        for met, style in styles.items():
            points = [(len(rows) - 1 - i, r) for i, r in enumerate(rows) if r["met"] is met]
            interval = [[r["ratio"] - r["low"] for _, r in points], [r["high"] - r["ratio"] for _, r in points]]
            places = {"x": [r["ratio"] for _, r in points], "y": [y for y, _ in points], "xerr": interval}
            axis.errorbar(**places, **style, markersize=7, capsize=3)
            targets = [(float(r["target"].split()[-1]), y) for y, r in points if r["target"]]
            axis.plot(*zip(*targets, strict=True) if targets else ([], []), "|", color="black", markersize=18)
        axis.axvline(1, color="black", linewidth=1)
        if unit == SPEED:
            axis.set_xscale("log")
            axis.set_xticks(SPEEDS, [f"{x:g}" for x in SPEEDS])
            axis.minorticks_off()
        labels = [symbols(f"{r['name']}\nagainst {r['baseline']} · {r['network']}") for r in rows]
        axis.set_yticks(range(len(rows)), reversed(labels), fontsize=9)
        axis.set_ylim(-0.6, max(1, len(rows)) - 0.4)
        axis.set_xlabel(f"{unit}, with 95 % interval (a tick is the target)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    plt.close(figure)
    return figure


def plot_growth(record: BenchmarkRecord) -> Figure:
    """Seconds, with a line through the origin, and peak memory by images, steps and epochs."""
    import matplotlib.pyplot as plt
    import seaborn as sns

    sns.set_theme(style="whitegrid", context="notebook")
    figure, axes = plt.subplots(2, 3, figsize=(10, 5.5), layout="constrained")
    titles = {"images": "attack, by images", "steps": "attack, by steps", "epochs": "fine-tuning, by epochs"}
    highest = max((peak for points in record.memory.values() for _, peak in points), default=1)
    for (top, bottom), (name, title) in zip(axes.T, titles.items(), strict=True):
        seconds, peaks = record.growth.get(name, []), record.memory.get(name, [])
        if seconds:
            slope = sum(x * y for x, y in seconds) / sum(x * x for x, _ in seconds)
            end = 1.1 * max(x for x, _ in seconds)
            top.plot([0, end], [0, slope * end], color=PAPER, linewidth=1)
            top.plot(*zip(*seconds, strict=True), "o", color=RECORDED, markersize=7)
        if peaks:
            bottom.plot(*zip(*peaks, strict=True), "s", color=THIS_RUN, markersize=7)
        top.set(title=title, xlabel=name, xlim=(0, None), ylim=(0, None))
        bottom.set(xlabel=name, xlim=(0, None), ylim=(0, 1.2 * highest))
    axes[0, 0].set_ylabel("seconds")
    axes[1, 0].set_ylabel("peak memory / images")
    plt.close(figure)
    return figure


def precision_table(record: PrecisionRecord) -> Any:
    """Accuracy under attack in each precision, and how far from float32, as Markdown."""
    from IPython.display import Markdown

    metrics: dict[str, Any] = record.metrics
    exact = metrics["float32"]
    columns = ["", *METRICS.values(), "most apart", f"{METRICS['w_inf']}, seen in float32", "W₂, seen in float32"]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for way, scores in metrics.items():
        apart = 100 * max(abs(scores[m] - exact[m]) for m in METRICS)
        cells = [way, *(f"{100 * scores[m]:.2f}" for m in METRICS)]
        cells.append("" if way == "float32" else f"{apart:.2f}: {'met' if apart <= 0.1 else 'missed'}")
        cells += [f"{100 * scores['in_float32'][m]:.2f}" for m in ("w_inf", "w_2")]
        lines.append("| " + " | ".join(cells) + " |")
    lines.append(
        f"\nAccuracy in per cent on {record.data.test:,} test images of {record.data.source}, network"
        f" `{record.network.name}`, on {record.device}; core {record.core[:8]}; `{record.command}`."
        " The target is 0.1 points."
    )
    return Markdown("\n".join(lines))


def upsilon_table(records: Sequence[UpsilonRecord]) -> Any:
    """The relative errors of two estimates of Upsilon along fine-tuning runs, as Markdown."""
    from statistics import median

    from IPython.display import Markdown

    lines = ["| run | estimate | median error | greatest | passes it costs |", "|---|---|---|---|---|"]
    for record in records:
        points, config = record.points, record.config
        for name, title in ESTIMATES.items():
            errors = [100 * abs(v / w - 1) for v, w in zip(points[name], points["whole"], strict=True)]
            cost = "none" if name == "batch" else f"{config.sample * (record.data.train or 0):,.0f} a minibatch"
            lines.append(f"| τ = {config.tau:g} | {title} | {median(errors):.0f} % | {max(errors):.0f} % | {cost} |")
    lines += [
        f"\nτ = {r.config.tau:g}: {len(r.points['whole'])} minibatches of {r.config.epochs} epoch(s),"
        f" {r.data.train:,} images of {r.data.source}, network `{r.network.name}`, on {r.device};"
        f" core {r.core[:8]}; `{r.command}`."
        for r in records
    ]
    return Markdown("\n".join(lines))


def plot_upsilon(records: Sequence[UpsilonRecord]) -> Figure:
    """Upsilon of the whole training set and its two estimates along fine-tuning runs."""
    import matplotlib.pyplot as plt
    import seaborn as sns

    sns.set_theme(style="whitegrid", context="notebook")
    figure, axes = plt.subplots(1, len(records), figsize=(10, 3.6), sharey=True, squeeze=False, layout="constrained")
    styles = {"whole": ("black", "-", "whole training set"), "sample": (RECORDED, "o", ESTIMATES["sample"])}
    styles["batch"] = (THIS_RUN, "s", ESTIMATES["batch"])
    for axis, record in zip(axes[0], records, strict=True):
        for name, (colour, style, label) in styles.items():
            axis.plot(record.points["minibatch"], record.points[name], style, color=colour, label=label)
        axis.set(title=f"τ = {record.config.tau:g}", xlabel="minibatch", yscale="log")
    axes[0, 0].set_ylabel("Υ")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    plt.close(figure)
    return figure


def symbols(text: str) -> str:
    """The names of the attacks as the page writes them."""
    return text.replace("W_2", "W₂").replace("W_inf", "W∞").replace("Upsilon", "Υ")
