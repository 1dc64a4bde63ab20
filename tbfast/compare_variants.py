"""The variants of an experiment, and what puts one on an optimizer."""

from __future__ import annotations

import glob
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from tbfast.balancer import Balancer
from tbfast.instep import attach
from tbfast.matrices import type_of
from tbfast.presets import Selection, resolve, select_options

# Options of `attach`; None leaves the optimizer as it is.
VariantOptions = dict[str, Any] | None

FIXED_FROM = "fixed_from"  # not an option of `attach`: ratios are those another variant found

NAMES = ("plain", "published", "every-step", "shape-corrected", "reverse", "fixed")


def named_variants(every: int) -> dict[str, VariantOptions]:
    """The variants that have a name; ``every`` is the steps between refreshes of the published."""
    return {
        "plain": None,
        "published": {"every": every, "budget": None, "method": "exact", "rate_classes": None},
        "every-step": {},
        "shape-corrected": {"shape_correction": "null"},
        "reverse": {"mapping": "reverse"},
        "fixed": {FIXED_FROM: "every-step"},
    }


def choose_variants(
    variants: Sequence[str] | Mapping[str, Mapping[str, Any] | None] | None,
    *,
    every: int,
    common: Mapping[str, Any],
) -> dict[str, VariantOptions]:
    """Options of each variant by name; a variant comes after the one that fixes its ratios.

    Args:
        variants: None for all that have a name, a list of names, or options by name.
        every: See ``named_variants``.
        common: Options of every variant but those without factors; a variant's own win.

    Raises:
        ValueError: If there is no variant without factors, a name or option is unknown or out of
            range, or ``fixed_from`` names no variant of its own factors.
        TypeError: On an option that does not exist.
    """
    known = named_variants(every)
    if isinstance(variants, str):
        raise TypeError(f"variants must be a list of names or a dict, got {variants!r}")
    if isinstance(variants, Mapping):
        chosen = {name: None if o is None else dict(o) for name, o in variants.items()}
    else:
        names = list(NAMES if variants is None else variants)
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"no variant {unknown[0]!r}; known are {', '.join(NAMES)}")
        chosen = {name: known[name] for name in names}
    if baseline_of(chosen) is None:
        raise ValueError(
            "variants need one without factors to compare with; add 'plain' (in a dict: "
            f"'plain': None) to {', '.join(chosen) or 'them'}"
        )
    chosen = {
        name: None if options is None else {**common, **options} for name, options in chosen.items()
    }
    for name, options in chosen.items():
        if options is not None:
            _check(name, options, chosen)
    return dict(sorted(chosen.items(), key=lambda item: FIXED_FROM in (item[1] or {})))


def baseline_of(variants: Mapping[str, VariantOptions]) -> str | None:
    """The first variant without factors."""
    return next((name for name, options in variants.items() if options is None), None)


def is_fixed(options: VariantOptions) -> bool:
    """Whether a variant's ratios are constants that look at no spectrum."""
    return options is not None and (FIXED_FROM in options or options.get("mapping") == "fixed")


def is_control(options: VariantOptions) -> bool:
    """Whether a variant only checks the others: fixed ratios, or the map reversed."""
    return is_fixed(options) or (options is not None and options.get("mapping") == "reverse")


def _check(name: str, options: dict[str, Any], variants: Mapping[str, VariantOptions]) -> None:
    """Refuse now what ``attach`` would refuse after hours of the variants before it."""
    own = dict(options)
    if (source := own.pop(FIXED_FROM, None)) is not None:
        own |= {"mapping": "fixed", "factors": {"*": 1.0}}
        if source not in variants or variants[source] is None or is_fixed(variants[source]):
            raise ValueError(
                f"variant {name!r} takes its ratios from {source!r}, which must be another "
                f"variant, with factors that it finds itself; variants: {', '.join(variants)}"
            )
    preset = own.pop("preset", "tempbalance")
    of_attach = set(inspect.signature(attach).parameters)
    tunable = {f.name for f in fields(Selection)}
    try:
        select_options(preset, {key: value for key, value in own.items() if key in tunable})
        resolve(preset, {key: value for key, value in own.items() if key not in of_attach})
    except (TypeError, ValueError) as error:
        raise type(error)(f"variant {name!r}: {error}") from error


