"""What ``tbfast bench`` times and beside what. Every answer is checked before it is timed."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tbfast import _native
from tbfast.alpha import fit_alpha
from tbfast.anchors import take_anchors
from tbfast.backends import native, reference
from tbfast.batch import Batch
from tbfast.bench_contest import STREAM, Call, Contest, Entry, Row, checked
from tbfast.bench_data import (
    cold_bytes,
    cold_layers,
    known_layers,
    minilm,
    singular_values,
    words,
)
from tbfast.fitting import FitOptions
from tbfast.lowrank import rsvd
from tbfast.matrices import Kind
from tbfast.sketching import SketchTable
from tbfast.spectra import measure

_MEDIAN = FitOptions()
_SVDVALS = "torch.linalg.svdvals"
MINILM = ((384, 384, 25), (1536, 384, 6), (384, 1536, 6))  # of MiniLM-L6, without embeddings


def float32_pass(
    rows: int, cols: int, probes: int, *, size: int | None = None, bar: float | None = None
) -> Contest:
    """WᵀW X of a set of layers beyond the cache, against a bare read of the same memory."""
    layers = cold_layers(rows, cols, cold_bytes() if size is None else size)
    # 1e-5: rounding to 24 bits in sums of some thousand terms
    entry = _product(f"WᵀW X, float32, {probes} probes", layers, probes, 1e-5, bar)
    return Contest(f"{_shape(layers)} cold", (entry,), (_stream(layers),), unit="%")


def bfloat16_pass(rows: int, cols: int, *, size: int | None = None) -> Contest:
    """The same in bfloat16; also against the float32 multiplications it may have to be done by."""
    layers = cold_layers(rows, cols, cold_bytes() if size is None else size, torch.bfloat16)
    # 1e-2: what lies between the two products is rounded to 8 bits
    bar = 0.7 if multiplies_bfloat16() else None
    entry = _product("WᵀW X, bfloat16, 16 probes", layers, 16, 1e-2, bar)
    flops, threads = 64 * sum(layer.numel() for layer in layers), _native.num_threads()
    peak = Call(
        "float32 multipliers",
        lambda: _native.multiply_adds(flops, threads=threads),
        len(layers),
    )
    return Contest(f"{_shape(layers)} cold", (entry,), (_stream(layers), peak), unit="%")


def multiplies_bfloat16() -> bool:
    """Whether the kernels in use have an instruction for it."""
    hardware = {"avx512bf16", "amx"}.intersection(_native.gram_bf16_engines())
    return bool(hardware) and _native.isa() in ("avx512", "amx")


def python_loop(n: int, count: int, bar: float | None = None) -> Contest:
    """WᵀW X of many layers in one call, against torch's products in a loop."""
    layers = cold_layers(n, n, 4 * n * n * count)
    entry = _product("WᵀW X, float32, one call", layers, 4, 1e-5, bar)
    pairs = [(w, x[0].T.contiguous()) for w, x in zip(layers, _signs(layers, 4), strict=True)]
    loop = Call("torch W.T @ (W @ X), loop", lambda: [w.T @ (w @ x) for w, x in pairs], count)
    return Contest(f"{_shape(layers)}, {count} layers", (entry,), (loop,))


def _product(
    what: str, layers: list[Tensor], probes: int, tolerance: float, bar: float | None
) -> Entry:
    batch, x = _batch(layers), _signs(layers, probes)
    found = native.gram_apply(batch, x)
    for i in {0, len(layers) - 1}:
        [expected] = reference.gram_apply(_batch(layers[i : i + 1]), [x[i]])
        error = float((found[i] - expected).norm() / expected.norm())
        checked(what, error, tolerance)

    call = Call(what, lambda: native.gram_apply(batch, x), len(layers), keep=layers)
    return Entry(call, error, bar, _bytes(layers))


def _stream(layers: list[Tensor]) -> Call:
    # The layers lie end to end.
    memory = words(torch.as_strided(layers[0], (sum(w.numel() for w in layers),), (1,)))
    threads = _native.num_threads()
    return Call(STREAM, lambda: _native.stream_sum(memory, threads=threads), len(layers))


