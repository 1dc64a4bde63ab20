"""Contenders run in turn, round by round, and the figures go to benchmarks/results/<machine>.csv.

pytest-benchmark times our side; the others run, timed, in the set-up of each round, so that a busy
moment of the machine hits all alike. Ratios are of medians.
"""

from __future__ import annotations

import csv
import os
import re
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from tbfast.bench import FIELDS, cpu_name

RESULTS = Path(__file__).parent / "results"


@pytest.fixture(scope="session")
def commit() -> str:
    """Short hash of the commit, with a + if the tree has changes; empty outside git."""
    run = lambda *a: subprocess.run(  # noqa: E731
        ["git", "-C", Path(__file__).parent, *a], capture_output=True, text=True
    ).stdout.strip()
    changed = "+" if run("status", "--porcelain", "--untracked-files=no") else ""
    return run("rev-parse", "--short", "HEAD") + changed


@pytest.fixture(scope="session")
def results(request):
    """Rows of this run; written and printed when the run ends."""
    rows: list[dict] = []
    yield rows
    request.config.stash[_ROWS] = rows
    if not rows or not request.config.getoption("benchmark_enable", True):
        return
    cores = os.cpu_count()
    slug = re.sub(r"[^a-z0-9]+", "-", f"{cpu_name()} {cores} cores".lower()).strip("-")
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{slug}.csv"
    key = lambda row: (row["bench"], row["case"], row["contender"])  # noqa: E731
    kept = []
    if path.exists():
        with path.open(newline="") as file:
            kept = list(csv.DictReader(file))
    new = {key(row) for row in rows}
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted([r for r in kept if key(r) not in new] + rows, key=key))


_ROWS = pytest.StashKey[list]()


def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash.get(_ROWS, [])
    if rows:
        terminalreporter.section("side by side (median of interleaved rounds)")
        for row in rows:
            ratio = f"{row['ratio']:>8}x" if row["ratio"] else " " * 9
            terminalreporter.line(
                f"{row['bench']:<12}{row['case']:<50}{row['contender']:<32}"
                f"{row['p50_ms']:>10} ms {ratio}"
            )


@pytest.fixture
def race(benchmark, results, commit):
    """``race(bench, case, ours, peers, rounds)``: time all in turn, return ratios peer / ours."""

    def run(bench, case, ours, peers, rounds=7, **more):
        name, function = ours
        times = {peer: [] for peer in peers}

        def others():
            for peer, call in peers.items():
                start = time.perf_counter()
                call()
                times[peer].append(time.perf_counter() - start)

        benchmark.pedantic(function, setup=others, rounds=rounds, warmup_rounds=1)
        if benchmark.disabled:
            return {}
        times = {name: list(benchmark.stats.stats.data)} | {k: v[1:] for k, v in times.items()}
        base = float(np.median(times[name]))
        ratios = {}
        for contender, seconds in times.items():
            p20, p50, p80 = (1e3 * np.percentile(seconds, (20, 50, 80))).round(3)
            ratios[contender] = float(np.median(seconds)) / base
            results.append(
                dict(
                    bench=bench, case=case, contender=contender, p20_ms=p20, p50_ms=p50, p80_ms=p80
                )
                | dict(ratio=round(ratios[contender], 2) if contender != name else "")
                | dict(rounds=len(seconds), threads=torch.get_num_threads(), cpu=cpu_name())
                | dict(torch=torch.__version__, commit=commit, date=time.strftime("%Y-%m-%d"))
                | more
            )
        benchmark.extra_info.update(ratios)
        return ratios

    return run
