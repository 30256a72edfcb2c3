"""The claims in words: what is asked, what the paper's numbers say, and every effect behind a verdict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from companion.bases import Record
from companion.claims import CLAIMS, RADII, Claim, counted, on_claimed_side, outcome, outcomes, verdict
from companion.effects import Effect
from companion.intervals import Estimate, accuracy, span
from companion.words import OUTCOMES, VERDICTS, count, listed, markdown, name_of, plural
from companion.worst import measured


def rule(claim: Claim) -> str:
    """What an effect of the claim is, and where the claim holds, in words."""
    line = f"{claim.line:g}{' %' if claim.line else ''}"
    when = "unless" if claim.side.startswith("not ") else "where"
    holds = f"The claim holds {when} the effect lies wholly {claim.side.removeprefix('not ')} {line}."
    return " ".join(filter(None, [f"Effect: {claim.measure}; in {claim.unit}.", holds, claim.note]))


def overview(records: Sequence[Record]) -> Any:
    """A row for each claim, as Markdown: its place, how many of the paper's own numbers agree with it, the verdict."""
    lines = []
    for number, claim in enumerate(CLAIMS, 1):
        effects = claim.effects(records)
        lines.append([f"{number}", claim.text, claim.place, paper_count(claim) or "–", verdict_text(effects, claim)])
    return markdown(["", "claim", "in the paper", "the paper's own numbers", "here"], lines)


def everywhere(records: Sequence[Record]) -> str:
    """Which claims hold on all networks that they are measured on, by the paper's measure and by the worst case."""
    measured, holding, by_found, worst = 0, [], 0, []
    for number, claim in enumerate(CLAIMS, 1):
        effects = counted(claim.effects(records))
        measured += bool(effects)
        if verdict(effects, claim) == "holds":
            networks = {record.network.name for effect in effects for record in effect.records}
            holding.append(f"claim {number} ({plural(len(networks), 'network')})")
        found = [effect for those in _at_each_radius(claim, records) for effect in those]
        by_found += bool(found)
        worst += [f"claim {number}"] * (verdict(found, claim) == "holds")
    if not measured:
        return ""
    text = f"Of {plural(measured, 'claim')} that are measured, {_that_hold(holding)} on every network measured."
    if by_found:
        radii = f"δ = {listed([str(delta) for delta in RADII])}/255"
        judged = f"By the worst case found, which can judge {by_found} of them"
        text += f" {judged}, {_that_hold(worst)} on every network at {radii} alike."
    return text


def _that_hold(numbers: Sequence[str]) -> str:
    return f"{listed(numbers)} hold{'s' * (len(numbers) == 1)}" if numbers else "none holds"


def details(records: Sequence[Record]) -> Any:
    """For each claim, as Markdown: its rule, the paper's numbers, every effect with its interval and outcome, and where
    it does not hold everywhere, a possible reason."""
    from IPython.display import Markdown

    parts = []
    for number, claim in enumerate(CLAIMS, 1):
        effects = claim.effects(records)
        parts += [f"**{number}. {claim.text}** {verdict_text(effects, claim)}", rule(claim), _paper_text(claim)]
        heads = ["network and run", "comparison", "effect", "95 % interval", "seeds", "outcome"]
        first = counted(effects)
        rest = [effect for effect in effects if not effect.full] if len(first) < len(effects) else []
        for those, title in ((first, ""), (rest, "Smaller runs, which the verdict does not count:")):
            if those:
                parts += [title] * bool(title) + [markdown(heads, [_row(effect, claim) for effect in those]).data]
        if claim.why and verdict(effects, claim) not in ("holds", "not yet measured"):
            parts.append(f"*A possible reason:* {claim.why}")
    return Markdown("\n\n".join(parts))


