"""How long an optimizer step takes, on whatever device it runs."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import torch


class StepClock:
    """Time between optimizer steps, without what was spent between them on other things.

    On a CPU the wall clock. On a GPU, whose host runs ahead, CUDA events, which are asked for only
    once they have passed: nothing ever waits for the device.

    Attributes:
        device: Where the steps run; None or a CPU device for the wall clock.
    """

    def __init__(self) -> None:
        self.device: torch.device | None = None
        self._began: float | None = None
        self._last: float | None = None
        self._paused = 0.0
        self._events: deque[tuple[Any, float]] = deque(maxlen=8)

    def tick(self) -> float | None:
        """Note a step; the seconds of one that has passed, if one is known."""
        now = time.perf_counter()
        self._began = now if self._began is None else self._began
        last, paused = self._last, self._paused
        self._last, self._paused = now, 0.0
        if self.device is not None and self.device.type == "cuda":
            return self._device_interval(paused)
        return None if last is None else now - last - paused

    def pause(self, seconds: float) -> None:
        """So many of the seconds until the next step are not the step's."""
        if self._last is not None:
            self._paused += seconds

    @property
    def elapsed(self) -> float:
        """Seconds since the first step."""
        return 0.0 if self._began is None else time.perf_counter() - self._began

    def _device_interval(self, paused: float) -> float | None:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        self._events.append((event, paused))
        found = None
        while len(self._events) > 1 and self._events[1][0].query():
            first, _ = self._events.popleft()
            second, between = self._events[0]
            found = first.elapsed_time(second) / 1e3 - between
        return found
