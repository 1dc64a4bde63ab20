"""The tables of docs/accuracy.md, and what they say, from the rows of benchmarks/accuracy.py."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from accuracy import Row

BUCKETS = ((0, 0.005), (0.005, 0.02), (0.02, 0.05), (0.05, 0.1), (0.1, 0.2), (0.2, 0.4), (0.4, 0.8))
METHODS = {
    "stale": "stale",
    "lin": "lin",
    "aligned": "aligned p8 m20",
    "fresh p4": "fresh p4 m20",
    "fresh p8": "fresh p8 m20",
    "fresh p16": "fresh p16 m20",
    "exact": "exact",
    "floor": "jitter floor",
}
RIVALS = ("stale", "lin", "aligned", "fresh p8")
SOURCES = {
    "init": "Training from initialisation",
    "fine": "Fine-tuning MiniLM",
    "darcy": "Darcy flow, a Fourier neural operator with complex weights",
}
# Fewer cases than these say nothing about a bucket.
LEAST_CASES = 8
PROMISED = 0.9  # share of cases within two standard errors

INTRODUCTION = """\
# How accurate the estimates of alpha are

Written by `python benchmarks/accuracy.py`; the rows behind the tables are in
[accuracy.csv](../benchmarks/results/accuracy.csv).
{versions}.

Alpha is that of `fit="median"`. The truth is alpha of all singular values, computed by LAPACK in
float64.

A *case* is a layer at one step of a training, and an anchor taken earlier. *Drift* is
|W − W₀| / |W₀| since that anchor. Two figures stand in each cell: the error in **% of alpha**, root
mean square over the cases, and after the stroke the error in **% of the spread**, the largest minus
the smallest alpha of the net's layers at that step. The spread is what layer-wise learning rates
are made from.

| method | what it is | reads of the weights |
|---|---|---|
| stale | alpha of the anchor | 1/20 |
| lin | first-order correction of it, gradient in int8 | 1, and the gradient |
| aligned p8 m20 | Lanczos quadrature from the anchor's eigenvectors, 8 probes, 20 steps | 20 |
| fresh p m20 | stochastic Lanczos quadrature without an anchor, p probes, 20 steps | 20 |
| exact | `method="exact"` | all eigenvalues |
| jitter floor | exact, xmin averaged over N/32 ranks to either side, relative to the anchor | – |

The *jitter floor* is about what no smooth estimate gets below, but by luck: the exact alpha hangs
on a single eigenvalue, the median, which moves erratically among its neighbours.

*Within 2 errors* is the share of the cases below 80 % drift whose true error is at most twice the
standard error that comes with the estimate. 95 % is what a normal error would give; tbfast promises
90 %.
"""
RUNS = {
    "init": """\
From random weights, at a constant rate, the text being Python's own standard library. `mlp`:
widths 512-768-768-3072-256, the next byte from 16 bytes. `tf`: a byte-level transformer, width 384,
two blocks. Adam with rate 1e-3, SGD with rate 0.1 and momentum 0.9. Anchors after 0, 20 and 100
steps, each looked at 1 step, about 20 and about 100 steps later.""",
    "fine": """\
The 36 matrices of MiniLM's six blocks (N = 384), fine-tuned by AdamW to tell which package a
piece of source code is from; `minilm` with rate 1e-4, `minilm-5e-4` with 5e-4. Anchors after 0 and
20 steps.""",
    "darcy": """\
The four spectral weights of the demo's operator (24 complex 24×24 matrices each, 576 eigenvalues
pooled), Adam with rate 1e-3. Anchors after 100, 400 and 1000 steps: the weights start at 1/width²
and leave that at once. The four have one shape, so the spread is small.""",
}
SYNTHETIC = """\
Matrices of known spectra, no anchor: root mean square error in % of alpha, by N and probes, 20
steps. N = 96: 8 matrices; 384: 6; 1536: 2, sketched 3 times each; 4096: 1, sketched 6 times. Power
law: Gaussian, column j times j^-s. Rank 3/4: a product of Gaussian factors. One outlier: Gaussian,
its largest singular value made 20 times as large. Seeds of the matrices: 0, 1, … The column *exact*
holds the largest error of `method="exact"`, in %."""


class Case(NamedTuple):
    """One layer at one step, seen from one anchor; methods' alphas and standard errors by name."""

    run: str
    drift: float
    exact: float
    spread: float
    found: dict[str, tuple[float, float]]

    def miss(self, method: str) -> float:
        """Distance from the exact alpha."""
        return abs(self.found[method][0] - self.exact)

    def bucket(self) -> tuple[float, float] | None:
        return next((b for b in BUCKETS if b[0] <= self.drift < b[1]), None)


