"""Where the parts of a weight lie that several processes hold.

A part is a block: a contiguous range along each dimension of the weight. What ``fully_shard`` and
``parallelize_module`` of torch make is of this form, uneven and empty parts included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tbfast.matrices import Kind, Layer, as_matrices

Block = tuple[slice, ...]


@cache
def dtensor_type() -> Any:
    """torch's distributed tensors; imported where wanted only, because that takes a while."""
    try:
        from torch.distributed.tensor import DTensor
    except ImportError:  # torch 2.4
        from torch.distributed._tensor import DTensor  # type: ignore[attr-defined]
    return DTensor


@dataclass(frozen=True)
class Spread:
    """How a weight is spread over processes.

    Attributes:
        blocks: By global rank, the parts that make up the weight, each entry in one of them; ranks
            that hold nothing, or what a rank before them holds, are not there.
        here: The part that this process holds.
        counts: Whether that is one of ``blocks``.
        split: Dimensions along which the weight is cut.
    """

    blocks: dict[int, Block]
    here: Block
    counts: bool
    split: frozenset[int]


def spread_of(name: str, weight: Any, rank: int) -> Spread:
    """How a DTensor is spread.

    Args:
        name: For errors.
        weight: The DTensor.
        rank: Global rank of this process.

    Raises:
        TypeError: If it holds partial sums, or its parts are not blocks.
    """
    mesh, placements, shape = weight.device_mesh, weight.placements, tuple(weight.shape)
    if any(p.is_partial() for p in placements):
        raise TypeError(f"{name} holds partial sums ({placements}); redistribute it first")
    order = _order(name, mesh.shape, placements, len(shape))
    ranks, blocks, here = mesh.mesh, {}, tuple(slice(0, 0) for _ in shape)
    for coordinate in product(*map(range, ranks.shape)):
        ranges = [(0, size) for size in shape]
        for mesh_dim, dim in order:
            ranges[dim] = _chunk(*ranges[dim], mesh.shape[mesh_dim], coordinate[mesh_dim])
        block = tuple(slice(*r) for r in ranges)
        holder = int(ranks[coordinate])
        if holder == rank:
            here = block
        first = all(c == 0 for c, p in zip(coordinate, placements, strict=True) if _whole(p))
        if first and is_filled(block):
            blocks[holder] = block
    split = frozenset(dim for mesh_dim, dim in order if mesh.shape[mesh_dim] > 1)
    return Spread(blocks, here, rank in blocks, split)


def whole(shape: Sequence[int], holder: int, rank: int) -> Spread:
    """The spread of a weight of which every process holds a copy; that of ``holder`` counts."""
    block = tuple(slice(0, size) for size in shape)
    return Spread({holder: block}, block, holder == rank, frozenset())


def is_filled(block: Block) -> bool:
    """Whether there is an entry in it."""
    return all(r.stop > r.start for r in block)


def block_shape(block: Block) -> tuple[int, ...]:
    """Its sizes."""
    return tuple(r.stop - r.start for r in block)


class Piece(NamedTuple):
    """A part of some of the matrices that a weight stands for.

    Attributes:
        matrices: Which matrices, int64.
        rows, cols: Of each of them.
        values: Shape (len(matrices), rows, cols).
    """

    matrices: Tensor
    rows: slice
    cols: slice
    values: Tensor


def pieces(layer: Layer, block: Block, values: Tensor) -> list[Piece]:
    """What a block of a weight is of the weight's matrices.

    Args:
        layer: The whole weight.
        block: Which part of it; not empty.
        values: That part.
    """
    device = values.device
    if layer.kind == "packed":
        height, held = layer.shape[0] // 3, block[0]
        found = []
        for index in range(3):
            low, high = max(held.start, index * height), min(held.stop, (index + 1) * height)
            if low < high:
                part = values[low - held.start : high - held.start]
                rows = slice(low - index * height, high - index * height)
                at = torch.tensor([index], device=device)
                found.append(Piece(at, rows, block[1], part.unsqueeze(0)))
        return found
    if layer.kind == "experts":
        matrices = torch.arange(block[0].start, block[0].stop, device=device)
        return [Piece(matrices, block[1], block[2], values)]
    numbers = torch.arange(prod(layer.shape[2:]), device=device).view(layer.shape[2:])
    matrices = numbers[block[2:]].flatten()
    return [Piece(matrices, block[0], block[1], as_matrices(values, layer.kind))]


def held_rows(layer: Layer, block: Block) -> Tensor:
    """Numbers, among the rows of all matrices of a weight, of those that a block has a part of.

    int64, ascending: in the order of ``as_matrices`` of the block as a weight of its own, see
    :func:`own_kind`.
    """
    shape, kind = layer.shape, layer.kind
    if kind == "experts":
        numbers = torch.arange(shape[0] * shape[1]).view(shape[0], shape[1])
        return numbers[block[0], block[1]].flatten()
    if kind in ("linear", "packed"):
        return torch.arange(block[0].start, block[0].stop)
    numbers = torch.arange(prod(shape[2:]) * shape[0]).view(*shape[2:], shape[0])
    at = (*block[2:], block[0])
    return numbers[at].flatten()


def own_kind(kind: Kind) -> Kind:
    """Kind of a block as a weight of its own: the rows of packed matrices are not always 3 d."""
    return "linear" if kind == "packed" else kind


def matrix_dims(kind: Kind) -> tuple[int, int]:
    """Dimensions of a weight that are the rows and the columns of its matrices."""
    return (1, 2) if kind == "experts" else (0, 1)


def _order(
    name: str, mesh_shape: Sequence[int], placements: Sequence[Any], ndim: int
) -> list[tuple[int, int]]:
    """(mesh dimension, tensor dimension) in the order in which the weight was cut.

    From left to right, but ``_StridedShard`` says that the cuts to its right came first: so
    ``fully_shard`` cuts what tensor parallelism has left.
    """
    plain: list[tuple[int, int]] = []
    strided: list[tuple[int, int]] = []
    for mesh_dim, placement in enumerate(placements):
        if _whole(placement):
            continue
        dim = placement.dim % ndim
        if not hasattr(placement, "split_factor"):
            plain.append((mesh_dim, dim))
            continue
        strided.insert(0, (mesh_dim, dim))
        right = [
            mesh_shape[i]
            for i, p in enumerate(placements)
            if i > mesh_dim and not _whole(p) and p.dim % ndim == dim
        ]
        if prod(right) != placement.split_factor:
            raise TypeError(f"{name} is cut in a way that is not known here: {placements}")
    return plain + strided


def _whole(placement: Any) -> bool:
    return bool(placement.is_replicate())


def _chunk(start: int, stop: int, parts: int, index: int) -> tuple[int, int]:
    """The range of one part, as ``torch.chunk`` cuts: the last ones may be short or empty."""
    size = -(-(stop - start) // parts)
    return min(start + index * size, stop), min(start + (index + 1) * size, stop)
