"""What a SharedLens says of weights in parts, beside what a plain Lens says of the whole ones."""

import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from tbfast.distributed import SharedLens, make_lens
from tbfast.lens import Lens
from tbfast.matrices import Layer
from tbfast.presets import resolve

SHAPES = {
    "tall": ("linear", (150, 61)),
    "fat": ("linear", (61, 150)),
    "few": ("linear", (3, 40)),  # fewer rows than processes
    "conv": ("conv", (37, 18, 3, 3)),
    "fourier": ("spectral", (22, 19, 3)),
    "in_proj_weight": ("packed", (66, 27)),
    "experts": ("experts", (5, 23, 19)),
}
LAYERS = [Layer(name, kind, shape) for name, (kind, shape) in SHAPES.items()]


def weights(turn: float = 0.0) -> dict[int, torch.Tensor]:
    """Random weights, at an angle to those of turn 0."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for row, layer in enumerate(LAYERS):
        dtype = torch.complex64 if layer.kind == "spectral" else torch.float32
        first, second = (torch.randn(layer.shape, dtype=dtype, generator=generator) for _ in "ab")
        scale = torch.linspace(0.1, 3, layer.shape[-1])  # a spectrum with a tail
        found[row] = (first + turn * second) * scale
    return found


def numbers(measurements: list) -> torch.Tensor:
    rows = []
    for m in measurements:
        f = m.fit
        rows.append([f.alpha, f.xmin, f.n_tail, f.ks, f.alpha_error, f.n_zeros, m.n_eigs])
        rows[-1] += [m.max_eigenvalue, m.sum_eigenvalues, m.sketch_error, m.method == "sketch"]
    return torch.tensor(rows, dtype=torch.float64)


def looked_at(lens: Lens, spread) -> dict:
    rows = list(range(len(LAYERS)))
    lens.show(spread(weights()))
    kept = lens.keep(rows)
    unmoved = lens.turned(rows, kept)
    lens.show(spread(weights(turn=0.3)))
    answers = {
        "kept": torch.cat([k.flatten() for k in kept]),
        "unmoved": torch.from_numpy(unmoved),
        "turned": torch.from_numpy(lens.turned(rows, kept)),
        "one": torch.from_numpy(lens.turned(rows[3:4], kept[3:4])),
    }
    for look in ("exact", "sketch", "auto"):
        measured = lens.measure(rows, look, draw=7)
        answers[look] = numbers(measured)
        answers[f"{look} reasons"] = [m.fit.reason for m in measured]
    return answers


def cut(mesh, placements):
    from torch.distributed.tensor import distribute_tensor

    def spread(whole):
        return {row: distribute_tensor(w, mesh, placements) for row, w in whole.items()}

    return spread


def main(out: Path) -> None:
    from torch.distributed.tensor import Replicate, Shard

    options = resolve("tempbalance", {"probes": 4, "steps": 8, "budget": None})
    answers = {"plain": looked_at(Lens(LAYERS, options), lambda whole: whole)}
    line = init_device_mesh("cpu", (dist.get_world_size(),))
    ways = {
        "copies": lambda whole: whole,
        "rows": cut(line, [Shard(0)]),
        "columns": cut(line, [Shard(1)]),
        "replicated": cut(line, [Replicate()]),
    }
    if dist.get_world_size() == 4:
        square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        ways |= {
            "half of the processes": cut(square["tp"], [Shard(0)]),
            "rows twice": cut(square, [Shard(0), Shard(0)]),
            "blocks": cut(square, [Shard(0), Shard(1)]),
            "rows of copies": cut(square, [Replicate(), Shard(0)]),
        }
    for way, spread in ways.items():
        lens = make_lens(LAYERS, options, spread(weights()))
        assert isinstance(lens, SharedLens)
        answers[way] = looked_at(lens, spread)
    squares = resolve("tempbalance", {"shape_correction": "farms"})
    plain, shared = Lens(LAYERS, squares), SharedLens(LAYERS, squares)
    plain.show(weights())
    shared.show(ways["rows"](weights()))
    rows = range(len(LAYERS))
    answers["farms"] = [numbers(lens.measure(rows, "auto", draw=0)) for lens in (shared, plain)]

    # The last process dies without a word.
    if dist.get_rank() == dist.get_world_size() - 1:
        torch.save(answers, out / f"{dist.get_rank()}.pt")
        os._exit(0)
    began = time.monotonic()
    try:
        lens.agree(1.0)
    except RuntimeError as error:
        answers["error"] = str(error)
    answers["waited"] = time.monotonic() - began
    torch.save(answers, out / f"{dist.get_rank()}.pt")
    os._exit(0)  # the group is broken: nothing more can be agreed on