class MakeOptimizer:
    """Builds the optimizer of one run; ``train`` gets it as its first argument.

    ``make_optimizer(model, torch.optim.AdamW, lr=rate)`` returns the optimizer of all parameters
    of the model, with the variant's factors attached. For groups of one's own, build the optimizer
    and call ``make_optimizer.attach(optimizer, model)``. More than one optimizer in a run is fine.

    Attributes:
        variant: Name of the variant.
        optimizers: The optimizers of this run.
        balancers: Their :class:`tbfast.Balancer`, none for a variant without factors.
    """

    def __init__(
        self,
        variant: str,
        options: VariantOptions,
        ratios: Sequence[Mapping[str, float]] = (),
    ) -> None:
        """Args: ``ratios``: for ``fixed_from``, factors by layer type, for each optimizer."""
        self.variant = variant
        self.optimizers: list[Optimizer] = []
        self.balancers: list[Balancer] = []
        self._options = options
        self._ratios = ratios

    def __call__(
        self, model: nn.Module, optimizer_class: Callable[..., Optimizer], **kwargs: Any
    ) -> Optimizer:
        """``optimizer_class(model.parameters(), **kwargs)`` with the variant's factors."""
        return self.attach(optimizer_class(model.parameters(), **kwargs), model)

    def attach(self, optimizer: Optimizer, model: nn.Module) -> Optimizer:
        """The same optimizer, with the variant's factors on the weights of ``model``."""
        if self._options is not None:
            options = dict(self._options)
            if options.pop(FIXED_FROM, None) is not None:
                options |= {"mapping": "fixed", "factors": self._factors(model)}
            self.balancers.append(attach(optimizer, model, **options))
        self.optimizers.append(optimizer)
        return optimizer

    def diverged(self) -> bool:
        """Whether a parameter of an optimizer is not finite."""
        return any(
            not bool(parameter.isfinite().all())
            for optimizer in self.optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        )

    def finish(self) -> list[dict[str, float]]:
        """Take the factors off; returns the mean factor of each layer type, per optimizer.

        Raises:
            RuntimeError: If the run built no optimizer here, or never stepped one.
        """
        if not self.optimizers:
            raise RuntimeError(
                "it built no optimizer with make_optimizer, so all variants would be the same; "
                "use make_optimizer(model, torch.optim.AdamW, lr=rate)"
            )
        if any(balancer.steps == 0 for balancer in self.balancers):
            raise RuntimeError(
                "it took no step with the optimizer that make_optimizer returned, so all variants "
                "would be the same; step that one, not a copy"
            )
        found = []
        for balancer in self.balancers:
            balancer.freeze(by="type")
            for _ in range(balancer.options.ramp):  # a new factor is reached after so many steps
                balancer.advance()
            found.append({type_of(name): factor for name, factor in balancer.factors.items()})
        self.release()
        return found

    def release(self) -> None:
        """Take the factors off and let the models go."""
        for balancer in self.balancers:
            balancer.detach()
        self.balancers.clear()
        self.optimizers.clear()

    def _factors(self, model: nn.Module) -> dict[str, float]:
        """Factors by name, for the weights whose type has a ratio."""
        index = len(self.balancers)
        if index >= len(self._ratios):
            raise RuntimeError(
                f"optimizer {index + 1} of the run has no ratios: the run that fixes them built "
                f"{len(self._ratios)}; build the same optimizers for every variant"
            )
        ratios = self._ratios[index]
        return {
            glob.escape(name): ratios[type_of(name)]
            for name, _ in model.named_parameters()
            if type_of(name) in ratios
        }


def seed_everything(seed: int) -> None:
    """Seed the global generators, for a ``train`` that draws from them without saying so."""
    import random

    import numpy as np

    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - the global generator is what is meant
    torch.manual_seed(seed)
