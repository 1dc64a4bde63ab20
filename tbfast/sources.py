"""Where weights come from: a model, a mapping or a checkpoint, seen the same way."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tbfast.checkpoint import Checkpoint, CheckpointError, open_checkpoint
from tbfast.matrices import (
    MEASURABLE,
    Layer,
    Pattern,
    as_tensor,
    find_layers,
    guess_kind,
    guess_role,
    is_analysable,
    name_filter,
)

Source = nn.Module | Mapping[str, Any] | str | os.PathLike[str]


def find_weights(
    source: Source, include: Pattern, exclude: Pattern
) -> tuple[list[Layer], Callable[[str], Tensor], str]:
    """The weights of a source, without holding them.

    Returns:
        The layers in model order, a function that reads the weight of one by name (dense, of a
        dtype that can be measured), and a label of the source.

    Raises:
        CheckpointError: If the checkpoint cannot be read or holds no weight.
        ValueError: If a model or mapping holds no weight, or the patterns leave none.
        TypeError: On another source, or a mapping of other things than tensors and arrays.
    """
    wanted = name_filter(include, exclude)
    tensors, label = _tensors_of(source)

    def fetch(name: str) -> Tensor:
        return as_tensor(tensors[name], name)

    if isinstance(source, nn.Module):
        found = [layer for layer in find_layers(source) if _is_measurable(fetch(layer.name))]
    else:
        found = [
            Layer(name, guess_kind(name, tensor), tuple(tensor.shape), guess_role(name))
            for name in tensors
            if _is_measurable(tensor := fetch(name))
        ]
    if isinstance(tensors, Checkpoint) and not tensors.keeps_order:
        found.sort(key=lambda layer: ("embedding", None, "head").index(layer.role))
    if not found:
        dtypes = Counter(str(fetch(name).dtype).removeprefix("torch.") for name in tensors)
        held = ", ".join(f"{count} of {dtype}" for dtype, count in dtypes.items()) or "none"
        fault = f"holds no floating-point weight of two or more dimensions (tensors: {held})"
        if isinstance(tensors, Checkpoint):
            raise CheckpointError.of(label, f"{fault}; pass the weights of a model")
        raise ValueError(f"{label} {fault}")
    layers = [layer for layer in found if wanted(layer.name, fetch(layer.name))]
    if not layers:
        raise ValueError(
            f"include={include!r}, exclude={exclude!r} leave none of the {len(found)} weights of "
            f"{label}; names look like {found[0].name!r}"
        )
    return layers, lambda name: _measurable(fetch(name), name), label


def _tensors_of(source: Source) -> tuple[Mapping[str, Any], str]:
    if isinstance(source, nn.Module):
        return dict(source.named_parameters()), type(source).__name__
    if isinstance(source, Mapping):
        return source, "mapping"
    if isinstance(source, (str, os.PathLike)):
        return open_checkpoint(source), os.fspath(source)
    raise TypeError(f"source must be a module, a mapping or a path, got {type(source).__name__}")


def _is_measurable(tensor: Tensor) -> bool:
    # Two 4-bit numbers to the byte: stored as a float dtype, but not the matrix itself.
    packed = "float4" in str(tensor.dtype)
    return is_analysable(tensor) and tensor.numel() > 0 and not packed


def _measurable(weight: Tensor, name: str) -> Tensor:
    """The weight as a dense tensor of a dtype that can be measured."""
    if weight.is_meta:
        raise ValueError(f"{name} is on the meta device and has no values; load the weights first")
    if weight.layout != torch.strided:
        weight = weight.detach().to_dense()
    if weight.dtype in MEASURABLE:
        return weight
    return weight.detach().to(torch.complex64 if weight.is_complex() else torch.float32)
