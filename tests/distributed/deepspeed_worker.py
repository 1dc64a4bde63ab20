"""Trainings under ZeRO 1 to 3, and what came of them."""

from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

import tbfast
from tbfast.zero import ZeroTempBalance

STEPS = 3


def build() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(20, 66), nn.ReLU(), nn.Linear(66, 70), nn.ReLU(), nn.Linear(70, 38)
    )


def schedule_of(model: nn.Module, optimizer_of) -> tuple:
    groups = tbfast.param_groups(model, skip_first=False, skip_last=False, min_eigs=5)
    optimizer = optimizer_of(groups)
    base = LambdaLR(optimizer, lambda step: 1 / (1 + step))
    options = {"budget": None, "rate_classes": None}
    return optimizer, ZeroTempBalance(optimizer, base, model=model, **options)


def adam(groups: list) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.0)


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, 20, generator=generator) for _ in range(STEPS)]


def note(schedule, optimizer) -> dict:
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    steps = schedule.balancer.steps
    return {"factors": schedule.factors, "alphas": schedule.alphas, "rates": rates, "steps": steps}


def train_plainly() -> list[dict]:
    """The same without DeepSpeed, in one process."""
    model = build()
    optimizer, schedule = schedule_of(model, adam)
    found = [note(schedule, optimizer)]
    for batch in batches():
        model(batch).square().mean().backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        found.append(note(schedule, optimizer))
    return found


def train(stage: int, folder: Path) -> dict:
    import deepspeed

    model = build()
    optimizer, schedule = schedule_of(model, adam)
    config = {
        "train_micro_batch_size_per_gpu": 16,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, lr_scheduler=schedule, config=config
    )
    found = [note(schedule, optimizer)]
    for batch in batches():
        engine.backward(engine(batch).square().mean())
        engine.step()
        found.append(note(schedule, optimizer))
    engine.save_checkpoint(str(folder))
    schedule.balancer.advance()  # so that loading has something to put right
    before = schedule.balancer.steps
    engine.load_checkpoint(str(folder))
    steps = {"steps before loading": before, "steps after loading": schedule.balancer.steps}
    return {"found": found, **steps}


def main(out: Path) -> None:
    import deepspeed

    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    answers = {stage: train(stage, out / f"stage{stage}") for stage in (1, 2, 3)}
    torch.save(answers, out / f"{dist.get_rank()}.pt")
