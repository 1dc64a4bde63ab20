"""The table of ``tbfast bench``: how fast this machine is, the engine on it, and what others take.

Every answer is checked before it is timed; contenders run in turn, round by round, and ratios are
of medians.
"""

from __future__ import annotations

import csv
import io
import math
import os
import platform
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tbfast import __version__, _native
from tbfast.bench_cases import (
    against_svdvals,
    beside_busy_cores,
    bfloat16_pass,
    exact_model,
    float32_pass,
    gradient_memory,
    low_rank,
    multiplies_bfloat16,
    python_loop,
    sketch_memory,
)
from tbfast.bench_contest import Contest, Row, race
from tbfast.bench_data import cold_bytes, cold_floats, words

FIELDS = ["bench", "case", "contender", "p20_ms", "p50_ms", "p80_ms", "ratio", "rounds"]
FIELDS += ["threads", "cpu", "torch", "commit", "date", "gb_s", "stream", "error", "bar"]

# Weights of one block, as they lie in the checkpoints.
_GPT2 = ((768, 2304), (768, 768), (768, 3072), (3072, 768))
_WIDE = ((6144, 2048), (2048, 2048), (8192, 2048), (2048, 8192))

_WIDTHS = {"what": 28, "size": 19, "ms": 7, "against": 25, "ms ": 7, "ratio": 6, "bar": 6}
_WIDTHS |= {"GB/s": 5, "stream": 6, "error": 5}
_LEGEND = """\
ms: median, for one layer of a call on all. stream: GB/s of weights as a share of a bare read of
memory, above 100 % where they stay in the cache. bar: for a machine of two cores, * if missed.
error: relative, against closed forms or double precision, checked before the timing. svd_lowrank
(left 1.02): its residual is 1.02 of the least possible. float32 multipliers: 64 flops per weight
in registers, the limit where no instruction multiplies bfloat16."""


@dataclass(frozen=True)
class Case:
    """One part of the table.

    Attributes:
        name: For messages.
        make: Makes the data, checks the answers and returns what is to be timed.
        rounds: How often each contender is timed, at most.
        patience: Seconds after which no new round begins.
    """

    name: str
    make: Callable[[], Contest | Row]
    rounds: int = 7
    patience: float = 10.0


def quick_cases() -> list[Case]:
    """What takes 20 seconds on two cores."""
    return [
        Case("pass 768", partial(float32_pass, 768, 768, 4)),
        Case("pass 2048", partial(float32_pass, 2048, 2048, 4, bar=0.9)),
        Case("bfloat16 pass", partial(bfloat16_pass, 2048, 2048), 3),
        Case("torch loop", partial(python_loop, 768, 72, bar=6), 5),
        Case("alpha 768", partial(against_svdvals, 768, 8, bar=28, lin_bar=300), 5, 2.0),
        Case("alpha 2048", partial(against_svdvals, 2048, 2, bar=55), 2, 2.0),
        Case("exact", partial(exact_model, bar=5), 2, 2.0),
        Case("rsvd", partial(low_rank, 768, 3072, 64, 6, bar=4), 2, 2.0),
        Case("Lanczos memory", partial(sketch_memory, "GPT-2 small", _GPT2, 12)),
        Case("gradient memory", partial(gradient_memory, 384)),
    ]


def full_cases(minilm: Path | None = None) -> list[Case]:
    """What takes under two minutes on two cores.

    Args:
        minilm: A checkpoint of MiniLM-L6; None takes other weights of its shapes.
    """
    return [
        Case("pass 768", partial(float32_pass, 768, 768, 4)),
        Case("pass 3072 x 768", partial(float32_pass, 3072, 768, 4)),
        Case("pass 768 x 3072", partial(float32_pass, 768, 3072, 4)),
        Case("pass 2048", partial(float32_pass, 2048, 2048, 4, bar=0.9)),
        Case("pass 4096", partial(float32_pass, 4096, 4096, 4, bar=0.9)),
        Case("pass 2048, 8 probes", partial(float32_pass, 2048, 2048, 8)),
        Case("bfloat16 pass 2048", partial(bfloat16_pass, 2048, 2048), 5),
        Case("bfloat16 pass 4096", partial(bfloat16_pass, 4096, 4096), 5),
        Case("torch loop", partial(python_loop, 768, 72, bar=6)),
        Case("alpha 768", partial(against_svdvals, 768, 8, bar=28, lin_bar=300)),
        Case("alpha 2048", partial(against_svdvals, 2048, 2, bar=55, lin_bar=800), 3),
        Case("alpha 4096", partial(against_svdvals, 4096, 2, bar=55, bfloat16_bar=60), 2),
        Case("exact", partial(exact_model, minilm, bar=5), 5),
        Case("rsvd", partial(low_rank, 768, 3072, 64, 24, bar=4), 3),
        Case("Lanczos memory", partial(sketch_memory, "GPT-2 small", _GPT2, 12)),
        Case("Lanczos memory, wide", partial(sketch_memory, "12 blocks of 2048", _WIDE, 12)),
        Case("gradient memory", partial(gradient_memory, 768)),
        Case("busy sketch", partial(beside_busy_cores, 768, 8, sketch=True, bar=3), 5),
        Case("busy exact", partial(beside_busy_cores, 384, 8, sketch=False, bar=3), 5),
    ]


