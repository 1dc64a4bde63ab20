"""examples/data_order keeps and merges what it says, and claims no more than its figures do."""

from __future__ import annotations

import csv
import runpy
from pathlib import Path

import numpy as np
import torch
from example_runs import EXAMPLES, PETS, run, write_bert
from safetensors.torch import load_file

MERGES = ("linear", "select", "select + resample", "select + 3 redraws")
FROZEN = ("encoder.words", "encoder.positions", "encoder.segments")


def test_data_order_merges_the_checkpoints_that_it_keeps(tmp_path: Path):
    out, pets = tmp_path / "out", tmp_path / "pets.csv"
    with pets.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *PETS])
    data = ("--data", pets, "--model", write_bert(tmp_path / "model"), "--out", out)
    settings = ("--quick", "--shots", 3, "--orders", 3, "--epochs", 3, "--rate", 1e-3)
    printed = run("data_order/run.py", *data, *settings)
    assert "2 seeds, 3 orders, 6 training and 4 test texts, bf16 checkpoints" in printed
    assert "is better" not in printed  # two seeds are too few for a claim
    with (out / "results.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    models = ["best order", "order 1", "order 2", "order 3", *MERGES]
    assert [(row["seed"], row["model"]) for row in rows] == [(s, m) for s in "01" for m in models]
    for row in rows:
        assert 0 < float(row["loss"]) < 2
        assert round(4 * float(row["accuracy"]), 9) in range(5)
    for seed in (0, 1):
        kept = {p.stem: load_file(p) for p in (out / f"seed-{seed}").glob("*.safetensors")}
        unchanged = {r["model"]: float(r["unchanged"]) for r in rows if r["seed"] == str(seed)}
        assert unchanged["select + resample"] < unchanged["select"]
        for name, start in kept["base"].items():
            orders = [kept[f"order-{i}"][name].view(torch.int16) for i in (1, 2, 3)]
            picked = kept["select"][name].view(torch.int16)
            assert bool(sum(picked == order for order in orders).all())
            if name.startswith(FROZEN):
                assert torch.equal(kept["linear"][name], start)
            elif start.ndim == 2:
                assert not torch.equal(orders[0], orders[1])
            # bfloat16 keeps eight bits; three sums in float32.
            mean = sum(kept[f"order-{i}"][name].double() for i in (1, 2, 3)) / 3
            torch.testing.assert_close(kept["linear"][name].double(), mean, rtol=2**-8, atol=1e-7)


def test_data_order_finds_no_difference_in_noise_and_finds_one_that_is_there():
    results = runpy.run_path(str(EXAMPLES / "data_order" / "results.py"))

    def told(gain: float, seeds: int = 8) -> list[str]:
        noise = np.random.default_rng(0).normal(0, 0.01, (seeds, len(MERGES) + 2))
        tested = []
        for seed in range(seeds):
            for place, model in enumerate(("order 1", "order 2", *MERGES)):
                better = gain if model == "linear" else 0.0
                figures = (0.6 - better + noise[seed, place], 0.8 + noise[seed, place], 0.1, 3.0)
                tested.append(results["Tested"](seed, model, *figures))
        return results["verdict"](results["by_model"](tested)).splitlines()

    loss, accuracy = told(gain=0.0)
    assert loss.startswith("Test loss, 8 seeds: no difference found between linear and one order")
    assert "better" not in loss + accuracy
    loss, accuracy = told(gain=0.1)
    assert "linear is better than one order by 0.1" in loss
    assert "select is worse than linear by 0.1" in loss
    assert "select and one order" in loss.partition("no difference found")[2]
    assert "better" not in accuracy
    assert "better" not in told(gain=0.1, seeds=2)[0]
