"""Compiles every GPU kernel for every target and checks what it takes; needs no GPU.

    python benchmarks/gpu_static.py [--targets 80 90 100 120]

Registers, spills, stack and static shared memory are ptxas's; what a launch asks for beside is
evaluated by the compiler from the sources. The occupancy follows from these and the limits of the
architecture. Instructions are counted in the machine code, each once, however often it runs. Rows
of the Triton kernels come from gpu_static_triton.py. Results go to
benchmarks/results/gpu_static.csv; the exit status is 1 if a kernel is over its budget, and 0, with
the reason printed, where there is no nvcc.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import importlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from gpu_listings import MIX, Resources, instruction_mix, resources, spills_in_loops
from gpu_occupancy import ARCHITECTURES, broken_budgets, occupancy, resident_blocks

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "csrc"
RESULTS = ROOT / "benchmarks/results/gpu_static.csv"
CACHE = ROOT / "build/gpu_static"
THREADS = 256  # of a block, in every kernel: kThreads in csrc/cuda/device.h
FLAGS = ("-std=c++17", "-O3", "-Xptxas=-v")


@dataclass(frozen=True)
class Launch:
    """What the compiler does not tell of a kernel.

    Attributes:
        shared: Bytes of shared memory that a launch asks for: a constant expression of C++, in
            namespace tb::gpu, at the end of the file that launches it.
        bytes_per_weight: Of global memory that one pass over a large bfloat16 matrix moves; None
            for a kernel that reads no weights, or whose share depends on its options.
    """

    shared: str
    bytes_per_weight: float | None = None


KERNELS = {
    # Each weight once; 8 sums of 4 bytes for each column, written and read, per 1024 rows.
    "spectral_step": Launch("sizeof(SpectralShared)", 2 + 2 * 8 * 4 / 1024),
    "rsvd_step": Launch("shared_bytes()"),
    "fit_spectra": Launch("0"),
    "fit_quadratures": Launch("kQuadratureShared"),
    "dot_step": Launch("0", 2 + 1),  # the weight and G in int8
    "drift_step": Launch("0", 2 + 4),  # of the kept rows: the weight and W_0 in float32
}

FIELDS = [
    *("language", "kernel", "target", "registers", "spills", "spills_in_loops", "stack"),
    *(
        "shared_static",
        "shared_dynamic",
        "threads",
        "blocks_per_multiprocessor",
        "occupancy",
        "bytes_per_weight",
    ),
    *MIX,
]
Row = dict[str, Any]


def find_nvcc() -> str | None:
    """The CUDA compiler: ``CUDACXX``, else what is on PATH."""
    return os.environ.get("CUDACXX") or shutil.which("nvcc")


def find_cuobjdump(nvcc: str) -> str | None:
    """NVIDIA's disassembler: beside the compiler, on PATH, or the one that Triton brings."""
    folders = [str(Path(nvcc).resolve().parent), os.environ.get("PATH", "")]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        folders.append(str(Path(triton.origin).parent / "backends/nvidia/bin"))
    return shutil.which("cuobjdump", path=os.pathsep.join(folders))


def included(source: Path) -> list[Path]:
    """The source and every file of ours that it includes, directly or not."""
    found, waiting = set(), [source]
    while waiting:
        path = waiting.pop()
        if path.is_file() and path not in found:
            found.add(path)
            names = re.findall(r'^#include "(.+)"', path.read_text(encoding="utf-8"), re.MULTILINE)
            waiting += [folder / name for name in names for folder in (SOURCES, path.parent)]
    return sorted(found)


def kernels_of(source: Path) -> list[str]:
    """Names of the kernels in a file and in what it includes."""
    text = "".join(path.read_text(encoding="utf-8") for path in included(source))
    found = re.findall(r"__global__\s+(?:void\s+|__launch_bounds__\([^)]*\)\s+)*(\w+)\(", text)
    return list(dict.fromkeys(found))


def translation_unit(source: Path) -> str:
    """The source with one empty kernel for each of its own, whose name carries a number to us."""
    lines = [f'#include "{source.relative_to(SOURCES)}"', "namespace tb::gpu {"]
    for kernel in kernels_of(source):
        if kernel in KERNELS:
            name = f"__global__ void dynamic_shared_of_{kernel}"
            lines.append(f"template <long long bytes> {name}() {{}}")
            lines.append(f"template {name}<{KERNELS[kernel].shared}>();")
    return "\n".join([*lines, "}", ""])


def compiled(source: Path, target: int, nvcc: str, cuobjdump: str | None) -> list[Row]:
    """A row for every kernel of a file; from the cache where nothing has changed.

    Raises:
        RuntimeError: With what the compiler printed, if it fails.
    """
    unit = translation_unit(source)
    tool = Path(nvcc).resolve()
    key = hashlib.sha256(
        repr((unit, FLAGS, FIELDS, tool, tool.stat().st_size, bool(cuobjdump))).encode()
    )
    for path in included(source):
        key.update(path.read_bytes())
    stem = CACHE / f"{source.stem}-sm_{target}"
    kept = stem.with_suffix(".json")
    if kept.exists():
        known = json.loads(kept.read_text())
        if known["key"] == key.hexdigest():
            found: list[Row] = known["rows"]
            return found
    CACHE.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".cu").write_text(unit)
    cubin = stem.with_suffix(".cubin")
    architecture = f"-gencode=arch=compute_{target},code=sm_{target}"
    command = [nvcc, *FLAGS, f"-I{SOURCES}", architecture, "-cubin", "-o", str(cubin)]
    log = run([*command, f"{stem}.cu"])
    sass = run([cuobjdump, "-sass", str(cubin)]) if cuobjdump else ""
    mixes, loops = instruction_mix(sass), spills_in_loops(sass)
    found = [row(r, target) | mixes.get(r.kernel, {}) for r in resources(log)]
    found = [r | {"spills_in_loops": loops.get(r["kernel"], "")} for r in found]
    kept.write_text(json.dumps({"key": key.hexdigest(), "rows": found}))
    return found


