"""Means over seeds, paired comparisons, and what they say."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import fmean, stdev

from tbfast.compare_stats import LEVEL, Difference, holm, paired
from tbfast.compare_verdict import plus_minus

SINGLE = "one order"  # stands for the mean over the orders of a seed: what one training gives
METRICS = {"loss": -1, "accuracy": 1}  # the sign of what is better
# What is tested for each metric; p-values are corrected for the number of pairs.
PAIRS = (
    ("linear", SINGLE),
    ("select", SINGLE),
    ("select + resample", SINGLE),
    ("select", "linear"),
    ("select + resample", "select"),
)
FEWEST = 3  # seeds for a claim: two agree too easily by luck

LEGEND = f"""Mean (standard deviation) over seeds; difference to {SINGLE}, paired by seed, ± its
standard error. {SINGLE}: mean over the orders; best order: by validation loss. unchanged: share of
the trained elements with the bits of the starting weights; distance: norm of the difference to
them. A difference counts as found if a paired t-test over {FEWEST} or more seeds has p < {LEVEL:g},
Holm-corrected for {len(PAIRS)} comparisons."""

Rows = dict[str, list["Tested"]]  # the results of each line of the table, one per seed


@dataclass(frozen=True)
class Tested:
    """A checkpoint on the test texts.

    Attributes:
        seed: Of the training and test texts, the dropout and the draws of the merge.
        model: ``order 1`` and so on, ``best order``, or a way to merge.
        loss: Cross-entropy, nats.
        accuracy: Share of right answers, 0 to 1.
        unchanged: Share of the trained elements that have the starting weights' bits, 0 to 1.
        distance: Euclidean norm of the difference to the starting weights.
    """

    seed: int
    model: str
    loss: float
    accuracy: float
    unchanged: float
    distance: float


@dataclass(frozen=True)
class Contrast:
    """How one model differs from another in a metric, paired by seed; p is Holm-corrected."""

    ours: str
    theirs: str
    metric: str
    difference: Difference

    @property
    def found(self) -> bool:
        """Whether the difference is more than noise."""
        return self.difference.n >= FEWEST and self.difference.p < LEVEL

    def __str__(self) -> str:
        better = self.difference.mean * METRICS[self.metric] > 0
        size = plus_minus(abs(self.difference.mean), self.difference.error)
        return f"{self.ours} is {'better' if better else 'worse'} than {self.theirs} by {size}"


def by_model(tested: Iterable[Tested]) -> Rows:
    """Lines of the table, the mean over the orders first."""
    rows: Rows = {SINGLE: []}
    orders: dict[int, list[Tested]] = {}
    for result in tested:
        if re.fullmatch(r"order \d+", result.model):
            orders.setdefault(result.seed, []).append(result)
        else:
            rows.setdefault(result.model, []).append(result)
    for seed, singles in orders.items():
        loss, accuracy, unchanged, distance = (
            fmean(getattr(single, name) for single in singles)
            for name in ("loss", "accuracy", "unchanged", "distance")
        )
        rows[SINGLE].append(Tested(seed, SINGLE, loss, accuracy, unchanged, distance))
    return rows


def contrasts(rows: Rows, metric: str) -> list[Contrast]:
    """All of PAIRS in one metric."""
    raw = [_difference(rows, ours, theirs, metric) for ours, theirs in PAIRS]
    corrected = holm([difference.p for difference in raw])
    return [
        Contrast(ours, theirs, metric, replace(difference, p=p))
        for (ours, theirs), difference, p in zip(PAIRS, raw, corrected, strict=True)
    ]


def table(rows: Rows) -> str:
    """A line for each model: test loss and accuracy, each with its difference to one order."""
    lines = [["", "test loss", "difference", "accuracy", "difference", "unchanged", "distance"]]
    for name, results in rows.items():
        line = [name]
        for metric in METRICS:
            gap = _difference(rows, name, SINGLE, metric)
            line.append(_mean_and_deviation([getattr(result, metric) for result in results]))
            line.append("" if name == SINGLE else plus_minus(gap.mean, gap.error))
        line.append(f"{fmean(result.unchanged for result in results):.2%}")
        line.append(f"{fmean(result.distance for result in results):.3f}")
        lines.append(line)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([head.ljust(widths[0]), *map(str.rjust, cells, widths[1:])])
        for head, *cells in lines
    )


def verdict(rows: Rows) -> str:
    """A sentence for each metric: which differences are more than noise, and which are not."""
    sentences = []
    for metric in METRICS:
        every = contrasts(rows, metric)
        clauses = [str(contrast) for contrast in every if contrast.found]
        if rest := [f"{c.ours} and {c.theirs}" for c in every if not c.found]:
            clauses.append(f"no difference found between {', nor between '.join(rest)}")
        sentences.append(f"Test {metric}, {len(rows[SINGLE])} seeds: {'; '.join(clauses)}.")
    return "\n".join(sentences)


def write_csv(tested: Sequence[Tested], path: Path) -> None:
    """A row for each checkpoint of each seed."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Tested)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(result) for result in tested)


def _difference(rows: Rows, ours: str, theirs: str, metric: str) -> Difference:
    values = [[getattr(result, metric) for result in rows[name]] for name in (ours, theirs)]
    return paired(*values)


def _mean_and_deviation(values: Sequence[float]) -> str:
    """``mean (standard deviation)``, to two digits of the latter."""
    spread = stdev(values)
    digits = 4 if spread == 0 else max(0, 1 - math.floor(math.log10(spread)))
    return f"{fmean(values):.{digits}f} ({spread:.{digits}f})"
