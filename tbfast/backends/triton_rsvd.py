"""``rsvd`` of the Triton backend: the random signs by a kernel, the rest by torch's libraries.

The signs of a sketch depend on the seed and the length of the longer side alone, so one launch
draws those of the longest matrix for all. Matrices of one shape are worked on as one batch, in
float64: products, QR and small singular value decompositions are those of the device's vendor,
which no kernel of ours would beat at these sizes. The definition is reference_rsvd.py.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from tbfast.backends.triton_launch import INTERPRETED, check_readable, launch
from tbfast.backends.triton_numbers import SKETCH_BITS, random_words
from tbfast.batch import Batch

Factors = tuple[Tensor, Tensor, Tensor, float]

_DRAW = tl.constexpr(8192)  # columns of signs that one draw of the stream has
_STEP = 16  # sketches have whole vectors of columns
_SHIFTED = 1e-10  # of the largest: smaller squared singular values are too uncertain a shift
_BATCH = 1 << 26  # elements converted to float64 at a time: 512 MiB
_ROWS = 1024 if INTERPRETED else 128


@triton.jit(do_not_specialize=["seed_low", "seed_high"])
def draw_signs(out, rows, columns, seed_low, seed_high, BR: tl.constexpr):
    """out (rows, columns), int8: the signs of a sketch."""
    words = (columns + 31) // 32
    for job in range(tl.program_id(0), (rows + BR - 1) // BR * words, tl.num_programs(0)):
        r = job // words * BR + tl.arange(0, BR).to(tl.int64)
        first = job % words * 32
        name = first * 0  # no part of the key: factors are the same in any company
        bits = random_words(
            r, first % _DRAW, SKETCH_BITS, first // _DRAW, seed_low, seed_high, r * 0 + name
        )
        column = tl.arange(0, 32)
        bit = (bits[:, None] >> column[None, :].to(tl.uint32)) & 1
        inside = (r < rows)[:, None] & (first + column < columns)[None, :]
        place = r[:, None] * columns + first + column[None, :]
        tl.store(out + place, 1 - 2 * bit.to(tl.int8), mask=inside)


def rsvd(batch: Batch, rank: int, *, oversample: int, power_iters: int, seed: int) -> list[Factors]:
    """Factors of every matrix, on the device of the weights; see ``reference_rsvd.rsvd``.

    Waits for the device, because residuals are returned as numbers.
    """
    check_readable(batch)
    matrices = [matrix.detach() for stack in batch.stacks() for matrix in stack]
    if not matrices:
        return []
    width = -(-(rank + oversample) // _STEP) * _STEP
    width = min(width, max(min(matrix.shape) for matrix in matrices))
    signs = _signs(max(max(m.shape) for m in matrices), width, seed, batch.device)
    groups: dict[object, list[int]] = {}
    for place, matrix in enumerate(matrices):
        groups.setdefault((matrix.shape, matrix.is_complex()), []).append(place)
    found: dict[int, Factors] = {}
    for owners in groups.values():
        size = max(1, _BATCH // matrices[owners[0]].numel())
        for start in range(0, len(owners), size):
            chosen = owners[start : start + size]
            wide = torch.complex128 if matrices[chosen[0]].is_complex() else torch.float64
            stack = torch.stack([matrices[place].to(wide) for place in chosen])
            u, s, vh, residual = _factors(stack, rank, width, power_iters, signs)
            for row, error in enumerate(residual.tolist()):
                found[chosen[row]] = (u[row], s[row], vh[row], error)
    return [found[place] for place in range(len(matrices))]


def _signs(rows: int, columns: int, seed: int, device: torch.device) -> Tensor:
    out = torch.empty((rows, columns), dtype=torch.int8, device=device)
    launch(draw_signs, device, out, rows, columns, seed & 0xFFFFFFFF, seed >> 32, BR=_ROWS)
    return out


def _factors(
    a: Tensor, rank: int, width: int, power_iters: int, signs: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """U, S, Vh and the residuals of matrices (count, rows, cols) of one shape."""
    if a.shape[1] > a.shape[2]:
        u, s, vh, residual = _factors(a.mH, rank, width, power_iters, signs)
        return vh.mH, s, u.mH, residual
    largest = torch.view_as_real(a.resolve_conj()).abs() if a.is_complex() else a.abs()
    largest = largest.flatten(1).amax(1)
    finite = torch.isfinite(largest)[:, None, None]
    scale = torch.where(finite[:, 0, 0] & (largest > 0), largest, 1.0)
    # Squares must neither overflow nor vanish; LAPACK might not return from what is not finite.
    a = torch.where(finite, a, torch.zeros_like(a)) / scale[:, None, None]
    columns = min(width, a.shape[1])
    q = _orthonormal(a @ signs[: a.shape[2], :columns].to(a.dtype))
    # With as many columns as A has rows the range is complete already.
    iterations = power_iters if columns < a.shape[1] else 0
    for step in reversed(range(iterations)):
        root = math.cos((2 * step + 1) / (4 * iterations + 2) * math.pi)
        q = _orthonormal(_power_step(a, q, root))
    v, r = torch.linalg.qr(a.mH @ q)
    left, s, right = torch.linalg.svd(r)
    u = q @ right.mH[:, :, :rank]
    vh = (v @ left[:, :, :rank]).mH
    s = s[:, :rank]
    norm = torch.linalg.vector_norm(a, dim=(1, 2))
    residual = torch.linalg.vector_norm(a - (u * s[:, None]) @ vh, dim=(1, 2))
    residual = residual / torch.where(norm > 0, norm, 1.0)
    return u, s * scale[:, None], vh, residual.masked_fill(~finite[:, 0, 0], math.nan)


def _power_step(a: Tensor, q: Tensor, root: float) -> Tensor:
    """(A Aᴴ - (root s)²) q with another basis, s the smallest singular value of Aᴴ q."""
    v, r = torch.linalg.qr(a.mH @ q)
    values = torch.linalg.svdvals(r)
    applied = a @ v
    shift = (root * values[:, -1]).square()[:, None, None]
    certain = (values[:, -1].square() > _SHIFTED * values[:, 0].square())[:, None, None]
    eye = torch.eye(r.shape[1], dtype=r.dtype, device=r.device)
    solved = torch.linalg.solve_triangular(torch.where(certain, r, eye), q, upper=True, left=False)
    return torch.where(certain, applied - shift * solved, applied)


def _orthonormal(y: Tensor) -> Tensor:
    q: Tensor = torch.linalg.qr(y).Q
    return q
