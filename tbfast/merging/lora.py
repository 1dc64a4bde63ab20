"""``extract_lora``: the difference of two models as an adapter of low rank.

The singular vectors of W_tuned - W_base, each times the root of its singular value (Eckart, Young:
no matrix of that rank is nearer), from one batched randomized SVD for many modules. Written as PEFT
reads it: W + B A, with lora_alpha = r.
"""

from __future__ import annotations

import json
import os
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tbfast.errors import CheckpointError
from tbfast.lowrank import SVD, rsvd
from tbfast.merging.inputs import Source, open_source
from tbfast.merging.workplace import Workplace
from tbfast.names import natural
from tbfast.progress import Progress, ticking

PathLike = str | os.PathLike[str]

_POWER_ITERS = 2  # with a shift each: within 0.5 % of the optimal error on decaying spectra
_TOGETHER = 1 << 28  # elements of differences in memory at a time: 1 GiB
_LOW_ENERGY = 0.5
# Not linear layers, though their weights are matrices.
_TABLES = ("*embed*", "*wte*", "*wpe*", "*lm_head*", "*shared.weight", "*relative_attention_bias*")
_TRANSPOSED = ("gpt2", "imagegpt", "openai-gpt")  # whose layers store W as (in, out)


@dataclass(frozen=True)
class ModuleFactors:
    """The adapter of one module.

    Attributes:
        name: Of the module.
        shape: Of its weight.
        rank: Of the adapter.
        energy: Share of |W_tuned - W_base|² that the adapter keeps.
    """

    name: str
    shape: tuple[int, int]
    rank: int
    energy: float


