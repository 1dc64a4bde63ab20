"""What many rates cost the optimizer: AdamW on the shapes of GPT-2 small, all layers tuned.

    python benchmarks/bench_optimizer.py [ROUNDS]

An optimizer with one group, the same under ``tbfast.attach`` and under ``TempBalance``, both with
16 rates, and one with a group for each layer take their steps in turn; nothing is measured. The
ratios of medians to the one-group step go to benchmarks/results/optimizer.csv, with what
``TempBalance.step()`` itself takes for 150 layers.
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
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from workloads import GPT

import tbfast
from tbfast.bench import cpu_name

RESULTS = Path(__file__).parent / "results/optimizer.csv"
LAYERS = {"preset": "llr", "min_eigs": 2}
WAYS = ("one group", "attach", "TempBalance", "a group for each layer")


class Contender:
    """A model with gradients, and an optimizer whose steps are timed."""

    def __init__(self, way: str, **options: bool) -> None:
        torch.manual_seed(0)
        model = GPT(vocabulary=50257, context=1024, width=768, depth=12, heads=12)
        for p in model.parameters():
            p.grad = torch.full_like(p, 1e-3)
        groups = tbfast.param_groups(model, **LAYERS)
        tuned = [group["name"] for group in groups if "kind" in group]
        rates = np.linspace(0.5, 1.5, 16)[np.arange(len(tuned)) * 7 % 16]
        fixed = {"mapping": "fixed", "factors": dict(zip(tuned, rates.tolist(), strict=True))}
        if way in ("one group", "attach"):
            groups = list(model.parameters())
        self.optimizer = torch.optim.AdamW(groups, lr=1e-4, **options)
        if way == "attach":
            tbfast.attach(self.optimizer, model, **LAYERS, **fixed)
        elif way == "TempBalance":
            tbfast.TempBalance(self.optimizer, **fixed)
        self.groups = len(self.optimizer.param_groups)
        self.seconds: list[float] = []

    def step(self) -> None:
        began = time.perf_counter()
        self.optimizer.step()
        self.seconds.append(time.perf_counter() - began)


def measure_steps(rounds: int) -> list[dict]:
    """AdamW's step under each way, by implementation."""
    rows = []
    for kind in ("foreach", "fused"):
        contenders = {way: Contender(way, **{kind: True}) for way in WAYS}
        for number in range(rounds + 2):
            order = list(contenders.values())
            for contender in order[number % 4 :] + order[: number % 4]:
                contender.step()
        # The first two steps make the state.
        medians = {way: float(np.median(c.seconds[2:])) for way, c in contenders.items()}
        rows += [
            {
                "what": f"AdamW {kind}",
                "way": way,
                "groups": contenders[way].groups,
                "ms": round(1e3 * seconds, 3),
                "ratio": round(seconds / medians["one group"], 4),
            }
            for way, seconds in medians.items()
        ]
    return rows


def measure_scheduler(rounds: int) -> list[dict]:
    """``TempBalance.step()`` for 150 layers when nothing is measured."""
    rows = []
    for base in (None, LambdaLR):
        model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(150)))
        groups = tbfast.param_groups(model, skip_first=False, skip_last=False)
        optimizer = torch.optim.AdamW(groups)
        plain = torch.optim.AdamW([{"params": group["params"]} for group in groups])
        schedule = lambda o: LambdaLR(o, lambda count: 1 / (1 + count))  # noqa: E731
        alone = schedule(plain)
        ours = tbfast.TempBalance(optimizer, schedule(optimizer) if base else None)
        for o in (optimizer, plain):
            o.step()  # or torch's schedulers warn
        seconds: dict[str, list[float]] = {"TempBalance": [], "LambdaLR": []}
        for _ in range(100 * rounds):  # the optimizer takes no step, so nothing is measured
            for name, step in (("TempBalance", ours.step), ("LambdaLR", alone.step)):
                began = time.perf_counter()
                step()
                seconds[name].append(time.perf_counter() - began)
        medians = {name: float(np.median(found)) for name, found in seconds.items()}
        rows.append(
            {
                "what": "scheduler.step()",
                "way": f"TempBalance on {base.__name__ if base else 'no base'}",
                "groups": 150,
                "ms": round(1e3 * medians["TempBalance"], 4),
            }
        )
    rows.append(
        {
            "what": "scheduler.step()",
            "way": "LambdaLR alone",
            "groups": 150,
            "ms": round(1e3 * medians["LambdaLR"], 4),
        }
    )
    return rows


def write(rows: list[dict]) -> None:
    stamp = {"threads": torch.get_num_threads(), "cpu": cpu_name(), "torch": torch.__version__}
    rows = [row | stamp | {"date": time.strftime("%Y-%m-%d")} for row in rows]
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def test_optimizer(benchmark):
    """The whole comparison, timed as one; step by step it is in the CSV."""
    if benchmark.disabled:
        pytest.skip("a benchmark of minutes: pytest --benchmark-enable --benchmark-only")
    run = lambda: measure_steps(20) + measure_scheduler(20)  # noqa: E731
    write(benchmark.pedantic(run, rounds=1))


if __name__ == "__main__":
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    found = measure_steps(rounds) + measure_scheduler(rounds)
    write(found)
    print(*(" ".join(f"{k}={v}" for k, v in row.items()) for row in found), sep="\n")
