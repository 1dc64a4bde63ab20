"""What a LoRA adapter costs to extract, beside a full SVD.

    python benchmarks/bench_lora.py [--rows 2048] [--cols 5632] [--rank 32] [--rounds 3]

Differences with known, decaying singular values: 1 / i, and a quick decay into noise. Both ways
run in every round, so that a busy moment hits both alike. CPU time counts. The error is that of
B A in the Frobenius norm, divided by the least that a rank can have, which the singular values
tell. Bars: 60 times less CPU time, 1.005 times the least error. Results go to
benchmarks/results/lora.csv.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import pytest
import torch
from torch import Tensor

from tbfast.bench import cpu_name
from tbfast.merging.lora import lora_factors

RESULTS = Path(__file__).parent / "results/lora.csv"
SPECTRA: dict[str, Callable[[Tensor], Tensor]] = {
    "1 / i": lambda i: 1 / i,
    "0.9^i + 0.01": lambda i: 0.9**i + 0.01,
}


def difference(values: Tensor, cols: int) -> Tensor:
    """(rows, cols) with these singular values, in float32."""
    generator = torch.Generator().manual_seed(0)
    rows = len(values)
    left = torch.linalg.qr(torch.randn(rows, rows, generator=generator))[0]
    right = torch.linalg.qr(torch.randn(cols, rows, generator=generator))[0]
    return (left * values.float()) @ right.T


def by_svd(delta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A and B the way others take."""
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    root = s[:rank].sqrt()
    return root[:, None] * vh[:rank], u[:, :rank] * root


def measure(rows: int, cols: int, rank: int, rounds: int) -> list[dict]:
    """Rows of the table."""
    ways = {"svd": by_svd, "tbfast": lambda delta, rank: lora_factors(delta, rank)[:2]}
    stamp = {"rounds": rounds, "cpu": cpu_name(), "torch": torch.__version__}
    found = []
    for spectrum, of in SPECTRA.items():
        values = of(torch.arange(1, rows + 1, dtype=torch.float64))
        delta = difference(values, cols)
        least = float(values[rank:].square().sum().sqrt())
        taken: dict[str, list[float]] = {way: [] for way in ways}
        error = {}
        for _ in range(rounds):
            for way, factors in ways.items():
                began = time.process_time()
                a, b = factors(delta, rank)
                taken[way].append(time.process_time() - began)
                error[way] = float(torch.linalg.norm((delta - b @ a).double())) / least
        for way in ways:
            cpu = median(taken[way])
            row = {"shape": f"{rows}x{cols}", "rank": rank, "spectrum": spectrum, "way": way}
            row |= {"cpu_seconds": round(cpu, 4), "error_to_least": round(error[way], 5)}
            row["svd_to_it"] = round(median(taken["svd"]) / cpu, 1)
            found.append(row | stamp | {"date": time.strftime("%Y-%m-%d")})
    return found


def write(rows: list[dict], path: Path = RESULTS) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def test_lora(benchmark):
    """The whole comparison, timed as one."""
    if benchmark.disabled:
        pytest.skip("a benchmark of minutes: pytest --benchmark-enable --benchmark-only")
    write(benchmark.pedantic(measure, (2048, 5632, 32, 3), rounds=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("rows", 2048), ("cols", 5632), ("rank", 32), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--csv", type=Path, default=RESULTS)
    given = parser.parse_args()
    rows = measure(given.rows, given.cols, given.rank, given.rounds)
    write(rows, given.csv)
    for row in rows:
        print(" ".join(f"{k}={v}" for k, v in row.items() if k not in ("cpu", "torch", "date")))


if __name__ == "__main__":
    main()
