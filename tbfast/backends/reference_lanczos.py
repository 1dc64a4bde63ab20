"""The definition of ``gram_apply`` and ``lanczos``: float64, one matrix after the other.

Sources: Golub and Van Loan, "Matrix Computations", section 10.1 (Lanczos); Ubaru, Chen and Saad,
"Fast estimation of tr(f(A)) via stochastic Lanczos quadrature", SIAM J. Matrix Anal. Appl. 38
(2017).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tbfast.backends.philox import Purpose, signs
from tbfast.batch import Batch
from tbfast.tridiagonals import Tridiagonals

Array = NDArray[np.float64]

_EPS = float(np.finfo(np.float64).eps)


def gram_apply(batch: Batch, x: Sequence[Tensor]) -> list[Tensor]:
    """WᴴW x of every matrix, WWᴴ x of those with fewer rows than columns.

    Args:
        batch: The weights.
        x: For each weight (matrices, vectors, length): length is the shorter side of its matrices,
            twice that for complex ones, whose vectors are real: (re, im) interleaved.

    Returns:
        Float64 tensors of the shapes of ``x``.
    """
    products = []
    for stack, vectors in zip(batch.stacks(), x, strict=True):
        pairs = zip(stack, vectors, strict=True)
        products.append(torch.stack([v.double() @ _tall(m).T @ _tall(m) for m, v in pairs]))
    return products


def lanczos(
    batch: Batch,
    probes: int | Sequence[Tensor],
    steps: int,
    *,
    seed: int = 0,
    draw: int = 0,
) -> Tridiagonals:
    """Lanczos on WᴴW (WWᴴ) of every matrix, with full reorthogonalisation.

    Args:
        batch: The weights.
        probes: Number of runs for each matrix, started from random signs; or the start vectors,
            for each weight (matrices, probes, length) as in :func:`gram_apply`.
        steps: Most steps of a run. It ends early where it has found an invariant subspace.
        seed: Of the signs, below 2^64.
        draw: Which of the draws of this seed, below 2^24.

    Returns:
        :class:`Tridiagonals`; the rows of matrices follow the order of the weights.
    """
    runs = [(_tall(matrix), start) for matrix, start in _starts(batch, probes, seed, draw)]
    stacks = batch.stacks()
    count = [min(matrix.shape) for stack in stacks for matrix in stack]
    shape = (len(runs), len(runs[0][1]) if runs else 0, steps)
    diagonal, off_diagonal = np.zeros(shape), np.zeros(shape)
    taken = np.ones(shape[:2], dtype=np.int32)
    for row, (matrix, start) in enumerate(runs):
        for probe, vector in enumerate(start):
            # No Krylov space has more dimensions than W has different eigenvalues.
            is_complex = matrix.shape[1] == 2 * count[row]
            a, b = _one_run(matrix, vector, min(steps, count[row]), is_complex)
            diagonal[row, probe, : len(a)], off_diagonal[row, probe, : len(b)] = a, b
            taken[row, probe] = len(a)
    return Tridiagonals(
        diagonal,
        off_diagonal,
        taken,
        first=np.cumsum([0, *map(len, stacks)]),
        count=np.array(count, dtype=np.int64),
        eps=_EPS,
    )


def _tall(matrix: Tensor) -> Tensor:
    """The real float64 matrix, rows at least columns, whose eigenvalues are wanted.

    A complex W becomes [[re, -im], [im, re]] with rows and columns interleaved: its eigenvalues
    are those of W, each twice.
    """
    matrix = matrix.detach()
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.mH
    if not tall.is_complex():
        return tall.double()
    z = tall.to(torch.complex128)
    upper = torch.stack([z.real, -z.imag], dim=-1).flatten(1)
    lower = torch.stack([z.imag, z.real], dim=-1).flatten(1)
    return torch.stack([upper, lower], dim=1).flatten(0, 1)


def _starts(
    batch: Batch, probes: int | Sequence[Tensor], seed: int, draw: int
) -> Iterator[tuple[Tensor, Tensor]]:
    for layer, stack in enumerate(batch.stacks()):
        length = min(stack.shape[1:]) * (2 if stack.is_complex() else 1)
        for index, matrix in enumerate(stack):
            if isinstance(probes, int):
                key = batch.keys[layer]
                drawn = signs(seed, key, Purpose.PROBE, draw, index * length, length, probes)
                yield matrix, torch.from_numpy(drawn.T.copy())
            else:
                yield matrix, probes[layer][index].double()


def _one_run(
    matrix: Tensor, start: Tensor, steps: int, is_complex: bool
) -> tuple[list[float], list[float]]:
    a: list[float] = []
    b: list[float] = []
    if not bool(torch.isfinite(matrix).all()):
        return [math.nan], b
    basis = (start / start.norm())[None]
    for _ in range(steps):
        w = matrix.T @ (matrix @ basis[-1])
        a.append(float(basis[-1] @ w))
        known = basis
        if is_complex:
            # Every eigenvalue has a second eigenvector, i times the first: rounding must not let
            # it in.
            turned = torch.stack([-basis[:, 1::2], basis[:, ::2]], dim=-1).flatten(1)
            known = torch.cat([basis, turned])
        for _ in range(2):  # twice is enough (Parlett)
            w = w - known.T @ (known @ w)
        b.append(float(w.norm()))
        # Below this, w is the rounding of an invariant subspace.
        if b[-1] <= 100 * _EPS * max(abs(x) + y for x, y in zip(a, [0.0, *b], strict=False)):
            break
        basis = torch.cat([basis, (w / b[-1])[None]])
    return a, b[: len(a) - 1]
