"""What a comparison found, in one sentence and a few notes."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence

from tbfast.compare_stats import LEVEL, Difference, Goal, Summary
from tbfast.names import counted


def verdict(
    summaries: Sequence[Summary], *, baseline: str, controls: Collection[str], goal: Goal
) -> str:
    """One sentence: what differs from the baseline and by how much, and what the controls did.

    Args:
        summaries: Of all variants, the baseline's among them.
        baseline: Its name.
        controls: Names of the variants that only check the others.
        goal: Whether small or large metrics are good.
    """
    by_name = {s.variant: s for s in summaries}
    treated = [s for s in summaries if s.variant not in (baseline, *controls)]
    clauses = [f"{s.variant} {_failing(s)}" for s in (by_name[baseline], *treated) if _worst(s)]
    for outcome in ("better", "worse"):
        for s in treated:
            if s.outcome == outcome and s.difference is not None:
                gap = _gap(s.difference, goal, than=f" than {baseline}")
                clauses.append(
                    f"{s.variant} is {gap} ({s.difference.n} seeds){_fixed(s, by_name, goal)}"
                )
    pairs = {s.variant: s.difference for s in treated if s.outcome == "none" and s.difference}
    told = {name: d for name, d in pairs.items() if d.n > 1}
    if told:
        largest = max(told, key=lambda name: abs(told[name].mean))
        clauses.append(
            f"no difference found between {baseline} and {_join(told, 'or')} ("
            + (f"the largest: {largest} " if len(told) > 1 else "")
            + f"{_gap(told[largest], goal)}, {told[largest].n} seeds)"
        )
    if few := [name for name in pairs if name not in told]:
        clauses.append(
            f"no difference found, nor could be, between {baseline} and {_join(few, 'or')}: it "
            "takes 2 seeds or more with finite metrics"
        )
    checks = [f"{name} ({_control(by_name[name], goal)})" for name in by_name if name in controls]
    clauses.append(f"controls: {', '.join(checks)}" if checks else "no control was run")
    sentence = "; ".join(clauses)
    return f"{sentence.replace('no', 'No', 1) if sentence.startswith('no ') else sentence}."


def notes(
    summaries: Sequence[Summary], *, baseline: str, rates: Sequence[float], seeds: Sequence[int]
) -> list[str]:
    """How the figures were made, and what a reader should doubt, a line each."""
    lines = [
        f"Difference: test metric at the variant's best rate minus {baseline}'s at its own, paired "
        f"by seed, ± standard error; best rate: by mean validation metric over {len(seeds)} seeds. "
        f"p: paired t-test, the largest against every rate (so that no luck in choosing one "
        f"counts), Holm-corrected for {len(summaries) - 1} variants; it counts below {LEVEL:g}."
    ]
    edges = [f"{s.variant} ({s.rate:g})" for s in summaries if s.at_edge]
    if len(rates) < 3:
        lines.append("Fewer than 3 rates: whether each variant had its best one is not known.")
    elif edges:
        lines.append(f"Best rate at the edge of the grid: {_join(edges)}; add rates beyond it.")
    failed = [f"{s.variant} {s.failed} of {len(seeds)}" for s in summaries if s.failed]
    if failed:
        lines.append(f"Failed runs (no finite metric) at the best rate: {_join(failed)}.")
    return lines


def plus_minus(value: float, error: float) -> str:
    """``value ± error`` to two digits of the error; without one, four digits of the value."""
    if not math.isfinite(value):
        return "-"
    if not math.isfinite(error) or error == 0:
        return f"{value:.4g}"
    decimals = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:.{decimals}f} ± {error:.{decimals}f}"


def _fixed(s: Summary, by_name: dict[str, Summary], goal: Goal) -> str:
    """How a variant that is better than the baseline stands to the fixed ratios."""
    text = ""
    for name, difference in s.versus_fixed.items():
        gap = _gap(difference, goal, than=f" than {name}")
        if difference.p < LEVEL:
            text += f", {'and' if gap.startswith('better') else 'but'} {gap}"
        elif by_name[name].outcome == "better":
            text += f", but fixed ratios do as well ({s.variant} {gap})"
        else:
            text += f", but no difference from fixed ratios was found ({gap})"
    return text


def _control(s: Summary, goal: Goal) -> str:
    if _worst(s):
        return _failing(s)
    if s.difference is None or s.difference.n < 2:
        return "not comparable"
    gap = _gap(s.difference, goal)
    return gap if s.outcome != "none" else f"{gap}: no difference found"


def _worst(s: Summary) -> bool:
    """Whether failed runs are what there is to say."""
    return s.failed > 0 and (s.outcome == "failed" or s.difference is None)


def _failing(s: Summary) -> str:
    return f"fails in {counted(s.failed, 'run')} at its best rate"


def _gap(difference: Difference, goal: Goal, than: str = "") -> str:
    if difference.mean == 0:
        return "equal"
    better = (difference.mean < 0) == (goal == "min")
    size = plus_minus(abs(difference.mean), difference.error)
    return f"{'better' if better else 'worse'}{than} by {size}"


def _join(names: Iterable[str], word: str = "and") -> str:
    *head, last = names
    return f"{', '.join(head)} {word} {last}" if head else last
