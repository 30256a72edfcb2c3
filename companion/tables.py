"""Tables of Markdown, drawn from records alone. The paper, what is recorded here and this run are never mixed."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from companion.bases import images_of
from companion.evidence import (
    ALONG,
    Column,
    along,
    best_setting,
    by_setting,
    column_of,
    columns_of,
    deviations,
    is_full,
    paper_value,
    pretrained_with,
    relative_errors,
    setting_of,
    studies,
    unusual,
)
from companion.intervals import (
    Estimate,
    accuracy,
    bits,
    change,
    change_of_each,
    estimate_of,
    has_found,
    outcome_of_change,
    span,
    with_metrics,
)
from companion.kinds import (
    DivergedRecord,
    EvaluateRecord,
    FinetuneRecord,
    PretrainRecord,
    SensitivityRecord,
    StrongerRecord,
)
from companion.settings import FINETUNED, FOUND, GRIDS, METRICS, PAPER_NETWORKS, STAND_INS, STRONGER, ParameterError
from companion.words import (
    HOW,
    NOTHING,
    OUTCOMES,
    column_words,
    listed,
    markdown,
    name_of,
    plural,
    seeds_words,
    setting_words,
    short_name,
    training_words,
)

if TYPE_CHECKING:
    from wdat_core import Scores

PARTS = {"test": "test images", "train": "training images"}
# Section 7 says which setting Table 5 reports.
PAPER_BEST = dict.fromkeys(list(PAPER_NETWORKS)[:3], ("whole", 0.01, 1.0))
PAPER_BEST |= dict.fromkeys(list(PAPER_NETWORKS)[3:], ("last_layer", 0.1, 1.0))


def network_rows(
    table: int, part: str, records: Sequence[EvaluateRecord], recorded: Sequence[EvaluateRecord]
) -> list[dict[str, Any]]:
    """The rows of Table 1 or 2: the paper's five networks, what is recorded here, and this run.

    Each row has "network", "source" ("paper", "recorded here", "this run"), "images" (how many, of what; None where the
    paper does not say), "upsilon" (of those images, or None) and "cells", an Estimate or None for each metric.

    Args:
        part: the images of the measured rows, "test" or "train".
        records, recorded: of kind "evaluate"; those of another part are left out.
    """
    found = FOUND if any(has_found(r, part) for r in (*records, *recorded)) else {}
    metrics = [*METRICS, *found] if table == 1 else ["budget", "w_inf", "w_2"]
    rows = []
    for name in PAPER_NETWORKS:
        values = {m: paper_value(table, name, m) for m in metrics}
        cells = {m: None if v is None else Estimate(v) for m, v in values.items()}
        rows.append({"network": name, "source": "paper", "images": None, "upsilon": None, "cells": cells})
    for source, those in (("recorded here", recorded), ("this run", records)):
        for r in (r for r in those if part in r.metrics):
            cells = {m: accuracy([r], part, m) if with_metrics([r], [m], part) else None for m in metrics}
            images = f"{images_of(r, part):,} {PARTS[part]}, {r.data.source}{unusual(r)}"
            row: dict[str, Any] = {"network": r.network.name, "source": source, "images": images}
            rows.append(row | {"upsilon": r.upsilon, "cells": cells})
    return rows


def network_table(
    table: int, records: Sequence[EvaluateRecord], recorded: Sequence[EvaluateRecord], parts: Sequence[str] = ("test",)
) -> Any:
    """Table 1 or 2 as Markdown: accuracy in per cent by network, kind of evidence and part of the images."""
    rows = network_rows(table, parts[0], records, recorded)
    for part in parts[1:]:
        rows += [row for row in network_rows(table, part, records, recorded) if row["source"] != "paper"]
    names = list(dict.fromkeys(row["network"] for row in rows))
    rows.sort(key=lambda row: names.index(row["network"]))  # the rows of a network stand together
    measured = {row["network"] for row in rows if row["source"] != "paper"}
    labels = METRICS | FOUND | {"budget": "W-PGD-budget"}
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


def best_table(records: Sequence[FinetuneRecord], recorded: Sequence[FinetuneRecord]) -> Any:
    """Table 5 as Markdown: for each network the best setting, its accuracies, and the change against the baseline."""
    lines = []
    for name in PAPER_NETWORKS:
        cells = []
        for metric in METRICS:
            value, base = paper_value(5, name, metric), paper_value(1, name, metric)
            cells.append("–" if value is None or base is None else f"{value:.2f} ({value - base:+z.2f})")
        lines.append([short_name(name), "paper", setting_words(*PAPER_BEST[name]), *cells, *["–"] * len(FOUND)])
    for source, those in (("recorded here", recorded), ("this run", records)):
        for study in studies(those):
            best = best_setting(study)
            one, n = best[0], len(by_setting(study))
            size = f"{one.data.train:,} training images, {plural(one.config.epochs, 'epoch')}"
            evidence = f"{source}: {size}, {seeds_words(best)}{unusual(one)}"
            setting = f"{setting_words(*setting_of(one))} ({f'best of {n}' if n > 1 else 'the only one'})"
            cells = []
            for m in (*METRICS, *FOUND):
                those = with_metrics(best, [m], "before", "after")
                text = (
                    f"{accuracy(those, 'after', m).value:.2f} ({change(those, m).text(signed=True)})" if those else "–"
                )
                cells.append(text)
            lines.append([short_name(one.network.name), evidence, setting, *cells])
    return markdown(["network", "evidence", "best setting", *METRICS.values(), *FOUND.values()], lines)


def labels_of(groups: Sequence[Sequence[FinetuneRecord]]) -> list[str]:
    """A name for each study: its network, and its training too where two studies are of the same network."""
    names = [short_name(group[0].network.name) for group in groups]
    return [
        f"{name}, {training_words(group[0])}{unusual(group[0])}" if names.count(name) > 1 else name
        for name, group in zip(names, groups, strict=True)
    ]


def grid_rows(
    table: int | None, records: Sequence[FinetuneRecord], recorded: Sequence[FinetuneRecord]
) -> list[dict[str, Any]]:
    """The rows of a fine-tuning table: for each metric the paper, each study that is recorded here, and this run.

    Each row has "metric", "source" ("paper", "recorded here", "this run"), "network", "before" (an Estimate) and
    "cells": for each (tau, eta) of the run (of the recorded ones without a run) a pair of Estimates (accuracy, change),
    or None where there is no evidence. A recorded row has "outcomes" too, for each of its cells that the paper has as
    well. Without a table there is no paper, and no row for records that are not there. The worst case found has rows
    where some record has it.
    """
    grid = list(columns_of(records or recorded))
    kept_all = [r for r in recorded if column_of(r) in grid]
    kept = studies(kept_all)
    parts = [("recorded here", label, those) for label, those in zip(labels_of(kept), kept, strict=True)]
    if table and not kept and records:
        parts.append(("recorded here", short_name(records[0].network.name), []))
    if records:
        parts.append(("this run", short_name(records[0].network.name), list(records)))
    rows: list[dict[str, Any]] = []
    found = FOUND if with_metrics([*kept_all, *records], [*FOUND], "before", "after") else {}
    for metric in (*METRICS, *found):
        printed = paper_changes(table, metric, grid) if table else {}
        if table and metric in METRICS:
            name = GRIDS[table][0]
            base = paper_value(1, name, metric)
            known = {c: None if p is None else (Estimate(p[0]), Estimate(p[1])) for c, p in printed.items()}
            before = None if base is None else Estimate(base)
            paper = {"metric": metric, "source": "paper", "network": short_name(name)}
            rows.append({**paper, "before": before, "cells": known})
        for source, label, those in parts:
            columns = columns_of(with_metrics(those, [metric], "before", "after"))
            cells = {c: (accuracy(columns[c], "after", metric), change(columns[c], metric)) for c in columns}
            # Records of other seeds share the baseline: one is enough.
            before = accuracy(next(iter(columns.values()))[:1], "before", metric) if columns else None
            row: dict[str, Any] = {"metric": metric, "source": source, "network": label, "before": before}
            row["cells"] = {c: cells.get(c) for c in grid}
            if source == "recorded here":
                pairs = {c: p for c, p in printed.items() if p and c in columns}
                row["outcomes"] = {c: outcome_of_change(p[1], columns[c], metric) for c, p in pairs.items()}
            rows.append(row)
    return rows


def paper_changes(table: int, metric: str, columns: Sequence[Column]) -> dict[Column, tuple[float, float] | None]:
    """What a fine-tuning table of the paper prints in each (tau, eta): accuracy, and its change in points, or None."""
    name = GRIDS[table][0]
    base, found = paper_value(1, name, metric), {}
    for column in columns:
        value = paper_value(table, name, metric, *column)
        found[column] = None if value is None or base is None else (value, value - base)
    return found


def grid_table(table: int | None, records: Sequence[FinetuneRecord], recorded: Sequence[FinetuneRecord]) -> Any:
    """A fine-tuning table as Markdown: accuracy in per cent, in brackets the change against the baseline.

    Where the paper says that an accuracy under attack rises or falls, a mark says whether it does so here: a key of
    `words.OUTCOMES`.

    Args:
        table: of the paper; None leaves the paper out.
    """
    lines = []
    for row in grid_rows(table, records, recorded):
        marks = {} if row["metric"] == "clean" else row.get("outcomes", {})
        cells = [(METRICS | FOUND)[row["metric"]], f"{row['source']}: {row['network']}"]
        cells.append("–" if row["before"] is None else row["before"].text())
        for column, cell in row["cells"].items():
            mark = f" {OUTCOMES[marks[column]][0]}" if column in marks else ""
            cells.append("–" if cell is None else f"{cell[0].value:.2f} ({cell[1].text(signed=True)}){mark}")
        lines.append(cells)
    grid = columns_of(records or recorded)
    return markdown(["Accuracy, %", "evidence", "baseline", *(column_words(*column) for column in grid)], lines)


def diverged(perturb: str, recorded: Sequence[DivergedRecord], others: Sequence[FinetuneRecord] = ()) -> list[Any]:
    """Which whole-protocol runs have no accuracies, because they diverged, as Markdown; [] where there are none.

    A run that ended well after all, elsewhere perhaps, is among the `others`.
    """
    from IPython.display import Markdown

    ended_well = [(r.network.digest, r.config) for r in others]
    those = [r for r in recorded if r.config.perturb == perturb and is_full(r) and not deviations(r)]
    those = [r for r in those if (r.network.digest, r.config) not in ended_well]
    where = [r.message.partition(", at learning rate")[0].removeprefix("training diverged in ") for r in those]
    runs = [
        f"{name_of(r)} with {column_words(*column_of(r))}, seed {r.config.seed} ({ended})"
        for r, ended in zip(those, where, strict=True)
    ]
    return [Markdown(f"No accuracies for the {HOW[perturb]}: training diverged for {listed(runs)}.")] if runs else []


def outcome_table(table: int, recorded: Sequence[FinetuneRecord]) -> Any:
    """For each study and column whether the paper's change is there: up or down as in the paper, by the rule of claims.

    It *holds* where the 95 % interval and every seed lie on the paper's side of 0, is *contradicted* where all of them
    lie on the other, and else is *not visible*.
    """
    from IPython.display import Markdown

    if not recorded:
        return Markdown("Nothing is recorded for these parameters yet.")
    lines, groups = [], studies(recorded)
    for label, study in zip(labels_of(groups), groups, strict=True):
        columns = columns_of(study)
        for metric in ("w_2", "w_inf"):
            for column, printed in paper_changes(table, metric, list(columns)).items():
                here, each = change(columns[column], metric), change_of_each(columns[column], metric)
                seeds = "1" if len(each) == 1 else f"{len(each)}: {span(each)}"
                cells = [label, METRICS[metric], column_words(*column), f"{printed[1]:+z.2f}" if printed else "–"]
                outcome = OUTCOMES[outcome_of_change(printed[1], columns[column], metric)] if printed else "–"
                lines.append([*cells, here.text(signed=True), seeds, outcome])
    return markdown(["network", "accuracy", "column", "paper", "recorded here", "seeds", "outcome"], lines)


def along_table(what: str, recorded: Sequence[FinetuneRecord]) -> Any:
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


def estimates_table(records: Sequence[SensitivityRecord], recorded: Sequence[SensitivityRecord]) -> Any:
    """Figure 7.1 in numbers: Upsilon of the training set, and how far its estimates from samples are off."""
    from statistics import median

    lines = []
    for source, those in (("recorded here", recorded), ("this run", records)):
        for r in those:
            errors = relative_errors(r)
            sample = f"{r.config.samples} samples of {100 * r.config.fraction:g} %"
            images = f"{r.data.train:,}, {r.data.source}{unusual(r)}"
            cells = [short_name(r.network.name), source, images, sample]
            cells += [f"{r.reference:.2f}", f"{min(r.estimates):.2f} to {max(r.estimates):.2f}"]
            lines.append([*cells, f"{100 * median(errors):.0f} %", f"{100 * max(errors):.0f} %"])
    columns = ["network", "evidence", "training images", "estimates", "Υ of all", "Υ of the samples", "median error"]
    return markdown([*columns, "greatest"], lines)


def stand_ins_table(recorded: Sequence[PretrainRecord]) -> Any:
    """The networks that this project pre-trained: size, recipe, and accuracy in per cent on the test images."""
    from companion.architectures import new_stand_in

    lines = []
    for r in recorded:
        name = r.network.name
        config: Any = r.config  # of one of two trainers
        size = sum(p.numel() for p in new_stand_in(name).parameters())
        method = {"trades": f"TRADES, β = {config.beta:g}", "pgd": "PGD"}[pretrained_with(r)]
        recipe = f"{method}, {config.epochs} epochs, {config.steps} steps, batch {config.batch_size}"
        recipe += f", averaging {config.average:g}" if config.average else ", no averaging"
        recipe += f"; {r.seconds['pretrain'] / 60:.0f} min on {r.device}, {config.precision}"
        network = f"{STAND_INS[name][0]}{STAND_INS[name][1]}, {size:,} parameters"
        lines.append([f"`{name}`", network, recipe, *(accuracy([r], "after", m).text() for m in METRICS)])
    return markdown(["name", "network", "pre-training", *METRICS.values()], lines)


def stronger_table(records: Sequence[StrongerRecord], recorded: Sequence[StrongerRecord]) -> Any:
    """Accuracy in per cent under every attack of the page: each network, beside it what was fine-tuned from it.

    Of a fine-tuned network also the change, with the interval of the paired differences on the same test images.
    """
    from IPython.display import Markdown

    parts = []
    for source, those in (("recorded here", recorded), ("this run", records)):
        given = [r for r in those if FINETUNED not in r.network.name]
        for before in given:
            name = before.network.name
            tuned = [r for r in those if r.network.name == name + FINETUNED and _same_test(r, before)]
            tuned.sort(key=lambda r: r.network.source, reverse=True)  # the whole network before the last layer
            n = before.data.test
            parts.append(f"**{short_name(name)}**, {source}: {n:,} test images, {before.data.source}")
            heads, lines = ["attack", "as given"], []
            for i, after in enumerate(tuned, 1):
                parts.append(f"fine-tuned {i}: {after.network.source}")
                heads += [f"fine-tuned {i}", "change"]
            for label, bits_of in _attacks(before).items():
                cells = [label, estimate_of([bits_of(before)]).text()]
                for after in tuned:
                    difference = bits_of(after) - bits_of(before)
                    cells += [estimate_of([bits_of(after)]).text(), estimate_of([difference]).text(signed=True)]
                lines.append(cells)
            parts.append(markdown(heads, lines).data)
    return Markdown("\n\n".join(parts) or NOTHING)


def _same_test(one: StrongerRecord, other: StrongerRecord) -> bool:
    return one.data == other.data and one.config == other.config


def _attacks(record: StrongerRecord) -> dict[str, Callable[[StrongerRecord], Any]]:
    """The attacks of a record of kind "stronger" in words, and of each which images it leaves right.

    Last of each kind stands the one that leaves fewest, for each network its own; of all the test images.
    """
    found: dict[str, Callable[[StrongerRecord], Any]] = {}
    for p, kind in ((2, "W₂"), (math.inf, "W∞")):
        names = [name for name, attack in STRONGER.items() if attack.p == p]
        words = (STRONGER[name].words(record.config.steps) for name in names)
        found |= dict(zip(words, map(_left_by, names), strict=True))
        found[f"{kind}, the strongest of these"] = functools.partial(fewest_left, names=names)
    if few := record.data.autoattack:
        found[f"W∞, AutoAttack, the first {few:,} images"] = _left_by("autoattack")
    return found


def _left_by(name: str) -> Callable[[StrongerRecord], Any]:
    return functools.partial(bits, when=name, metric="accuracy")


def fewest_left(record: StrongerRecord, names: Sequence[str]) -> Any:
    """Which images are right, (n,), under the attack of those named that leaves fewest."""
    return min((_left_by(name)(record) for name in names), key=sum)


def compare(before: Scores, after: Scores) -> Any:
    """Two networks on the same images, as Markdown: accuracy in per cent, and the change, each with its 95 % interval.

    Needs no record: it is for networks of one's own. The interval of a change is that of the paired differences.
    """
    n = {len(scores.correct[m]) for scores in (before, after) for m in METRICS}
    if len(n) > 1:
        raise ParameterError(f"scores of {' and '.join(map(str, sorted(n)))} images cannot be paired")
    lines = []
    for m, label in METRICS.items():
        there, here = (scores.correct[m].cpu().numpy().astype(float) for scores in (before, after))
        cells = [estimate_of([there]).text(), estimate_of([here]).text()]
        lines.append([label, *cells, estimate_of([here - there]).text(signed=True)])
    return markdown(["Accuracy, %", "before", "after", "change"], lines)
