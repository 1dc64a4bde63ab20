"""Which layers of a model are tuned, and which parameters share the rate of each.

The published rules (Zhou et al. 2023; Liu et al. 2024) as data: see ``presets.Selection``. Of a
PEFT model the same layers count as of the model it wraps, the first and the last for instance; then
those that are frozen fall out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

from torch import Tensor, nn

from tbfast.lora_layers import LoraWeight, find_lora, plain_name
from tbfast.matrices import Layer, Pattern, block_of, find_layers, guess_role, name_filter
from tbfast.presets import Selection


@dataclass(frozen=True)
class TunedLayer:
    """A layer whose rate is tuned.

    Attributes:
        layer: The layer.
        members: Names of the parameters that share its rate: weight, bias, tied norms. In place of
            a LoRA layer's weight, which is frozen, stand those of its adapters.
        lora: The weight of a LoRA layer, else None.
    """

    layer: Layer
    members: tuple[str, ...]
    lora: LoraWeight | None = None


def tuned_layers(
    model: nn.Module,
    selection: Selection,
    *,
    include: Pattern = None,
    exclude: Pattern = None,
) -> list[TunedLayer]:
    """The tuned layers of a model in ``named_modules()`` order; every parameter in one at most.

    A frozen layer is tuned too (it may thaw), but not in a model with LoRA adapters.

    Args:
        model: Any module.
        selection: The rules.
        include, exclude: Patterns on parameter names; what they leave out is not analysed, so
            it is neither the first nor the last layer.

    Raises:
        ValueError: If no layer is left, or a LoRA layer's weight cannot be known.
    """
    found = find_layers(model, include=include, exclude=exclude)
    lora, apart = find_lora(model, name_filter(include, exclude))
    analysed = [
        replace(layer, role=layer.role or guess_role(plain_name(layer.name)))
        for layer in found
        if layer.module not in apart
    ]
    if not selection.embeddings:
        analysed = [layer for layer in analysed if layer.role != "embedding"]
    large = [layer for layer in analysed if layer.n_eigs >= selection.min_eigs]
    kept = large if selection.skip_small_first else analysed
    kept = kept[int(selection.skip_first) :]
    if selection.skip_last and not (_ends_in_tied_head(model) and not selection.embeddings):
        kept = kept[:-1]
    tuned = [layer for layer in kept if layer.n_eigs >= selection.min_eigs]
    if apart:
        thawed = {name for name, p in model.named_parameters() if p.requires_grad}
        tuned = [layer for layer in tuned if layer.name in lora or layer.name in thawed]
    if not analysed:
        asked = f" with include={include!r}, exclude={exclude!r}" if include or exclude else ""
        some = [name for name, p in model.named_parameters() if p.ndim >= 2][:3]
        raise ValueError(
            f"no parameter of the model is analysed{asked}; its first weights with two or more "
            f"dimensions are {', '.join(some) or 'none'}"
        )
    if not tuned:
        raise ValueError(
            f"no layer of the model is left to tune: {len(analysed)} analysed, {len(large)} of "
            f"them with min_eigs={selection.min_eigs} eigenvalues or more, "
            f"skip_first={selection.skip_first}, skip_last={selection.skip_last}"
            f"{', the others frozen' if apart else ''}; "
            "lower min_eigs or pass skip_first=False, skip_last=False"
        )
    names = {layer.name for layer in tuned}
    weights = {name: lora[name].members if name in lora else (name,) for name in names}
    members = {name: list(own) for name, own in weights.items()}
    owned = {member for own in weights.values() for member in own}
    present = {name for name, _ in model.named_parameters()}
    for layer in tuned:
        if layer.bias in present and layer.bias not in owned:
            members[layer.name].append(layer.bias)
            owned.add(layer.bias)
    for norm, layer_name in _tied_norms(model, selection.tie_norms, analysed, tuned).items():
        if layer_name in names and norm not in owned:
            members[layer_name].append(norm)
            owned.add(norm)
    return [TunedLayer(layer, tuple(members[layer.name]), lora.get(layer.name)) for layer in tuned]


def _ends_in_tied_head(model: nn.Module) -> bool:
    """Whether the last module with a matrix shares it with an embedding, as in GPT-2.

    That head is the last layer by the published rule; it is not tuned here, being an embedding.
    """
    modules = list(model.modules())
    tables = {id(m.weight) for m in modules if isinstance(m, (nn.Embedding, nn.EmbeddingBag))}
    owners = [m for m in modules if isinstance(getattr(m, "weight", None), nn.Parameter)]
    matrices = [m for m in owners if cast(Tensor, m.weight).ndim >= 2]
    return (
        bool(matrices)
        and id(matrices[-1].weight) in tables
        and not isinstance(matrices[-1], nn.Embedding)
    )


def _tied_norms(
    model: nn.Module, rule: str, analysed: list[Layer], tuned: list[Layer]
) -> dict[str, str]:
    """Parameter names of norms, each with the name of the layer it follows."""
    if rule == "none":
        return {}
    by_module = {layer.module: layer.name for layer in analysed}
    tuned_modules = {layer.module: layer.name for layer in tuned}
    tied: dict[str, str] = {}
    before: str | None = None  # "order": the layer that no norm has followed yet
    last: dict[str, str] = {}  # "block": the latest tuned layer of each block
    waiting: dict[str, list[str]] = {}  # "block": norms that no layer of their block precedes
    for path, module in model.named_modules():
        if path in by_module:
            before = by_module[path]
        block = block_of(f"{path}.")
        if path in tuned_modules and block is not None:
            last[block] = tuned_modules[path]
            tied.update(dict.fromkeys(waiting.pop(block, []), last[block]))
        norm = _norm_parameters(path, module)
        if not norm:
            continue
        if rule == "name" and "BatchNorm" in type(module).__name__:
            twin = by_module.get(path.replace("bn", "conv"))
            tied.update(dict.fromkeys(norm, twin) if twin else {})
        elif rule == "order":
            tied.update(dict.fromkeys(norm, before) if before else {})
            before = None
        elif rule == "block" and block is not None:
            if block in last:
                tied.update(dict.fromkeys(norm, last[block]))
            else:
                waiting.setdefault(block, []).extend(norm)
    return tied


def _norm_parameters(path: str, module: nn.Module) -> list[str]:
    """Parameters of a normalisation layer, known by its class's name: LlamaRMSNorm is one too."""
    if "Norm" not in type(module).__name__:
        return []
    prefix = f"{path}." if path else ""
    return [f"{prefix}{name}" for name, p in module.named_parameters(recurse=False) if p.ndim == 1]
