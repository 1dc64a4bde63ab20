"""How many layers may be measured now, given a share of the run's wall time."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch

# Below this a complete refresh is cheap enough to keep the run reproducible.
FREE_SECONDS = 0.05

# Complete refreshes before any is rationed: the first is slow for reasons of its own.
_TRIALS = 3


class Budget:
    """Clock of the measurements, and the rationing of them.

    Refreshes are complete while one costs at most 50 ms. Above that a refresh takes the stalest
    layers first, as many as ``share`` of the wall time since the first optimizer step (measuring
    excluded) pays for. Which layers those are depends on the clock: a rationed run is not
    reproducible bit for bit. Runs of more than one process are never rationed, since their clocks
    would disagree about the factors.

    Args:
        costs: Relative costs of the layers, to divide the time of a joint measurement.
        share: Largest share of wall time; None for no limit.
    """

    def __init__(self, costs: Sequence[float], share: float | None) -> None:
        self.share = share
        self.spent = 0.0
        self._weights = list(costs)
        self._seconds = [math.inf] * len(costs)  # least cost measured of each layer
        self._records = 0
        self._began: float | None = None

    def begin(self) -> None:
        """Start the clock, at the first optimizer step; later calls change nothing."""
        self._began = time.perf_counter() if self._began is None else self._began

    def overhead(self) -> float:
        """Share of the wall time since the first optimizer step that measuring took."""
        elapsed = 0.0 if self._began is None else time.perf_counter() - self._began
        return self.spent / elapsed if elapsed > 0 else 0.0

    def affordable(self, rows: Sequence[int], measured_at: Sequence[int]) -> list[int]:
        """Those of ``rows`` to measure now, in order; all of them where nothing is rationed."""
        cost = [seconds if seconds < math.inf else 0.0 for seconds in self._seconds]
        if self.share is None or self._began is None:
            return list(rows)
        if self._records < _TRIALS or sum(cost) <= FREE_SECONDS or _processes() > 1:
            return list(rows)
        left = self.share * (time.perf_counter() - self._began - self.spent) - self.spent
        chosen = []
        for row in sorted(rows, key=lambda r: (measured_at[r], r)):
            left -= cost[row]
            if left < 0:
                break
            chosen.append(row)
        return sorted(chosen)

    def record(self, rows: Sequence[int], seconds: float) -> None:
        """Note what a joint measurement of ``rows`` took."""
        self._records += 1
        whole = sum(self._weights[row] for row in rows)
        for row in rows:
            part = seconds * self._weights[row] / whole
            self._seconds[row] = min(self._seconds[row], part)
        if self._began is not None:
            self.spent += seconds


def _processes() -> int:
    ready = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if ready else 1
