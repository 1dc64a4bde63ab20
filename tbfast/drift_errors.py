"""How far estimates from an anchor are off, given how far the weights have moved since.

All errors are relative errors of T = 1 / (alpha - 1), one standard deviation. They join up to
three parts, with d the tangent of the angle that the weights have turned by, lambda the mean
eigenvalue and xmin the one at the start of the tail:

- *Jitter*, in every estimate: the exact alpha hangs on the one eigenvalue xmin. Unrelated noise of
  relative size d moves its logarithm by 2 d sqrt(lambda / (M xmin)), M the longer side (first-order
  perturbation theory), but not further than to its neighbour.
- *Curvature*, in ``stale`` and ``lin``: noise fills in small eigenvalues, 0.7 d² sqrt(lambda /
  xmin). A first-order change x of ln T leaves another x² / 4.
- *Trend*, in ``stale``: training moves all eigenvalues in concert, 0.25 d. What reshapes the whole
  spectrum at once (every singular value raised to a power, say) moves T by 1 to 4 d; nothing but
  the gradient can tell.
- *Probes*, in ``aligned``: the eigenvectors turn away from the probes, which have become random
  ones when x = d sqrt(lambda / xmin) reaches 1. For x up to 1, p probes err by 2 x / sqrt(p n) and
  the quadrature, whose error at the anchor cancels, by 10 sqrt(x) / steps².

All of it holds while the rank stays: zeros that become eigenvalues shift the rank of xmin.

The constants are round numbers near the maximum of the likelihood on 750 movements of random
matrices (Gaussian, Student, power-law, spiked, products; 64 to 384 eigenvalues; moved at random, by
low rank, by signs of a low-rank update, by decay and mixing, by column, by powers of the singular
values) and 324 of trained ones (an MLP by Adam and SGD, a transformer by Adam).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tbfast.alpha import AlphaFit
from tbfast.fitting import FitOptions

Array = NDArray[np.float64]

_TREND = 0.25
_CURVATURE = 0.7
_SECOND_ORDER = 0.25
_PROBES = 2.0
_STEPS = 10.0
_RESOLUTION = 5e-4  # of quadrature: at the anchor itself, in float32
_WINDOW = 16  # the distance of neighbours is the mean over n / 16 ranks to either side of xmin


@dataclass(frozen=True)
class AnchorErrors:
    """Errors of the estimates from a set of anchors; what they depend on, arrays (layers,).

    Attributes:
        excess: T at the anchor.
        level: sqrt(mean eigenvalue / xmin).
        spacing: Distance of the logarithms of neighbouring eigenvalues at xmin.
        longer: Longer side of the layer's matrices.
        count: Number of eigenvalues, zeros dropped.
        averaged: Number of eigenvalues that xmin is the mean of.
    """

    excess: Array
    level: Array
    spacing: Array
    longer: Array
    count: Array
    averaged: Array

    @classmethod
    def of(
        cls, values: Sequence[Tensor], longer: Sequence[int], fit: AlphaFit, options: FitOptions
    ) -> AnchorErrors:
        """Those of anchors.

        Args:
            values: Eigenvalues of each layer's matrices, zeros included.
            longer: Longer side of each layer's matrices.
            fit: The fit of each layer.
            options: The fit's options.
        """
        nan = np.full(len(values), math.nan)
        scales = cls(
            1 / (fit.alpha - 1), nan, nan.copy(), np.array(longer, float), nan.copy(), nan.copy()
        )
        for layer, all_values in enumerate(values):
            if fit.reason[layer] is not None:
                continue
            pooled = np.sort(all_values.numpy(), axis=None)
            kept = pooled[fit.n_zeros[layer] :]
            n, start = len(kept), len(kept) - int(fit.n_tail[layer])
            reach = max(1, n // _WINDOW)
            low, high = max(0, start - reach), min(n - 1, start + reach)
            half_width = int(options.smooth * n) if options.kind == "median" else 0
            scales.level[layer] = math.sqrt(pooled.mean() / kept[start])
            scales.spacing[layer] = math.log(kept[high] / kept[low]) / max(1, high - low)
            scales.count[layer] = n
            scales.averaged[layer] = 2 * half_width + 1
        return scales

    def stale(self, turned: Array) -> Array:
        """Relative error of T of the anchor, for weights that have turned so far (layers,)."""
        return np.hypot(self.lin(turned, np.zeros_like(turned)), _TREND * turned)

    def lin(self, turned: Array, change: Array) -> Array:
        """The same with the first-order change of ln T added."""
        noise = np.hypot(self._jitter(turned), _CURVATURE * turned**2 * self.level)
        return np.hypot(noise, _SECOND_ORDER * change**2)

    def aligned(self, turned: Array, probes: int, steps: int) -> Array:
        """The same by quadrature from the anchor's eigenvectors."""
        share = np.minimum(1, turned * self.level)
        drawn = _PROBES * share / np.sqrt(probes * self.count)
        truncated = _STEPS * np.sqrt(share) / steps**2
        parts = np.stack(
            [self._jitter(turned), drawn, truncated, np.full_like(turned, _RESOLUTION)]
        )
        error: Array = np.sqrt((parts**2).sum(axis=0))
        return error

    def _jitter(self, turned: Array) -> Array:
        first_order = 2 * turned * self.level / np.sqrt(self.longer)
        bounded = first_order * self.spacing / np.hypot(first_order, self.spacing)
        jitter: Array = bounded / (self.excess * np.sqrt(self.averaged))
        return jitter
