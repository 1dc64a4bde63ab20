"""Alpha of every layer at every step, from launches that nobody waits for."""

from __future__ import annotations

import torch
from torch import Tensor

from tbfast.backends.cuda_plans import SKETCH_COLUMNS, Planned, sketch_table, spectral_plan
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
        pinned = batch.device.type == "cuda"
        self._results = torch.full(
            (self._BUFFERS, size), -1.0, dtype=torch.float64, pin_memory=pinned
        )
        self._draws = [0] * self._BUFFERS
        self._started = 0

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
        """Launch while a CUDA graph is captured.

        Each replay takes the next draw, beginning with that of the options.

        Returns:
            Float64 (layers, 10) in pinned memory, which each replay overwrites: the numbers of
            :func:`quadrature_fit` in the order of :class:`SketchTable`.
        """
        rows = torch.empty(
            self._layers,
            SKETCH_COLUMNS,
            dtype=torch.float64,
            pin_memory=self._batch.device.type == "cuda",
        )
        self._plan().launch(
            mode="alpha",
            out=rows,
            seed=self._sketch.seed,
            draw=self._sketch.draw,
            replayed=True,
        )
        return rows

    def latest(self) -> tuple[int, SketchTable] | None:
        """The draw and the fits of the last launch that has finished; None if there is none."""
        finished = self._finished()
        if finished == 0:
            return None
        buffer = finished % self._BUFFERS
        rows = self._results[buffer, :-1].view(self._layers, SKETCH_COLUMNS)
        return self._draws[buffer], sketch_table(rows.numpy())

    def _plan(self) -> Planned:
        return spectral_plan(self._batch, self._sketch.probes, self._sketch.steps, self._options)

    def _finished(self) -> int:
        return max(0, int(self._results[:, -1].max()))
