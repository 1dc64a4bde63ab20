"""Learning-rate factors from tail exponents.

A factor multiplies the learning rate that the user's own schedule gives a layer. The larger a
layer's alpha (the lighter its tail), the larger its factor.

References: Zhou et al., "Temperature Balancing, Layer-wise Weight Analysis, and Neural Network
Training", NeurIPS 2023 (linear, sqrt, log2, step); Liu et al., "Model Balancing Helps Low-data
Training and Fine-tuning", EMNLP 2024 (sigmoid). ``"reverse"`` and ``"fixed"`` are controls for
honest comparisons: the linear map with its ends swapped, and ratios that ignore alpha.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

import torch
from torch import Tensor

MappingName = Literal["linear", "sqrt", "log2", "step", "sigmoid", "reverse", "fixed"]
MAPPINGS: tuple[MappingName, ...] = get_args(MappingName)

# Share of the way to the next class at which a factor changes over.
_HYSTERESIS = 0.75
_EXP_TEMP = 10.0  # published slope of the sigmoid


def lr_factors(
    alpha: Any,
    mapping: MappingName = "linear",
    *,
    low: float = 0.5,
    high: float = 1.5,
    **options: Any,
) -> Tensor:
    """Learning-rate factors of all layers, finite and above 0.

    With d = alpha - mean(alpha), n layers and rank 0 for the smallest alpha:

    - ``"linear"``: from ``low`` at the smallest alpha to ``high`` at the largest
    - ``"step"``: low + (high - low) * rank / n
    - ``"sigmoid"``: 10 ** (s * (sigmoid(exp_temp * d) - 1/2)), s = 2 log10(high) above the mean
      and -2 log10(low) below it
    - ``"sqrt"``, ``"log2"``: n * f(alpha) / sum f(alpha); they ignore the range
    - ``"reverse"``: linear with ``low`` and ``high`` swapped
    - ``"fixed"``: constants by name

    Two differences from the published code: equal alphas (and a single layer) get the middle of
    the range, (low + high) / 2, or 1 where the map has a neutral point of its own (sigmoid, sqrt,
    log2), not ``high``; a layer whose alpha is not finite gets 1 and the others do not see it.

    Args:
        alpha: Tail exponents, shape (layers,): tensor, array or list. Not changed. ``"fixed"``
            does not look at it; it may then be None.
        mapping: One of ``MAPPINGS``.
        low: Lower end of the range, above 0.
        high: Upper end; ``"step"`` stops one rank short, ``"sigmoid"`` never arrives.
        **options: ``clip=q``: finite alphas are first limited to their quantiles q and 1 - q
            (0: not at all). ``exp_temp=10``: slope of the sigmoid. For ``"fixed"``:
            ``names=[...]`` of the layers and ``factors={glob: ratio}``; the first glob that
            matches wins, a layer that none matches gets 1.

    Returns:
        Factors, shape (layers,); dtype and device of ``alpha`` if that is a floating-point
        tensor, else float64 on the CPU. Waits for the device.

    Raises:
        ValueError: On a wrong shape, an empty range, an unknown mapping, or an alpha outside
            the mapping's domain (log2: above 1, sqrt: above 0).
        TypeError: On an option that the mapping does not have.
    """
    check_mapping(mapping, low, high, options)
    if mapping == "fixed":
        if alpha is not None and len(alpha) != len(options["names"]):
            raise ValueError(f"got {len(alpha)} alphas but {len(options['names'])} names")
        ratios = fixed_factors(options["names"], options["factors"])
        result = torch.tensor(ratios, dtype=torch.float64)
        like = alpha if isinstance(alpha, Tensor) else None
    else:
        like = alpha if isinstance(alpha, Tensor) else None
        values = torch.as_tensor(alpha, dtype=torch.float64, device="cpu").detach()
        if values.ndim != 1 or values.numel() == 0:
            raise ValueError(f"alpha must have shape (layers,), got {tuple(values.shape)}")
        finite = values.isfinite()
        result = torch.ones_like(values)
        if finite.any():
            result[finite] = _map(values[finite], mapping, low, high, options)
    if like is not None and like.is_floating_point():
        result = result.to(like.device, like.dtype)
    return result


def check_mapping(mapping: str, low: float, high: float, options: Mapping[str, Any]) -> None:
    """Refuse an unknown mapping, a range it cannot have, and options it does not know."""
    if mapping not in MAPPINGS:
        raise ValueError(f"mapping must be one of {', '.join(MAPPINGS)}; got {mapping!r}")
    if not 0 < low <= high < math.inf:
        raise ValueError(f"need 0 < low <= high, got low={low!r}, high={high!r}")
    if mapping == "sigmoid" and not low <= 1 <= high:
        raise ValueError(f"mapping='sigmoid' needs low <= 1 <= high, got low={low}, high={high}")
    known = {"sigmoid": {"clip", "exp_temp"}, "fixed": {"factors", "names"}}.get(mapping, {"clip"})
    if unknown := sorted(set(options) - known):
        names = ", ".join(sorted(known))
        raise TypeError(f"mapping={mapping!r} has no option {unknown[0]!r}; known are {names}")
    if missing := sorted({"factors", "names"} - set(options)) if mapping == "fixed" else []:
        raise ValueError(f"mapping='fixed' needs the option {missing[0]!r}")
    if not 0 <= options.get("clip", 0.0) < 0.5:
        raise ValueError(f"clip must be a quantile in [0, 0.5), got {options['clip']!r}")
    if not 0 < options.get("exp_temp", _EXP_TEMP) < math.inf:
        raise ValueError(f"exp_temp must be above 0, got {options['exp_temp']!r}")


def fixed_factors(names: Sequence[str], factors: Mapping[str, float]) -> list[float]:
    """Ratio of each name: that of the first glob of ``factors`` that matches it, else 1."""
    for glob, ratio in factors.items():
        if not 0 < ratio < math.inf:
            raise ValueError(f"factors[{glob!r}] must be finite and above 0, got {ratio!r}")
    if names and factors and not any(fnmatchcase(name, glob) for name in names for glob in factors):
        raise ValueError(
            f"factors match no layer: globs {', '.join(factors)}; layers {', '.join(names[:3])}"
        )
    return [
        next((float(ratio) for glob, ratio in factors.items() if fnmatchcase(name, glob)), 1.0)
        for name in names
    ]


def quantise(
    factors: Tensor,
    classes: int,
    mapping: str,
    low: float,
    high: float,
    before: Tensor | None = None,
) -> Tensor:
    """The nearest of ``classes`` values to each factor.

    The values divide [low, high] evenly, or by a constant ratio for ``"sigmoid"``, whose range is
    one of ratios; for ``"sqrt"`` and ``"log2"`` they divide the range that the factors span.

    Args:
        factors: Shape (layers,), above 0.
        classes, mapping, low, high: As for ``lr_factors`` and ``TempBalance``.
        before: What each was rounded to last time. It stays there until it is three quarters of the
            way to the next value, so that noise does not toggle it.
    """
    if mapping in ("sqrt", "log2"):
        low, high = float(factors.min()), float(factors.max())
    if mapping == "sigmoid":
        steps = torch.logspace(
            math.log10(low), math.log10(high), classes, dtype=torch.float64
        ).clamp(low, high)
    else:
        steps = torch.linspace(low, high, classes, dtype=torch.float64)
    nearest = (factors.log()[:, None] - steps.log()).abs().argmin(1)
    if before is not None:
        last = (before[:, None] - steps).abs().argmin(1)
        onward = (last + (factors - before).sign().long()).clamp(0, classes - 1)
        way = (factors.log() - steps[last].log()) / (steps[onward].log() - steps[last].log())
        stays = (before == steps[last]) & ~(way > _HYSTERESIS)
        nearest = torch.where(stays, last, nearest)
    return steps[nearest]


def _map(
    alpha: Tensor, mapping: str, low: float, high: float, options: Mapping[str, Any]
) -> Tensor:
    floor = {"sqrt": 0.0, "log2": 1.0}.get(mapping, -math.inf)
    if float(alpha.min()) <= floor:
        raise ValueError(
            f"mapping={mapping!r} needs every alpha above {floor:g}, got {float(alpha.min()):.6g}"
        )
    if clip := options.get("clip", 0.0):
        alpha = alpha.clamp(alpha.quantile(clip), alpha.quantile(1 - clip))
    shares = mapping in ("sigmoid", "sqrt", "log2")
    if bool((alpha == alpha[0]).all()):
        # Equal alphas say nothing about balance. The published code then gives every layer
        # `high` (an artefact of np.interp).
        return torch.full_like(alpha, 1.0 if shares else (low + high) / 2)
    if mapping == "sqrt":
        return alpha.sqrt() / alpha.sqrt().mean()
    if mapping == "log2":
        return alpha.log2() / alpha.log2().mean()
    if mapping == "sigmoid":
        gap = alpha - alpha.mean()
        up, down = alpha.new_tensor(2 * math.log10(high)), alpha.new_tensor(-2 * math.log10(low))
        reach = torch.where(gap > 0, up, down)
        slope = options.get("exp_temp", _EXP_TEMP)
        return (10 ** (reach * (torch.sigmoid(slope * gap) - 0.5))).clamp(low, high)
    if mapping == "step":
        share = alpha.argsort(stable=True).argsort().to(alpha.dtype) / alpha.numel()
    else:
        share = (alpha - alpha.min()) / (alpha.max() - alpha.min())
    if mapping == "reverse":
        share = 1 - share
    # The clamp is for the last bit: low + (high - low) may round past high.
    return (low + (high - low) * share).clamp(low, high)
