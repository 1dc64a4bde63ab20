"""Merges of several processes: what they write, and how they fail."""

import errno
import json
import os
import signal
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist

import tbfast
from tbfast.merging import ranks, run, workplace

LAST = 2


def failed(*arguments, **options):
    """Kind and text of the error, and after how many seconds it came."""
    began = time.monotonic()
    try:
        tbfast.merge_checkpoints(*arguments, **options)
    except Exception as error:
        return type(error).__name__, str(error), time.monotonic() - began
    return "none", "", 0.0


def full(*arguments):
    raise OSError(errno.ENOSPC, "No space left on device")


def stop(done, total, name):
    raise KeyError("enough")


def failures(folder: Path, rank: int, options) -> dict:
    """Merges that end badly in one process."""
    answers = {}

    def attempt(what: str, second: str = "b", **more) -> None:
        models, out = [folder / "a", folder / second], folder / f"failed {what}"
        answers[what] = failed(models, out, **options, **more)

    if rank == 0:
        alone = folder / "alone.safetensors"
        tbfast.merge_checkpoints([folder / "a", folder / "b"], alone, distributed=False)
    attempt("nan", "nan")
    attempt("no model", "nowhere" if rank == 1 else "b")
    attempt("other seed", seed=int(rank == 1))
    attempt("progress", progress=stop)
    holder = workplace.Workplace(folder / "failed held", "digest").opened(resume=False)
    with holder if rank == 1 else nullcontext():
        dist.barrier()
        attempt("held")
        dist.barrier()

    sync, folder_of = os.fsync, workplace.Workplace.__init__
    if rank == 1:
        os.fsync = full
    attempt("full", base=folder / "base")
    os.fsync = sync

    def elsewhere(self, *arguments):
        folder_of(self, *arguments)
        self.folder = folder / "elsewhere"

    if rank == LAST:
        workplace.Workplace.__init__ = elsewhere
    attempt("not shared")
    workplace.Workplace.__init__ = folder_of
    return answers


def threads(count: int) -> dict:
    """Threads of a process, on a machine with so many cores."""
    cores, ranks._native.num_threads = ranks._native.num_threads, lambda: count
    found = {}
    for asked in ("", "7"):
        os.environ["TBFAST_NUM_THREADS"] = asked
        with ranks.meeting() as all_ranks:
            found[asked] = all_ranks.threads()
    ranks._native.num_threads = cores
    os.environ["TBFAST_NUM_THREADS"] = "1"
    return found


def killed(folder: Path, rank: int, count: int, options) -> None:
    """All processes end at the COUNTth of the calls with which the first makes something last."""
    sync = os.fsync

    def dying(descriptor):
        nonlocal count
        count -= 1
        if count == 0:
            os.killpg(0, signal.SIGKILL)
        sync(descriptor)

    run._APART = 0
    if rank == 0:
        os.fsync = dying
    models = [folder / "a", folder / "b"]
    tbfast.merge_checkpoints(models, folder / "out", base=folder / "base", **options)


def main(folder: Path) -> None:
    rank = dist.get_rank()
    cases, options = json.loads((folder / "cases.json").read_text())
    if count := os.environ.get("KILLED_AT"):
        killed(folder, rank, int(count), options)
        return
    answers = {"threads": threads(12)}
    models, seen, wrote, write = [folder / "a", folder / "b"], [], [], run._write

    def noting(plan, shard, *arguments):
        wrote.append(shard.name)
        return write(plan, shard, *arguments)

    run._write = noting
    for name, case in cases.items():
        wrote.clear()
        if "base" in case:
            case["base"] = folder / "base"
        report = tbfast.merge_checkpoints(
            models,
            folder / f"together {name}",
            **options,
            **case,
            progress=lambda *step: seen.append(step),
        )
        answers[name] = report.to_dict()
        answers[f"wrote {name}"] = list(wrote)
    answers["progress"] = seen
    answers["failures"] = failures(folder, rank, options)

    # One process ends in the middle of a merge.
    if rank == LAST:
        torch.save(answers, folder / f"{rank}.pt")
        os.fsync = lambda *arguments: os._exit(0)
    answers["failures"]["ended"] = failed(models, folder / "failed ended", **options)
    torch.save(answers, folder / f"{rank}.pt")
    os._exit(0)  # the others cannot be waited for
