"""Which matrices a parameter stands for, and which parameters of a model are analysed.

A parameter is seen as a stack of matrices; the eigenvalues of all of them are pooled into one
empirical spectral density. The rules, by *kind*:

========== ============================== ==================================================
kind       parameter                      matrices
========== ============================== ==================================================
linear     (out, in)                      the matrix itself; GPT-2's ``Conv1D`` (in, out) has
                                          the same eigenvalues, being its transpose
conv       (out, in / groups, *kernel)    one (out, in / groups) slice per kernel position,
                                          times sqrt(0.5) as published; transposed convolutions
                                          (in, out / groups, *kernel) likewise: a slice and its
                                          transpose have the same eigenvalues
spectral   (in, out, *modes), complex     one complex (in, out) matrix per Fourier mode
packed     (3 d, in), ``in_proj_weight``  three (d, in) matrices: query, key, value
experts    (experts, in, out)             one matrix per expert; in a module that is no
                                          convolution every real 3-D parameter, ``nn.Bilinear``
                                          included
========== ============================== ==================================================

Published for ``nn.Linear`` and ``nn.Conv2d`` only (Zhou et al., "Temperature Balancing,
Layer-wise Weight Analysis, and Neural Network Training", NeurIPS 2023); the rest is the same idea
carried over, and our choice. Depthwise convolutions follow the rule to the letter and have one
eigenvalue per kernel position.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

Kind = Literal["linear", "conv", "spectral", "packed", "experts"]
Role = Literal["embedding", "head"]
Pattern = str | Iterable[str] | Callable[[str, Tensor], bool] | None

KINDS: tuple[Kind, ...] = ("linear", "conv", "spectral", "packed", "experts")

# What a spectrum can be computed of; other floating-point types are widened first.
MEASURABLE = (
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
)

_CONV_SCALE = math.sqrt(0.5)  # published `conv_norm`; cancels in alpha, not in the norms
_EMBEDDING_NAMES = {"wte", "wpe", "embed_tokens", "embed_positions", "shared"}
_HEAD_NAMES = {"lm_head", "head", "classifier", "score", "output_projection", "embed_out"}


@dataclass(frozen=True)
class Layer:
    """A parameter that is analysed, and the parameters that share its learning rate.

    Attributes:
        name: The weight's parameter name, ``"encoder.0.linear.weight"``.
        kind: How the weight becomes matrices.
        shape: Shape of the weight.
        role: ``"embedding"``, ``"head"`` or None.
        module: Path of the module that holds the weight.
        bias: Name of the module's bias, or None.
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]
    role: Role | None = None
    module: str = ""
    bias: str | None = None

    @property
    def n_eigs(self) -> int:
        """Number of eigenvalues, zeros included."""
        return count_eigenvalues(self.shape, self.kind)


def as_matrices(weight: Tensor, kind: Kind) -> Tensor:
    """The stack of matrices that a parameter stands for; a view where one exists.

    Args:
        weight: Parameter of the shape its ``kind`` asks for (see the module's table).
        kind: One of ``KINDS``.

    Returns:
        Tensor of shape (matrices, rows, cols), the dtype and device of ``weight``. The factor
        sqrt(0.5) of convolutions is *not* applied: see :func:`eigenvalue_scale`.
    """
    weight = weight.detach()
    if kind == "linear":
        return weight.unsqueeze(0)
    if kind == "packed":
        return weight.reshape(3, -1, weight.shape[1])
    if kind == "experts":
        return weight
    return weight.flatten(2).permute(2, 0, 1)


def real_rows(stack: Tensor) -> Tensor:
    """All rows of all matrices, (rows, width), complex ones (re, im) interleaved."""
    rows = stack.reshape(-1, stack.shape[-1]).resolve_conj()
    return torch.view_as_real(rows).flatten(1) if rows.is_complex() else rows


def eigenvalue_scale(kind: Kind) -> float:
    """Factor on the eigenvalues of ``as_matrices(weight, kind)``: 0.5 for convolutions."""
    return _CONV_SCALE**2 if kind == "conv" else 1.0


