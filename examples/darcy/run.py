"""Low-data Darcy flow: plain Adam against three ways to set layer-wise learning rates.

    python examples/darcy/run.py --data build/data/darcy --out out/darcy

Every variant trains from the same initial weights on the same samples and batches, at the same
base rates; its best rate is the one with the smallest validation error. Writes results.json,
table.md, error.png and alpha.png.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict
from itertools import product
from pathlib import Path

import torch
from data import Darcy, load
from experiment import VARIANTS, Job, Result, ratios_by_type, train
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_darcy: Darcy  # of a worker process


def _start_worker(folder: Path) -> None:
    # One run per core: a second thread in any of them would only wait for the others.
    torch.set_num_threads(1)
    global _darcy
    _darcy = load(folder)


def _work(job: Job) -> Result:
    return train(job, _darcy)


def run_all(
    folder: Path,
    sizes: list[int],
    rates: list[float],
    seeds: int,
    steps: int,
    workers: int,
    advance: Callable[[], None],
) -> list[Result]:
    """All runs, one process per worker; ``advance`` is called as each ends."""
    os.environ["TBFAST_NUM_THREADS"] = "1"  # inherited by the workers
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, _start_worker, (folder,)) as pool:

        def submit(variant: str, size: int, **extra: dict[str, float]) -> list[Future[Result]]:
            jobs = product(range(seeds), rates)
            futures = [
                pool.submit(_work, Job(variant, size, seed, rate, steps, **extra))
                for seed, rate in jobs
            ]
            for future in futures:
                future.add_done_callback(lambda _: advance())
            return futures

        # "ours" comes first: the fixed ratios are the mean of its factors.
        ours = {size: submit("ours", size) for size in sizes}
        runs = [
            run for variant in ("plain", "published") for n in sizes for run in submit(variant, n)
        ]
        for size in sizes:
            ratios = ratios_by_type([future.result() for future in ours[size]])
            runs += [*ours[size], *submit("fixed", size, ratios=ratios)]
        return [future.result() for future in runs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--data", type=Path, default=Path("build/data/darcy"), help="folder of the data"
    )
    parser.add_argument("--out", type=Path, default=Path("out/darcy"), help="folder for results")
    parser.add_argument("--sizes", type=int, nargs="+", default=[16, 64], help="training samples")
    parser.add_argument("--rates", type=float, nargs="+", default=[8e-3, 1.6e-2, 3.2e-2])
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps of a run")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parser.add_argument("--workers", type=int, default=cores, help="processes (default: cores)")
    args = parser.parse_args()
    try:
        darcy = load(args.data)
    except FileNotFoundError as error:
        sys.exit(str(error))
    batch = Job.batch
    if not all(batch <= size <= darcy.largest_size for size in args.sizes):
        parser.error(f"--sizes must lie between {batch} (a batch) and {darcy.largest_size}")
    if min(args.seeds, args.steps, args.workers) < 1 or min(args.rates) <= 0:
        parser.error("--seeds, --steps and --workers must be at least 1, --rates above 0")

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        total = len(VARIANTS) * len(args.sizes) * len(args.rates) * args.seeds
        task = progress.add_task("training", total=total)
        results = run_all(
            args.data,
            args.sizes,
            args.rates,
            args.seeds,
            args.steps,
            args.workers,
            lambda: progress.advance(task),
        )
    from report import write_report  # not above: the workers need no matplotlib

    args.out.mkdir(parents=True, exist_ok=True)
    held = json.dumps([asdict(result) for result in results])
    (args.out / "results.json").write_text(held, encoding="utf-8")
    write_report(results, args.out)


if __name__ == "__main__":
    main()
