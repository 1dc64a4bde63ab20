"""How the weights of a set of layers are looked at: a few rows, or their spectra.

A ``Lens`` is shown the present tensors, and answers by row number of the layers. One process with
whole weights is here; :mod:`tbfast.distributed` has the same for weights that several processes
hold or share.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tbfast._native import num_threads
from tbfast.backends import engine_for
from tbfast.batch import Batch
from tbfast.lora_layers import LoraWeight, Weight, formed
from tbfast.matrices import Layer, as_matrices, count_eigenvalues, real_rows
from tbfast.presets import Options
from tbfast.shape import sides, square_blocks
from tbfast.spectra import Measurement, Method, measure

Array = NDArray[np.float64]
Look = Literal["exact", "sketch"]

# Rows kept of a layer, evenly spread. The movement that 8 rows see is that of the weights to some
# 15 %, and only decides when to measure again.
_KEPT_ROWS = 8


class Lens:
    """The present weights of some layers.

    Args:
        layers: The layers.
        options: Resolved options of a Balancer.

    Attributes:
        layers: The layers.
        workers: Threads that measure, of all processes together.
    """

    def __init__(self, layers: Sequence[Layer], options: Options) -> None:
        self.layers = layers
        self.workers = num_threads()
        self._options = options
        self._weights: dict[int, Weight] = {}
        self._batches: dict[tuple[int, ...], tuple[Batch, Tensor, list[weakref.ref[Tensor]]]] = {}

    def show(self, weights: Mapping[int, Weight]) -> None:
        """Look at these tensors, by row, from now on.

        Raises:
            ValueError: If one does not have the shape of its layer.
        """
        for row, weight in weights.items():
            layer, shape = self.layers[row], tuple(weight.shape)
            if shape != layer.shape:
                raise ValueError(f"{layer.name} must have shape {layer.shape}, got {shape}")
        self._weights = dict(weights)

    def keep(self, rows: Sequence[int]) -> list[Tensor]:
        """A few rows of each of these layers, float32 (rows, width), complex ones interleaved."""
        return [self._some_rows(row) for row in rows]

    def turned(self, rows: Sequence[int], kept: Sequence[Tensor]) -> Array:
        """How far layers have moved since some of their rows were kept.

        Args:
            rows: Row numbers of the layers.
            kept: What ``keep`` gave of each.

        Returns:
            (len(rows),): tangent of the angle between the rows then and now; scaling is no
            movement. Infinite from 90 degrees on; NaN where a weight there is not finite.
        """
        moved, along, size = self._movement(rows, kept)
        with np.errstate(divide="ignore", invalid="ignore"):
            across = np.sqrt(np.maximum(moved * size - along**2, 0))
            angle = np.where(size + along > 0, across / (size + along), np.inf)
            return np.where(np.isfinite(moved), angle, np.nan)

    def measure(self, rows: Sequence[int], look: Look | Method, draw: int) -> list[Measurement]:
        """Spectra and fits of these layers.

        Args:
            rows: Row numbers of the layers.
            look: ``"exact"``, ``"sketch"``, or ``"auto"`` as in :func:`tbfast.spectra.measure`.
            draw: Which random probes a sketch takes.
        """
        kinds = [self.layers[row].kind for row in rows]
        weights = [formed(self._weights[row]) for row in rows]
        if self._options.shape_correction == "farms":
            weights = [square_blocks(w, kind) for w, kind in zip(weights, kinds, strict=True)]
            kinds = ["experts"] * len(rows)
        return measure(
            weights,
            kinds,
            self._options.fit,
            names=[self.layers[row].name for row in rows],
            filter_zeros=self._options.filter_zeros,
            sketch=replace(self._options.sketch, draw=draw % 2**24),
            method=look,
            backend=self._options.backend,
        )

    def agree(self, seconds: float) -> float:
        """The same number in every process: the largest."""
        return seconds

    def _movement(self, rows: Sequence[int], kept: Sequence[Tensor]) -> tuple[Array, Array, Array]:
        """|W - W₀|², <W - W₀, W₀> and |W₀|² over the kept rows, (len(rows),) each."""
        weights = [self._weights[row] for row in rows]
        devices = {w.device if isinstance(w, Tensor) else None for w in weights}
        device = devices.pop() if len(devices) == 1 else None
        if device is not None:
            engine, place = engine_for(self._options.backend, device)
            if place == device:
                batch, places = self._batch(rows)
                values = torch.cat([k.flatten() for k in kept])
                moved, along, size = engine.drift(batch, places, values)
                return moved, along, size
        sums = [_sums(self._some_rows(row), old) for row, old in zip(rows, kept, strict=True)]
        moved, along, size = np.array(sums).T
        return moved, along, size

    def _batch(self, rows: Sequence[int]) -> tuple[Batch, Tensor]:
        """A batch of these layers and which of its rows are kept; the last one is used again."""
        weights = [formed(self._weights[row]) for row in rows]
        seen = self._batches.get(tuple(rows))
        if seen is None or any(a() is not b for a, b in zip(seen[2], weights, strict=True)):
            names = [self.layers[row].name for row in rows]
            batch = Batch(
                dict(zip(names, weights, strict=True)), [self.layers[row].kind for row in rows]
            )
            totals = [count_rows(self.layers[row]) for row in rows]
            firsts = np.cumsum(totals) - totals
            places = torch.cat(
                [self._kept(row) + int(first) for row, first in zip(rows, firsts, strict=True)]
            )
            seen = (batch, places, [weakref.ref(weight) for weight in weights])
            self._batches = {tuple(rows): seen}
        return seen[0], seen[1]

    def _kept(self, row: int) -> Tensor:
        """Numbers of the rows of a layer that are kept, among those of all its matrices."""
        return kept_rows(count_rows(self.layers[row]))

    def _some_rows(self, row: int) -> Tensor:
        layer, weight = self.layers[row], self._weights[row]
        if isinstance(weight, LoraWeight):
            return weight.rows(self._kept(row)).float().cpu()
        stack = as_matrices(weight, layer.kind)
        places = self._kept(row).to(stack.device)
        some = stack[places // stack.shape[1], places % stack.shape[1]]
        return real_rows(some).float().cpu()


def kept_rows(total: int) -> Tensor:
    """Which of all rows of a layer's matrices are kept: int64, ascending."""
    count = min(total, _KEPT_ROWS)
    return torch.from_numpy(((np.arange(count) + 0.5) * (total / count)).astype(np.int64))


def count_rows(layer: Layer) -> int:
    """Number of rows of all matrices that a layer's weight stands for."""
    return (
        count_eigenvalues(layer.shape, layer.kind)
        // min(sides(layer.shape, layer.kind))
        * (sides(layer.shape, layer.kind)[0])
    )


def _sums(now: Tensor, before: Tensor) -> tuple[float, float, float]:
    old = before.double()
    step = now.double() - old
    return float(step.square().sum()), float((step * old).sum()), float(old.square().sum())
