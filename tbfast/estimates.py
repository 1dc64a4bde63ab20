"""What is known of each layer's alpha: an estimate, its variance, and how fast it moves.

While the weights move the variance grows by (pace · drift · (alpha - 1))², drift being the tangent
of the angle by which some kept rows have turned since the layer was measured. A measurement is
taken in as by a one-dimensional Kalman filter; how far off it finds the estimate teaches the
layer's pace. An exact alpha has hardly a variance and replaces the estimate; sketches average.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tbfast.matrices import Layer
from tbfast.presets import Options
from tbfast.shape import aspect_ratio, is_noise, noise_alpha
from tbfast.spectra import Measurement

# Relative change of alpha - 1 for each unit of drift: at the start, and how fast it is learned.
_PACE = 0.15
_LEARNING = 0.2
_MOST_SURPRISE = 9.0  # squared standard errors that one measurement may teach
_ROUNDING = 1e-6  # relative error of an exact alpha
_FASTEST = 1.0  # drift for each step: more is nonsense from weights that blow up

_PER_LAYER = ("alpha", "estimate", "variance", "pace", "speed", "measured_at", "lost", "left_noise")


class Estimates:
    """Alpha and standard error of each layer, by row.

    Args:
        layers: The layers.
        options: Resolved options.

    Attributes:
        alpha: Latest alphas as the map sees them, corrected and smoothed as the options say; NaN
            before the first.
        estimate, variance: Of alpha, at the latest measurement.
        pace: Relative change of alpha - 1 for each unit of drift.
        speed: Drift for each step.
        measured_at: Steps of the latest measurements, -1 before the first.
        lost: Whether the latest measurement gave no alpha.
        left_noise: Whether alpha has been outside the band of noise (``start="auto"`` only).
    """

    def __init__(self, layers: Sequence[Layer], options: Options) -> None:
        n = len(layers)
        self.alpha = [math.nan] * n
        self.estimate = [math.nan] * n
        self.variance = [math.nan] * n
        self.pace = [_PACE] * n
        self.speed = [0.0] * n
        self.measured_at = [-1] * n
        self.lost = [False] * n
        self.left_noise = [False] * n
        self._layers = layers
        self._options = options

    def error(self, step: int) -> list[float]:
        """Standard errors of ``alpha`` at this step; NaN where there is no alpha."""
        return [math.sqrt(self.predicted(row, step)) for row in range(len(self._layers))]

    def predicted(self, row: int, step: int) -> float:
        """Variance of the estimate of a layer at this step."""
        moved = self.speed[row] * (step - self.measured_at[row])
        return self.variance[row] + (self.pace[row] * moved * (self.estimate[row] - 1)) ** 2

    @property
    def spread(self) -> float:
        """Largest estimate minus smallest."""
        finite = [a for a in self.estimate if math.isfinite(a)]
        return max(finite) - min(finite) if finite else 0.0

    def move(self, row: int, drift: float, step: int) -> None:
        """Note how far a layer has turned since it was measured; NaN if it is not finite."""
        if (age := step - self.measured_at[row]) > 0:
            # A layer that is no longer finite, or turned by 90°, has gone as far as there is.
            self.speed[row] = min(_FASTEST, drift / age if drift < math.inf else _FASTEST)

    def take(self, row: int, measurement: Measurement, step: int, *, anew: bool) -> None:
        """Take in what was measured of a layer.

        Args:
            row: The layer.
            measurement: Its fit, which may have no alpha.
            step: The present step.
            anew: Forget what was known, rather than weigh it against the measurement.
        """
        alpha = measurement.fit.alpha
        self.lost[row] = not math.isfinite(alpha)
        if not self.lost[row]:
            error = max(measurement.sketch_error, _ROUNDING * alpha)
            if anew or not math.isfinite(self.estimate[row]):
                self.estimate[row], self.variance[row] = alpha, error**2
            else:
                self._filter(row, alpha, error**2, step)
            self._show(row)
        self.measured_at[row] = step

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers; lists are by row."""
        return {key: list(getattr(self, key)) for key in _PER_LAYER}

    def load_state_dict(self, state: Mapping[str, Any], order: Sequence[int]) -> None:
        """Take over a state whose row ``order[i]`` is row i here."""
        for key in _PER_LAYER:
            setattr(self, key, [state[key][row] for row in order])

    def _filter(self, row: int, alpha: float, variance: float, step: int) -> None:
        """The Kalman filter of a random walk."""
        before = self.predicted(row, step)
        gain, surprise = before / (before + variance), alpha - self.estimate[row]
        by_drift = 1 - (self.variance[row] + variance) / (before + variance)
        if by_drift > 0:
            # The part of the expected square that drift is to answer for learns from the found one.
            found = min(surprise**2 / (before + variance), _MOST_SURPRISE)
            self.pace[row] *= math.sqrt(1 + _LEARNING * by_drift * (found - 1))
        self.estimate[row] += gain * surprise
        self.variance[row] = (1 - gain) * before

    def _show(self, row: int) -> None:
        """Alpha as the map is to see it."""
        layer, alpha, o = self._layers[row], self.estimate[row], self._options
        xmin_pos = o.fit.xmin_pos
        if o.start == "auto" and not self.left_noise[row]:
            self.left_noise[row] = not is_noise(alpha, layer.shape, layer.kind, xmin_pos)
        if o.shape_correction == "null":
            ratio = aspect_ratio(layer.shape, layer.kind)
            alpha += noise_alpha(1.0, xmin_pos) - noise_alpha(ratio, xmin_pos)
        old = self.alpha[row]
        self.alpha[row] = o.ema * old + (1 - o.ema) * alpha if math.isfinite(old) else alpha
