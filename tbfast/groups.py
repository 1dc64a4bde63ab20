"""Parameter groups for ``TempBalance``: one for each tuned layer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.nn import Parameter

from tbfast.lora_layers import remember
from tbfast.matrices import Pattern, name_filter
from tbfast.presets import TieNorms, select_options
from tbfast.selection import tuned_layers
from tbfast.watch import settle


def param_groups(
    model: nn.Module,
    *,
    preset: str = "tempbalance",
    include: Pattern = None,
    exclude: Pattern = None,
    skip_first: bool | None = None,
    skip_last: bool | None = None,
    tie_norms: TieNorms | None = None,
    min_eigs: int | None = None,
    weight_decay: float | None = None,
    no_decay: str | Iterable[str] = (),
) -> list[dict[str, Any]]:
    """Parameter groups for any torch optimizer, one for each tuned layer.

    The first group, ``"untuned"``, holds every parameter that is not tuned; it is left out if
    there is none. Then one group per layer: ``name`` (its weight's parameter name), ``kind`` and
    ``role`` (what :class:`TempBalance` needs to measure it), ``params`` (the weight first, then
    bias and tied norm). Parameters with ``requires_grad=False`` are in no group. The group of a
    PEFT LoRA layer holds A and B, under the name of their frozen weight, and says ``lora=True``:
    what is measured is W + s·B·A, which :class:`TempBalance` takes from the model.

    Args:
        model: Any module.
        preset: ``"tempbalance"``: the first and the last analysed layer (``named_modules()``
            order, embeddings not counted) are left out, then layers with fewer than 50
            eigenvalues. ``"model-balancing"``: layers with fewer than 50, then the last of the
            rest. ``"llr"``: all layers with two eigenvalues or more, embeddings too.
        include, exclude: Patterns on parameter names; see :func:`tbfast.matrices.name_filter`.
        skip_first, skip_last, min_eigs: None takes the preset's value.
        tie_norms: Norms that join a layer. ``"name"``: a BatchNorm joins the layer named like it
            with ``conv`` for ``bn``. ``"order"``: a norm joins the layer before it, unless
            another norm lies between. ``"block"``: a norm joins the nearest tuned layer before it
            in its block, else the one after. ``"none"``. None takes the preset's value.
        weight_decay: Set in every group; None leaves it to the optimizer.
        no_decay: Globs of parameter names that get ``weight_decay=0``, in a group of their own:
            ``"<layer>/no_decay"``, with the key ``layer`` so that it shares the layer's factor.

    Raises:
        ValueError: If no layer is left to tune, or an option is out of range.
    """
    given = {
        "skip_first": skip_first,
        "skip_last": skip_last,
        "tie_norms": tie_norms,
        "min_eigs": min_eigs,
    }
    tuned = tuned_layers(model, select_options(preset, given), include=include, exclude=exclude)
    settle(model)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    tuned = [entry for entry in tuned if entry.members[0] in parameters]
    free = name_filter(no_decay, None)
    decays = {name: not free(name, p) for name, p in parameters.items()}

    def split(key: str, names: Iterable[str], extra: dict[str, Any]) -> list[dict[str, Any]]:
        """One group, or two where some of ``names`` decay and some do not."""
        halves: dict[bool, list[Parameter]] = {}
        for name in names:
            if name in parameters:
                halves.setdefault(decays[name], []).append(parameters[name])
        groups: list[dict[str, Any]] = []
        for decay, params in halves.items():
            own = {"name": key, **extra}
            if groups:
                own = {"name": f"{key}/{'decay' if decay else 'no_decay'}", "layer": key}
            if not decay or weight_decay is not None:
                own["weight_decay"] = weight_decay if decay else 0.0
            groups.append({"params": params, **own})
        return groups

    owned = {name for entry in tuned for name in entry.members}
    groups = split("untuned", [name for name in parameters if name not in owned], {})
    for entry in tuned:
        extra: dict[str, Any] = {"kind": entry.layer.kind}
        if entry.layer.role is not None:
            extra["role"] = entry.layer.role
        if entry.lora is not None:
            extra["lora"] = True
            for name in parameters.keys() & set(entry.lora.members):
                remember(parameters[name], entry.lora)
        groups += split(entry.layer.name, entry.members, extra)
    return groups
