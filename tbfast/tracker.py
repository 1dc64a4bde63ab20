"""The alphas of a set of layers over a run: what is measured next, for how much time.

With a budget, whenever it allows, the layers are measured that promise most: by variance times age
over cost, which makes the mean squared error over time least if variances grow evenly.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from tbfast.budget import Budget, joint_cost, layer_cost, look_cost
from tbfast.distributed import make_lens
from tbfast.estimates import Estimates
from tbfast.fitting import Reason
from tbfast.lens import Lens
from tbfast.lora_layers import Weight
from tbfast.matrices import Layer
from tbfast.presets import Options
from tbfast.progress import ticking
from tbfast.shape import sides
from tbfast.spectra import sketched_above
from tbfast.watch import Notice

_BROKEN_LOOKS = 3  # looks without one finite layer before the run is given up
_RETRY = 100  # steps before a layer that had no alpha is measured again, where there is a budget
_WORTH = 0.002  # error, as share of the spread of all alphas, below which nothing is measured


class Tracker:
    """Keeps the alphas of layers up to date, by row.

    Args:
        layers: The layers.
        options: Resolved options.

    Attributes:
        known: What is known of each layer.
        is_starting: Whether some layer that was shown has not been measured at all.
        budget: What may be spent.
    """

    def __init__(self, layers: Sequence[Layer], options: Options) -> None:
        self.known = Estimates(layers, options)
        self.budget = Budget(options.budget)
        self._kept: list[Tensor | None] = [None] * len(layers)
        self._layers = layers
        self._options = options
        self._lens: Lens | None = None
        self._costs: list[float] = []
        self._broken = 0
        self._notice = Notice()
        self.is_starting = True

    def tick(self) -> None:
        """Count an optimizer step."""
        self.budget.tick(self._lens.agree if self._lens else lambda seconds: seconds)

    @property
    def is_ready(self) -> bool:
        """Whether something can be measured now, if weights are shown."""
        return self.is_starting or self.budget.is_ready

    def update(self, weights: Mapping[int, Weight], step: int) -> bool:
        """Measure as many of these tensors, by row, as the budget allows.

        Returns:
            Whether any was measured.

        Raises:
            ValueError: If a tensor does not have the shape of its layer.
            RuntimeError: If no tensor was finite in 3 looks in a row.
        """
        if not weights:
            return False
        lens = self._shown(weights)
        try:
            return self._look(lens, list(weights), step)
        finally:
            lens.show({})  # gradients live no longer for being looked at

    def _look(self, lens: Lens, weights: Sequence[int], step: int) -> bool:
        keeps = self.budget.share is not None  # but a state saved without a budget kept no rows
        new = [
            row
            for row in weights
            if self.known.measured_at[row] < 0 or (keeps and self._kept[row] is None)
        ]
        if new:
            self._measure_first(lens, new, step)
        self.is_starting = any(self.known.measured_at[row] < 0 for row in weights)
        if not self._is_rationed(step):
            if rows := [row for row in weights if row not in new]:
                began = time.perf_counter()
                finite = self._measure(lens, rows, step)
                self.budget.pay(0.0, time.perf_counter() - began)  # no credit to take it from
                self._count_broken([*finite, bool(new)], step)
            return True
        old = [row for row in weights if row not in new and self._kept[row] is not None]
        return self._measure_some(lens, old, step) or bool(new)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists, dicts and tensors; lists are by row."""
        return {
            "rows": self.known.state_dict(),
            "kept": list(self._kept),
            "budget": self.budget.state_dict(),
            "broken": self._broken,
            "is_starting": self.is_starting,
            "warned": sorted(self._notice.told),
        }

    def load_state_dict(self, state: Mapping[str, Any], order: Sequence[int]) -> None:
        """Take over a state whose row ``order[i]`` is row i here."""
        self.known.load_state_dict(state["rows"], order)
        self._kept = [state["kept"][row] for row in order]
        self.budget.load_state_dict(state["budget"])
        self._broken = state["broken"]
        self.is_starting = state["is_starting"]
        self._notice.told = set(state["warned"])

    def _shown(self, weights: Mapping[int, Weight]) -> Lens:
        if self._lens is None:
            self._lens = make_lens(self._layers, self._options, weights)
        self.budget.clock.device = next(iter(weights.values())).device
        self._lens.show(weights)
        if len(self._costs) < len(self._layers):
            shown = enumerate(self._layers)
            self._costs = [self._cost(layer, weights.get(row)) for row, layer in shown]
        return self._lens

    def _cost(self, layer: Layer, weight: Weight | None) -> float:
        o = self._options
        least = sketched_above(o.method, o.fit, o.filter_zeros, o.sketch)
        sketch = (o.sketch.probes, o.sketch.steps)
        is_sketched = min(sides(layer.shape, layer.kind)) > least
        is_complex = isinstance(weight, Tensor) and weight.is_complex()
        return layer_cost(layer, is_complex=is_complex, sketch=sketch if is_sketched else None)

    def _measure_first(self, lens: Lens, rows: Sequence[int], step: int) -> None:
        """The first measurement of layers: free, in parts, with a bar if it takes long."""
        rows = rows[: math.ceil(len(self._layers) / max(1, self._options.warm_start))]
        costs = [self._costs[row] for row in rows]
        takes_long = joint_cost(costs, lens.workers) > 1
        with ticking(takes_long and sys.stderr.isatty(), "first spectra", len(rows)) as tick:
            for some in _portions(rows, costs, lens.workers):
                began = time.perf_counter()
                self._measure(lens, some, step)
                nominal = joint_cost([self._costs[row] for row in some], lens.workers)
                self.budget.pay_first(nominal, time.perf_counter() - began)
                tick(rows.index(some[-1]) + 1, len(rows), self._layers[some[-1]].name)

    def _measure_some(self, lens: Lens, rows: Sequence[int], step: int) -> bool:
        """Look how far layers have moved, and measure the most promising that can be paid for."""
        budget, began = self.budget, time.perf_counter()
        look = look_cost(len(rows))
        if not rows or not budget.is_ready:
            return False
        drift = lens.turned(rows, [kept for row in rows if (kept := self._kept[row]) is not None])
        self._count_broken([not math.isnan(turned) for turned in drift.tolist()], step)
        for row, turned in zip(rows, drift.tolist(), strict=True):
            self.known.move(row, turned, step)
        ranked = self._ranked(rows, step)
        budget.limit(joint_cost(self._costs, lens.workers) + look)
        count, price = budget.afford([self._costs[row] for row in ranked], lens.workers, look)
        if count:
            self._measure(lens, sorted(ranked[:count]), step)
        budget.pay(price, time.perf_counter() - began)
        return count > 0

    def _ranked(self, rows: Sequence[int], step: int) -> list[int]:
        """Those of ``rows`` that are worth measuring, the most promising first."""
        known, spread = self.known, self.known.spread
        worth = 0.0 if self.budget.is_granted else (_WORTH * spread) ** 2
        value = {}
        for row in rows:
            age = step - known.measured_at[row]
            if known.lost[row]:
                if age >= _RETRY or (self.budget.is_granted and age > 0):
                    value[row] = math.inf
            elif age > 0 and (variance := known.predicted(row, step)) >= worth:
                value[row] = variance * age / self._costs[row]
        return sorted(value, key=lambda row: (-value[row], row))

    def _measure(self, lens: Lens, rows: Sequence[int], step: int) -> list[bool]:
        """Measure layers; of each, whether it is finite."""
        found = lens.measure(rows, self._options.method, step)
        news: dict[str, list[str]] = {}
        for row, measurement in zip(rows, found, strict=True):
            self.known.take(row, measurement, step, anew=not self._is_rationed(step))
            reason = measurement.fit.reason
            # A start that has no alpha (orthogonal, zero) is no news; the rest is.
            had_alpha = math.isfinite(self.known.alpha[row])
            if reason and (had_alpha or reason == Reason.NOT_FINITE.text):
                news.setdefault(reason, []).append(self._layers[row].name)
        if self.budget.share is not None:
            again = [row for row in rows if not self.known.lost[row] or self._kept[row] is None]
            for row, kept in zip(again, lens.keep(again), strict=True):
                self._kept[row] = kept.nan_to_num(0.0, 0.0, 0.0)  # to be seen when it recovers
        for reason, names in news.items():
            self._notice(names, f"has no alpha at step {step}: {reason}; its last factor stays")
        return [m.fit.reason != Reason.NOT_FINITE.text for m in found]

    def _is_rationed(self, step: int) -> bool:
        return self.budget.share is not None and step > 0

    def _count_broken(self, finite: Sequence[bool], step: int) -> None:
        self._broken = 0 if any(finite) else self._broken + 1
        if self._broken >= _BROKEN_LOOKS:
            raise RuntimeError(
                f"no tuned layer was finite in {self._broken} refreshes in a row (step {step}): "
                "the run has diverged; go back to a checkpoint, and lower the learning rate or "
                "clip the gradients"
            )


def _portions(rows: Sequence[int], costs: Sequence[float], workers: int) -> list[list[int]]:
    """Rows in portions of a tenth of a nominal second, so that a bar has something to show."""
    portions: list[list[int]] = [[]]
    filled = 0.0
    for row, cost in zip(rows, costs, strict=True):
        if filled > 0.1 * workers and len(portions[-1]) >= workers:
            portions.append([])
            filled = 0.0
        portions[-1].append(row)
        filled += cost
    return portions
