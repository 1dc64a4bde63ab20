"""The benchmarks of merging and of LoRA extraction, at the smallest size: they run and add up."""

import csv
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def rows_of(script, tmp_path, *options):
    path = tmp_path / "rows.csv"
    command = [sys.executable, BENCHMARKS / script, "--rounds", "1", "--csv", path, *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_merging_is_measured_beside_cp(tmp_path):
    options = ("--layers", "1", "--hidden", "64", "--folder", str(tmp_path))
    rows = {row["contender"]: row for row in rows_of("bench_merge.py", tmp_path, *options)}
    assert rows["cp"]["to_cp"] == "1.0"
    assert {"select", "select, resampled", "linear", "slerp", "task", "ties"} < set(rows)
    assert rows["ties"]["least"] == "2.0"  # three read and one written, to one and one
    for row in rows.values():
        assert float(row["seconds"]) > 0
        assert float(row["cpu_seconds"]) > 0
        assert 0 < float(row["peak_mb"]) < 200  # torch alone takes more
    assert not any(tmp_path.glob("tmp*"))


def test_extraction_is_measured_beside_the_full_svd(tmp_path):
    rows = rows_of("bench_lora.py", tmp_path, "--rows", "96", "--cols", "128", "--rank", "8")
    assert [row["way"] for row in rows] == ["svd", "tbfast"] * 2
    for row in rows:
        # 1.005 is promised for large weights; the SVD is the best up to its rounding.
        assert 0.999 < float(row["error_to_least"]) < (1.0001 if row["way"] == "svd" else 1.02)
