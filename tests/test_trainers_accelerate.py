"""attach and TempBalance in a loop with Accelerate, prepared or not, in one process and in two.

Run by itself under torchrun, the file is the two processes of its last tests.
"""

import json
import os
import runpy
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset

import tbfast

accelerate = pytest.importorskip("accelerate")

from accelerate.optimizer import AcceleratedOptimizer  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402

EXAMPLES = Path(__file__).parents[1] / "examples" / "integrations"
TUNED = ["2.weight", "4.weight"]
# The state counts, and without a budget every refresh is on the step it is due.
STATEFUL = dict(every=3, ema=0.5, ramp=2, budget=None)


@pytest.fixture(autouse=True)
def _fresh_accelerator():
    """Accelerate keeps one state per process, and with it the settings of the first test."""
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def make_model():
    torch.manual_seed(0)
    sizes = [16, 64, 64, 96, 4]
    layers = [part for pair in pairwise(sizes) for part in (nn.Linear(*pair), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


def make_loader():
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(128, 16, generator=generator), torch.randn(128, 4, generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=8)


def halving(step):
    return 0.9**step


def equal(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def run(way, prepare_scheduler=False, accumulation=1, steps=16, resume=None, save=None):
    """Train; ``way``: plain, attach or TempBalance, over an exponential decay.

    Returns model, optimizer, the object that balances (None) and the rates after each step.
    """
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    model = raw = make_model()
    groups = tbfast.param_groups(model, min_eigs=60) if way == "TempBalance" else None
    optimizer = torch.optim.AdamW(groups or model.parameters(), lr=1e-3)
    model, optimizer, loader = accelerator.prepare(model, optimizer, make_loader())
    scheduler, balancing = LambdaLR(optimizer, halving), None
    if way == "TempBalance":
        scheduler = balancing = tbfast.TempBalance(optimizer, scheduler, **STATEFUL)
    if way == "attach":
        balancing = tbfast.attach(optimizer, raw, min_eigs=60, **STATEFUL)
    if balancing is not None:
        accelerator.register_for_checkpointing(balancing)
    if way != "TempBalance":
        accelerator.register_for_checkpointing(scheduler)
    stepped = accelerator.prepare(scheduler) if prepare_scheduler else scheduler
    if resume is not None:
        accelerator.load_state(str(resume))
    batches, rates = list(loader) * accumulation, []
    first = 0 if resume is None else steps // 2
    for step in range(first, steps):
        for micro in range(accumulation):
            x, y = batches[(step * accumulation + micro) % len(batches)]
            with accelerator.accumulate(model):
                # what a loader does at the end of its data must not end an accumulation early
                accelerator.gradient_state._set_sync_gradients(micro == accumulation - 1)
                accelerator.backward(F.mse_loss(model(x), y))
                optimizer.step()
                if prepare_scheduler or accelerator.sync_gradients:
                    stepped.step()
                optimizer.zero_grad()
        rates.append([g["lr"] for g in optimizer.param_groups])
        if save is not None and step + 1 == steps // 2:
            accelerator.save_state(str(save))
    return raw, optimizer, balancing, rates


@pytest.mark.parametrize("way", ["attach", "TempBalance"])
def test_a_prepared_optimizer_is_balanced_as_the_one_inside_it(way):
    model, optimizer, balancing, _ = run(way, accumulation=2)
    twin = make_model()
    if way == "attach":
        plain = torch.optim.AdamW(twin.parameters(), lr=1e-3)
        base = LambdaLR(plain, halving)
        other = tbfast.attach(plain, twin, min_eigs=60, **STATEFUL)
    else:
        plain = torch.optim.AdamW(tbfast.param_groups(twin, min_eigs=60), lr=1e-3)
        base = other = tbfast.TempBalance(plain, LambdaLR(plain, halving), **STATEFUL)
    batches = list(make_loader()) * 2
    for step in range(16):
        for x, y in batches[2 * step : 2 * step + 2]:
            (F.mse_loss(twin(x), y) / 2).backward()
        plain.step()
        plain.zero_grad()
        base.step()
    assert equal(model, twin)
    assert balancing.factors == other.factors
    assert list(balancing.factors) == TUNED
    assert isinstance(optimizer, AcceleratedOptimizer)
    balancing.detach()
    tbfast.attach(optimizer.optimizer, model, min_eigs=60)


@pytest.mark.parametrize("way", ["attach", "TempBalance"])
def test_load_state_resumes_bitwise(way, tmp_path):
    first = run(way, save=tmp_path)
    second = run(way, resume=tmp_path)
    assert equal(first[0], second[0])
    assert first[2].factors == second[2].factors
    assert first[2].alphas == second[2].alphas
    assert first[3][8:] == second[3]


@pytest.mark.parametrize("way", ["attach", "TempBalance"])
def test_a_step_that_the_scaler_skips_is_not_counted(way):
    model = make_model()
    groups = tbfast.param_groups(model, min_eigs=60) if way == "TempBalance" else None
    raw = torch.optim.AdamW(groups or model.parameters(), lr=1e-3)
    accelerate.Accelerator(cpu=True)
    # What prepare builds for fp16, which Accelerate itself refuses on a CPU.
    optimizer = AcceleratedOptimizer(raw, scaler=torch.amp.GradScaler("cpu"))
    if way == "attach":
        balancer = tbfast.attach(optimizer, model, min_eigs=60)
    else:
        balancer = tbfast.TempBalance(optimizer).balancer
    outside = raw.param_groups
    for step in range(6):
        loss = model(torch.randn(8, 16)).square().mean() * (float("inf") if step == 2 else 1)
        optimizer.scaler.scale(loss).backward()
        optimizer.step()
        assert optimizer.step_was_skipped == (step == 2)
        optimizer.zero_grad()
        assert raw.param_groups is outside
    assert balancer.steps == 5


def test_the_example_runs(capsys):
    runpy.run_path(str(EXAMPLES / "accelerate_loop.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("after 32 steps")
    assert [line.split()[0] for line in lines[1:]] == [f"{i}.weight" for i in (2, 4, 6, 8)]


def two_processes(out):
    """What each of two processes writes about runs with and without a prepared scheduler."""
    found = {}
    for way in ("plain", "attach", "TempBalance"):
        for prepared in (False, True):
            AcceleratorState._reset_state()
            model, _, balancing, rates = run(way, prepare_scheduler=prepared)
            report = dict(
                rates=rates, weights=[float(p.double().sum()) for p in model.parameters()]
            )
            if balancing is not None:
                balancer = getattr(balancing, "balancer", balancing)
                report |= dict(
                    steps=balancer.steps,
                    factors=balancer.factors,
                    alphas=balancer.alphas,
                    measured_at=[step for step, _, _ in balancer.history],
                )
            found[f"{way}, {'prepared' if prepared else 'own'}"] = report
    for way in ("attach", "TempBalance"):
        AcceleratorState._reset_state()
        first = run(way, save=Path(out, way))
        AcceleratorState._reset_state()
        second = run(way, resume=Path(out, way))
        same = first[2].factors == second[2].factors and first[2].alphas == second[2].alphas
        found[f"{way}, resumed"] = equal(first[0], second[0]) and same
    Path(out, f"rank{os.environ['RANK']}.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    out = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", __file__, str(out)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0, done.stderr
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in (0, 1)]


def test_two_processes_have_the_same_factors_rates_and_weights_bitwise(ranks):
    assert ranks[0] == ranks[1]


@pytest.mark.parametrize("way", ["attach", "TempBalance"])
def test_two_processes_resume_bitwise(ranks, way):
    assert ranks[0][f"{way}, resumed"] is True


@pytest.mark.parametrize("prepared", ["own", "prepared"])
@pytest.mark.parametrize("way", ["attach", "TempBalance"])
def test_measuring_counts_optimizer_steps_however_often_step_is_called(ranks, way, prepared):
    found = ranks[0][f"{way}, {prepared}"]
    assert found["steps"] == 16
    assert found["measured_at"] == [0, 3, 6, 9, 12, 15]


@pytest.mark.parametrize(("prepared", "calls"), [("own", 1), ("prepared", 2)])
def test_the_base_schedule_steps_as_often_as_torchs_own_would(ranks, prepared, calls):
    expected = [1e-3 * 0.9 ** (calls * (step + 1)) for step in range(16)]
    for way in ("plain", "attach"):
        rates = [groups[0] for groups in ranks[0][f"{way}, {prepared}"]["rates"]]
        assert rates == pytest.approx(expected, rel=1e-12)
    # TempBalance's first group is not tuned, and each other group has the base rate × factor.
    found = ranks[0][f"TempBalance, {prepared}"]
    assert [groups[0] for groups in found["rates"]] == pytest.approx(expected, rel=1e-12)
    last = [rate / expected[-1] for rate in found["rates"][-1][1:]]
    assert last == pytest.approx(list(found["factors"].values()), rel=1e-12)


if __name__ == "__main__":
    two_processes(sys.argv[1])
