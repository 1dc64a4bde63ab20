"""Alpha of every layer at every step, from launches that nobody waits for."""

from __future__ import annotations

from contextlib import suppress

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tbfast.backends.cuda_plans import (
    SKETCH_COLUMNS,
    Planned,
    make_plan,
    sketch_table,
    spectral,
)
from tbfast.batch import Batch
from tbfast.fitting import FitOptions
from tbfast.sketching import SketchOptions, SketchTable


class Refresh:
    """Alpha of every layer from one launch that nobody waits for.

    ``start`` puts a launch on the current stream; ``latest`` tells what the last one that has
    finished found, usually that of the step before.

    Args:
        batch: The weights.
        options: The fit.
        sketch: Probes, steps and seed.

    Raises:
        RuntimeError: If there is not enough memory, or no GPU that the kernels run on.
        ValueError: If the weights are not on a GPU or do not fit the kernels' tables.
    """

    _BUFFERS = 4  # of results: launches that may be under way, and one that is being read

    def __init__(self, batch: Batch, options: FitOptions, sketch: SketchOptions) -> None:
        self._batch, self._options, self._sketch = batch, options, sketch
        self._layers = len(batch)
        size = SKETCH_COLUMNS * self._layers + 1  # rows, then the number of the launch
        self._results = self._pinned(self._BUFFERS, size).fill_(-1)
        self._captured = self._pinned(self._layers, SKETCH_COLUMNS)
        self._draws = [0] * self._BUFFERS
        self._started = 0
        self._planned: Planned | None = None
        self._described: NDArray[np.int64] | None = None  # what the plan was made for
        self._plan()

    def __del__(self) -> None:
        # Launches that are under way write to the memory that is about to go.
        if self.__dict__.get("_started") and self._batch.device.type == "cuda":
            with suppress(Exception):
                torch.cuda.synchronize(self._batch.device)

    def start(self, draw: int) -> bool:
        """Launch; False, and nothing is done, where three launches are still under way.

        Args:
            draw: Which of the draws of the seed, below 2^24: usually the optimizer step.
        """
        if self._started - self._finished() >= self._BUFFERS - 1:
            return False
        self._started += 1
        buffer = self._started % self._BUFFERS
        self._draws[buffer] = draw
        rows = self._results[buffer]
        self._plan().launch(
            mode="alpha",
            out=rows,
            seed=self._sketch.seed,
            draw=draw,
            finished=rows[-1:],
            sequence=float(self._started),
        )
        return True

    def capture(self) -> Tensor:
        """Launch while a CUDA graph is captured; this object must live as long as the graph.

        Each replay takes the next draw, beginning with that of the options; graphs captured from
        one object count together.

        Returns:
            Float64 (layers, 10) in pinned memory, which each replay overwrites: the numbers of
            :func:`quadrature_fit` in the order of :class:`SketchTable`.

        Raises:
            RuntimeError: If weights have moved since this was made: what a graph reads is fixed.
        """
        self._plan().launch(
            mode="alpha",
            out=self._captured,
            seed=self._sketch.seed,
            draw=self._sketch.draw,
            replayed=True,
        )
        return self._captured

    def latest(self) -> tuple[int, SketchTable] | None:
        """The draw and the fits of the last launch that has finished; None if there is none."""
        finished = self._finished()
        if finished == 0:
            return None
        buffer = finished % self._BUFFERS
        rows = self._results[buffer, :-1].view(self._layers, SKETCH_COLUMNS)
        return self._draws[buffer], sketch_table(rows.numpy())

    def _plan(self) -> Planned:
        """Its own, which no other use of the batch replaces."""
        described = self._batch.descriptors()
        if self._planned is None or self._described is not described:
            if self._batch.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "weights have moved since this Refresh was made; make a new one to capture"
                )
            self._planned, self._described = None, described  # its memory is free for the next
            sketch = self._sketch
            make = spectral(self._batch, sketch.probes, sketch.steps, self._options)
            self._planned = make_plan(self._batch, make)
        return self._planned

    def _pinned(self, *shape: int) -> Tensor:
        on_gpu = self._batch.device.type == "cuda"
        return torch.empty(shape, dtype=torch.float64, pin_memory=on_gpu)

    def _finished(self) -> int:
        return max(0, int(self._results[:, -1].max()))