@dataclass(frozen=True)
class Machine:
    """What runs the benchmark; see :func:`machine`.

    Attributes:
        cpu: Model of the processor.
        threads: Of tbfast; torch has ``torch.get_num_threads()``.
        isa: Instruction set of the kernels in use.
        stream: Bytes per second that these threads read from memory.
        flops: Float32 operations per second that they do in registers.
    """

    cpu: str
    threads: int
    isa: str
    stream: float
    flops: float

    def __str__(self) -> str:
        bfloat16 = " with bfloat16" if multiplies_bfloat16() else ""
        return (
            f"{self.cpu}, {os.cpu_count()} cores\n"
            f"tbfast {__version__}, {self.threads} threads, {self.isa}{bfloat16}; "
            f"torch {torch.__version__}, {torch.get_num_threads()} threads\n"
            f"memory read at {self.stream * 1e-9:.1f} GB/s, "
            f"float32 multiplied and added at {self.flops * 1e-9:.0f} Gflop/s"
        )


def machine(size: int | None = None) -> Machine:
    """Look at this machine.

    Args:
        size: Bytes of memory to read; None for more than the cache holds.
    """
    threads = _native.num_threads()
    memory = words(cold_floats(cold_bytes() if size is None else size))
    flops = 10**8 * threads
    done: list[int] = []
    reading = _median(lambda: _native.stream_sum(memory, threads=threads))
    computing = _median(lambda: done.append(_native.multiply_adds(flops, threads=threads)))
    return Machine(cpu_name(), threads, _native.isa(), memory.nbytes / reading, done[0] / computing)


def _median(call: Callable[[], object]) -> float:
    seconds = []
    for _ in range(7):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds))


def cpu_name() -> str:
    """Model of the processor, as the system tells it."""
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def measured(case: Case, stream: float) -> list[Row]:
    """Check and time one case.

    Args:
        case: Of :func:`quick_cases` or :func:`full_cases`.
        stream: Of the machine.

    Raises:
        RuntimeError: If an answer is wrong.
    """
    made = case.make()
    return [made] if isinstance(made, Row) else race(made, case.rounds, stream, case.patience)


def print_table(quick: bool = False, path: str | None = None) -> None:
    """Print the table, each line as soon as it is known.

    Args:
        quick: A part of it in 20 seconds.
        path: A file for the figures, as :func:`csv_rows`; None for none.

    Raises:
        RuntimeError: If an answer is wrong.
    """
    start, rows = time.perf_counter(), []
    this = machine()
    print(this)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > 0.5:
        print(
            f"the machine is busy (load {load:.1f}): threaded BLAS may collapse, so ratios flatter"
        )
    print()
    print(_line(_WIDTHS), flush=True)
    for case in quick_cases() if quick else full_cases():
        for row in measured(case, this.stream):
            rows.append(row)
            print(_line(_cells(row)), flush=True)
    print(f"\n{_LEGEND}\n{time.perf_counter() - start:.0f} s")
    if path is not None:
        from tbfast.files import write_whole

        text = io.StringIO()
        writer = csv.DictWriter(text, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(csv_rows(rows, this.cpu, f"v{__version__}"))
        write_whole(path, text.getvalue())


def _cells(row: Row) -> list[str]:
    bar = "" if row.bar is None else ("≤" if row.at_most else "≥") + _ratio(row.bar, row.unit)
    return [
        row.what,
        row.size,
        _milliseconds(row.ours),
        row.peer,
        _milliseconds(row.theirs),
        _ratio(row.ratio, row.unit),
        bar + "*" * row.missed(),
        _number(row.gb_per_s, ".1f"),
        _number(row.stream, ".0%"),
        _number(row.error, ".0e"),
    ]


def _number(value: float, form: str) -> str:
    return "" if math.isnan(value) else format(value, form)


def _ratio(ratio: float, unit: str) -> str:
    value = 100 * ratio if unit == "%" else ratio
    return f"{value:.{0 if value >= 100 else 1}f}".removesuffix(".0") + unit


def _milliseconds(seconds: Any) -> str:
    return f"{1e3 * np.median(seconds):.3f}"[:7] if len(seconds) else ""


def _line(cells: Iterable[str]) -> str:
    words = ("what", "size", "against")
    padded = (
        cell.strip().ljust(width) if name in words else cell.strip().rjust(width)
        for cell, (name, width) in zip(cells, _WIDTHS.items(), strict=True)
    )
    return "  ".join(padded).rstrip()


def csv_rows(rows: Iterable[Row], cpu: str, commit: str) -> Iterator[dict[str, Any]]:
    """Two lines for each row, with the columns ``FIELDS``.

    One is ours, with GB/s of weights, their share of the stream and the relative error; one the
    peer's, with the ratio and the bar. Times are for one layer.
    """
    stamp = dict(bench="spectra", threads=torch.get_num_threads(), cpu=cpu)
    stamp |= dict(torch=torch.__version__, commit=commit, date=time.strftime("%Y-%m-%d"))
    seen = set()
    for row in rows:
        case = f"{row.what}; {row.size}"
        extra = {"gb_s": row.gb_per_s, "stream": row.stream, "error": row.error}
        ours = {k: float(f"{v:.3g}") for k, v in extra.items() if not math.isnan(v)}
        theirs = {"ratio": float(f"{row.ratio:.4g}"), "bar": row.bar}
        if case not in seen and len(row.ours):
            yield stamp | dict(case=case, contender="tbfast") | _percentiles(row.ours) | ours
        seen.add(case)
        yield stamp | dict(case=case, contender=row.peer) | _percentiles(row.theirs) | theirs


def _percentiles(seconds: Any) -> dict[str, Any]:
    if not len(seconds):
        return {}
    names = ("p20_ms", "p50_ms", "p80_ms")
    times = [float(f"{1e3 * t:.4g}") for t in np.percentile(seconds, (20, 50, 80))]
    return dict(zip(names, times, strict=True)) | {"rounds": len(seconds)}
