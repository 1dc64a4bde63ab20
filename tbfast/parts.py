"""A lens on the parts of weights that one process holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tbfast.lens import Lens, count_rows, kept_rows
from tbfast.lora_layers import Weight
from tbfast.matrices import Layer
from tbfast.presets import Options
from tbfast.shape import sides
from tbfast.sharding import (
    Piece,
    Spread,
    block_shape,
    held_rows,
    is_filled,
    matrix_dims,
    own_kind,
    pieces,
)

Array = NDArray[np.float64]


class PartsLens(Lens):
    """What one process sees of some layers: each part is a weight of its own.

    Args:
        layers: The whole layers.
        options: Resolved options of a Balancer.

    Attributes:
        spreads: By row, how the weights that are shown are spread.
    """

    def __init__(self, layers: Sequence[Layer], options: Options) -> None:
        self._whole = tuple(layers)
        self._own = list(layers)
        super().__init__(self._own, options)
        self.spreads: dict[int, Spread] = {}
        # Which of the kept rows of a layer are held here; their numbers among those of the part.
        self._which: dict[int, Tensor | slice] = {}
        self._places: dict[int, Tensor] = {}

    def hold(self, weights: Mapping[int, tuple[Spread, Weight]]) -> None:
        """Look at these parts, by row, from now on."""
        for row, (spread, _) in weights.items():
            if self.spreads.get(row) is not spread:
                self._cut(row, spread)
        self._weights = {row: part for row, (_, part) in weights.items()}

    def weight(self, row: int) -> Weight:
        """What this process holds of a weight; may be empty."""
        return self._weights[row]

    def part(self, row: int) -> Tensor:
        """The same of a weight that is not whole here."""
        part = self._weights[row]
        assert isinstance(part, Tensor)
        return part

    def pieces(self, row: int) -> list[Piece]:
        """What of a layer's matrices is held here and by no process before this one."""
        spread = self.spreads[row]
        return pieces(self._whole[row], spread.here, self.part(row)) if spread.counts else []

    def padded_rows(self, row: int) -> Tensor:
        """The kept rows of the whole layer, 0 where not held here or held before: to be summed."""
        layer = self._whole[row]
        width = sides(layer.shape, layer.kind)[1] * self._numbers(row)
        padded = torch.zeros(len(kept_rows(count_rows(layer))), width)
        if self.spreads[row].counts and len(self._kept(row)):
            padded[self._which[row], self._columns(row)] = self._some_rows(row)
        return padded

    def sums(self, rows: Sequence[int], kept: Sequence[Tensor]) -> Array:
        """The three sums of ``turned`` over what is held here, (3, len(rows)): to be summed.

        What a process before this one holds too counts 0, or NaN where it is not finite here.
        """
        sums = np.zeros((3, len(rows)))
        at = [i for i, row in enumerate(rows) if len(self._kept(row))]
        if at:
            own = [kept[i][self._which[rows[i]], self._columns(rows[i])] for i in at]
            counts = [float(self.spreads[rows[i]].counts) for i in at]
            with np.errstate(invalid="ignore"):
                sums[:, at] = np.array(self._movement([rows[i] for i in at], own)) * counts
        return sums

    def _kept(self, row: int) -> Tensor:
        return self._places[row]

    def _columns(self, row: int) -> slice:
        """Which columns of the kept rows are held here; complex ones are two each."""
        columns = self.spreads[row].here[matrix_dims(self._whole[row].kind)[1]]
        return slice(columns.start * self._numbers(row), columns.stop * self._numbers(row))

    def _numbers(self, row: int) -> int:
        """Real numbers in an entry of a weight."""
        weight = self._weights[row]
        return 2 if isinstance(weight, Tensor) and weight.is_complex() else 1

    def _cut(self, row: int, spread: Spread) -> None:
        """Note what is held of a layer and of its kept rows."""
        layer, block = self._whole[row], spread.here
        self.spreads[row] = spread
        self._own[row] = replace(layer, kind=own_kind(layer.kind), shape=block_shape(block))
        numbers, kept = held_rows(layer, block), kept_rows(count_rows(layer))
        which = torch.nonzero(torch.isin(kept, numbers) & is_filled(block))[:, 0]
        self._places[row] = torch.searchsorted(numbers, kept[which])
        first, count = int(which[:1].sum()), len(which)
        in_line = torch.equal(which, torch.arange(first, first + count))
        self._which[row] = slice(first, first + count) if in_line else which  # a slice is no copy
