"""What the scheduler costs, and how closely it follows alpha, in four real trainings.

    python benchmarks/bench_step.py [gpt2 darcy minilm mlp]

Copies of a training take turns step by step, one plain and one under ``tbfast.attach`` with its
defaults, so that a busy moment of the machine hits both; a third where steps are short, whose plain
optimizer has as many groups as there are rates, which torch charges for. The ratio is the median
over the steps of the one's time to the other's. Every ten steps the exact alphas of the tuned copy
are computed, off the clock, and compared with what the scheduler believes. Beside it the
published way, all singular values by torch every so many steps: its cost is measured, its error
follows from the same exact alphas. Results go to benchmarks/results/step.csv.
"""

from __future__ import annotations

import csv
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))

import pytest
from policies import layers_of, svdvals_seconds
from workloads import WORKLOADS, Workload

import tbfast
from tbfast.bench import cpu_name
from tbfast.lens import Lens
from tbfast.presets import resolve

RESULTS = Path(__file__).parent / "results/step.csv"
STEPS = {"gpt2": 200, "darcy": 2000, "minilm": 200, "mlp": 2000}
_EACH = 10  # steps between looks at the exact alphas
_MANY = 1000  # steps from which on a third copy is affordable
_SETTLED = 50  # steps after which errors count where training starts at random


class Run:
    """One copy of a training."""

    def __init__(self, workload: Workload, groups: int = 1, **options) -> None:
        self.workload = workload
        parameters = list(workload.model.parameters())
        parts = [{"params": parameters[part::groups]} for part in range(groups)]
        self.optimizer = torch.optim.AdamW(parts, lr=workload.rate)
        self.balancer = None
        if options:
            self.balancer = tbfast.attach(
                self.optimizer, workload.model, **workload.options, **options
            )
        self.seconds: list[float] = []

    def step(self, number: int) -> None:
        began = time.perf_counter()
        self.optimizer.zero_grad()
        self.workload.loss(number).backward()
        self.optimizer.step()
        self.seconds.append(time.perf_counter() - began)

    def ratio(self, plain: Run) -> float:
        """Median over the steps of the time that this took for each of the plain one's."""
        return round(float(np.median(np.divide(self.seconds, plain.seconds))), 4)


def measure(name: str, steps: int) -> list[dict]:
    """Rows of one training."""
    make = WORKLOADS[name]
    plain, tuned = Run(make(0)), Run(make(0), budget=0.01)
    runs = [plain, tuned]
    layers = layers_of(tuned.workload)
    rates = min(len(layers), 16) + 1
    if steps >= _MANY:
        runs.append(Run(make(0), rates))
    weights = dict(tuned.workload.model.named_parameters())
    lens = Lens(layers, resolve("tempbalance", {}))
    pause = tuned.balancer._tracker.budget.clock.pause
    exact, believed, errors = [], [], []
    for number in range(1, steps + 1):
        began = time.perf_counter()
        if (number - 1) % _EACH == 0:
            lens.show({row: weights[layer.name] for row, layer in enumerate(layers)})
            exact.append([m.fit.alpha for m in lens.measure(range(len(layers)), "exact", 0)])
            believed.append(list(tuned.balancer.alphas.values()))
            errors.append(list(tuned.balancer.errors.values()))
        pause(time.perf_counter() - began)  # what happens here is no part of the tuned training
        first = number % len(runs)
        for run in runs[first:] + runs[:first]:
            run.step(number)
            if run is not tuned:
                pause(run.seconds[-1])
        if number % 50 == 0:
            print(f"{name}: step {number} of {steps}", file=sys.stderr)
    exact, believed, errors = map(np.array, (exact, believed, errors))
    spread = np.ptp(exact, axis=1)[:, None]
    settled = slice(_SETTLED // _EACH if tuned.workload.fresh else 0, None)
    step_seconds = float(np.median(plain.seconds))
    row = {"workload": name, "steps": steps, "step_ms": round(1e3 * step_seconds, 2)}
    rows = [
        row
        | {
            "policy": "tbfast, every step, budget 1 %",
            "median_ratio": tuned.ratio(plain),
            "mean_ratio": round(sum(tuned.seconds) / sum(plain.seconds), 4),
            "overhead_percent": round(100 * _overhead(tuned), 3),
            "initial_ms": round(1e3 * tuned.balancer.initial_seconds, 1),
        }
        | _errors((believed - exact)[settled] / spread[settled])
        | {"within_two_errors": round(float(np.mean(np.abs(believed - exact) < 2 * errors)), 3)}
    ]
    rows += [
        row | {"policy": f"plain AdamW with {rates} groups", "median_ratio": run.ratio(plain)}
        for run in runs[2:]
    ]
    refresh = svdvals_seconds([weights[layer.name].detach() for layer in layers])
    for every in sorted({1, 10, 100, tuned.workload.epoch}):
        errors = {}
        if every == 1 or (every > _EACH and every % _EACH == 0):  # else the looks say nothing
            behind = np.arange(len(exact)) * _EACH // every * every // _EACH
            errors = _errors((exact[behind] - exact)[settled] / spread[settled])
        rows.append(
            row
            | {
                "policy": f"svdvals every {every}" + " (epoch)" * (every == tuned.workload.epoch),
                "overhead_percent": round(100 * refresh / every / step_seconds, 3),
            }
            | errors
        )
    stamp = {"threads": torch.get_num_threads(), "cpu": cpu_name(), "torch": torch.__version__}
    return [r | stamp | {"date": time.strftime("%Y-%m-%d")} for r in rows]


def _overhead(tuned: Run) -> float:
    """Share of its own training's time; ``Balancer.overhead`` would divide by that of all."""
    return tuned.balancer._tracker.budget.spent / sum(tuned.seconds)


def _errors(shares: np.ndarray) -> dict:
    return {
        "rms_error_percent_of_spread": round(100 * float(np.sqrt(np.mean(shares**2))), 3),
        "max_error_percent_of_spread": round(100 * float(np.abs(shares).max()), 2),
    }


def write(rows: list[dict]) -> None:
    """Put the rows in the place of older ones of the same trainings."""
    kept = []
    if RESULTS.exists():
        with RESULTS.open(newline="") as file:
            kept = list(csv.DictReader(file))
    new = {row["workload"] for row in rows}
    rows = [row for row in kept if row["workload"] not in new] + rows
    fields = list(dict.fromkeys(field for row in rows for field in row))
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


@pytest.mark.parametrize("name", WORKLOADS)
def test_step(name, benchmark):
    """The whole comparison, timed as one; in steps it is in the CSV."""
    if benchmark.disabled:
        pytest.skip("a benchmark of minutes: pytest --benchmark-enable --benchmark-only")
    write(benchmark.pedantic(measure, (name, STEPS[name]), rounds=1))


if __name__ == "__main__":
    for chosen in sys.argv[1:] or WORKLOADS:
        found = measure(chosen, STEPS[chosen])
        write(found)
        print(*(" ".join(f"{k}={v}" for k, v in row.items()) for row in found), sep="\n")
