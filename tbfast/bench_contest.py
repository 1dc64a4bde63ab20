"""Calls timed in turn, round by round, so that a busy moment of the machine hits all alike."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

STREAM = "read-only sum"


@dataclass(frozen=True)
class Call:
    """Something to time.

    Attributes:
        name: Of the contender.
        run: What is timed.
        layers: How many layers one run works on; times are given for one.
        beside: What goes on meanwhile.
        keep: What a ``Batch`` in ``run`` refers to and does not keep itself.
    """

    name: str
    run: Callable[[], object]
    layers: int = 1
    beside: Callable[[], AbstractContextManager[None]] = nullcontext
    keep: object = None


@dataclass(frozen=True)
class Entry:
    """Something of ours to time.

    Attributes:
        call: Its name says what is computed.
        error: Relative error of its answer, found before the timing; NaN where it has none.
        bar: What the ratio to the first peer should reach on a machine of two cores.
        weights: Bytes of weights that one run reads.
    """

    call: Call
    error: float = np.nan
    bar: float | None = None
    weights: int = 0


@dataclass(frozen=True)
class Contest:
    """Calls that are timed in turn.

    Attributes:
        size: Of the layers.
        ours: Each is compared with every peer.
        peers: What others do.
        unit: ``"×"`` or ``"%"``, how a ratio is written.
        at_most: Whether a bar is an upper one.
    """

    size: str
    ours: tuple[Entry, ...]
    peers: tuple[Call, ...]
    unit: str = "×"
    at_most: bool = False


@dataclass(frozen=True)
class Row:
    """A line of the table: something of ours against one peer, or a share of bytes without peer.

    Attributes:
        what, size: What is computed, and of which layers.
        peer: What it is compared with; empty if with nothing.
        ours, theirs: Seconds for a layer in each round; none if nothing was timed.
        ratio: Median of theirs by median of ours, or the share.
        unit, bar, at_most, error: As of a :class:`Contest` and its :class:`Entry`.
        gb_per_s: 10⁹ bytes of weights that ours read in a second; NaN if it was not timed.
        stream: The same as a share of what a bare read of memory reaches.
    """

    what: str
    size: str
    peer: str
    ours: NDArray[np.float64]
    theirs: NDArray[np.float64]
    ratio: float
    unit: str = "×"
    bar: float | None = None
    at_most: bool = False
    error: float = np.nan
    gb_per_s: float = np.nan
    stream: float = np.nan

    def missed(self) -> bool:
        """Whether the bar was not reached."""
        if self.bar is None:
            return False
        return self.ratio > self.bar if self.at_most else self.ratio < self.bar


def checked(what: str, error: float, tolerance: float) -> float:
    """The error, where it is small enough.

    Raises:
        RuntimeError: Where it is not: a wrong answer is not worth a timing.
    """
    if not error <= tolerance:
        raise RuntimeError(
            f"{what} is wrong and was not timed: its relative error is {error:.2g}, above "
            f"{tolerance:.2g}; please report this with the output of 'tbfast doctor'"
        )
    return error


def race(contest: Contest, rounds: int, stream: float, patience: float = 10.0) -> list[Row]:
    """Time the calls of a contest.

    Args:
        contest: What to time.
        rounds: How often each call is timed, at most. From 3 on, one more goes before, uncounted.
        stream: Bytes per second that a bare read of memory reaches, for a contest that does not
            time one itself.
        patience: Seconds after which no new round begins.
    """
    calls = [*(entry.call for entry in contest.ours), *contest.peers]
    times: list[list[float]] = []
    start = time.perf_counter()
    while len(times) < rounds + (rounds > 2):
        times.append([_timed(call) for call in calls])
        if time.perf_counter() - start > patience:
            break
    seconds = np.array(times[len(times) > 2 :]) / [call.layers for call in calls]
    medians = np.median(seconds, axis=0)
    first = len(contest.ours)
    rows = []
    for i, entry in enumerate(contest.ours):
        read = entry.weights / entry.call.layers
        for j, peer in enumerate(contest.peers, first):
            if peer.name == STREAM:
                stream = read / medians[j]
            rows.append(
                Row(
                    what=entry.call.name,
                    size=contest.size,
                    peer=peer.name,
                    ours=seconds[:, i],
                    theirs=seconds[:, j],
                    ratio=float(medians[j] / medians[i]),
                    unit=contest.unit,
                    bar=entry.bar if j == first else None,
                    at_most=contest.at_most,
                    error=entry.error,
                    gb_per_s=read / medians[i] * 1e-9 if read else np.nan,
                    stream=read / medians[i] / stream if read else np.nan,
                )
            )
    return rows


def _timed(call: Call) -> float:
    with call.beside():
        start = time.perf_counter()
        call.run()
        return time.perf_counter() - start