def by_worst_case(records: Sequence[Record]) -> Any:
    """For each claim about accuracies, as Markdown: each study's effect by the worst case found, at each radius."""
    lines = []
    for number, claim in enumerate(CLAIMS, 1):
        for effects in _at_each_radius(claim, records):
            lines.append([f"{number}", claim.text, effects[0].study, effects[0].comparison])
            lines[-1] += [
                f"{e.value:+z.2f} ({e.low:+z.2f} to {e.high:+z.2f}) {OUTCOMES[outcome(e, claim)]}" for e in effects
            ]
    heads = ["", "claim", "network and run", "comparison", *(f"δ = {delta}/255" for delta in RADII)]
    return markdown(heads, lines)


def _at_each_radius(claim: Claim, records: Sequence[Record]) -> list[tuple[Effect, ...]]:
    """The effects of whole-protocol runs by the worst case found, for each comparison at each of RADII."""
    at = [[e for e in claim.found(records, delta) if e.full] for delta in RADII] if claim.found else []
    return list(zip(*at, strict=True))


def by_both(records: Sequence[Record]) -> str:
    """A row for each network, as Markdown: W_2 accuracy and what fine-tuning changes, by W-PGD and cheapest first."""
    (claim,) = [claim for claim in CLAIMS if claim.key == "whole-w2"]
    assert claim.found is not None
    delta, lines = RADII[1], []
    columns = claim.effects(records), claim.found(records, delta)
    of = [{e.records[0].network.name: e for e in effects if e.full} for effects in columns]
    for record in measured(records):
        left = [accuracy([record], "test", metric).text() for metric in ("w_2", "w_2_found")]
        lines.append([name_of(record), *left, *(_with_seeds(effects.get(record.network.name)) for effects in of)])
    heads = ["network", "W₂, W-PGD", "W₂, cheapest first", "change, W-PGD", f"change, cheapest first at {delta}/255"]
    return markdown(heads, lines).data


def _with_seeds(effect: Effect | None) -> str:
    """A change with its interval, and a star where it is of one seed."""
    return "–" if effect is None else _with_interval(effect) + "\\*" * (len(effect.seeds) == 1)


def _with_interval(effect: Effect) -> str:
    half = None if effect.low is None else effect.value - effect.low
    return Estimate(effect.value, half).text(signed=True)


def verdict_text(effects: Sequence[Effect], claim: Claim) -> str:
    """A mark and what it counts, "◐ holds in 1 of 2, contradicted in 1"; or the command that would measure it."""
    found = VERDICTS[verdict(effects, claim)]
    if not effects:
        return f"{found}: {', '.join(f'`{command}`' for command in claim.commands)}"
    return f"{found[0]} {count(outcomes(effects, claim))}"


def paper_count(claim: Claim) -> str:
    """How many of the paper's own numbers agree with the claim, "4 of 5"; empty where it prints none."""
    numbers = claim.paper()
    return f"{sum(on_claimed_side(v, claim) for _, v in numbers)} of {len(numbers)}" if numbers else ""


def _paper_text(claim: Claim) -> str:
    numbers = claim.paper()
    if not numbers:
        return "The paper prints no number."
    others = [f"{what}: {value:+z.2f}" for what, value in numbers if not on_claimed_side(value, claim)]
    return (
        f"The paper's own numbers agree in {paper_count(claim)} comparison{'s' * (len(numbers) > 1)},"
        f" {span([value for _, value in numbers])}{'; not for ' * bool(others)}{'; '.join(others)}."
    )


def _row(effect: Effect, claim: Claim) -> list[str]:
    number = "{:.2f}" if claim.line else "{:+z.2f}"  # a sign says something against 0 only
    known = effect.low is not None and effect.high is not None
    interval = f"{number.format(effect.low)} to {number.format(effect.high)}" if known else "–"
    seeds = "–" if not effect.seeds else f"{len(effect.seeds)}"
    if len(effect.seeds) > 1:
        seeds += f": {number.format(min(effect.seeds))} to {number.format(max(effect.seeds))}"
    value, found = number.format(effect.value), OUTCOMES[outcome(effect, claim)]
    return [effect.study, effect.comparison, value, interval, seeds, found]
