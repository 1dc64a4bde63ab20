"""``dot`` and ``drift`` of the Triton backend: sums over all weights of a layer, read once.

    phase 0    each work item, some rows of one matrix, adds up its products in float64
    phase 1    each layer adds the sums of its items, in their order

Items depend on shapes alone and every sum has an order of its own, so the grid changes no bit. The
definitions are ``dot`` and ``drift`` in reference.py.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from tbfast.backends import triton_plan as plan
from tbfast.backends.gpu_checks import check_length, check_table
from tbfast.backends.triton_launch import INTERPRETED, check_readable, launch_phases
from tbfast.backends.triton_numbers import grid_barrier, load_double
from tbfast.batch import Batch

Array = NDArray[np.float64]

_ITEM = 1 << 18  # weights of a work item
TILES = {"BR": 32, "BK": 512} if INTERPRETED else {"BR": 8, "BK": 256}

# Columns of the table of items, int64.
_ADDRESS = tl.constexpr(0)
_DTYPE = tl.constexpr(1)  # as in csrc/ragged.h
_ROW_STRIDE = tl.constexpr(2)  # in elements
_COL_STRIDE = tl.constexpr(3)
_WIDTH = tl.constexpr(4)  # real numbers of a row
_FIRST = tl.constexpr(5)  # row of the matrix
_LAST = tl.constexpr(6)
_OTHER = tl.constexpr(7)  # place of the first row's partners: gradient, or rows kept
_SCALE = tl.constexpr(8)  # place of its scale
_TOGETHER = tl.constexpr(9)  # 1: rows lie together, aligned, in numbers of up to 4 bytes
_ITEM_COLUMNS = tl.constexpr(10)


@triton.jit
def _together(item, r, k, TYPE: tl.constexpr):
    """A tile of a matrix whose rows are read by 16 bytes."""
    # The hints hold only where the values are made.
    W = tl.multiple_of(tl.load(item + _ADDRESS).to(tl.pointer_type(TYPE)), 16)
    stride = tl.multiple_of(tl.load(item + _ROW_STRIDE), 8)
    width = tl.multiple_of(tl.load(item + _WIDTH), 8)
    inside = (r < tl.load(item + _LAST))[:, None] & (k < width)[None, :]
    w = tl.load(W + r[:, None] * stride + k[None, :], mask=inside, other=0.0)
    return w.to(tl.float32).to(tl.float64)


@triton.jit
def _weights(item, r, k):
    """A tile of a matrix in float64; complex numbers are pairs of columns."""
    dtype = tl.load(item + _DTYPE)
    if tl.load(item + _TOGETHER) == 1:
        if dtype == 0:
            w = _together(item, r, k, tl.float16)
        elif dtype == 1:
            w = _together(item, r, k, tl.bfloat16)
        else:
            w = _together(item, r, k, tl.float32)
    else:
        inside = (r < tl.load(item + _LAST))[:, None] & (k < tl.load(item + _WIDTH))[None, :]
        bit = (dtype >= 4).to(tl.int64)
        place = r[:, None] * tl.load(item + _ROW_STRIDE)
        place += (k >> bit)[None, :] * tl.load(item + _COL_STRIDE)
        offset = (place << bit) + (k & bit)[None, :]
        w = load_double(tl.load(item + _ADDRESS), offset, inside, dtype)
    return w


@triton.jit
def _sums(item, others, scales, BR: tl.constexpr, BK: tl.constexpr):
    """The sums of one item: of products with its partners and of squares."""
    width, first, last = (
        tl.load(item + _WIDTH),
        tl.load(item + _FIRST),
        tl.load(item + _LAST),
    )
    a = tl.zeros((BR, BK), tl.float64)
    b = tl.zeros((BR, BK), tl.float64)
    c = tl.zeros((BR, BK), tl.float64)
    for top in range(first, last, BR):
        r = top + tl.arange(0, BR)
        for left in range(0, width, BK):
            k = left + tl.arange(0, BK)
            inside = (r < last)[:, None] & (k < width)[None, :]
            w = _weights(item, r, k)
            place = tl.load(item + _OTHER) + (r - first)[:, None] * width + k[None, :]
            other = tl.load(others + place, mask=inside, other=0).to(tl.float64)
            if scales is None:
                step = w - other
                a += step * step
                b += step * other
                c += other * other
            else:
                scale = tl.load(scales + tl.load(item + _SCALE) + r - first, mask=r < last, other=0)
                a += w * (other * scale[:, None].to(tl.float64))
                b += w * w
    return tl.sum(a), tl.sum(b), tl.sum(c)


@triton.jit
def sum_phases(
    begin,
    end,
    counter,  # of the grid barrier; None where a launch is one phase
    items,  # (items, 10) int64
    firsts,  # (layers + 1) int64: the first item of each layer
    n_items,
    layers,
    others,  # gradient, int8; or rows kept, float32
    scales,  # float32, of the gradient; or None
    partial,  # (items, 3) float64
    out,  # (3, layers) float64
    BR: tl.constexpr,
    BK: tl.constexpr,
):
    me, programs = tl.program_id(0), tl.num_programs(0)
    for phase in range(begin, end):
        if phase == 0:
            for i in range(me, n_items, programs):
                a, b, c = _sums(items + i * _ITEM_COLUMNS, others, scales, BR, BK)
                tl.store(partial + 3 * i, a)
                tl.store(partial + 3 * i + 1, b)
                tl.store(partial + 3 * i + 2, c)
        else:
            for job in range(me, 3 * layers, programs):
                layer, which = job // 3, job % 3
                last = tl.load(firsts + layer + 1)
                total = tl.zeros((BK,), tl.float64)
                for start in range(tl.load(firsts + layer), last, BK):
                    i = start + tl.arange(0, BK)
                    total += tl.load(partial + 3 * i + which, mask=i < last, other=0.0)
                tl.store(out + which * layers + layer, tl.sum(total))
        if counter is not None:
            grid_barrier(counter)


def dot(batch: Batch, values: Tensor, scales: Tensor) -> tuple[Array, Array]:
    """Re <G, W> and |W|² of each layer in one read of both; see ``reference.dot``."""
    described = batch.descriptors()
    rows, width = described[:, plan.ROWS], _width(described)
    step = np.maximum(1, _ITEM // width)
    count = -(-rows // step)
    matrix = np.repeat(np.arange(len(described)), count)
    part = np.arange(len(matrix)) - np.repeat(np.cumsum(count) - count, count)
    first = part * step[matrix]
    last = np.minimum(first + step[matrix], rows[matrix])
    element, row = _starts(rows * width), _starts(rows)
    check_length("values", values, int(element[-1]))
    check_length("scales", scales, int(row[-1]))
    other = element[matrix] + first * width[matrix]
    found = _run(batch, described, matrix, first, last, other, row[matrix] + first, values, scales)
    return found[0], found[1]


def drift(batch: Batch, rows: Tensor, values: Tensor) -> tuple[Array, Array, Array]:
    """How far some rows of each layer have moved; see ``reference.drift``."""
    described = batch.descriptors()
    kept, starts = rows.cpu().numpy(), _starts(described[:, plan.ROWS])
    if len(kept) and (kept[0] < 0 or kept[-1] >= starts[-1] or (np.diff(kept) < 0).any()):
        raise ValueError(f"rows must be ascending, from 0 to {starts[-1] - 1}")
    matrix = np.searchsorted(starts, kept, side="right") - 1
    other = _starts(_width(described)[matrix])
    check_length("values", values, int(other[-1]))
    first = kept - starts[matrix]
    found = _run(batch, described, matrix, first, first + 1, other[:-1], first, values, None)
    return found[0], found[1], found[2]


def _run(
    batch: Batch,
    described: plan.Table,
    matrix: plan.Table,
    first: plan.Table,
    last: plan.Table,
    other: plan.Table,
    scale: plan.Table,
    others: Tensor,
    scales: Tensor | None,
) -> Array:
    check_readable(batch)
    check_table(described, batch.names, "triton")
    device, layers = batch.device, len(batch)
    mine = described[matrix]
    table = np.column_stack(
        [
            mine[:, plan.ADDRESS],
            mine[:, plan.DTYPE],
            mine[:, plan.ROW_STRIDE],
            mine[:, plan.COL_STRIDE],
            _width(described)[matrix],
            first,
            last,
            other,
            scale,
            plan.rows_together(mine),
        ]
    )
    firsts = np.searchsorted(mine[:, plan.LAYER], np.arange(layers + 1))
    out = torch.zeros((3, layers), dtype=torch.float64, device=device)
    launch_phases(
        sum_phases,
        2,
        device,
        torch.from_numpy(table).to(device),
        torch.from_numpy(firsts).to(device),
        len(table),
        layers,
        others.to(device).contiguous(),
        None if scales is None else scales.to(device, torch.float32).contiguous(),
        torch.empty((len(table), 3), dtype=torch.float64, device=device),
        out,
        **TILES,
    )
    found: Array = out.cpu().numpy()
    return found


def _width(described: plan.Table) -> plan.Table:
    return described[:, plan.COLS] * plan.parts(described)


def _starts(sizes: plan.Table) -> plan.Table:
    return np.concatenate([[0], np.cumsum(sizes)])
