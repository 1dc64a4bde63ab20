"""A merge needs little memory, and no torch, whatever the size of the models."""

import os
import subprocess
import sys

import pytest

from tbfast.merging.dtypes import DTYPES
from tbfast.merging.header import write_header

SHAPE, TENSORS = (4096, 2048), 18  # 302 MB in bfloat16
MERGE = """
import sys, tbfast
paths, out, method = sys.argv[1:4], sys.argv[4], sys.argv[5]
report = tbfast.merge_checkpoints(paths[:2], out, base=paths[2], method=method, threads=2)
assert report.bytes > 300e6
assert not {"torch", "numpy"} & sys.modules.keys()
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(int(peak.split()[1]) * 1024)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
@pytest.mark.parametrize("method", ["select", "ties"])
def test_a_merge_of_300_megabytes_takes_less_than_200_at_its_peak(tmp_path, method):
    header = write_header([(f"w{i}", DTYPES["BF16"], SHAPE) for i in range(TENSORS)], {})
    paths = [tmp_path / f"{name}.safetensors" for name in ("a", "b", "base")]
    for path in paths:
        path.write_bytes(header)
        os.truncate(path, len(header) + TENSORS * 2 * SHAPE[0] * SHAPE[1])  # zeros, not stored
    out = tmp_path / "out.safetensors"
    command = [sys.executable, "-c", MERGE, *paths, out, method]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    out.unlink(missing_ok=True)
    assert done.returncode == 0, done.stderr
    assert 10e6 < int(done.stdout) < 200e6