def cases(rows: Iterable[Row]) -> list[Case]:
    """Rows of trainings, those of the methods without an anchor joined to every anchor."""
    alone: dict[tuple[str, str, int], dict[str, tuple[float, float]]] = defaultdict(dict)
    anchored: dict[tuple[str, str, int, int], dict[str, tuple[float, float]]] = defaultdict(dict)
    exact: dict[tuple[str, int], dict[str, float]] = defaultdict(dict)
    drift: dict[tuple[str, str, int, int], float] = {}
    for row in rows:
        exact[row.run, row.step][row.layer] = row.exact
        if row.anchor is None or row.drift is None:
            alone[row.run, row.layer, row.step][row.method] = (row.alpha, row.error)
        else:
            place = (row.run, row.layer, row.step, row.anchor)
            anchored[place][row.method] = (row.alpha, row.error)
            drift[place] = row.drift
    found = []
    for place, methods in anchored.items():
        run, layer, step, _ = place
        alphas = exact[run, step]
        spread = max(alphas.values()) - min(alphas.values())
        both = {**methods, **alone[run, layer, step]}
        found.append(Case(run, drift[place], alphas[layer], spread, both))
    return found


def name(bucket: tuple[float, float]) -> str:
    low, high = bucket
    return f"{100 * low:g}–{100 * high:g} %" if low else f"< {100 * high:g} %"


def rms(values: Iterable[float]) -> float:
    """Root mean square; NaN of nothing."""
    squares = np.square(list(values))
    return math.sqrt(squares.mean()) if len(squares) else math.nan


def percent(value: float) -> str:
    """A share in per cent, without the sign; a dash for none."""
    if math.isnan(value):
        return "–"
    return f"{100 * value:.2f}" if value < 0.1 else f"{100 * value:.1f}"


def relative(some: Sequence[Case], method: str) -> float:
    return rms(case.miss(method) / case.exact for case in some)


def coverage(errors: Iterable[tuple[float, float]]) -> float:
    """Share of (true error, standard error) with the first within twice the second."""
    within = [miss <= 2 * error for miss, error in errors if not math.isnan(error)]
    return float(np.mean(within)) if within else math.nan


def within(some: Sequence[Case], method: str) -> float:
    """Coverage of a method over the cases that are in a bucket."""
    near = [case for case in some if case.bucket()]
    return coverage((case.miss(method), case.found[method][1]) for case in near)


def table(some: Sequence[Case]) -> str:
    """Markdown: methods down, buckets of drift across."""
    by_bucket = {bucket: [case for case in some if case.bucket() == bucket] for bucket in BUCKETS}
    heads = [name(bucket) for bucket in BUCKETS]
    lines = [
        markdown(["drift", *heads, "within 2 errors"]),
        markdown(["---"] * (len(BUCKETS) + 2)),
        markdown(["cases", *(str(len(found)) for found in by_bucket.values()), ""]),
    ]
    for method, label in METHODS.items():
        cells = [label]
        for found in by_bucket.values():
            spread = rms(case.miss(method) / case.spread for case in found)
            both = f"{percent(relative(found, method))} / {percent(spread)}"
            cells.append(both if found else "–")
        share = within(some, method)
        cells.append("–" if method == "exact" or math.isnan(share) else f"{100 * share:.0f} %")
        lines.append(markdown(cells))
    return "\n".join(lines)


