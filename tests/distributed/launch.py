"""Runs a worker in several processes: python launch.py WORKER WORLD_SIZE FOLDER.

torch is imported once, then forked, which saves seconds for each process. Each calls the worker's
``main(FOLDER)`` with the default process group ready. If one fails, the others are killed.
"""

import importlib.util
import os
import signal
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

import tbfast  # noqa: F401  (before the fork)


def run(worker: str, rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=float(os.environ.get("GROUP_TIMEOUT", "60"))),
    )
    spec = importlib.util.spec_from_file_location("worker", worker)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(folder)
    dist.barrier()
    dist.destroy_process_group()


def main(worker: str, world: int, folder: Path) -> int:
    running = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            try:
                run(worker, rank, world, folder)
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(1)
            os._exit(0)
        running.append(child)
    while running:
        child, status = os.wait()
        running.remove(child)
        if status != 0:
            for other in running:
                os.kill(other, signal.SIGKILL)
            return 1
    return 0


sys.exit(main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]).resolve()))
