"""What the spectral kernel does for a list of matrices: its tile plan, in Python.

The rules are those of csrc/cuda/spectral_plan.{h,cpp}; tests/test_gpu_model.py compares the two.
Bytes are those of a layer's weights in one type, and contiguous.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from gpu_architectures import Shape
from numpy.typing import NDArray

PROBES = 8  # that one pass serves
SEGMENT = 1024
PANEL_ROWS = {2: 16, 4: 8}  # by bytes of a weight
SHORT_SLICE, LONG_SLICE, LARGE = 256, 1024, 1 << 22  # rows; the last in elements
FLOAT = 4  # bytes
QUADRATURE_BARRIERS = 1


@dataclass(frozen=True)
class Plan:
    """One launch of the spectral kernel with up to 8 start vectors.

    Attributes:
        matrices: Shapes.
        weight_bytes: Of one weight: 2 for bfloat16 (tensor cores), 4 for float32.
        steps: Lanczos steps.
        segment: Columns of the tall view that one block keeps on chip: kSegment.
    """

    matrices: tuple[Shape, ...]
    weight_bytes: int = 2
    steps: int = 20
    segment: int = SEGMENT

    @cached_property
    def sides(self) -> NDArray[np.int64]:
        """Rows and columns of the tall view of each matrix, (matrices, 2)."""
        return np.array([(max(shape), min(shape)) for shape in self.matrices], dtype=np.int64)

    @cached_property
    def steps_taken(self) -> NDArray[np.int64]:
        """Of each matrix: a run cannot be longer than its vectors."""
        return np.minimum(self.steps, self.sides[:, 1])

    @cached_property
    def slice_rows(self) -> NDArray[np.int64]:
        return np.where(self.sides.prod(1) < LARGE, SHORT_SLICE, LONG_SLICE)

    @cached_property
    def slices(self) -> NDArray[np.int64]:
        return -(-self.sides[:, 0] // self.slice_rows)

    @cached_property
    def segments(self) -> NDArray[np.int64]:
        return -(-self.sides[:, 1] // self.segment)

    @property
    def items(self) -> int:
        """Work items of a product."""
        return int((self.slices * self.segments).sum())

    @property
    def most_blocks(self) -> int:
        """Blocks that have something to do in one phase or the other."""
        return max(self.items, len(self.matrices) * PROBES)

    @property
    def least_blocks(self) -> int:
        """Blocks of the widest team, all of which must run at once."""
        return int(self.segments.max())

    @cached_property
    def item_panels(self) -> NDArray[np.float64]:
        """Panels of each work item, in order; those of its team's matrix follow each other."""
        tall = PANEL_ROWS[self.weight_bytes]
        parts = []
        for (rows, _), height, slices, segments in zip(
            self.sides, self.slice_rows, self.slices, self.segments, strict=True
        ):
            full = np.full(slices, -(-height // tall), dtype=float)
            full[-1] = -(-(rows - (slices - 1) * height) // tall)
            parts.append(np.repeat(full, segments))
        return np.concatenate(parts)

    @cached_property
    def item_teams(self) -> NDArray[np.int64]:
        """Blocks of the team of each work item."""
        return np.repeat(self.segments, self.slices * self.segments)

    @property
    def barriers(self) -> int:
        """Grid barriers of a launch: start, two for each step, end, those of the quadrature."""
        return 1 + 2 * self.steps + 1 + QUADRATURE_BARRIERS

    @property
    def weights_read(self) -> int:
        """Bytes of weights that a refresh reads: each once for every step."""
        return int((self.sides.prod(1) * self.steps_taken).sum()) * self.weight_bytes

    @property
    def flops(self) -> float:
        """Useful ones: W x and W^T t, without the second product that high + low parts take."""
        return float(4 * PROBES * (self.sides.prod(1) * self.steps_taken).sum())

    def product_bytes(self) -> float:
        """Bytes of one product beside the weights: x once, y of every slice."""
        return float((self.sides[:, 1] * (1 + self.slices)).sum()) * PROBES * FLOAT

    def run_bytes(self, step: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Bytes that one block reads to advance one run of each matrix, twice (matrices,).

        First y of all slices, and what subtracts the earlier vectors from w, with w itself written
        and read by ten loops; then the inner products with the earlier vectors.
        """
        vector = self.sides[:, 1].astype(np.float64) * FLOAT
        earlier = vector * (step + 1.0)
        return earlier + vector * (self.slices + 10.0), earlier

    @property
    def vector_bytes(self) -> int:
        """Of the Krylov bases and of y of all slices: what a round holds."""
        floats = self.sides[:, 1] * PROBES * (self.steps_taken + 1 + self.slices)
        return int(floats.sum()) * FLOAT


def busiest(matrices: Sequence[Shape], ranks: int) -> tuple[Shape, ...]:
    """The matrices of the rank with most to do, by tbfast's own rule: the longest first."""
    from tbfast.distributed import shared_out

    costs = [float(rows * columns) for rows, columns in matrices]
    owners = np.array(shared_out(costs, ranks))
    loads = np.bincount(owners, weights=costs, minlength=ranks)
    return tuple(m for m, owner in zip(matrices, owners, strict=True) if owner == loads.argmax())
