"""The analyser: every weight of a model or checkpoint to a record."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tbfast.alpha import fit_options
from tbfast.anchors import Anchors, take_anchors
from tbfast.backends import get_backend
from tbfast.batch import Batch
from tbfast.fitting import FitKind, FitOptions, Reason
from tbfast.matrices import Layer, Pattern, eigenvalue_scale
from tbfast.progress import Progress, ticking
from tbfast.report import LayerSpectrum, Report
from tbfast.sketching import SketchOptions
from tbfast.sources import Source, find_weights
from tbfast.spectra import Measurement, Method, check_method, measure, sketched_measurements

# Elements of weights measured in one call, per thread, so that small layers keep all threads busy.
_BATCH_ELEMENTS = 2**23

_WIDEST = {False: torch.float64, True: torch.complex128}

# Measures a few layers, given what reads their weights.
_Measure = Callable[[Sequence[Layer], Callable[[str], Tensor]], list[Measurement]]


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
        method: ``"exact"``: all eigenvalues. ``"sketch"``: stochastic Lanczos quadrature, a few
            reads of the weights; see the errors in docs/accuracy.md. ``"auto"``: exact, except for
            the median fit of matrices whose shorter side is above 2048.
        include: Glob, list of globs or callable ``(name, tensor) -> bool`` on parameter names;
            None takes every weight with two or more dimensions.
        exclude: The same, of what to leave out.
        min_eigs: Layers with fewer eigenvalues get norms but no alpha.
        backend: ``"auto"``, ``"native"`` or ``"reference"``.
        seed: For the randomized method; exact results do not depend on it.
        progress: True for a progress bar, or a callable ``(done, total, name)``.
        **options: Those of a sketch: ``probes=8``, ``steps=20``, and ``probes_from``, earlier
            weights (a source as above, or :class:`tbfast.anchors.Anchors`) whose eigenvectors
            the probes are taken from, which is much more accurate while the weights have not
            moved far; those of the fit, see
            :func:`tbfast.fit_alpha`; and ``filter_zeros``: eigenvalues at
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
    anchor = options.pop("probes_from", None)
    given = {name: options.pop(name) for name in ("probes", "steps") if name in options}
    sketch = SketchOptions(**given, seed=seed)
    chosen = fit_options(fit, options)
    if anchor is not None and (method == "exact" or filter_zeros is not None):
        raise ValueError(
            "probes_from= is for a sketch: leave it out, or method='exact' and filter_zeros"
        )
    layers, read, label = find_weights(source, include, exclude)
    measured: _Measure
    if anchor is None:
        known = {"filter_zeros": filter_zeros, "method": method, "sketch": sketch}
        measured = lambda some, read: _measured(some, read, chosen, backend, known)  # noqa: E731
    else:
        measured = _aligned_to(anchor, layers, chosen, sketch, backend)
    # Anchors are of all their layers at once; else a few layers are in memory at a time.
    batches = [layers] if isinstance(anchor, Anchors) else _batches(layers)
    records: list[LayerSpectrum] = []
    with ticking(progress, "measuring", len(layers)) as tick:
        for batch in batches:
            for layer, measurement in zip(batch, measured(batch, read), strict=True):
                records.append(_record(layer, measurement, min_eigs))
                tick(len(records), len(layers), layer.name)
    return Report(records, source=label, fit=chosen.kind)


def _measured(
    layers: Sequence[Layer],
    read: Callable[[str], Tensor],
    fit: FitOptions,
    backend: str,
    options: dict[str, Any],
) -> list[Measurement]:
    """Measurements of weights that nobody holds before or after."""
    names = [layer.name for layer in layers]
    kinds = [layer.kind for layer in layers]
    weights = [read(name) for name in names]
    found = measure(weights, kinds, fit, names=names, backend=backend, **options)
    return _with_norms(found, layers, weights)


def _aligned_to(
    anchor: Anchors | Source,
    layers: Sequence[Layer],
    fit: FitOptions,
    sketch: SketchOptions,
    backend: str,
) -> _Measure:
    """What measures layers by probes from the eigenvectors of other weights of the same names."""
    before: dict[str, Layer] = {}
    if not isinstance(anchor, Anchors):
        found, read_before, label = find_weights(anchor, None, None)
        before = {layer.name: layer for layer in found}
        for layer in layers:
            if layer.name not in before or before[layer.name].shape != layer.shape:
                raise ValueError(
                    f"probes_from={label!r} has no weight {layer.name!r} of the shape "
                    f"{layer.shape}; pass an earlier state of the same model"
                )

    def batch_of(some: Sequence[Layer], weights: Sequence[Tensor]) -> Batch:
        named = {layer.name: w for layer, w in zip(some, weights, strict=True)}
        return Batch(named, [layer.kind for layer in some])

    def measured(some: Sequence[Layer], read: Callable[[str], Tensor]) -> list[Measurement]:
        known = anchor
        if not isinstance(known, Anchors):
            earlier = [read_before(layer.name).detach().cpu() for layer in some]
            known = take_anchors(
                batch_of(some, earlier),
                fit,
                gradient=False,
                probes=sketch.probes,
                seed=sketch.seed,
                backend=backend,
            )
        weights = [read(layer.name).detach().cpu() for layer in some]
        batch = batch_of(some, weights)
        table = known.sketch(batch, sketch.steps)
        found = sketched_measurements(batch.kinds, [layer.n_eigs for layer in some], table)
        return _with_norms(found, some, weights)

    return measured


def _with_norms(
    found: list[Measurement], layers: Sequence[Layer], weights: Sequence[Tensor]
) -> list[Measurement]:
    """Sketches with the exact sum of their eigenvalues: here one more read is no matter."""
    whole = []
    for measurement, layer, weight in zip(found, layers, weights, strict=True):
        if measurement.method == "sketch":
            dtype = _WIDEST[weight.is_complex()]
            norm = float(torch.linalg.vector_norm(weight.detach(), dtype=dtype))
            total = norm**2 * eigenvalue_scale(layer.kind)
            measurement = replace(measurement, sum_eigenvalues=total)
        whole.append(measurement)
    return whole


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
        alpha_error=math.nan if few else math.hypot(fit.alpha_error, measurement.sketch_error),
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
        sketch_error=math.nan if few else measurement.sketch_error,
    )
