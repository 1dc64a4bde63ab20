"""Saves a training under FSDP2 after 3 of 6 steps, or resumes it in another number of processes."""

import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.optim.lr_scheduler import LambdaLR

import tbfast

STEPS = 6


def build() -> nn.Sequential:
    """Sides that no number of processes divides."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(20, 66), nn.ReLU(), nn.Linear(66, 70), nn.ReLU(), nn.Linear(70, 37)
    )


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, 20, generator=generator) for _ in range(STEPS)]


class Run:
    def __init__(self, way: str) -> None:
        self.model = fully_shard(build())
        select = {"skip_first": False, "skip_last": False, "min_eigs": 5}
        self.schedule = None
        if way == "groups":
            groups = tbfast.param_groups(self.model, **select)
            self.optimizer = torch.optim.AdamW(groups, lr=0.01, foreach=False)
            base = LambdaLR(self.optimizer, lambda step: 1 / (1 + step))
            self.schedule = tbfast.TempBalance(self.optimizer, base, ema=0.5)
            self.balancer = self.schedule.balancer
        else:
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01, foreach=False)
            self.balancer = tbfast.attach(self.optimizer, self.model, ema=0.5, **select)

    def state(self) -> dict:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        balance = (self.schedule or self.balancer).state_dict()
        return {"model": model, "optimizer": optimizer, "balance": balance}

    def load(self, state: dict) -> None:
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        (self.schedule or self.balancer).load_state_dict(state["balance"])

    def go(self, steps: range) -> list[dict]:
        found = []
        for step in steps:
            self.model(batches()[step]).square().mean().backward()
            self.optimizer.step()
            if self.schedule is not None:
                self.schedule.step()
            self.optimizer.zero_grad()
            found.append({"factors": self.balancer.factors, "alphas": self.balancer.alphas})
        return found


def main(out: Path) -> None:
    answers = {}
    for way in ("groups", "attach"):
        run, place = Run(way), out / way
        if os.environ["PHASE"] == "save":
            run.go(range(3))
            dcp.save(run.state(), checkpoint_id=place)
        else:
            state = run.state()
            dcp.load(state, checkpoint_id=place)
            run.load(state)  # with a smoothed alpha, the past matters
        answers[way] = run.go(range(3, STEPS))
        rows = run.balancer.state_dict()["tracker"]["rows"]
        answers[way, "measured at"] = rows["measured_at"]
    torch.save(answers, out / f"{dist.get_rank()}.pt")
