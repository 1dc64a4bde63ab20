"""Paired statistics of one experiment run under several variants.

Every variant is run with the same seeds and rates, so differences are taken seed by seed. A
variant's rate is the one with the best mean validation metric; its test metric there is compared
with the baseline's at the baseline's own best rate, by a paired t-test.

Which rate wins is partly luck, and a baseline caught at a second-best rate would make any variant
look better. So a variant counts as better only if it is so against *every* rate of the baseline,
and as worse only if every rate of its own is worse: p is the largest over those (an
intersection-union test: Berger, Technometrics 24, 1982). p-values are then corrected for the
number of variants by Holm's method (Scandinavian Journal of Statistics 6, 1979) to 5 % for the
whole experiment. Only a variant that is better than the baseline is compared with the fixed-ratio
controls, its p there multiplied by the number of variants.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Literal

LEVEL = 0.05  # family-wise

Goal = Literal["min", "max"]
Outcome = Literal["better", "worse", "none", "failed"]
Key = tuple[str, float, int]  # variant, rate, seed


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        variant, rate, seed: What was run.
        validation, test: Its metrics; NaN where the run diverged.
        seconds: Wall time of ``train``.
        overhead: Share of it that measuring spectra took, 0 to 1.
        ratios: Mean factor of each layer type over the run, one dict per optimizer.
        note: Why it diverged, where an exception says so.
    """

    variant: str
    rate: float
    seed: int
    validation: float
    test: float
    seconds: float = 0.0
    overhead: float = 0.0
    ratios: list[dict[str, float]] = field(default_factory=list)
    note: str = ""

    @property
    def failed(self) -> bool:
        """Whether one of the metrics is not finite."""
        return not (math.isfinite(self.validation) and math.isfinite(self.test))


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences with its standard error; NaN where there are too few pairs.

    ``p`` is that of the two-sided paired t-test of no difference, where nothing else is said.
    """

    mean: float
    error: float
    n: int
    p: float


@dataclass(frozen=True)
class Summary:
    """A variant at its best rate.

    Attributes:
        variant: Its name.
        rate: The best rate by mean validation metric.
        at_edge: Whether that is the smallest or largest of the grid.
        validation, test: Means over the seeds that did not fail.
        spread: Standard deviation of the test metric over seeds.
        failed: Seeds that failed at this rate.
        difference: Test metric minus the baseline's, each at its own best rate; None for the
            baseline. Its ``p`` is against every rate and corrected.
        outcome: What the difference says.
        equal_rates: Test metric minus the baseline's at the same rate, by rate; not corrected.
        versus_fixed: For a variant better than the baseline: its test metric minus that of each
            fixed-ratio control, by name; ``p`` as above.
        seconds, overhead: Means over all runs of the variant.
    """

    variant: str
    rate: float
    at_edge: bool
    validation: float
    test: float
    spread: float
    failed: int
    difference: Difference | None
    outcome: Outcome
    equal_rates: dict[float, Difference]
    versus_fixed: dict[str, Difference]
    seconds: float
    overhead: float


def summarise(
    runs: Mapping[Key, Run],
    *,
    variants: Sequence[str],
    baseline: str,
    fixed: Sequence[str],
    rates: Sequence[float],
    seeds: Sequence[int],
    goal: Goal,
) -> list[Summary]:
    """Statistics of each variant, in their order.

    A failed run counts as worst: of two rates the one with fewer failures is better, and a variant
    with more failures than the baseline has the outcome ``"failed"``, whatever the others say.

    Args:
        runs: A run for each variant, rate and seed.
        variants: Names.
        baseline: The one that all are compared with.
        fixed: Those that are fixed-ratio controls.
        rates, seeds: The grid.
        goal: Whether small or large metrics are good.
    """
    sign = 1.0 if goal == "min" else -1.0
    best = {v: _best_rate(runs, v, rates, seeds, sign) for v in variants}

    def at(variant: str, rate: float) -> list[float]:
        mine = [runs[variant, rate, seed] for seed in seeds]
        return [math.nan if run.failed else run.test for run in mine]

    def failures(variant: str, rate: float) -> int:
        return sum(math.isnan(metric) for metric in at(variant, rate))

    def rivals(variant: str) -> list[list[float]]:
        least = failures(variant, best[variant])
        return [at(variant, r) for r in rates if failures(variant, r) == least]

    def contrast(ours: str, theirs: str) -> Difference:
        """Difference at the best rates, with p against luck in the choice of the rate."""
        mine, other = at(ours, best[ours]), at(theirs, best[theirs])
        found = paired(mine, other)
        if sign * found.mean < 0:
            rest = [paired(mine, rival) for rival in rivals(theirs)]
        else:
            rest = [paired(rival, other) for rival in rivals(ours)]
        if any(d.mean * found.mean <= 0 or math.isnan(d.p) for d in rest):
            return replace(found, p=1.0)
        return replace(found, p=max(d.p for d in rest))

    others = [v for v in variants if v != baseline]
    contrasts = {v: contrast(v, baseline) for v in others}
    corrected = dict(zip(others, holm([contrasts[v].p for v in others]), strict=True))
    found = []
    for v in variants:
        difference, failed = contrasts.get(v), failures(v, best[v])
        outcome: Outcome = "none"
        if failed > failures(baseline, best[baseline]):
            outcome = "failed"
        elif difference is not None and corrected[v] < LEVEL:
            outcome = "better" if sign * difference.mean < 0 else "worse"
        versus = {}
        for control in fixed if outcome == "better" and v not in fixed else ():
            d = contrast(v, control)
            versus[control] = replace(d, p=min(1.0, len(others) * d.p))
        chosen = [runs[v, best[v], seed] for seed in seeds]
        mine = [runs[v, rate, seed] for rate in rates for seed in seeds]
        tests = [run.test for run in chosen if not run.failed]
        found.append(
            Summary(
                variant=v,
                rate=best[v],
                at_edge=best[v] in (min(rates), max(rates)),
                validation=_mean([run.validation for run in chosen if not run.failed]),
                test=_mean(tests),
                spread=_deviation(tests),
                failed=failed,
                difference=None if difference is None else replace(difference, p=corrected[v]),
                outcome=outcome,
                equal_rates={
                    rate: paired(at(v, rate), at(baseline, rate))
                    for rate in (rates if v != baseline else ())
                },
                versus_fixed=versus,
                seconds=_mean([run.seconds for run in mine]),
                overhead=_mean([run.overhead for run in mine]),
            )
        )
    return found


def paired(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """Difference ``ours - theirs`` over the pairs in which both are finite."""
    gaps = [a - b for a, b in zip(ours, theirs, strict=True) if math.isfinite(a - b)]
    n = len(gaps)
    if n < 2:
        return Difference(gaps[0] if gaps else math.nan, math.nan, n, math.nan)
    mean, error = fmean(gaps), _deviation(gaps) / math.sqrt(n)
    if error == 0:
        return Difference(mean, 0.0, n, 1.0 if mean == 0 else 0.0)
    return Difference(mean, error, n, two_sided_p(mean / error, n - 1))


def two_sided_p(t: float, freedom: int) -> float:
    """Probability of a Student t beyond ±t, 0 to 1, absolute error about 1e-15.

    The finite sums for whole degrees of freedom: Abramowitz and Stegun, 26.7.3 and 26.7.4.
    """
    angle = math.atan(abs(t) / math.sqrt(freedom))
    cos2 = math.cos(angle) ** 2
    odd = freedom % 2
    term, total = (math.cos(angle), 0.0) if odd else (1.0, 0.0)
    for k in range(1 + odd, freedom, 2):  # k is the numerator of the next term's new fraction
        total += term
        term *= cos2 * k / (k + 1)
    within = math.sin(angle) * total
    if odd:
        within = 2 / math.pi * (angle + within)
    return min(1.0, max(0.0, 1.0 - within))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected by Holm's step-down method; NaN counts as 1."""
    known = [1.0 if math.isnan(p) else p for p in p_values]
    corrected, running = [1.0] * len(known), 0.0
    for rank, index in enumerate(sorted(range(len(known)), key=known.__getitem__)):
        running = max(running, min(1.0, (len(known) - rank) * known[index]))
        corrected[index] = running
    return corrected


def _best_rate(
    runs: Mapping[Key, Run], variant: str, rates: Sequence[float], seeds: Sequence[int], sign: float
) -> float:
    def rank(rate: float) -> tuple[int, float]:
        mine = [runs[variant, rate, seed] for seed in seeds]
        valid = [sign * run.validation for run in mine if not run.failed]
        return len(mine) - len(valid), fmean(valid) if valid else math.inf

    return min(rates, key=rank)


def _mean(values: Sequence[float]) -> float:
    return fmean(values) if values else math.nan


def _deviation(values: Sequence[float]) -> float:
    """Standard deviation of a sample, NaN of fewer than two values."""
    if len(values) < 2:
        return math.nan
    mean = fmean(values)
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))