def against_svdvals(
    n: int,
    count: int,
    *,
    bar: float | None = None,
    bfloat16_bar: float | None = None,
    lin_bar: float | None = None,
) -> Contest:
    """Alpha estimated from Lanczos runs, and followed from an anchor, against ``svdvals``.

    Args:
        n, count: Layers of n × n, all in one call; ``svdvals`` gets one of them.
        bar: Of 4 probes in float32.
        bfloat16_bar: Of 16 probes in bfloat16; None leaves them out.
        lin_bar: Of the step from an anchor; None leaves it out: anchors take their time.
    """
    layers = known_layers(n, n, count)
    ours = [_lanczos(layers, 4, bar)]
    if bfloat16_bar is not None:
        ours.append(_lanczos([layer.bfloat16() for layer in layers], 16, bfloat16_bar))
    if lin_bar is not None:
        ours += _from_anchor(layers, lin_bar)
    svdvals = Call(_SVDVALS, lambda: torch.linalg.svdvals(layers[0]))
    return Contest(f"{_shape(layers)}, {count} layers", tuple(ours), (svdvals,))


def _lanczos(layers: list[Tensor], probes: int, bar: float | None) -> Entry:
    dtype = str(layers[0].dtype).removeprefix("torch.")
    what = f"alpha, SLQ p{probes} m20, {dtype}"
    run = sketcher(layers, probes)
    error = _worst(run().fits.alpha, _exact_alpha(layers))
    # The probes alone give a standard error of 1.2 to 1.5 / sqrt(probes n); this is four of them.
    checked(what, error, 6 / math.sqrt(probes * len(layers[0])))
    return Entry(Call(what, run, len(layers), keep=layers), error, bar, 20 * _bytes(layers))


def sketcher(layers: list[Tensor], probes: int) -> Callable[[], SketchTable]:
    """Lanczos runs of 20 steps on all layers, to be kept alive by the caller, and the fit."""
    batch = _batch(layers)
    return lambda: native.quadrature_fit(native.lanczos(batch, probes, 20), _MEDIAN)


def _from_anchor(layers: list[Tensor], bar: float) -> list[Entry]:
    anchors = take_anchors(_batch(layers), _MEDIAN, probes=0)
    assert anchors.gradient is not None
    assert anchors.scales is not None
    gradient, scales, moved = anchors.gradient, anchors.scales, 0.02
    n, count = len(layers[0]), len(layers)
    now = known_layers(n, n, count, moved)
    batch = _batch(now)
    what, exact = "alpha, lin: scalar product", _exact_alpha(now, moved)
    found = anchors.lin(batch)
    error = checked(what, _worst(found.alpha, exact), 5 * float(np.max(found.error)) / exact)
    step = Call(what, lambda: native.dot(batch, gradient, scales), count, keep=now)
    watch = Call(
        "drift since the anchor",
        lambda: native.drift(batch, anchors.rows, anchors.kept),
        count,
        keep=now,
    )
    return [Entry(step, error, bar, _bytes(now)), Entry(watch, weights=_bytes([anchors.kept]))]


def exact_model(
    checkpoint: Path | None = None,
    *,
    shapes: Sequence[tuple[int, int, int]] = MINILM,
    bar: float | None = None,
) -> Contest:
    """Exact alpha of all layers of a model, against ``svdvals`` in a loop.

    Args:
        checkpoint: MiniLM's weights, if they are there.
        shapes: Else rows, columns and number of other layers.
        bar: Of the ratio.
    """
    if checkpoint is not None:
        weights = minilm(checkpoint)
        values = [torch.linalg.svdvals(w.double()).square().flip(0).numpy() for w in weights]
        expected = [float(fit_alpha(v).alpha) for v in values]
    else:
        weights = [layer for shape in shapes for layer in known_layers(*shape)]
        expected = [_exact_alpha([w]) for w in weights]
    what, run = "alpha, all eigenvalues", exact(weights)
    # 1e-4: what exact spectra promise of alpha
    error = checked(what, float(np.max(np.abs(np.divide(run(), expected) - 1))), 1e-4)
    entry = Entry(Call(what, run, len(weights)), error, bar, _bytes(weights))
    loop = Call(_SVDVALS, lambda: [torch.linalg.svdvals(w) for w in weights], len(weights))
    size = f"MiniLM's {len(weights)} {'shapes' if checkpoint is None else 'layers'}"
    return Contest(size, (entry,), (loop,))


def exact(weights: list[Tensor]) -> Callable[[], list[float]]:
    """The median fit to all eigenvalues of each of these matrices."""
    kinds: list[Kind] = ["linear"] * len(weights)
    return lambda: [m.fit.alpha for m in measure(weights, kinds, _MEDIAN, method="exact")]


