"""Short trainings under every way of spreading a model, each with both ways of applying factors."""

import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import tbfast
from tbfast.distributed import SharedLens
from tbfast.lens import Lens
from tbfast.matrices import Layer
from tbfast.presets import resolve

STEPS = 4
# By number of processes, how the model is spread and how factors are applied.
TRAININGS = {
    2: [("ddp", "attach"), ("ddp", "groups"), ("tp", "groups")],
    4: [("fsdp", "attach"), ("fsdp", "groups"), ("hsdp", "attach"), ("fsdp of tp", "groups")],
}
OPTIONS = {"budget": None, "rate_classes": None, "low": 0.5, "high": 1.5, "history": 0}
SELECTION = {"skip_first": False, "skip_last": False, "min_eigs": 5}


def build() -> nn.Sequential:
    """Sides that no number of processes divides; the last weight has a row for three of four."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(20, 66),
        nn.ReLU(),
        nn.Linear(66, 70),
        nn.ReLU(),
        nn.Linear(70, 38),
        nn.ReLU(),
        nn.Linear(38, 5),
    )


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, 20, generator=generator) for _ in range(STEPS)]


def train(model: nn.Module, way: str, of: str = "weight") -> list[dict[str, float]]:
    """Factors after each step of SGD with momentum; every process has the same batches."""
    if way == "attach":
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, foreach=False)
        balancer = tbfast.attach(optimizer, model, of=of, **SELECTION, **OPTIONS)
        schedule = None
    else:
        groups = tbfast.param_groups(model, **SELECTION)
        optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9, foreach=False)
        schedule = tbfast.TempBalance(optimizer, of=of, **OPTIONS)
        balancer = schedule.balancer
    found = []
    for batch in batches():
        model(batch).square().mean().backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
        optimizer.zero_grad()
        found.append({_plain(name): factor for name, factor in balancer.factors.items()})
        found[-1] |= {f"alpha {_plain(name)}": a for name, a in balancer.alphas.items()}
    return found


def rationed(model: nn.Module) -> list:
    """What was measured when, and the factors, of a run with the default budget."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, foreach=False)
    balancer = tbfast.attach(optimizer, model, **SELECTION)
    found = []
    for step in range(70):
        model(batches()[step % STEPS]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        rows = balancer.state_dict()["tracker"]["rows"]
        found.append([rows["measured_at"], rows["speed"], balancer.factors])
    return found


@torch.no_grad()
def looked_at(model: nn.Module) -> dict:
    """Kept rows and sketches of the weights."""
    weights = {name: p for name, p in model.named_parameters() if p.ndim == 2}
    layers = [Layer(name, "linear", tuple(w.shape)) for name, w in weights.items()]
    options, rows = resolve("tempbalance", {"probes": 2, "steps": 4}), range(len(layers))
    is_whole = all(type(w) is nn.Parameter for w in weights.values())
    lens = Lens(layers, options) if is_whole else SharedLens(layers, options)
    lens.show(dict(enumerate(weights.values())))
    alphas = [m.fit.alpha for m in lens.measure(rows, "sketch", draw=0)]
    return {"kept": lens.keep(rows), "alphas": alphas}


def _plain(name: str) -> str:
    return name.removeprefix("module.")


def spread(how: str) -> nn.Module:
    """The model as one of the ways makes it."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    model, world = build(), dist.get_world_size()
    pairs = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    if how == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if how == "fsdp":
        fully_shard(model[2])
        return fully_shard(model)
    if how == "hsdp":
        mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("copies", "rows"))
        return fully_shard(model, mesh=mesh)
    if how == "tp":
        return parallelize_module(model, init_device_mesh("cpu", (world,)), pairs)
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("dp", "tp"))
    parallelize_module(model, mesh["tp"], pairs | {"4": ColwiseParallel(), "6": RowwiseParallel()})
    return fully_shard(model, mesh=mesh["dp"])


def main(out: Path) -> None:
    warnings.simplefilter("error", RuntimeWarning)  # what tbfast warns of
    answers = {}
    for how, way in TRAININGS[dist.get_world_size()]:
        answers[how, way, "weight"] = train(spread(how), way)
    if dist.get_world_size() == 4:
        for of in ("grad", "momentum"):
            answers["fsdp", "groups", of] = train(spread("fsdp"), "groups", of)
        answers["twice cut"] = looked_at(spread("fsdp of tp")), looked_at(build())
    else:
        answers["budget"] = rationed(spread("fsdp"))
    torch.save(answers, out / f"{dist.get_rank()}.pt")
