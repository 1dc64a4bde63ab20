"""The alphas of a set of layers over a run: what is known of each, and what is measured next.

Of each layer an estimate of alpha and its variance are kept. While the weights move the variance
grows by (pace · drift · (alpha - 1))², drift being the tangent of the angle by which some kept rows
have turned since the layer was measured. A measurement is taken in as by a one-dimensional Kalman
filter; how far off it finds the estimate teaches the layer's pace. An exact alpha has hardly a
variance and replaces the estimate; sketches average.

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
from tbfast.fitting import Reason
from tbfast.lens import Lens
from tbfast.lora_layers import Weight
from tbfast.matrices import Layer
from tbfast.presets import Options
from tbfast.progress import ticking
from tbfast.shape import aspect_ratio, is_noise, noise_alpha, sides
from tbfast.spectra import Measurement, sketched_above
from tbfast.watch import Notice

_BROKEN_LOOKS = 3  # looks without one finite layer before the run is given up
_RETRY = 100  # steps before a layer that had no alpha is measured again, where there is a budget
_WORTH = 0.002  # error, as share of the spread of all alphas, below which nothing is measured

# Relative change of alpha - 1 for each unit of drift: at the start, and how fast it is learned.
_PACE = 0.15
_LEARNING = 0.2
_MOST_SURPRISE = 9.0  # squared standard errors that one measurement may teach
_ROUNDING = 1e-6  # relative error of an exact alpha
_FASTEST = 1.0  # drift for each step: more is nonsense from weights that blow up

_PER_LAYER = ("alpha", "estimate", "variance", "pace", "speed", "measured_at", "lost", "left_noise")


class Tracker:
    """Alpha and standard error of each layer, by row.

    Args:
        layers: The layers.
        options: Resolved options.

    Attributes:
        alpha: Latest alphas as the map sees them, corrected and smoothed as the options say; NaN
            before the first.
        measured_at: Steps of the latest measurements, -1 before the first.
        lost: Whether the latest measurement gave no alpha.
        left_noise: Whether alpha has been outside the band of noise (``start="auto"`` only).
        is_starting: Whether some layer that was shown has not been measured at all.
        budget: What may be spent.
    """

    def __init__(self, layers: Sequence[Layer], options: Options) -> None:
        n = len(layers)
        self.alpha = [math.nan] * n
        self.estimate = [math.nan] * n
        self.variance = [math.nan] * n
        self.pace = [_PACE] * n
        self.speed = [0.0] * n  # drift for each step
        self.measured_at = [-1] * n
        self.lost = [False] * n
        self.left_noise = [False] * n
        self.budget = Budget(options.budget)
        self._kept: list[Tensor | None] = [None] * n
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

    def error(self, step: int) -> list[float]:
        """Standard errors of ``alpha`` at this step; NaN where there is no alpha."""
        return [math.sqrt(self._predicted(row, step)) for row in range(len(self._layers))]

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
            if self.measured_at[row] < 0 or (keeps and self._kept[row] is None)
        ]
        if new:
            self._measure_first(lens, new, step)
        self.is_starting = any(self.measured_at[row] < 0 for row in weights)
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
        rows: dict[str, Any] = {key: list(getattr(self, key)) for key in _PER_LAYER}
        return {
            "rows": rows,
            "kept": list(self._kept),
            "budget": self.budget.state_dict(),
            "broken": self._broken,
            "is_starting": self.is_starting,
            "warned": sorted(self._notice.told),
        }

    def load_state_dict(self, state: Mapping[str, Any], order: Sequence[int]) -> None:
        """Take over a state whose row ``order[i]`` is row i here."""
        for key in _PER_LAYER:
            setattr(self, key, [state["rows"][key][row] for row in order])
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
            if (age := step - self.measured_at[row]) > 0:
                # A layer that is no longer finite, or turned by 90°, has gone as far as there is.
                self.speed[row] = min(_FASTEST, turned / age if turned < math.inf else _FASTEST)
        ranked = self._ranked(rows, step)
        budget.limit(joint_cost(self._costs, lens.workers) + look)
        count, price = budget.afford([self._costs[row] for row in ranked], lens.workers, look)
        if count:
            self._measure(lens, sorted(ranked[:count]), step)
        budget.pay(price, time.perf_counter() - began)
        return count > 0

    def _ranked(self, rows: Sequence[int], step: int) -> list[int]:
        """Those of ``rows`` that are worth measuring, the most promising first."""
        finite = [a for a in self.estimate if math.isfinite(a)]
        spread = max(finite) - min(finite) if finite else 0.0
        worth = 0.0 if self.budget.is_granted else (_WORTH * spread) ** 2
        value = {}
        for row in rows:
            age = step - self.measured_at[row]
            if self.lost[row]:
                if age >= _RETRY or (self.budget.is_granted and age > 0):
                    value[row] = math.inf
            elif age > 0 and (variance := self._predicted(row, step)) >= worth:
                value[row] = variance * age / self._costs[row]
        return sorted(value, key=lambda row: (-value[row], row))

    def _predicted(self, row: int, step: int) -> float:
        """Variance of the estimate of a layer at this step."""
        moved = self.speed[row] * (step - self.measured_at[row])
        return self.variance[row] + (self.pace[row] * moved * (self.estimate[row] - 1)) ** 2

    def _measure(self, lens: Lens, rows: Sequence[int], step: int) -> list[bool]:
        """Measure layers; of each, whether it is finite."""
        found = lens.measure(rows, self._options.method, step)
        news: dict[str, list[str]] = {}
        for row, measurement in zip(rows, found, strict=True):
            fit = measurement.fit
            self.lost[row] = not math.isfinite(fit.alpha)
            if not self.lost[row]:
                self._absorb(row, measurement, step)
            # A start that has no alpha (orthogonal, zero) is no news; the rest is.
            elif fit.reason == Reason.NOT_FINITE.text or math.isfinite(self.alpha[row]):
                news.setdefault(str(fit.reason), []).append(self._layers[row].name)
            self.measured_at[row] = step
        if self.budget.share is not None:
            again = [row for row in rows if not self.lost[row] or self._kept[row] is None]
            for row, kept in zip(again, lens.keep(again), strict=True):
                self._kept[row] = kept.nan_to_num(0.0, 0.0, 0.0)  # to be seen when it recovers
        for reason, names in news.items():
            self._notice(names, f"has no alpha at step {step}: {reason}; its last factor stays")
        return [m.fit.reason != Reason.NOT_FINITE.text for m in found]

    def _absorb(self, row: int, measurement: Measurement, step: int) -> None:
        layer, alpha = self._layers[row], measurement.fit.alpha
        error = max(measurement.sketch_error, _ROUNDING * alpha)
        self._filter(row, alpha, error**2, step)
        alpha, xmin_pos = self.estimate[row], self._options.fit.xmin_pos
        if self._options.start == "auto" and not self.left_noise[row]:
            self.left_noise[row] = not is_noise(alpha, layer.shape, layer.kind, xmin_pos)
        if self._options.shape_correction == "null":
            ratio = aspect_ratio(layer.shape, layer.kind)
            alpha += noise_alpha(1.0, xmin_pos) - noise_alpha(ratio, xmin_pos)
        old, ema = self.alpha[row], self._options.ema
        self.alpha[row] = ema * old + (1 - ema) * alpha if math.isfinite(old) else alpha

    def _filter(self, row: int, alpha: float, variance: float, step: int) -> None:
        """Take in a measured alpha: the Kalman filter of a random walk."""
        if not (self._is_rationed(step) and math.isfinite(self.estimate[row])):
            self.estimate[row], self.variance[row] = alpha, variance
            return
        before = self._predicted(row, step)
        gain, surprise = before / (before + variance), alpha - self.estimate[row]
        by_drift = 1 - (self.variance[row] + variance) / (before + variance)
        if by_drift > 0:
            # The part of the expected square that drift is to answer for learns from the found one.
            found = min(surprise**2 / (before + variance), _MOST_SURPRISE)
            self.pace[row] *= math.sqrt(1 + _LEARNING * by_drift * (found - 1))
        self.estimate[row] += gain * surprise
        self.variance[row] = (1 - gain) * before

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
