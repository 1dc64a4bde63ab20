"""The analyser: every weight of a model or checkpoint to a record, and the table of them."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, overload

import numpy as np
import torch

from tbfast.alpha import fit_options
from tbfast.backends import get_backend
from tbfast.files import PathLike, write_whole
from tbfast.fitting import FitKind, Reason
from tbfast.matrices import Kind, Layer, Pattern, Role
from tbfast.progress import Progress, ticking
from tbfast.sources import Source, find_weights
from tbfast.spectra import Measurement, Method, check_method, measure

# Elements of weights measured in one call, per thread, so that small layers keep all threads busy.
_BATCH_ELEMENTS = 2**23


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
        alpha_error: Its standard error.
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


def analyze(
    source: Source,
    *,
    fit: FitKind = "median",
    method: Method = "auto",
    include: Pattern = None,
    exclude: Pattern = None,
    min_eigs: int = 50,
    backend: str = "auto",
    seed: int = 0,
    progress: Progress = None,
    **options: Any,
) -> Report:
    """Spectrum, alpha and norms of every weight of a model or checkpoint.

    A checkpoint is read a few tensors at a time. Integer tensors, packed quantised weights among
    them, are left out; float8 is widened to float32. Nothing is changed.

    Args:
        source: A module; a mapping of names to tensors or arrays; or a path, see
            :func:`tbfast.checkpoint.open_checkpoint`. In a mapping and a checkpoint the kind of a
            weight is guessed from its name and shape.
        fit: ``"median"``, ``"ks"``, ``"peak"`` or ``"tail"``, see :func:`tbfast.fit_alpha`.
        method: ``"exact"``, or ``"auto"``, which today is the same.
        include: Glob, list of globs or callable ``(name, tensor) -> bool`` on parameter names;
            None takes every weight with two or more dimensions.
        exclude: The same, of what to leave out.
        min_eigs: Layers with fewer eigenvalues get norms but no alpha.
        backend: ``"auto"``, ``"native"`` or ``"reference"``.
        seed: For the randomized method; exact results do not depend on it.
        progress: True for a progress bar, or a callable ``(done, total, name)``.
        **options: Those of the fit; see :func:`tbfast.fit_alpha`. ``filter_zeros``: eigenvalues at
            or below this are dropped before the fit (published: 1e-5). None: those that rounding
            the weights could have made, (8 eps |W|_F (1/sqrt(M) + 1/sqrt(N)))² or less, eps that
            of float32 for float32 and narrower: sharper than max(M, N) eps lambda_max, which
            would drop the smallest eigenvalues of every square random matrix.

    Returns:
        :class:`Report`, a sequence of :class:`LayerSpectrum` in model order. A layer that cannot
        be fitted is in it, with ``alpha`` NaN and a ``reason``.

    Raises:
        CheckpointError: If the checkpoint cannot be read or holds no weight.
        ValueError: On an unknown option, a model without weights, or patterns that match none.
        TypeError: On a source of another type.
    """
    check_method(method)
    get_backend(backend)
    filter_zeros = options.pop("filter_zeros", None)
    chosen = fit_options(fit, options)
    layers, read, label = find_weights(source, include, exclude)
    records: list[LayerSpectrum] = []
    with ticking(progress, "measuring", len(layers)) as tick:
        for batch in _batches(layers):
            measured = measure(
                [read(layer.name) for layer in batch],
                [layer.kind for layer in batch],
                chosen,
                filter_zeros=filter_zeros,
                method=method,
                backend=backend,
            )
            for layer, measurement in zip(batch, measured, strict=True):
                records.append(_record(layer, measurement, min_eigs))
                tick(len(records), len(layers), layer.name)
    return Report(records, source=label, fit=chosen.kind)


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


def _batches(layers: Sequence[Layer]) -> Iterator[list[Layer]]:
    """The layers in order, in batches that are held in memory one at a time.

    A batch of large layers has one for each thread, no more memory than the threads work in.
    """
    threads = torch.get_num_threads()
    batch: list[Layer] = []
    for layer in layers:
        batch.append(layer)
        held = sum(math.prod(member.shape) for member in batch)
        if len(batch) >= threads and held >= _BATCH_ELEMENTS * threads:
            yield batch
            batch = []
    if batch:
        yield batch


def _record(layer: Layer, measurement: Measurement, min_eigs: int) -> LayerSpectrum:
    fit, largest, total = measurement.fit, measurement.max_eigenvalue, measurement.sum_eigenvalues
    few = measurement.n_eigs < min_eigs
    alpha = math.nan if few else fit.alpha
    log_norm = math.log10(largest) if largest > 0 else math.nan
    return LayerSpectrum(
        name=layer.name,
        shape=layer.shape,
        n_eigs=measurement.n_eigs,
        alpha=alpha,
        alpha_error=math.nan if few else fit.alpha_error,
        xmin=math.nan if few else fit.xmin,
        n_tail=0 if few else fit.n_tail,
        ks=math.nan if few else fit.ks,
        spectral_norm=math.sqrt(largest),
        frobenius_norm=math.sqrt(total),
        stable_rank=total / largest if largest > 0 else math.nan,
        log_spectral_norm=log_norm,
        alpha_weighted=alpha * log_norm,
        method=measurement.method,
        reason=Reason.TOO_FEW.text if few else fit.reason,
        n_zeros=fit.n_zeros,
        role=layer.role,
        kind=layer.kind,
    )
