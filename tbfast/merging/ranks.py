"""The processes that merge together: those of ``torchrun``, or of ``torch.distributed``.

Each makes the same plan and writes its share of the files. They meet in one way only: all do a
piece of work, and all learn how it went. So none waits for one that has failed.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from itertools import count
from typing import Any, TypeVar, cast

from tbfast import _native
from tbfast.errors import CheckpointError, brief

T = TypeVar("T")

_ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # as torchrun sets it
_MEETING = timedelta(minutes=5)  # for all to come
_KINDS = (CheckpointError, ValueError, OSError, RuntimeError)  # of what the others raise
_meetings = count()


class Ranks:
    """A process that is alone.

    Attributes:
        number: Rank of this process.
        size: Number of processes.
    """

    number = 0
    size = 1

    def each(self, work: Callable[[], T]) -> list[T]:
        """Do a piece of work on every rank.

        Args:
            work: What it returns is small, and can be pickled.

        Returns:
            What it returned, by rank.

        Raises:
            Exception: What it raised here; or, where it failed on another rank only, the like of
                it with the number of that rank.
            RuntimeError: If another process has ended.
        """
        return [work()]

    def first(self, work: Callable[[], T]) -> T:
        """Do a piece of work on rank 0, while the others wait; what it returned, to all."""
        return cast(T, self.each(lambda: work() if self.number == 0 else None)[0])

    def same(self, make: Callable[[], T], digest: Callable[[T], str]) -> T:
        """What every rank makes for itself, and has to find alike.

        Raises:
            RuntimeError: If the digests differ.
        """
        made: list[T] = []

        def work() -> str:
            made.append(make())
            return digest(made[0])

        digests = self.each(work)
        for rank, other in enumerate(digests):
            if other != digests[0]:
                raise RuntimeError(
                    f"rank {rank} plans another merge than rank 0; give every rank the same "
                    "models, output and options"
                )
        return made[0]

    def shares(self, costs: Sequence[float]) -> list[int]:
        """Which rank does which job: the longest first, each to the one with the least."""
        return [0] * len(costs)

    def threads(self) -> int:
        """Number of threads for this process."""
        return _native.num_threads()


class _Several(Ranks):
    """Processes that talk through a group of torch.distributed."""

    def __init__(self, group: Any) -> None:
        import torch.distributed as dist

        self._group = group
        self.number, self.size = dist.get_rank(group), dist.get_world_size(group)
        hosts = self.each(socket.gethostname)
        self._neighbours = hosts.count(hosts[self.number])

    def each(self, work: Callable[[], T]) -> list[T]:
        result: T | None = None
        failure: Exception | None = None
        try:
            result = work()
        except Exception as error:
            failure = error
        said = self._told((result, _described(failure)))
        if failure is not None:
            raise failure
        for rank, (_, fault) in enumerate(said):
            if fault is not None:
                kind, text = fault
                raise _KINDS[kind](f"rank {rank} failed: {text}")
        return [answer for answer, _ in said]

    def shares(self, costs: Sequence[float]) -> list[int]:
        from tbfast.distributed import shared_out

        return shared_out(costs, self.size)

    def threads(self) -> int:
        share = 1 if os.environ.get("TBFAST_NUM_THREADS") else self._neighbours
        return max(1, _native.num_threads() // share)

    def _told(self, mine: Any) -> list[Any]:
        import torch.distributed as dist

        said: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(said, mine, group=self._group)
        except RuntimeError as error:
            raise RuntimeError(
                f"another process of this merge has ended ({brief(error)}); start all again, with "
                "resume"
            ) from error
        return said


@contextmanager
def meeting() -> Iterator[Ranks]:
    """All processes that merge, which all have to come here.

    Where ``torch.distributed`` is initialized, these are its processes; else those that
    ``torchrun`` has started. Without either there is one, and torch is not imported.

    Raises:
        RuntimeError: If some do not come.
    """
    if world()[1] == 1:
        yield Ranks()
        return
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    with ExitStack() as stack:
        try:
            if not dist.is_initialized():
                store, rank, size = next(rendezvous("env://", timeout=_MEETING))
                # What an earlier meeting has left in the store is not read again.
                place = f"tbfast.merge/{next(_meetings)}"
                store = dist.PrefixStore(place, store)  # type: ignore[attr-defined]
                dist.init_process_group(
                    "gloo", store=store, rank=rank, world_size=size, timeout=_MEETING
                )
                stack.callback(dist.destroy_process_group)
            group = dist.new_group(backend="gloo")  # its time-out is torch's, half an hour
            stack.callback(dist.destroy_process_group, group)
        except RuntimeError as error:
            raise RuntimeError(
                f"the {world()[1]} processes of this merge did not meet ({brief(error)}); merge in "
                "each of them, or in one with distributed=False"
            ) from error
        yield _Several(group)


def world() -> tuple[int, int]:
    """Rank of this process, and how many merge together."""
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    if all(os.environ.get(name) for name in _ENVIRONMENT):
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return 0, 1


def _described(failure: Exception | None) -> tuple[int, str] | None:
    """The kind of an error as a number, and its text."""
    if failure is None:
        return None
    kinds = [kind for kind, known in enumerate(_KINDS) if isinstance(failure, known)]
    return (kinds or [len(_KINDS) - 1])[0], str(failure) or type(failure).__name__
