"""What measuring may cost: nominal seconds, earned by training steps and spent on layers.

Decisions are made in nominal seconds, which follow from the shapes alone. The clock only says how
many of them a step earns: it is read once, after 32 steps, and then believed until it is off by a
quarter over 64 steps. So the first 32 steps do not depend on the clock, nor does a resumed run
decide otherwise than the one it continues, unless the machine has changed its pace.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from itertools import accumulate
from statistics import median
from typing import Any

from tbfast.clock import StepClock
from tbfast.matrices import Layer, count_eigenvalues
from tbfast.shape import sides

# Given to every run, evenly over its first steps: too little to be felt, and enough to measure a
# small model whole at each of them.
GRANT_SECONDS = 0.05
GRANT_STEPS = 20

_FIRST_READING = 32  # steps before the clock is believed at all
_WINDOW = 64
_TOLERANCE = 1.25
_MEMORY = 0.8  # of what measurements took, from one reading to the next
_LOOK_SHARE = 0.2  # of the budget that may go into looks that find nothing worth measuring
_MOST_SAVED = 50  # complete refreshes of which the credit may hold the price

# Nominal seconds of a thread, on one 2.8 GHz core with AVX-512 and four-byte weights.
_CALL = 8e-4  # of any measurement
_LOOK = (5e-5, 1.2e-5)  # of looking at how far layers have moved: once, and for each layer
_CUBE, _SQUARE, _GRAM = 4e-11, 1.8e-8, 2.5e-11  # exact: n³, n² and n² (m - n)
_MATRIX, _COMPLEX_MATRIX = 2e-5, 8e-6
_COMPLEX, _SMALL_COMPLEX = 4.0, 1.4  # times the arithmetic of a real one; small: worked on together
_SMALL = 64
_PASS = 1e-10  # sketch: one probe times one element


class Budget:
    """The account of a run.

    Args:
        share: Largest share of the time of a step; None for no limit.

    Attributes:
        credit: Nominal seconds that may be spent.
        initial: Seconds that the first measurement of the layers took; not in ``spent``.
        spent: Seconds that all later ones took.
    """

    def __init__(self, share: float | None) -> None:
        self.share = share
        self.credit = 0.0
        self.initial = 0.0
        self.spent = 0.0
        self.clock = StepClock()
        self._wanted = 0.0  # credit at which the next look is due
        self._steps = 0
        self._step_seconds = 0.0  # what a step is believed to take
        self._slowness = 1.0  # seconds for each nominal second
        self._recent: deque[float] = deque(maxlen=_WINDOW)
        self._paid = (0.0, 0.0)  # seconds and nominal seconds; those long ago count less

    def tick(self, agree: Callable[[float], float]) -> None:
        """Earn what one more optimizer step is worth.

        Args:
            agree: Makes one number of the numbers that several processes have.
        """
        interval = self.clock.tick()
        if self.share is None:
            return
        if interval is not None:
            self._recent.append(interval)
        self._steps += 1
        earned = 1
        if self._steps == _FIRST_READING:
            earned = _FIRST_READING
        if self._steps >= _FIRST_READING and (self._steps - _FIRST_READING) % _WINDOW == 0:
            self._read(agree)
        self.credit += earned * self.share * self._step_seconds / self._slowness
        if self._steps <= GRANT_STEPS:
            self.credit += GRANT_SECONDS / GRANT_STEPS

    def pay(self, nominal: float, seconds: float) -> None:
        """Note a look at the weights that took so long."""
        self.credit -= nominal
        self.spent += seconds
        self._paid = (self._paid[0] + seconds, self._paid[1] + nominal)
        self.clock.pause(seconds)

    def pay_first(self, nominal: float, seconds: float) -> None:
        """Note a part of the first measurement, which is free."""
        self.initial += seconds
        self._paid = (self._paid[0] + seconds, self._paid[1] + nominal)
        self.clock.pause(seconds)

    def afford(self, costs: Sequence[float], workers: int, look: float) -> tuple[int, float]:
        """How many layers to measure now, and the price with that of the look before; 0: wait.

        Args:
            costs: Of the layers worth measuring, best first.
            workers: Threads, of all processes together.
            look: Price of the look.
        """
        if not costs:
            self._wanted = self.credit + look / _LOOK_SHARE
            return 0, look
        totals, largest = accumulate(costs), accumulate(costs, max)
        prices = [
            look + _CALL + max(top, total / workers)
            for total, top in zip(totals, largest, strict=True)
        ]
        # No thread should idle, nor the fixed cost of a call be most of it.
        enough = min(workers, len(costs))
        while enough < len(costs) and prices[enough - 1] < look + 4 * _CALL:
            enough += 1
        if prices[enough - 1] > self.credit:
            self._wanted = prices[enough - 1]
            return 0, look
        self._wanted = look + _CALL + min(costs)
        count = bisect_right(prices, self.credit)
        return count, prices[count - 1]

    def limit(self, refresh: float) -> None:
        """Forget credit beyond the price of some complete refreshes, each of this price."""
        self.credit = min(self.credit, _MOST_SAVED * refresh)

    @property
    def is_ready(self) -> bool:
        """Whether there is credit enough for another look."""
        return self.share is None or self.credit >= self._wanted

    @property
    def is_granted(self) -> bool:
        """Whether the first steps are not over."""
        return self._steps <= GRANT_STEPS

    @property
    def overhead(self) -> float:
        """Share of the wall time since the first optimizer step that measuring took."""
        elapsed = self.clock.elapsed
        return min(1.0, self.spent / elapsed) if elapsed > 0 else 0.0

    def state_dict(self) -> dict[str, Any]:
        """Credit and what is believed of the clock; plain numbers."""
        return {
            "credit": self.credit,
            "wanted": self._wanted,
            "steps": self._steps,
            "step_seconds": self._step_seconds,
            "slowness": self._slowness,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state."""
        self.credit = state["credit"]
        self._wanted = state["wanted"]
        self._steps = state["steps"]
        self._step_seconds = state["step_seconds"]
        self._slowness = state["slowness"]

    def _read(self, agree: Callable[[float], float]) -> None:
        """Read the clock, and believe it where it differs by more than the tolerance."""
        seconds, nominal = self._paid
        if nominal > 0:
            self._slowness = _believed(self._slowness, agree(seconds / nominal))
        self._paid = (_MEMORY * seconds, _MEMORY * nominal)
        # All processes ask, also one that knows of no step yet because its device is behind.
        interval = agree(median(self._recent) if self._recent else 0.0)
        if interval > 0:
            self._step_seconds = _believed(self._step_seconds, interval)