def markdown(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def synthetic_table(rows: Sequence[Row]) -> str:
    """Markdown: spectra down, N and probes across."""
    fresh = sorted(
        {(row.n, row.method) for row in rows if row.method != "exact"},
        key=lambda key: (key[0], int(key[1].removeprefix("fresh p"))),
    )
    heads = [f"{n} {method.removeprefix('fresh ')}" for n, method in fresh]
    lines = [
        markdown(["spectrum", *heads, "within 2 errors", "exact"]),
        markdown(["---"] * (len(heads) + 3)),
    ]
    for spectrum in dict.fromkeys(row.run for row in rows):
        mine = [row for row in rows if row.run == spectrum]
        miss: dict[tuple[int, str], list[float]] = defaultdict(list)
        for row in mine:
            miss[row.n, row.method].append(abs(row.alpha / row.exact - 1))
        share = coverage(
            (abs(row.alpha - row.exact), row.error) for row in mine if row.method != "exact"
        )
        worst = max(max(values) for key, values in miss.items() if key[1] == "exact")
        cells = [percent(rms(miss.get(key, ()))) for key in fresh]
        lines.append(markdown([spectrum, *cells, f"{100 * share:.0f} %", f"{100 * worst:.0e}"]))
    return "\n".join(lines)


def synthetic_reading(rows: Sequence[Row]) -> str:
    """Where more probes do not help, and where the standard error is too small."""
    biased, short = [], []
    for spectrum in dict.fromkeys(row.run for row in rows):
        mine = [row for row in rows if row.run == spectrum and row.method != "exact"]
        largest = max(row.n for row in mine if row.method == "fresh p16")
        misses: dict[str, list[float]] = defaultdict(list)
        for row in mine:
            if row.n == largest:
                misses[row.method].append(row.alpha / row.exact - 1)
        few, many = rms(misses["fresh p4"]), rms(misses["fresh p16"])
        share = coverage((abs(row.alpha - row.exact), row.error) for row in mine)
        # Four times the probes should halve the error.
        if many > 0.75 * few:
            biased.append(f"{spectrum} ({percent(many)} % at N = {largest})")
        if share < PROMISED:
            short.append(f"{spectrum} ({100 * share:.0f} %)")
    text = "What chance adds to the error falls as the root of 1 / (p N)."
    if biased:
        text += (
            " Where p16 is hardly better than p4, the 20 steps set the error, and probes do not "
            f"help: {listed(biased)}."
        )
    if short:
        text += f" Standard errors that are too small: {listed(short)} within 2 errors."
    return text


def reading(some: Sequence[Case]) -> str:
    """What a table says, in sentences."""
    best: list[tuple[str, str]] = []
    losing: list[str] = []
    for bucket in BUCKETS:
        found = [case for case in some if case.bucket() == bucket]
        if len(found) < LEAST_CASES:
            continue
        head = name(bucket)
        errors = {method: relative(found, method) for method in RIVALS}
        winner = min(errors, key=lambda method: errors[method])
        # Within a tenth of the smallest error nothing is better that is dearer.
        cheapest = next(m for m in RIVALS if errors[m] <= 1.1 * errors[winner])
        best.append((METHODS[cheapest], head))
        if errors["fresh p8"] > errors["stale"]:
            losing.append(head)
    grouped: dict[str, list[str]] = defaultdict(list)
    for method, head in best:
        grouped[method].append(head)
    parts = [f"{method} at a drift of {listed(heads)}" for method, heads in grouped.items()]
    if not best:
        return f"No bucket has {LEAST_CASES} cases."
    text = (
        f"Cheapest within a tenth of the smallest error: {'; '.join(parts)} (buckets of "
        f"{LEAST_CASES} cases or more)."
    )
    if losing:
        text += f" Fresh p8 is worse than doing nothing (stale) at {listed(losing)}."
    shares = {METHODS[method]: within(some, method) for method in METHODS if method != "exact"}
    short = [f"{label} ({100 * x:.0f} %)" for label, x in shares.items() if x < PROMISED]
    if short:
        text += f" Standard errors that are too small: {listed(short)} within 2 errors."
    return text


def listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def gains(some: Sequence[Case]) -> str:
    """How much lin gains over stale, by run."""
    near = [case for case in some if 0.02 <= case.drift < 0.1]
    ratios: dict[str, float] = {}
    for run in dict.fromkeys(case.run for case in near):
        mine = [case for case in near if case.run == run]
        if len(mine) >= LEAST_CASES:
            ratios[run] = relative(mine, "lin") / relative(mine, "stale")
    told = ", ".join(f"{run} {ratio:.2f}" for run, ratio in ratios.items())
    return f"Error of lin over that of stale at a drift of 2–10 %, by training: {told}."


def dropped(some: Sequence[Case]) -> str:
    far = sum(case.bucket() is None for case in some)
    return f"Cases with a drift of 80 % or more, left out: {far} of {len(some)}."


def spreads(some: Sequence[Case]) -> str:
    """Range of the spread by run."""
    by_run: dict[str, list[float]] = defaultdict(list)
    for case in some:
        by_run[case.run].append(case.spread)
    told = (f"{run} {min(values):.2f} to {max(values):.2f}" for run, values in by_run.items())
    return f"Spread of alpha: {', '.join(told)}."


def report(rows: Sequence[Row], versions: str) -> str:
    """The whole document."""
    parts = [INTRODUCTION.format(versions=versions)]
    trained = [row for row in rows if row.source in SOURCES]
    everything = cases(trained)
    said = " ".join(say(everything) for say in (reading, gains, dropped))
    parts += ["## All trainings\n", table(everything), "", f"{said}\n"]
    for source, title in SOURCES.items():
        mine = cases([row for row in trained if row.source == source])
        if mine:
            said = " ".join(say(mine) for say in (reading, dropped, spreads))
            parts += [f"## {title}\n", f"{RUNS[source]}\n", table(mine), "", f"{said}\n"]
    synthetic = [row for row in rows if row.source == "synthetic"]
    if synthetic:
        parts += ["## Known spectra\n", f"{SYNTHETIC}\n", synthetic_table(synthetic), ""]
        parts += [f"{synthetic_reading(synthetic)}\n"]
    return "\n".join(parts)
