"""The clock of optimizer steps, on a CPU and on a device that runs behind its host."""

import time
from types import SimpleNamespace

import torch

from tbfast.clock import StepClock


class FakeDevice:
    """CUDA events on a device that has done all work queued up to ``done``."""

    def __init__(self, monkeypatch):
        self.queued, self.done = 0.0, 0.0
        device = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self, stream):
                assert stream == "stream of cuda:0"
                self.at = device.queued

            def query(self):
                return self.at <= device.done

            def elapsed_time(self, later):
                assert self.query()
                assert later.query()
                return 1e3 * (later.at - self.at)

            def synchronize(self):
                raise AssertionError("nothing waits for the device")

        fakes = {
            "Event": Event,
            "current_stream": lambda device: f"stream of {device}",
            "synchronize": Event.synchronize,
        }
        monkeypatch.setattr(torch, "cuda", SimpleNamespace(**fakes))


def test_the_wall_clock_leaves_out_what_was_paused(monkeypatch):
    now = [10.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock = StepClock()
    clock.pause(5.0)  # before the first step nothing counts
    assert clock.tick() is None
    now[0] += 0.25
    clock.pause(0.0625)
    now[0] += 0.0625
    assert clock.tick() == 0.25
    now[0] += 1.0
    assert clock.tick() == 1.0
    assert clock.elapsed == 1.3125


def test_events_are_asked_only_once_the_device_has_passed_them(monkeypatch):
    device = FakeDevice(monkeypatch)
    clock = StepClock()
    clock.device = torch.device("cuda:0")
    found = []
    for step in range(6):
        device.done = max(0.0, device.queued - 0.5)  # half a second behind the host
        found.append(clock.tick())
        clock.pause(0.0625)
        device.queued += 0.25 * (step + 1)
    # Steps of 0.25, 0.5 ... 1.25 s, each with 0.0625 s of measuring; known once they have passed.
    assert [f for f in found if f is not None] == [0.1875, 0.4375, 0.6875, 0.9375]
    assert found[:2] == [None, None]


def test_a_device_that_never_catches_up_holds_few_events(monkeypatch):
    device = FakeDevice(monkeypatch)
    device.done = -1.0
    clock = StepClock()
    clock.device = torch.device("cuda:0")
    assert [clock.tick() for _ in range(100)] == [None] * 100
    assert len(clock._events) <= 8