def count_eigenvalues(shape: Sequence[int], kind: Kind) -> int:
    """Number of eigenvalues of a parameter of this shape, zeros included."""
    if kind == "linear":
        return min(shape)
    if kind == "packed":
        return 3 * min(shape[0] // 3, shape[1])
    if kind == "experts":
        return shape[0] * min(shape[1:])
    return math.prod(shape[2:]) * min(shape[0], shape[1])


def guess_kind(name: str, tensor: Tensor) -> Kind:
    """Kind of a parameter known by name and shape alone, as in a checkpoint.

    Two dimensions: a matrix (three stacked ones if the name ends in ``in_proj_weight``). More
    dimensions: complex tensors are spectral, a 3-D tensor with ``expert`` in its name holds one
    matrix per expert, anything else is a convolution.
    """
    if tensor.ndim == 2:
        packed = name.endswith("in_proj_weight") and tensor.shape[0] % 3 == 0
        return "packed" if packed else "linear"
    if tensor.is_complex():
        return "spectral"
    if tensor.ndim == 3 and "expert" in name:
        return "experts"
    return "conv"


def guess_role(name: str) -> Role | None:
    """``"embedding"`` or ``"head"`` where the parameter's name says so, else None."""
    parts = name.removesuffix(".weight").split(".")
    last = parts[-1]
    if last in _EMBEDDING_NAMES or "embedding" in last or last.startswith("embed_"):
        return "embedding" if last not in _HEAD_NAMES else "head"
    return "head" if last in _HEAD_NAMES or parts[0] in _HEAD_NAMES else None


def as_tensor(value: Any, label: str) -> Tensor:
    """A tensor, or the array as one, without changing or sharing what torch cannot share.

    Raises:
        TypeError: If it is neither, or an array of a dtype that torch does not know.
    """
    if isinstance(value, Tensor):
        return value
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{label} must be a tensor or an array, got {type(value).__name__}")
    array = np.ascontiguousarray(value, dtype=value.dtype.newbyteorder("="))
    array = array if array.flags.writeable else array.copy()
    try:
        return torch.from_numpy(array)
    except TypeError as error:
        raise TypeError(
            f"{label} has the dtype {value.dtype}, which torch does not know"
        ) from error


def is_analysable(tensor: Tensor) -> bool:
    """Whether a tensor is a weight: floating point or complex, two or more dimensions."""
    return tensor.ndim >= 2 and (tensor.is_floating_point() or tensor.is_complex())


def name_filter(include: Pattern, exclude: Pattern) -> Callable[[str, Tensor], bool]:
    """A test ``(name, tensor) -> bool`` from ``include`` and ``exclude`` patterns.

    Args:
        include: Glob, list of globs, or callable; None admits every name.
        exclude: The same; None excludes none. Excluding wins.
    """
    admitted = _matcher(include, when_none=True)
    refused = _matcher(exclude, when_none=False)
    return lambda name, tensor: admitted(name, tensor) and not refused(name, tensor)


def _matcher(pattern: Pattern, *, when_none: bool) -> Callable[[str, Tensor], bool]:
    if pattern is None:
        return lambda name, tensor: when_none
    if callable(pattern):
        return pattern
    globs = [pattern] if isinstance(pattern, str) else list(pattern)
    if bad := [g for g in globs if not isinstance(g, str)]:
        raise TypeError(f"include and exclude take globs (str) or a callable, got {bad[0]!r}")
    return lambda name, tensor: any(fnmatchcase(name, glob) for glob in globs)


def find_layers(
    model: nn.Module, *, include: Pattern = None, exclude: Pattern = None
) -> list[Layer]:
    """Layers of a model in ``named_modules()`` order, each parameter once.

    Every floating-point or complex parameter with two or more dimensions is a layer, embeddings
    and heads included (their ``role`` says so). A parameter shared by two modules is one layer,
    under the name ``named_parameters()`` gives it.

    Args:
        model: Any module, on any device.
        include, exclude: See :func:`name_filter`; matched against parameter names.

    Raises:
        TypeError: If ``model`` is not a module, or a parameter has not been initialised.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    wanted = name_filter(include, exclude)
    layers: list[Layer] = []
    seen: set[int] = set()
    for path, module in model.named_modules():
        for short, parameter in module.named_parameters(recurse=False):
            name = f"{path}.{short}" if path else short
            if isinstance(parameter, nn.parameter.UninitializedParameter):
                raise TypeError(f"{name} is not initialised; run one forward pass first")
            if id(parameter) in seen or not is_analysable(parameter):
                continue
            seen.add(id(parameter))
            if parameter.numel() and wanted(name, parameter):
                layers.append(_layer(path, module, short, name, parameter))
    return layers


def _layer(path: str, module: nn.Module, short: str, name: str, parameter: Tensor) -> Layer:
    kind = guess_kind(name, parameter)
    # Here, unlike in a checkpoint, the module tells: nn.Bilinear and batched matrices of one's own.
    if kind == "conv" and parameter.ndim == 3 and not isinstance(module, _ConvNd):
        kind = "experts"
    role: Role | None = guess_role(name)
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        role = "embedding"
    bias_name = {"weight": "bias", "in_proj_weight": "in_proj_bias"}.get(short)
    bias = getattr(module, bias_name, None) if bias_name else None
    prefix = f"{path}." if path else ""
    return Layer(
        name=name,
        kind=kind,
        shape=tuple(parameter.shape),
        role=role,
        module=path,
        bias=f"{prefix}{bias_name}" if isinstance(bias, nn.Parameter) else None,
    )


def block_of(name: str) -> str | None:
    """Block of a parameter: its name up to the first index, ``"encoder.layer.3"``; None if none."""
    match = re.match(r"(.*?\.)?(\d+)\.", name)
    return name[: match.end() - 1] if match else None


def type_of(name: str) -> str:
    """Type of a layer: its name with the indices removed, ``"encoder.layer.*.query.weight"``."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))
