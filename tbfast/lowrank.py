"""Truncated singular value decompositions of many matrices at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from tbfast.backends import engine_for
from tbfast.batch import Batch
from tbfast.matrices import as_tensor


@dataclass(frozen=True, eq=False)
class SVD:
    """A matrix is about ``(U * S) @ Vh``; fields as of ``torch.linalg.svd``.

    Attributes:
        U: Orthonormal columns, shape (rows, rank).
        S: Singular values, descending, real, shape (rank,).
        Vh: Orthonormal rows, shape (rank, cols).
        error: |A - U S Vh|_F / |A|_F, what the factors leave of the matrix; 0 for a zero matrix.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor
    error: float


@overload
def rsvd(
    matrices: Tensor,
    rank: int,
    *,
    oversample: int = 8,
    power_iters: int = 1,
    seed: int = 0,
    backend: str = "auto",
) -> SVD: ...
@overload
def rsvd(
    matrices: Sequence[Tensor],
    rank: int,
    *,
    oversample: int = 8,
    power_iters: int = 1,
    seed: int = 0,
    backend: str = "auto",
) -> list[SVD]: ...
def rsvd(
    matrices: Tensor | Sequence[Tensor],
    rank: int,
    *,
    oversample: int = 8,
    power_iters: int = 1,
    seed: int = 0,
    backend: str = "auto",
) -> SVD | list[SVD]:
    """The largest singular values and their vectors, of a matrix or of each of a ragged list.

    Randomized (Halko, Martinsson and Tropp, SIAM Review 53, 2011, algorithms 4.4 and 5.1, with
    shifted power iterations): the matrix is multiplied with ``rank + oversample`` columns
    2 + 2 ``power_iters`` times. Singular values come out too small rather than too large; the
    faster the spectrum decays, the less. A matrix has the same factors, to the bit, alone, in a
    list, and on any number of threads; a list is shared out among the threads by matrices.

    Args:
        matrices: Tensor (or array) of shape (rows, cols), or a list of these; float16, bfloat16,
            float32, float64, complex64 or complex128, any strides, any device. Not changed.
        rank: Number of singular values, from 1 to the shorter side of every matrix.
        oversample: Columns beyond the rank, at least: the sum is rounded up to a multiple of 16,
            which costs nothing. More of them make the result more accurate.
        power_iters: Power iterations; more of them help where the spectrum decays slowly.
        seed: Of the random test matrices, from 0 to 2^64 - 1.
        backend: ``"auto"``, ``"native"``, ``"reference"``, ``"cuda"`` or ``"triton"``. ``"auto"``
            computes where the first matrix is, and moves the others there.

    Returns:
        An :class:`SVD`, or a list of them for a list, in the dtype (float32 for halves) and on
        the device of the matrix. Float64 and complex128 are computed in double precision, the
        others in single.

    Raises:
        ValueError: On an option out of range, an empty matrix or one without two dimensions, one
            whose shorter side is below ``rank``, or one with a NaN or infinite entry.
        TypeError: On a dtype that is neither floating point nor complex, or a tensor that has no
            plain memory (sparse, quantised, on the meta device).
    """
    if rank < 1 or oversample < 0 or power_iters < 0 or not 0 <= seed < 1 << 64:
        raise ValueError(
            "need rank >= 1, oversample >= 0, power_iters >= 0 and 0 <= seed < 2**64; got "
            f"rank={rank}, oversample={oversample}, power_iters={power_iters}, seed={seed}"
        )
    single = isinstance(matrices, (Tensor, np.ndarray))
    items = [matrices] if single else list(matrices)
    given = {f"matrix {row}": as_tensor(item, f"matrix {row}") for row, item in enumerate(items)}
    device = next(iter(given.values())).device if given else torch.device("cpu")
    engine, place = engine_for(backend, device)
    readable = {name: _readable(tensor, place) for name, tensor in given.items()}
    batch = Batch(readable, ["linear"] * len(readable))
    for name, tensor in readable.items():
        if tensor.ndim != 2 or rank > min(tensor.shape):
            raise ValueError(_misfit(name, tensor, rank))
    found = engine.rsvd(batch, rank, oversample=oversample, power_iters=power_iters, seed=seed)
    decompositions = [
        _as_svd(name, tensor, factors)
        for (name, tensor), factors in zip(given.items(), found, strict=True)
    ]
    return decompositions[0] if single else decompositions


def _readable(tensor: Tensor, place: torch.device) -> Tensor:
    """The values where the backend reads them, with conjugations and signs that views promise."""
    if tensor.layout != torch.strided or tensor.is_meta:
        return tensor  # which Batch refuses by name
    return tensor.detach().to(place).resolve_conj().resolve_neg()


def _misfit(name: str, tensor: Tensor, rank: int) -> str:
    shape = tuple(tensor.shape)
    if tensor.ndim != 2:
        return f"{name} must have shape (rows, cols), both above 0; got {shape}"
    return f"{name} of shape {shape} has no {rank} singular values; use rank={min(shape)} or less"


def _as_svd(name: str, matrix: Tensor, factors: tuple[Any, ...]) -> SVD:
    u, s, vh, error = factors
    if math.isnan(error):
        raise ValueError(f"{name} has a NaN or infinite entry, so it has no singular values")
    double = matrix.dtype in (torch.float64, torch.complex128)
    real = torch.float64 if double else torch.float32
    dtype = real.to_complex() if matrix.is_complex() else real
    device = matrix.device
    return SVD(u.to(device, dtype), s.to(device, real), vh.to(device, dtype), error)
