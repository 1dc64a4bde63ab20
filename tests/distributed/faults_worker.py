"""What a SharedLens makes visible, and what it does when a process is gone."""

import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from tbfast.distributed import SharedLens
from tbfast.lens import kept_rows
from tbfast.matrices import Layer
from tbfast.presets import resolve

SIDE = 96
LAYERS = [Layer(f"{i}.weight", "linear", (SIDE, SIDE)) for i in range(3)]
OPTIONS = resolve("tempbalance", {"probes": 2, "steps": 4, "budget": None})
ROWS = [0, 1, 2]


class Watch(TorchDispatchMode):
    """Notes the communication, and how often a tensor as large as a weight was made."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.wholes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional"):
            self.calls.append(func._opname)
        else:
            made = isinstance(result, torch.Tensor) and result.numel() >= SIDE * SIDE
            # A view of a tensor is not another one.
            self.wholes += made and result._base is None and func._opname.startswith("new_empty")
        return result


def rows_of(weights):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return {row: distribute_tensor(w, mesh, [Shard(0)]) for row, w in weights.items()}


def broken(rank: int, of: int) -> dict[int, torch.Tensor]:
    """Copies, of which layer 1 is not finite in one process."""
    generator = torch.Generator().manual_seed(0)
    weights = {row: torch.randn(SIDE, SIDE, generator=generator) for row in ROWS}
    if rank == of:
        weights[1][kept_rows(SIDE)[2]] = float("nan")
    return weights


def main(out: Path) -> None:
    rank, answers = dist.get_rank(), {}
    lens = SharedLens(LAYERS, OPTIONS)

    whole = broken(rank, of=-1)
    lens.show(whole)
    kept = lens.keep(ROWS)
    for of in range(dist.get_world_size()):
        lens.show(broken(rank, of))
        answers[f"turned {of}"] = lens.turned(ROWS, kept).tolist()
        answers[f"reasons {of}"] = [m.fit.reason for m in lens.measure(ROWS, "exact", 0)]
        answers[f"alphas {of}"] = [m.fit.alpha for m in lens.measure(ROWS, "exact", 0)]
    answers["agreed"] = lens.agree(1.0 + rank)

    parts = rows_of(whole)
    lens.show(parts)
    for look in ("exact", "sketch"):
        with Watch() as watch:
            lens.measure(ROWS, look, 0)
        answers[look] = (watch.calls, watch.wholes)
    with Watch() as watch:
        lens.keep(ROWS)
        lens.turned(ROWS, kept)
    answers["rows"] = (watch.calls, watch.wholes)

    other = [*LAYERS[:2], Layer("2.weight", "linear", (SIDE, SIDE + rank % 2))]
    try:
        SharedLens(other, OPTIONS).show({0: whole[0]})
    except ValueError as error:
        answers["different layers"] = str(error)

    # The last process stops answering, and does not come back.
    began, last = time.monotonic(), rank == dist.get_world_size() - 1
    if not last:
        try:
            lens.measure(ROWS, "sketch", 1)
        except RuntimeError as error:
            answers["error"] = str(error)
        answers["waited"] = time.monotonic() - began
    torch.save(answers, out / f"{rank}.pt")
    while last and len(list(out.glob("*.pt"))) < dist.get_world_size():
        time.sleep(0.1)
    os._exit(0)  # the group is broken: nothing more can be agreed on
