"""What the Triton kernels become on real GPUs: compiled here, where there is none."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
# A process of its own: in this one the kernels may be those of the interpreter.
COMPILED = """
import json, sys
import gpu_static_triton as static
name, targets = json.loads(sys.argv[1])
rows = []
for target in targets:
    (kernel,) = (k for k in static.kernels(static.TARGETS[target].backend) if k.name == name)
    rows.append(static.static_row(kernel, target))
print(json.dumps(rows))
"""
# One row that keeps within every limit, and what is wrong with rows that do not.
JUDGED = """
import json
import gpu_static_triton as static
kernel = static.Kernel("k", None, {}, {}, reads_weights=True, multiplies=True, spills={"sm_80": 8})
good = dict(target="sm_80", threads=256, registers=255, spill_bytes=8, shared_bytes=163 << 10)
good |= dict(ld128=1, tensor_core=1)
wrong = dict(spill_bytes=12), dict(registers=257), dict(shared_bytes=1 + (163 << 10))
wrong += dict(ld128=0), dict(tensor_core=0), dict(target="gfx942", registers=512)
print(json.dumps([static.faults(kernel, good | more) for more in ({}, *wrong)]))
"""


def run(code, folder, *arguments):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(folder), "PYTHONPATH": str(BENCHMARKS)}
    out = subprocess.run(
        [sys.executable, "-c", code, json.dumps(arguments)],
        env=env,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert out.returncode == 0, out.stderr[-3000:]
    return json.loads(out.stdout.splitlines()[-1])


def test_the_lanczos_kernel_reads_by_16_bytes_and_multiplies_on_tensor_cores(tmp_path):
    (row,) = run(COMPILED, tmp_path, "lanczos", ["sm_90"])
    assert row["faults"] == []
    assert row["ld128"] > 0
    assert row["tensor_core"] > 0


def test_kernels_of_sums_read_by_16_bytes_on_nvidia_and_amd(tmp_path):
    for row in run(COMPILED, tmp_path, "dot", ["sm_80", "gfx942"]):
        assert row["faults"] == []
        assert row["ld128"] > 0


def test_a_kernel_that_takes_too_much_or_reads_too_little_is_told(tmp_path):
    assert run(JUDGED, tmp_path) == [
        [],
        ["spills 4 bytes"],
        ["257 registers at 256 threads"],
        ["166913 bytes of shared memory"],
        ["no load of 16 bytes"],
        ["no product on tensor cores"],
        ["spills 8 bytes", "166912 bytes of shared memory"],
    ]
