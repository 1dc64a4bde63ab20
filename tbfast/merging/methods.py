"""The methods of merging and their options.

``select``: parameter selection (Ju et al., "Mitigating Training Imbalance in LLM Fine-Tuning via
Selective Parameter Merging", EMNLP 2024). ``task``: Ilharco et al., "Editing Models with Task
Arithmetic". ``ties``: Yadav et al., "TIES-Merging", trimmed by tensor. ``dare_*``: Yu et al.,
"Language Models are Super Mario". ``slerp``: Shoemake 1985, by tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

_DIFFERENCES = ("weights", "density", "scale")
OPTIONS = {  # that each method uses; in the order of `tb::Method` in csrc/merge.h
    "select": ("weights", "resample"),
    "linear": ("weights",),
    "task": ("weights", "scale"),
    "slerp": ("t",),
    "ties": _DIFFERENCES,
    "dare_linear": (*_DIFFERENCES, "rescale"),
    "dare_ties": (*_DIFFERENCES, "rescale"),
}
METHODS = tuple(OPTIONS)
RESCALES = ("paper", "l1", "none")
MOST_MODELS = 32

_NEED_BASE = ("task", "ties", "dare_linear", "dare_ties")
_WHOLE = ("slerp", "ties")
_SHARES = ("select", "linear")  # whose weights are made to add up to 1


@dataclass(frozen=True)
class Method:
    """How tensors are merged.

    Attributes:
        name: One of ``METHODS``.
        weights: One for each model.
        resample: ``"off"``, ``"changed"`` (redraw among the models that changed the base) or a
            number of further draws among all.
        density: Share of the differences that TIES and DARE keep.
        scale: What the merged difference to the base is multiplied by.
        t: SLERP's place between the first model, 0, and the second, 1.
        rescale: How DARE makes up for what it drops, one of ``RESCALES``.
    """

    name: str
    weights: tuple[float, ...]
    resample: str | int = "off"
    density: float = 0.5
    scale: float = 1.0
    t: float = 0.5
    rescale: str = "paper"

    @property
    def code(self) -> int:
        """As of ``tb::Method`` in csrc/merge.h."""
        return METHODS.index(self.name)

    @property
    def needs_base(self) -> bool:
        """Whether it works on differences to a base."""
        return self.name in _NEED_BASE

    @property
    def looks_at_all(self) -> bool:
        """Whether it has to see a whole tensor before it merges any of it."""
        return self.name in _WHOLE or (self.rescale == "l1" and self.name.startswith("dare"))


def make_method(
    name: str,
    models: int,
    *,
    has_base: bool,
    weights: Sequence[float] | None = None,
    resample: str | int = "auto",
    density: float = 0.5,
    scale: float = 1.0,
    t: float = 0.5,
    rescale: str = "paper",
) -> Method:
    """A method with its options checked.

    Raises:
        ValueError: Naming the option, its value and what it may be.
    """
    if name not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {name!r}")
    if not 1 <= models <= MOST_MODELS:
        raise ValueError(f"need 1 to {MOST_MODELS} models, got {models}")
    if name == "slerp" and models != 2:
        raise ValueError(f"method='slerp' merges 2 models, got {models}")
    if name in _NEED_BASE and not has_base:
        raise ValueError(f"method={name!r} needs base=, the model that the others were tuned from")
    for option, value in (("density", density), ("scale", scale), ("t", t)):
        if isinstance(value, (bool, str)) or not hasattr(value, "__float__"):
            raise ValueError(f"{option} must be a number, got {value!r}")
    if not 0 < density <= 1:
        raise ValueError(f"density must be above 0 and at most 1, got {density}")
    if not 0 <= t <= 1:
        raise ValueError(f"t must be from 0 to 1, got {t}")
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    if rescale not in RESCALES:
        raise ValueError(f"rescale must be one of {', '.join(RESCALES)}; got {rescale!r}")
    return Method(
        name,
        _weights(name, models, weights),
        _resample(name, resample, has_base),
        float(density),
        float(scale),
        float(t),
        rescale,
    )


def copying(method: Method) -> Method:
    """What takes a tensor from the first model as it is."""
    weights = (1.0,) + (0.0,) * (len(method.weights) - 1)
    return replace(method, name="select", resample="off", weights=weights)


def _weights(name: str, models: int, given: Sequence[float] | None) -> tuple[float, ...]:
    if given is None:
        return (1 / models,) * models
    weights = [float(weight) for weight in given]
    if len(weights) != models:
        raise ValueError(f"need one weight for each of the {models} models, got {len(weights)}")
    if not all(math.isfinite(w) and w >= 0 for w in weights) or sum(weights) == 0:
        raise ValueError(f"weights must be finite, not negative and not all 0; got {weights}")
    total = sum(weights) if name in _SHARES else 1.0
    return tuple(weight / total for weight in weights)


def _resample(name: str, given: Any, has_base: bool) -> str | int:
    if name != "select":
        if given not in ("auto", "off"):
            raise ValueError(f"resample={given!r} is for method='select', not for {name!r}")
        return "off"
    if given == "auto":
        return "changed" if has_base else "off"
    if given == "off":
        return "off"
    if isinstance(given, bool) or not isinstance(given, int) or not 1 <= given <= 64:
        raise ValueError(f"resample must be 'auto', 'off' or a number from 1 to 64, got {given!r}")
    if not has_base:
        raise ValueError(f"resample={given} needs base=, the model that the others were tuned from")
    return given
