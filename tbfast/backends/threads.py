"""Torch operations on our own threads, one thread each, longest task first.

LAPACK's own threads gain little on one layer and collapse beside another busy process (22 ms to
4.7 s has been seen), so every worker runs single-threaded and the layers run side by side.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Lock
from typing import TypeVar

import torch
from torch import Tensor

from tbfast import _native

T = TypeVar("T")
R = TypeVar("R")

_lock = Lock()
_pool: ThreadPoolExecutor | None = None
_pool_key: tuple[int, int] | None = None  # (process, threads) the pool was made for


def settle(tensors: Iterable[Tensor]) -> None:
    """Wait for the current stream of every GPU that holds one of these tensors.

    Before ``parallel_map`` reads them: its threads have streams of their own.
    """
    for device in {tensor.device for tensor in tensors if tensor.device.type == "cuda"}:
        torch.cuda.current_stream(device).synchronize()


def parallel_map(task: Callable[[T], R], items: Sequence[T], cost: Callable[[T], float]) -> list[R]:
    """``[task(item) for item in items]``, run on the pool in order of falling cost.

    Also a single item: in the calling thread its bits would depend on how many threads torch has.
    """
    order = sorted(range(len(items)), key=lambda i: -cost(items[i]))
    pool = _workers(_native.num_threads())
    futures = {i: pool.submit(task, items[i]) for i in order}
    try:
        return [futures[i].result() for i in range(len(items))]
    except BaseException:  # Ctrl-C as well: leave nothing behind in the queue
        for future in futures.values():
            future.cancel()
        raise


def _workers(threads: int) -> ThreadPoolExecutor:
    global _pool, _pool_key
    key = (os.getpid(), threads)  # a forked child inherits the pool object without its threads
    with _lock:
        if _pool is None or _pool_key != key:
            _pool = _started_pool(threads)
            _pool_key = key
        return _pool


def _started_pool(threads: int) -> ThreadPoolExecutor:
    default = torch.get_num_threads()
    all_started = Barrier(threads)
    pool = ThreadPoolExecutor(threads, "tbfast", initializer=_use_one_thread)
    for future in [pool.submit(all_started.wait) for _ in range(threads)]:
        future.result()
    torch.set_num_threads(default)
    return pool


def _use_one_thread() -> None:
    # torch.set_num_threads acts on the calling thread, and on those that have not yet asked for
    # their number: so this thread asks first, and the caller of _started_pool puts it back.
    torch.get_num_threads()
    torch.set_num_threads(1)
