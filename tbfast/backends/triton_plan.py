"""What the Triton kernels work on: tables of matrices and work items, made from shapes alone.

An entry is a matrix and a group of start vectors; its vectors are (length, group) with the group
running fastest. Entries whose vectors do not fit into memory together take turns, in rounds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Table = NDArray[np.int64]

_COMPLEX = 4  # dtypes from here on
_ALIGNED = 16  # bytes
_VECTOR = 8  # elements: strides and bounds of what lies together are whole vectors
_SLICE = 1 << 19  # weights of a work item: few enough to share out, many beside the sums they make
_ROUND = 1 << 31  # bytes of vectors: a billion weights and more

# Columns of Batch.descriptors().
ADDRESS, ROWS, COLS, ROW_STRIDE, COL_STRIDE, DTYPE, LAYER = range(7)


@dataclass(frozen=True)
class Round:
    """Entries that are worked on together.

    Attributes:
        table: (entries, 21); the columns are those of triton_apply.
        items: (items, 2): entry and slice.
        floats: Size of their vectors.
    """

    table: Table
    items: Table
    floats: int


def index_in_layer(described: Table) -> Table:
    """The place of every matrix among those of its layer; a layer's matrices are neighbours."""
    layer = described[:, LAYER]
    first = np.searchsorted(layer, layer)
    return np.arange(len(layer)) - first


def tall(described: Table) -> Table:
    """Rows, columns, their strides, and whether they were swapped: (matrices, 5)."""
    swap = described[:, ROWS] < described[:, COLS]
    order = np.where(swap[:, None], [COLS, ROWS, COL_STRIDE, ROW_STRIDE], [1, 2, 3, 4])
    return np.column_stack([np.take_along_axis(described, order, axis=1), swap])


def lengths(described: Table) -> Table:
    """Of the real vectors that each matrix acts on."""
    return np.minimum(described[:, ROWS], described[:, COLS]) * parts(described)


def parts(described: Table) -> Table:
    """Real numbers of an element: 1 or 2."""
    return np.where(described[:, DTYPE] >= _COMPLEX, 2, 1)


def spectral_rounds(
    described: Table, keys: NDArray[np.int64], probes: int, steps: int, group: int, panel: int
) -> list[Round]:
    """The tables for ``spectral_phases``.

    Args:
        described: As of ``Batch.descriptors()``.
        keys: CRC-32 of the name of each layer.
        probes: Start vectors of each matrix.
        steps: Lanczos steps.
        group: Start vectors of an entry.
        panel: Rows that a program reads at a time.
    """
    n = len(described)
    rows, cols, row_stride, col_stride, swapped = tall(described).T
    part = parts(described)
    path = _paths(described, rows, cols, row_stride, col_stride)
    real_rows, real_cols = rows * part, cols * part
    slice_rows = np.maximum(1, _SLICE // (real_cols * panel)) * panel
    slices = -(-real_rows // slice_rows)
    given = np.concatenate([[0], np.cumsum(real_cols * probes)[:-1]])
    first = np.arange(0, probes, group)
    matrix = np.repeat(np.arange(n), len(first))
    first = np.tile(first, n)
    size = real_cols[matrix] * group
    floats = (steps + 1 + slices[matrix]) * size
    zero = np.zeros_like(matrix)
    table = np.column_stack(
        [
            described[matrix, ADDRESS],
            real_rows[matrix],
            real_cols[matrix],
            row_stride[matrix],
            col_stride[matrix],
            described[matrix, DTYPE],
            path[matrix],
            np.where(swapped, -1, 1)[matrix],
            (index_in_layer(described) * real_cols)[matrix],
            keys[described[matrix, LAYER]],
            first,
            np.minimum(group, probes - first),
            zero,  # basis
            steps * size,  # sums
            (steps + 1) * size,  # partials
            slices[matrix],
            slice_rows[matrix],
            given[matrix] + first * real_cols[matrix],
            matrix * probes + first,
            zero,  # first item
            cols[matrix],
        ]
    )
    return [_round(table[chosen], floats[chosen]) for chosen in _chunks(floats * 4)]


def rows_together(described: Table) -> Table:
    """1 for matrices whose rows can be read by 16 bytes, in numbers of up to 4 bytes."""
    narrow = described[:, DTYPE] <= 2
    placed = narrow & (described[:, ADDRESS] % _ALIGNED == 0) & (described[:, COL_STRIDE] == 1)
    whole = (described[:, ROW_STRIDE] % _VECTOR == 0) & (described[:, COLS] % _VECTOR == 0)
    together: Table = (placed & whole).astype(np.int64)
    return together


def _paths(
    described: Table, rows: Table, cols: Table, row_stride: Table, col_stride: Table
) -> Table:
    """How each matrix is read: 0 by elements, 1 by rows of the tall view, 2 by its columns."""
    narrow = described[:, DTYPE] <= 2
    placed = narrow & (described[:, ADDRESS] % _ALIGNED == 0)
    by_rows = placed & (col_stride == 1) & (row_stride % _VECTOR == 0) & (cols % _VECTOR == 0)
    by_cols = placed & (row_stride == 1) & (col_stride % _VECTOR == 0) & (rows % _VECTOR == 0)
    return np.where(by_rows, 1, np.where(by_cols, 2, 0))


def _chunks(sizes: Table) -> list[slice]:
    """Neighbours that fit into a round together; one that does not fit is alone."""
    cuts, used = [0], 0
    for index, size in enumerate(sizes.tolist()):
        if index > cuts[-1] and used + size > _ROUND:
            cuts.append(index)
            used = 0
        used += size
    return [slice(a, b) for a, b in zip(cuts, [*cuts[1:], len(sizes)], strict=True) if b > a]


def _round(table: Table, floats: Table) -> Round:
    table = table.copy()
    offset = np.concatenate([[0], np.cumsum(floats)])
    table[:, 12:15] += offset[:-1, None]
    slices = table[:, 15]
    first = np.concatenate([[0], np.cumsum(slices)])
    table[:, 19] = first[:-1]
    entry = np.repeat(np.arange(len(table)), slices)
    items = np.column_stack([entry, np.arange(first[-1]) - first[entry]])
    return Round(table, items, int(offset[-1]))
