"""The alphas of a set of layers over a run: what is measured, when, and what is made of it."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from tbfast.budget import Budget
from tbfast.fitting import Reason
from tbfast.matrices import Layer
from tbfast.presets import Options
from tbfast.shape import aspect_ratio, is_noise, noise_alpha, sides, square_blocks
from tbfast.spectra import Measurement, measure

_BROKEN_REFRESHES = 3  # refreshes without one finite layer before the run is given up
_PER_LAYER = ("alpha", "error", "measured_at", "lost", "left_noise")


class Tracker:
    """Alpha and standard error of each layer, by row.

    Args:
        layers: The layers.
        options: Resolved options.

    Attributes:
        alpha: Latest alphas, corrected and smoothed as the options say; NaN before the first.
        error: Standard errors of the latest fits; NaN before the first.
        measured_at: Steps of the latest measurements, -1 before the first.
        lost: Whether the latest measurement gave no alpha.
        left_noise: Whether alpha has been outside the band of noise (``start="auto"`` only).
        budget: What may be measured.
    """

    def __init__(self, layers: Sequence[Layer], options: Options) -> None:
        n = len(layers)
        self.alpha = [math.nan] * n
        self.error = [math.nan] * n
        self.measured_at = [-1] * n
        self.lost = [False] * n
        self.left_noise = [False] * n
        # An eigensolver's work: entries times the shorter side.
        costs = [math.prod(layer.shape) * min(sides(layer.shape, layer.kind)) for layer in layers]
        self.budget = Budget(costs, options.budget)
        self._layers = layers
        self._options = options
        self._broken = 0
        self._warned: set[str] = set()

    def update(self, weights: Mapping[int, Tensor], step: int) -> bool:
        """Measure as many of these tensors, by row, as the budget allows.

        Returns:
            Whether any was measured.

        Raises:
            ValueError: If a tensor does not have the shape of its layer.
            RuntimeError: If no tensor was finite in 3 refreshes in a row.
        """
        rows = self.budget.affordable(list(weights), self.measured_at)
        if not rows:
            return False
        for row in rows:
            layer, shape = self._layers[row], tuple(weights[row].shape)
            if shape != layer.shape:
                raise ValueError(f"{layer.name} must have shape {layer.shape}, got {shape}")
        began = time.perf_counter()
        found = self._measure(rows, [weights[row] for row in rows], step)
        self.budget.record(rows, time.perf_counter() - began)
        for row, measurement in zip(rows, found, strict=True):
            self._absorb(row, measurement, step)
        broken = all(m.fit.reason == Reason.NOT_FINITE.text for m in found)
        self._broken = self._broken + 1 if broken else 0
        if self._broken >= _BROKEN_REFRESHES:
            raise RuntimeError(
                f"no tuned layer was finite in {self._broken} refreshes in a row (step {step}): "
                "the run has diverged; go back to a checkpoint, and lower the learning rate or "
                "clip the gradients"
            )
        return True

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts; lists are by row."""
        rows = {key: list(getattr(self, key)) for key in _PER_LAYER}
        return {"rows": rows, "broken": self._broken, "warned": sorted(self._warned)}

    def load_state_dict(self, state: Mapping[str, Any], order: Sequence[int]) -> None:
        """Take over a state whose row ``order[i]`` is row i here."""
        for key in _PER_LAYER:
            setattr(self, key, [state["rows"][key][row] for row in order])
        self._broken = state["broken"]
        self._warned = set(state["warned"])

    def _measure(
        self, rows: Sequence[int], weights: Sequence[Tensor], step: int
    ) -> list[Measurement]:
        kinds = [self._layers[row].kind for row in rows]
        if self._options.shape_correction == "farms":
            weights = [square_blocks(w, kind) for w, kind in zip(weights, kinds, strict=True)]
            kinds = ["experts"] * len(rows)
        return measure(
            weights,
            kinds,
            self._options.fit,
            names=[self._layers[row].name for row in rows],
            filter_zeros=self._options.filter_zeros,
            sketch=replace(self._options.sketch, draw=step % 2**24),
            method=self._options.method,
            backend=self._options.backend,
        )

    def _absorb(self, row: int, measurement: Measurement, step: int) -> None:
        layer, fit, old = self._layers[row], measurement.fit, self.alpha[row]
        self.measured_at[row] = step
        self.lost[row] = not math.isfinite(fit.alpha)
        if self.lost[row]:
            # A start that has no alpha (orthogonal, zero) is no news; the rest is.
            is_news = fit.reason == Reason.NOT_FINITE.text or math.isfinite(old)
            if is_news and layer.name not in self._warned:
                self._warned.add(layer.name)
                warnings.warn(
                    f"{layer.name} has no alpha at step {step}: {fit.reason}; "
                    "it keeps its last factor",
                    RuntimeWarning,
                    stacklevel=4,
                )
            return
        alpha, xmin_pos = fit.alpha, self._options.fit.xmin_pos
        if self._options.start == "auto" and not self.left_noise[row]:
            self.left_noise[row] = not is_noise(alpha, layer.shape, layer.kind, xmin_pos)
        if self._options.shape_correction == "null":
            ratio = aspect_ratio(layer.shape, layer.kind)
            alpha += noise_alpha(1.0, xmin_pos) - noise_alpha(ratio, xmin_pos)
        ema = self._options.ema
        self.alpha[row] = ema * old + (1 - ema) * alpha if math.isfinite(old) else alpha
        self.error[row] = fit.alpha_error