def look_cost(layers: int) -> float:
    """Nominal seconds of looking at how far so many layers have moved."""
    return _LOOK[0] + _LOOK[1] * layers


def layer_cost(layer: Layer, *, is_complex: bool, sketch: tuple[int, int] | None = None) -> float:
    """Nominal seconds of one thread for the spectrum of a layer.

    Args:
        layer: The layer.
        is_complex: Whether its weights are.
        sketch: Probes and steps; None for all eigenvalues.
    """
    rows, cols = sides(layer.shape, layer.kind)
    n, m = min(rows, cols), max(rows, cols)
    matrices = count_eigenvalues(layer.shape, layer.kind) / n
    flops = _COMPLEX if is_complex else 1.0
    if sketch is not None:
        return matrices * (flops * _PASS * n * m * math.prod(sketch) + _MATRIX)
    solve = _CUBE * n**3 + _SQUARE * n**2 + _GRAM * n**2 * (m - n)
    if is_complex and n <= _SMALL:
        return matrices * (_SMALL_COMPLEX * solve + _COMPLEX_MATRIX)
    return matrices * (flops * solve + _MATRIX)


def joint_cost(costs: Sequence[float], workers: int) -> float:
    """Nominal seconds of measuring layers of these costs in one call."""
    return _CALL + max(max(costs), sum(costs) / workers)


def _believed(old: float, new: float) -> float:
    return old if old and 1 / _TOLERANCE <= new / old <= _TOLERANCE else new
