"""What the analyser found: a record for every weight, and the table of them."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, overload

import numpy as np
import torch

from tbfast.files import PathLike, write_whole
from tbfast.matrices import Kind, Role

# Elements of weights measured in one call, per thread, so that small layers keep all threads busy.
_BATCH_ELEMENTS = 2**23

_WIDEST = {False: torch.float64, True: torch.complex128}


@dataclass(frozen=True)
class LayerSpectrum:
    """Spectrum and fit of one weight; alphas and norms are dimensionless.

    ``log_spectral_norm`` and ``alpha_weighted`` follow WeightWatcher's definitions (Martin, Peng
    and Mahoney, Nature Communications 12, 2021): both are of lambda_max, the *squared* spectral
    norm. The norms are those of the matrices analysed: of all slices together for the Frobenius
    norm, of the largest one for the spectral norm, times sqrt(0.5) for convolutions.

    Attributes:
        name: Parameter name.
        shape: Shape of the weight.
        n_eigs: Number of eigenvalues, zeros included.
        alpha: Tail exponent, NaN where there is none.
        alpha_error: Its standard error: that of the fit, and of the sketch where there was one.
        xmin: Smallest eigenvalue of the tail.
        n_tail: Number of eigenvalues in the tail.
        ks: Kolmogorov-Smirnov distance between tail and fit.
        spectral_norm: Largest singular value.
        frobenius_norm: Root of the sum of the squared singular values.
        stable_rank: (frobenius_norm / spectral_norm)².
        log_spectral_norm: log10(lambda_max).
        alpha_weighted: alpha * log10(lambda_max).
        method: ``"exact"`` or ``"sketch"``.
        reason: Why there is no alpha, None when fitted.
        n_zeros: Eigenvalues that were numerically zero and left out of the fit.
        role: ``"embedding"``, ``"head"`` or None.
        kind: How the weight became matrices, see :mod:`tbfast.matrices`.
        sketch_error: Standard error of alpha against that of the exact spectrum; 0 if exact.
    """

    name: str
    shape: tuple[int, ...]
    n_eigs: int
    alpha: float
    alpha_error: float
    xmin: float
    n_tail: int
    ks: float
    spectral_norm: float
    frobenius_norm: float
    stable_rank: float
    log_spectral_norm: float
    alpha_weighted: float
    method: str
    reason: str | None
    n_zeros: int
    role: Role | None
    kind: Kind
    sketch_error: float

    @property
    def note(self) -> str:
        """What a reader of a table should know: the role, and why there is no alpha."""
        return "; ".join(filter(None, (self.role, self.reason)))


class Report(Sequence[LayerSpectrum]):
    """Records of all analysed weights, in model order.

    Attributes:
        source: What was analysed: a path, or the class of the model.
        fit: Which fit gave the alphas.
    """

    def __init__(self, layers: Sequence[LayerSpectrum], *, source: str, fit: str) -> None:
        self._layers = tuple(layers)
        self.source = source
        self.fit = fit

    @overload
    def __getitem__(self, index: int) -> LayerSpectrum: ...
    @overload
    def __getitem__(self, index: slice) -> Report: ...
    def __getitem__(self, index: int | slice) -> LayerSpectrum | Report:
        if isinstance(index, slice):
            return Report(self._layers[index], source=self.source, fit=self.fit)
        return self._layers[index]

    def __len__(self) -> int:
        return len(self._layers)

    def __repr__(self) -> str:
        return f"Report({len(self)} layers of {self.source!r}, fit={self.fit!r})"

    def __str__(self) -> str:
        """The table as plain text."""
        head, *rows = table(self)
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        lines = [
            "  ".join(
                # Names and notes read from the left, numbers line up on the right.
                cell.ljust(width) if column in (0, len(head) - 1) else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in (head, *rows)
        ]
        lines.insert(1, "-" * max(map(len, lines)))
        return "\n".join([*lines, "", self.summary_line()])

    @property
    def alphas(self) -> dict[str, float]:
        """Alpha by name, of the layers that have one."""
        return {layer.name: layer.alpha for layer in self if math.isfinite(layer.alpha)}

    def summary(self) -> dict[str, float | int]:
        """Number of layers and fits, and of the alphas the mean, median, smallest and largest.

        ``mean_alpha_weighted`` is WeightWatcher's figure of a whole model, the mean of
        alpha * log10(lambda_max). NaN where no layer has an alpha.
        """
        alphas = list(self.alphas.values())
        weighted = [x.alpha_weighted for x in self if math.isfinite(x.alpha_weighted)]
        return {
            "layers": len(self),
            "fitted": len(alphas),
            "mean_alpha": float(np.mean(alphas)) if alphas else math.nan,
            "median_alpha": float(np.median(alphas)) if alphas else math.nan,
            "min_alpha": min(alphas, default=math.nan),
            "max_alpha": max(alphas, default=math.nan),
            "mean_alpha_weighted": float(np.mean(weighted)) if weighted else math.nan,
        }

    def summary_line(self) -> str:
        """The summary in one line of text."""
        s = self.summary()
        counts = f"{s['layers']} layers, {s['fitted']} with an alpha"
        if not s["fitted"]:
            return counts
        return (
            f"{counts} ({self.fit} fit): mean {s['mean_alpha']:.3f}, "
            f"median {s['median_alpha']:.3f}, range {s['min_alpha']:.3f} to {s['max_alpha']:.3f}, "
            f"mean of alpha * log10(lambda_max) {s['mean_alpha_weighted']:.3f}"
        )

    def to_dict(self) -> dict[str, Any]:
        """``source``, ``fit``, ``summary`` and ``layers``, a list of the records as dicts."""
        return {
            "source": self.source,
            "fit": self.fit,
            "summary": self.summary(),
            "layers": [asdict(layer) for layer in self],
        }

    def to_json(self, path: PathLike | None = None) -> str:
        """:meth:`to_dict` as JSON, NaN as null; also written to ``path`` if there is one."""
        text = json.dumps(_finite(self.to_dict()), indent=2, allow_nan=False)
        if path is not None:
            write_whole(path, text + "\n")
        return text

    def to_csv(self, path: PathLike) -> None:
        """Write one row per layer; NaN and None are empty, the shape is ``out x in``."""
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(field.name for field in fields(LayerSpectrum))
        for layer in self:
            record = _finite(asdict(layer)) | {"shape": _shape(layer)}
            writer.writerow("" if value is None else value for value in record.values())
        write_whole(path, stream.getvalue())

    def to_pandas(self) -> Any:
        """A ``pandas.DataFrame`` with one row per layer and the fields as columns.

        Raises:
            RuntimeError: If pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise RuntimeError("to_pandas() needs pandas; pip install pandas") from error
        columns = [field.name for field in fields(LayerSpectrum)]
        return pd.DataFrame([asdict(layer) for layer in self], columns=columns)

    def plot(self, path: PathLike) -> None:
        """Write a picture of alpha by layer; the suffix of ``path`` says PNG, SVG or PDF.

        Raises:
            ValueError: On another suffix.
            RuntimeError: If matplotlib is not installed.
        """
        from tbfast.plot import plot_report

        plot_report(self, path)


def table(report: Report) -> list[tuple[str, ...]]:
    """The report as text cells: a row of column heads, then a row per layer."""
    head = ("layer", "shape", "eigs", "alpha", "error", "xmin", "tail", "KS", "norm")
    rows = [
        (
            printable(x.name),
            _shape(x),
            str(x.n_eigs),
            _number(x.alpha, ".3f"),
            _number(x.alpha_error, ".3f"),
            _number(x.xmin, ".3g"),
            str(x.n_tail) if x.n_tail else "-",
            _number(x.ks, ".3f"),
            _number(x.spectral_norm, ".4g"),
            _number(x.stable_rank, ".4g"),
            x.note,
        )
        for x in report
    ]
    return [(*head, "stable rank", "note"), *rows]


def printable(name: str) -> str:
    """A name from a file, safe to show: control characters become escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def _shape(layer: LayerSpectrum) -> str:
    return "x".join(map(str, layer.shape))


def _number(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else "-"


def _finite(value: Any) -> Any:
    """The same with NaN and infinity, which JSON does not know, as None."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
