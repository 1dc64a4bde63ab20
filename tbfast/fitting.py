"""What a power-law fit takes and gives, shared by every backend."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from enum import IntEnum
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

FitKind = Literal["median", "ks", "peak", "tail"]
FIT_KINDS: tuple[FitKind, ...] = get_args(FitKind)

# Above this alpha the tail is a single value repeated: rounding float32 weights alone spreads
# the eigenvalues of an orthogonal matrix by 1e-7 and gives alphas of 1e6.
MAX_ALPHA = 1e5


class Reason(IntEnum):
    """Why a spectrum has no alpha; the numbers are those of ``csrc/kernels.h``."""

    FITTED = 0
    NO_EIGENVALUES = 1
    NOT_FINITE = 2
    ALL_EQUAL = 3
    NO_CANDIDATE = 4
    TOO_FEW = 5

    @property
    def text(self) -> str | None:
        """The reason in words, None when fitted."""
        return _REASONS[self]


_REASONS: dict[Reason, str | None] = {
    Reason.FITTED: None,
    Reason.NO_EIGENVALUES: "all eigenvalues are zero",
    Reason.NOT_FINITE: "weights or eigenvalues are not finite",
    Reason.ALL_EQUAL: "all eigenvalues of the tail are equal",
    Reason.NO_CANDIDATE: "no eigenvalue qualifies as xmin",
    Reason.TOO_FEW: "too few eigenvalues",
}


@dataclass(frozen=True)
class FitOptions:
    """Which fit, and its parameters.

    Attributes:
        kind: ``"median"``, ``"ks"``, ``"peak"`` or ``"tail"``.
        xmin_pos: ``median``: xmin is the eigenvalue at index ``int(N / xmin_pos)``; above 1.
        smooth: ``median``: ln xmin is the mean over ``int(smooth * N)`` ranks to either side.
            0 is the published fit.
        k: ``tail``: number of largest eigenvalues.
        bins: ``peak``: bins of the histogram of log10 of the eigenvalues.
        peak_compat: ``peak``: compare with the logarithm of the lower bound, as published.
    """

    kind: FitKind = "median"
    xmin_pos: float = 2.0
    smooth: float = 0.0
    k: int = 64
    bins: int = 100
    peak_compat: bool = False

    def __post_init__(self) -> None:
        if self.kind not in FIT_KINDS:
            raise ValueError(f"fit must be one of {', '.join(FIT_KINDS)}; got {self.kind!r}")
        if not (1 < self.xmin_pos < math.inf):
            raise ValueError(f"xmin_pos must be above 1, got {self.xmin_pos!r}")
        if not 0 <= self.smooth < 0.5:
            raise ValueError(f"smooth must lie in [0, 0.5), got {self.smooth!r}")
        if int(self.k) != self.k or self.k < 2:
            raise ValueError(f"k must be a whole number of at least 2, got {self.k!r}")
        if int(self.bins) != self.bins or self.bins < 1:
            raise ValueError(f"bins must be a whole number of at least 1, got {self.bins!r}")

    def arguments(self) -> dict[str, Any]:
        """As the compiled fits take them."""
        return {
            **asdict(self),
            "kind": FIT_KINDS.index(self.kind),
            "max_alpha": MAX_ALPHA,
        }

    def upper_share(self, n: int) -> float:
        """Share of ``n`` eigenvalues, counted from the largest, that the fit looks at.

        The fits that choose among candidates look at all of them: the smallest eigenvalue sets
        the bins of ``peak``, and each is an xmin that ``ks`` may choose.
        """
        if self.kind == "median":
            return min(1.0, 1 - 1 / self.xmin_pos + self.smooth)
        return min(1.0, self.k / n) if self.kind == "tail" and n else 1.0


@dataclass
class FitTable:
    """Fits of many spectra, one row each; NaN and -1 where there is no fit."""

    alpha: NDArray[np.float64]
    xmin: NDArray[np.float64]
    ks: NDArray[np.float64]
    start: NDArray[np.int64]  # index of xmin among the eigenvalues that were fitted
    n_tail: NDArray[np.int64]
    reason: NDArray[np.int64]  # Reason

    @classmethod
    def empty(cls, rows: int) -> FitTable:
        """A table without fits."""
        nan = np.full(rows, math.nan)
        none = np.full(rows, -1, dtype=np.int64)
        zero = np.zeros(rows, dtype=np.int64)
        return cls(nan, nan.copy(), nan.copy(), none, zero, zero.copy())