def low_rank(rows: int, cols: int, rank: int, count: int, *, bar: float | None = None) -> Contest:
    """The largest singular values and vectors of many layers, against torch in a loop."""
    layers = known_layers(rows, cols, count)
    what = f"rsvd, rank {rank}"
    for found, w in zip(rsvd(layers, rank), layers, strict=True):
        left = residual((found.U * found.S) @ found.Vh, w)
        error = checked(what, left / least_residual(w, rank) - 1, 0.02)
        checked(f"the error that {what} states", abs(found.error / left - 1), 0.1)

    def loop(some: list[Tensor]) -> list[tuple[Tensor, ...]]:
        return [torch.svd_lowrank(w, q=rank) for w in some]

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        [(u, s, v)] = loop(layers[:1])
    worse = residual((u * s) @ v.T, layers[0]) / least_residual(layers[0], rank)
    peer = Call(f"svd_lowrank (left {worse:.2f})", lambda: loop(layers), count)
    ours = Entry(Call(what, lambda: rsvd(layers, rank), count), error, bar, 4 * _bytes(layers))
    return Contest(f"{_shape(layers)}, {count} layers", (ours,), (peer,))


def residual(approximation: Tensor, weight: Tensor) -> float:
    """|W - A|_F / |W|_F in double precision."""
    exact = weight.double()
    return float((exact - approximation.double()).norm() / exact.norm())


def least_residual(weight: Tensor, rank: int) -> float:
    """What no approximation of this rank to one of ``known_layers`` goes below."""
    squares = singular_values(*weight.shape) ** 2
    return float(np.sqrt(squares[:-rank].sum() / squares.sum()))


def beside_busy_cores(n: int, count: int, *, sketch: bool, bar: float) -> Contest:
    """Alpha of some layers on a quiet machine and beside a busy process for each core."""
    layers = known_layers(n, n, count)
    what = "SLQ p4 m20" if sketch else "all eigenvalues"
    run = sketcher(layers, 4) if sketch else exact(layers)
    quiet = Call(f"alpha, {what}", run, count, keep=layers)
    busy = Call("same, with busy cores", run, count, beside=_every_core_busy)
    entry = Entry(quiet, bar=bar)
    return Contest(f"{_shape(layers)}, {count} layers", (entry,), (busy,), at_most=True)


@contextmanager
def _every_core_busy() -> Iterator[None]:
    spin = [sys.executable, "-S", "-c", "while True: pass"]
    others = [subprocess.Popen(spin) for _ in range(os.cpu_count() or 1)]
    try:
        time.sleep(0.2)  # until they spin
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def sketch_memory(what: str, shapes: Sequence[tuple[int, int]], blocks: int) -> Row:
    """What 8 Lanczos runs of 20 steps allocate beyond the weights of a model of such blocks."""
    memory = torch.randn(max(rows * cols for rows, cols in shapes))
    layers = [memory[: rows * cols].view(rows, cols) for rows, cols in shapes] * blocks
    views = [layer.view(layer.shape) for layer in layers]  # a Batch wants each by itself
    batch = _batch(views)
    native.lanczos(batch, 8, 20)
    share = _native.workspace_bytes(batch.table()) / _bytes(views)
    return _share("memory of SLQ p8 m20", what, share, 0.02)


def gradient_memory(n: int) -> Row:
    """Bytes of the gradient that an anchor keeps."""
    layers = known_layers(n, n, 2)
    anchors = take_anchors(_batch(layers), _MEDIAN, probes=0)
    assert anchors.gradient is not None
    assert anchors.scales is not None
    share = _bytes([anchors.gradient, anchors.scales]) / _bytes(layers)
    return _share("memory of the int8 gradient", _shape(layers), share, 0.27)


def _share(what: str, size: str, share: float, bar: float) -> Row:
    none = np.empty(0)
    return Row(what, size, "the weights", none, none, share, "%", bar, at_most=True)


def _batch(layers: Sequence[Tensor]) -> Batch:
    return Batch(layers, ["linear"] * len(layers))


def _signs(layers: Sequence[Tensor], probes: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    draw = 1.0 - 2 * torch.randint(2, (1, probes, min(layers[0].shape)), generator=generator)
    return [draw] * len(layers)


def _shape(layers: Sequence[Tensor]) -> str:
    return "×".join(map(str, layers[0].shape))


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _exact_alpha(layers: Sequence[Tensor], moved: float = 0.0) -> float:
    rows, cols = layers[0].shape
    return float(fit_alpha(singular_values(rows, cols, moved) ** 2).alpha)


def _worst(found: NDArray[np.float64], exact: float) -> float:
    return float(np.max(np.abs(found / exact - 1)))