def attempted(
    source: Path, target: int, nvcc: str, cuobjdump: str | None
) -> tuple[list[Row], str | None]:
    """The rows of :func:`compiled`, or why there are none: one failure must not hide others."""
    try:
        return compiled(source, target, nvcc, cuobjdump), None
    except RuntimeError as error:
        return [], str(error)


def run(command: Sequence[str]) -> str:
    """What a command prints, errors included.

    Raises:
        RuntimeError: With that, if it fails.
    """
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}")
    return done.stdout


def row(kernel: Resources, target: int) -> Row:
    """What one kernel takes on one target, without its instructions."""
    shared = kernel.shared_static + (kernel.shared_dynamic or 0)
    takes = (target, THREADS, kernel.registers, shared)
    launch = KERNELS.get(kernel.kernel.partition("<")[0])
    return {
        "language": "cuda",
        "target": f"sm_{target}",
        "threads": THREADS,
        **asdict(kernel),
        "blocks_per_multiprocessor": resident_blocks(*takes),
        "occupancy": round(occupancy(*takes), 3),
        "bytes_per_weight": launch and launch.bytes_per_weight,
    }


def faults(found: Iterable[Row]) -> list[str]:
    """What is wrong with each row of a CUDA kernel, in words."""
    bad = []
    for r in found:
        label = f"{r['kernel']} on {r['target']}"
        if r["shared_dynamic"] is None:
            bad.append(f"{label}: unknown; say in KERNELS what its launch asks for")
            continue
        shared = r["shared_static"] + r["shared_dynamic"]
        target = int(r["target"].removeprefix("sm_"))
        takes = (target, r["threads"], r["registers"], r["spills"], shared)
        bad += [f"{label}: {fault}" for fault in broken_budgets(*takes)]
        if r.get("spills_in_loops"):
            bad.append(f"{label}: {r['spills_in_loops']} spills in innermost loops")
    return bad


def triton_rows() -> tuple[list[Row], list[str], str | None]:
    """Rows of the Triton kernels, what is wrong with them, and why there are none."""
    try:
        module = importlib.import_module("gpu_static_triton")
    except ImportError as error:
        return [], [], str(error)
    found: list[Row] = []
    bad: list[str] = []
    for r in module.triton_static_rows():
        bad += [f"{r['kernel']} (Triton) on {r['target']}: {fault}" for fault in r["faults"]]
        made = {"language": "triton", "mma": r["tensor_core"]}
        made |= {"spills": r["spill_bytes"], "shared_dynamic": r["shared_bytes"]}
        if r["target"].startswith("sm_"):
            target = int(r["target"].removeprefix("sm_"))
            takes = (target, r["threads"], r["registers"], r["shared_bytes"])
            made["blocks_per_multiprocessor"] = resident_blocks(*takes)
            made["occupancy"] = round(occupancy(*takes), 3)
        found.append({key: r[key] for key in r if key in FIELDS} | made)
    return found, bad, None


def write(found: Sequence[Row], path: Path) -> None:
    """All rows as CSV; fields that a row lacks stay empty."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(found)


def table(found: Sequence[Row]) -> str:
    """The rows for a reader."""
    cells = [list(FIELDS), *([str(r.get(f, "")) for f in FIELDS] for r in found)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in cells
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compile the GPU kernels and check their budgets.")
    parser.add_argument("--targets", type=int, nargs="+", default=sorted(ARCHITECTURES))
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    nvcc = find_nvcc()
    if nvcc is None:
        print("gpu_static: skipped, because nvcc was not found; put it on PATH or set CUDACXX")
        return 0
    cuobjdump = find_cuobjdump(nvcc)
    if cuobjdump is None:
        print("gpu_static: no instruction mix: cuobjdump was not found; 'pip install triton'")
    sources = [s for s in sorted((SOURCES / "cuda").glob("*.cu")) if kernels_of(s)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        attempt = partial(attempted, nvcc=nvcc, cuobjdump=cuobjdump)
        parts = list(pool.map(attempt, *zip(*product(sources, options.targets), strict=True)))
    found = [r for rows, _ in parts for r in rows]
    bad = [error for _, error in parts if error is not None] + faults(found)
    triton, triton_faults, missing = triton_rows()
    if missing is not None:
        print(f"gpu_static: no rows for Triton: {missing}")
    write([*found, *triton], options.out)
    print(table([*found, *triton]))
    print(f"{len(found)} of CUDA, {len(triton)} of Triton, in {options.out}")
    bad += triton_faults
    for fault in bad:
        print(f"failed: {fault}", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
