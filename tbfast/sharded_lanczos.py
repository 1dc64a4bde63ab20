"""Lanczos on weights of which each process holds a part: no weight is ever gathered.

With W cut along its rows, WᵀW x = Σ_r W_rᵀ W_r x: one sum of a skinny block over the processes for
each step. Cut along its columns, W x = Σ_r W_r x_r has to be summed first. The sums of all layers
are made in one call. The start vectors are those of :func:`tbfast.backends.native.lanczos`, and so
is the result, but for rounding.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tbfast.backends.philox import Purpose, signs
from tbfast.matrices import Layer
from tbfast.shape import sides
from tbfast.sharding import Piece, matrix_dims
from tbfast.sketching import SketchOptions
from tbfast.tridiagonals import Tridiagonals

Array = NDArray[np.float64]
Run = Generator[Tensor, Tensor, tuple[Array, Array, NDArray[np.int32]]]

# The products are made in float32, as by the engine for whole weights.
_EPS = float(np.finfo(np.float32).eps)
_INVARIANT = 100 * _EPS  # below this, a vector is the rounding of an invariant subspace
_HELD = 2**24  # most numbers in the bases of the layers that run at a time: 128 MiB


@dataclass(frozen=True)
class Held:
    """What this process holds of a layer.

    Attributes:
        layer: The layer.
        pieces: The pieces of all processes make up its matrices.
        split: Dimensions along which its weight is cut.
        is_complex: Whether the weight is, of which this process may hold nothing.
    """

    layer: Layer
    pieces: Sequence[Piece]
    split: frozenset[int]
    is_complex: bool


def lanczos(
    layers: Sequence[Held],
    total: Callable[[Tensor], Tensor],
    sketch: SketchOptions,
    device: torch.device,
) -> list[Tridiagonals]:
    """Lanczos with full reorthogonalisation on every matrix of every layer.

    Args:
        layers: The layers; no matrix has fewer eigenvalues than a run has steps.
        total: Sums a float32 tensor over the processes. All call it equally often.
        sketch: Probes, steps and random numbers.
        device: Where to compute.

    Returns:
        One :class:`Tridiagonals` of one layer each, NaN where a weight is not finite in any
        process.
    """
    found = []
    for chunk in _chunks([x.layer.n_eigs * sketch.probes * sketch.steps for x in layers]):
        runs = [_run(layers[i], sketch, device) for i in chunk]
        for i, run in zip(chunk, _together(runs, total), strict=True):
            layer, matrices = layers[i].layer, len(run[0])
            count = np.full(matrices, min(sides(layer.shape, layer.kind)))
            found.append(Tridiagonals(*run, np.array([0, matrices]), count, _EPS))
    return found


def _together(
    runs: Sequence[Run], total: Callable[[Tensor], Tensor]
) -> list[tuple[Array, Array, NDArray[np.int32]]]:
    """Drive all runs, with one sum over the processes for what they all ask at a time."""
    results = {}
    asked = {index: next(run) for index, run in enumerate(runs)}
    while asked:
        flat = torch.cat([part.flatten() for part in asked.values()])
        sums = torch.split(total(flat), [part.numel() for part in asked.values()])
        waiting, asked = asked, {}
        for (index, part), answer in zip(waiting.items(), sums, strict=True):
            try:
                asked[index] = runs[index].send(answer.view_as(part))
            except StopIteration as end:
                results[index] = end.value
    return [results[index] for index in range(len(runs))]


def _run(held: Held, sketch: SketchOptions, device: torch.device) -> Run:
    """One layer: yields what is to be summed over the processes, float32, and is sent the sum."""
    layer, is_complex = held.layer, held.is_complex
    rows, cols = sides(layer.shape, layer.kind)
    # The vectors live on the shorter side.
    turn = rows < cols
    length, other = min(rows, cols), max(rows, cols)
    row_dim, col_dim = matrix_dims(layer.kind)
    summed_twice = (row_dim if turn else col_dim) in held.split
    parts = [_tall(piece, turn, is_complex, device) for piece in held.pieces]
    start = _start(layer, length, sketch, is_complex, device)
    q = start / torch.linalg.vector_norm(start, dim=1, keepdim=True)
    matrices, probes = q.shape[0], q.shape[2]
    shape = (matrices, probes, sketch.steps)
    a, b = np.zeros(shape), np.zeros(shape)
    taken = np.full(shape[:2], sketch.steps, dtype=np.int32)
    norm, going = np.zeros(shape[:2]), np.ones(shape[:2], dtype=bool)
    basis = q.new_empty((sketch.steps, *q.shape))
    for j in range(sketch.steps):
        basis[j] = q
        x = q.to(torch.complex64 if is_complex else torch.float32)
        images = [part.values @ x[part.matrices, part.cols] for part in parts]
        if summed_twice:
            t = x.new_zeros(matrices, other, probes)
            for part, image in zip(parts, images, strict=True):
                t[part.matrices, part.rows] += image
            t = _as(is_complex, (yield _real(t)))
            images = [t[part.matrices, part.rows] for part in parts]
        y = torch.zeros_like(x)
        for part, image in zip(parts, images, strict=True):
            y[part.matrices, part.cols] += part.values.mH @ image
        w = _as(is_complex, (yield _real(y))).to(q.dtype)

        a[..., j] = (q.conj() * w).real.sum(dim=1).cpu().numpy()
        known = basis[: j + 1]
        for _ in range(2):  # twice is enough (Parlett)
            w = w - (known * (known.conj() * w).sum(dim=2, keepdim=True)).sum(dim=0)
        size = torch.linalg.vector_norm(w, dim=1).cpu().numpy()
        norm = np.fmax(norm, np.abs(a[..., j]) + (b[..., j - 1] if j else 0.0))
        ends = going & ~(size > _INVARIANT * norm)
        taken[ends] = j + 1
        going &= ~ends
        b[..., j] = np.where(going, size, 0.0)
        with np.errstate(divide="ignore"):
            inverse = torch.from_numpy(np.where(going, 1 / size, 0.0)).to(device)
        q = torch.where(inverse[:, None] > 0, w * inverse[:, None], 0)
    broken = ~np.isfinite(a[..., 0])
    a[broken, 0], taken[broken] = math.nan, 1
    return a, b, taken


def _tall(piece: Piece, turn: bool, is_complex: bool, device: torch.device) -> Piece:
    values = piece.values.detach().to(device, torch.complex64 if is_complex else torch.float32)
    matrices = piece.matrices.to(device)
    if turn:
        return Piece(matrices, piece.cols, piece.rows, values.mH)
    return Piece(matrices, piece.rows, piece.cols, values)


def _start(
    layer: Layer, length: int, sketch: SketchOptions, is_complex: bool, device: torch.device
) -> Tensor:
    """Random signs, float64 (matrices, length, probes); of complex layers re and im are signs."""
    key = zlib.crc32(layer.name.encode())
    numbers = 2 * length if is_complex else length
    drawn = [
        signs(sketch.seed, key, Purpose.PROBE, sketch.draw, m * numbers, numbers, sketch.probes)
        for m in range(layer.n_eigs // length)
    ]
    start = torch.from_numpy(np.stack(drawn)).to(device)
    if not is_complex:
        return start
    return torch.complex(start[:, ::2].contiguous(), start[:, 1::2].contiguous())


def _real(x: Tensor) -> Tensor:
    return torch.view_as_real(x) if x.is_complex() else x


def _as(is_complex: bool, x: Tensor) -> Tensor:
    return torch.view_as_complex(x) if is_complex else x


def _chunks(sizes: Sequence[int]) -> list[list[int]]:
    """Row numbers in order, in lists whose sizes sum to ``_HELD`` at most, or of one row."""
    chunks: list[list[int]] = []
    room = 0
    for row, size in enumerate(sizes):
        if not chunks or size > room:
            chunks.append([])
            room = _HELD
        chunks[-1].append(row)
        room -= size
    return chunks