@dataclass(frozen=True)
class LoraReport:
    """What ``extract_lora`` did.

    Attributes:
        modules: The modules that got an adapter.
        energy: Share of the squared differences of all these modules that is kept.
        unchanged: Names of weights that are equal in both models.
        left_out: Names of weights that differ and are not in the adapter: norms, biases,
            embeddings, and what ``targets`` does not match.
        seconds: Wall time.
    """

    modules: list[ModuleFactors]
    energy: float
    unchanged: list[str]
    left_out: list[str]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts."""
        return vars(self) | {"modules": [dict(vars(module)) for module in self.modules]}


def lora_factors(
    delta: Tensor, rank: int, *, oversample: int = 8, power_iters: int = _POWER_ITERS, seed: int = 0
) -> tuple[Tensor, Tensor, float]:
    """A difference of weights as B A, for starting a LoRA from an update that is known.

    Args:
        delta: (out, in), floating point, dense or sparse (SLoRA's first stage leaves a sparse one,
            Babakniya et al. 2023).
        rank: Columns of B.
        oversample: As of :func:`tbfast.rsvd`.
        power_iters: As of :func:`tbfast.rsvd`.
        seed: Of the random numbers.

    Returns:
        A (rank, in), B (out, rank), float32, and the share of |delta|² that B A keeps.

    Raises:
        ValueError: As of :func:`tbfast.rsvd`.
    """
    dense = delta.to_dense() if delta.layout != torch.strided else delta
    found = rsvd(dense.float(), rank, oversample=oversample, power_iters=power_iters, seed=seed)
    a, b = _factors(found, rank)
    return a, b, 1 - found.error**2


def extract_lora(
    base: PathLike,
    tuned: PathLike,
    out: PathLike,
    *,
    rank: int | str = 32,
    energy: float = 0.9,
    max_rank: int = 128,
    seed: int = 0,
    targets: str | Sequence[str] | None = None,
    overwrite: bool = False,
    progress: Progress = None,
) -> LoraReport:
    """Write the difference of a fine-tuned model to its base as a LoRA adapter for PEFT.

    Args:
        base: ``.safetensors`` file, index file or folder.
        tuned: The same of the tuned model.
        out: A new folder, with adapter_model.safetensors and adapter_config.json.
        rank: Of every module, at most its shorter side; or ``"auto"``: of each module as low as
            keeps ``energy``, at most ``max_rank``.
        energy: Share of each module's squared difference that ``rank="auto"`` keeps.
        max_rank: The most that ``rank="auto"`` takes.
        seed: Of the random numbers, from 0 to 2^64 - 1.
        targets: Globs of module names (without ``.weight``); None takes every matrix but
            embeddings and heads.
        overwrite: Replace an output that exists.
        progress: None, True for a bar, or a callable ``(done, total, name)``.

    Warns:
        UserWarning: If less than half of the squared differences is kept.

    Raises:
        CheckpointError: If a model is damaged, or the two do not fit together.
        ValueError: If an option is out of range, or no module has changed.
        OSError: If the output cannot be written.
    """
    began = time.perf_counter()
    _check(rank, energy, max_rank, seed)
    target = Path(out)
    if target.exists() and not overwrite:
        raise FileExistsError(f"'{out}' exists; choose another output or use overwrite")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"cannot write '{out}': there is no folder '{target.parent}'")
    sources = open_source(base), open_source(tuned)
    names = _common(*sources)
    transposed = sources[0].config.get("model_type") in _TRANSPOSED
    chosen = [name for name in names if _is_target(name, sources[0], targets)]
    modules: list[ModuleFactors] = []
    tensors: dict[str, Tensor] = {}
    unchanged: list[str] = []
    kept = whole = 0.0
    with ticking(progress, "decomposing", len(chosen)) as tick:
        done = 0
        for group in _groups(chosen, sources[0]):
            deltas = {name: _delta(name, *sources) for name in group}
            unchanged += [name for name, delta in deltas.items() if not bool(delta.any())]
            changed = {n: d.T if transposed else d for n, d in deltas.items() if n not in unchanged}
            for name, found, size in _decomposed(changed, rank, max_rank, seed):
                module = name.removesuffix(".weight")
                r = _rank(found, size, rank, energy)
                part = float(found.S[:r].double().square().sum())
                a, b = _factors(found, r)
                tensors[f"base_model.model.{module}.lora_A.weight"] = a
                tensors[f"base_model.model.{module}.lora_B.weight"] = b
                shape = sources[0].entries[name].shape
                share = min(1.0, part / size)
                modules.append(ModuleFactors(module, (shape[0], shape[1]), r, share))
                kept, whole = kept + min(part, size), whole + size
            done += len(group)
            tick(done, len(chosen), group[-1])
    if not modules:
        raise ValueError(
            f"'{tuned}' does not differ from '{base}' in the {len(chosen)} modules taken; choose "
            "others with targets, or check the paths"
            if chosen
            else f"targets={targets!r} takes none of the modules of '{tuned}' (matrices of names "
            "that end in .weight, but embeddings and heads); choose others with targets"
        )
    left_out = [n for n in names if n not in chosen and _differs(n, *sources)]
    report = LoraReport(modules, kept / whole, unchanged, left_out, time.perf_counter() - began)
    _write(target, tensors, _config(modules, sources[0], transposed), report)
    if report.energy < _LOW_ENERGY:
        warnings.warn(
            f"the adapter keeps {100 * report.energy:.0f} % of the squared differences; take a "
            "larger rank, or merge the models instead",
            stacklevel=2,
        )
    return report


def _check(rank: int | str, energy: float, max_rank: int, seed: int) -> None:
    if rank != "auto" and (isinstance(rank, (bool, str)) or rank < 1):
        raise ValueError(f"rank must be 'auto' or a number above 0, got {rank!r}")
    if not 0 < energy <= 1:
        raise ValueError(f"energy must be above 0 and at most 1, got {energy}")
    if max_rank < 1:
        raise ValueError(f"max_rank must be above 0, got {max_rank}")
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed must be from 0 to 2^64 - 1, got {seed}")


def _common(base: Source, tuned: Source) -> list[str]:
    """Names in both, in natural order, after a look at their shapes."""
    names = sorted(base.entries.keys() & tuned.entries.keys(), key=natural)
    if not names:
        raise CheckpointError.of(tuned.path, f"has no tensor in common with '{base.path}'")
    for name in names:
        mine, theirs = base.entries[name].shape, tuned.entries[name].shape
        if mine != theirs:
            raise CheckpointError.of(
                tuned.path,
                f"has '{name}' with shape {list(theirs)}, the base with {list(mine)}; it was not "
                "tuned from it, or its vocabulary has grown",
            )
    return names


def _is_target(name: str, source: Source, targets: str | Sequence[str] | None) -> bool:
    entry = source.entries[name]
    if len(entry.shape) != 2 or not entry.elements or not entry.dtype.computes:
        return False
    if not name.endswith(".weight"):
        return False
    if targets is None:
        return not any(fnmatchcase(name, pattern) for pattern in _TABLES)
    patterns = [targets] if isinstance(targets, str) else targets
    return any(fnmatchcase(name.removesuffix(".weight"), pattern) for pattern in patterns)


def _groups(names: Sequence[str], source: Source) -> Iterator[list[str]]:
    group: list[str] = []
    for name in names:
        group.append(name)
        if sum(source.entries[n].elements for n in group) >= _TOGETHER:
            yield group
            group = []
    if group:
        yield group


def _delta(name: str, base: Source, tuned: Source) -> Tensor:
    delta = _read(name, tuned).float() - _read(name, base).float()
    if not bool(torch.isfinite(delta).all()):
        raise CheckpointError.of(
            tuned.path, f"or '{base.path}' holds NaN or infinity in '{name}'; repair it"
        )
    return delta


def _differs(name: str, base: Source, tuned: Source) -> bool:
    return not torch.equal(_read(name, base), _read(name, tuned))


def _read(name: str, source: Source) -> Tensor:
    with safe_open(str(source.entries[name].file), "pt") as opened:
        tensor: Tensor = opened.get_tensor(name)
        return tensor


def _decomposed(
    deltas: dict[str, Tensor], rank: int | str, max_rank: int, seed: int
) -> Iterator[tuple[str, SVD, float]]:
    """Name, factors and squared norm of each; those of one rank in one call."""
    wanted = {
        name: min(*delta.shape, max_rank if rank == "auto" else int(rank))
        for name, delta in deltas.items()
    }
    found: dict[str, SVD] = {}
    for r in sorted(set(wanted.values())):
        names = [name for name in deltas if wanted[name] == r]
        parts = rsvd([deltas[n] for n in names], r, power_iters=_POWER_ITERS, seed=seed)
        found |= dict(zip(names, parts, strict=True))
    for name, delta in deltas.items():
        yield name, found[name], float(delta.double().square().sum())


def _rank(found: SVD, size: float, rank: int | str, energy: float) -> int:
    if rank != "auto":
        return len(found.S)
    shares = found.S.double().square().cumsum(0) / size
    return min(len(found.S), int((shares < energy).sum()) + 1)


def _factors(found: SVD, rank: int) -> tuple[Tensor, Tensor]:
    """A and B, the largest entry of each column of B positive."""
    u, vh = found.U[:, :rank], found.Vh[:rank]
    largest = u.gather(0, u.abs().argmax(0, keepdim=True))
    root = found.S[:rank].sqrt() * torch.where(largest[0] < 0, -1.0, 1.0)
    return (root[:, None] * vh).contiguous(), (u * root).contiguous()


def _config(modules: Sequence[ModuleFactors], base: Source, transposed: bool) -> dict[str, Any]:
    (common, _), *_ = Counter(module.rank for module in modules).most_common(1)
    pattern = {module.name: module.rank for module in modules if module.rank != common}
    architectures = base.config.get("architectures") or [""]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if str(architectures[0]).endswith("ForCausalLM") else None,
        "base_model_name_or_path": str(base.path),
        "r": common,
        "lora_alpha": common,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": [module.name for module in modules],
        "fan_in_fan_out": transposed,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }


def _write(
    out: Path, tensors: dict[str, Tensor], config: dict[str, Any], report: LoraReport
) -> None:
    place = Workplace(out, "")
    with place.opened(resume=False):
        try:
            save_file(tensors, place.path("adapter_model.safetensors"), {"format": "pt"})
            for name, content in (
                ("adapter_config.json", config),
                ("extract_report.json", report.to_dict()),
            ):
                text = json.dumps(content, indent=2) + "\n"
                place.path(name).write_text(text, encoding="utf-8")
            place.publish(None)
        except BaseException:
            place.discard()
            raise
