"""Factors as a scheduler: named parameter groups whose rate is base rate times factor."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from os import PathLike
from typing import Any, Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from tbfast.balancer import Balancer
from tbfast.base_rates import BaseRates, rates_of, unshare_rates
from tbfast.fitting import FitKind
from tbfast.lora_layers import lora_of_group
from tbfast.matrices import Layer
from tbfast.optim import StepHooks, check_free, check_scaled, claim, release, seen_tensor, unwrapped
from tbfast.presets import GroupBy, Of, OfWhat
from tbfast.rates import MappingName
from tbfast.regroup import Regrouping
from tbfast.spectra import Method
from tbfast.watch import Watch


class TempBalance(LRScheduler):
    """Learning-rate scheduler that gives each layer the base rate times a factor of its alpha.

    Built on the groups of :func:`tbfast.param_groups`; the factors apply from construction on.
    ``step`` steps ``base`` on the rates without factors and puts the factors back on, so nothing
    compounds. It may be called as often as the base schedule wants (each batch, each epoch):
    spectra are measured only when the optimizer has taken ``every`` steps since the last time,
    which a hook on the optimizer counts, without the steps that a GradScaler skipped. While the
    optimizer steps, groups with equal hyperparameters are one, so that many layers do not slow it
    down; but not groups whose rate is a tensor, which compiled and captured steps hold on to.

    Args:
        optimizer: Any torch optimizer with groups from :func:`tbfast.param_groups`.
        base: Any torch scheduler on the same optimizer. None: the rates stay what the user sets;
            a rate that somebody else writes into a group becomes that group's base rate.
        preset: ``"tempbalance"``, ``"model-balancing"`` or ``"llr"``; None below takes its value.
        mapping, low, high: See :func:`tbfast.lr_factors`.
        every: Optimizer steps between refreshes.
        budget: Share of the wall time that measuring may take. After each ``every`` steps the
            layers are looked at, and those measured that promise most; the first 20 steps get
            50 ms more. What is measured depends on how long steps take, so such a run is not
            reproducible bit for bit. None: everything is measured, at whatever cost.
        fit, xmin_pos: The fit; see :func:`tbfast.fit_alpha`.
        method: ``"exact"``, ``"sketch"`` or ``"auto"``; see :func:`tbfast.analyze`. A sketch draws
            new probes at each step.
        of: Whose spectrum: the ``"weight"``, its ``"grad"``, or the optimizer's ``"momentum"``
            (``exp_avg`` or ``momentum_buffer``). A layer without one yet has the factor 1.
        of_what: What factors multiply: ``"lr"`` or the group's ``"weight_decay"`` (a light tail
            gets the stronger decay: AlphaDecay, arXiv 2506.14562, whose range is low=0.667,
            high=3). A group without decay stays without.
        shape_correction: ``"null"``: alpha minus that of Gaussian noise of the same shape, plus
            that of square noise. ``"farms"``: alpha of square sub-matrices.
        group_by: One factor from the mean alpha of each ``"block"`` (layers outside any: 1) or
            ``"type"``; ``"layer"`` for one each.
        ema: Weight of the old alpha at a refresh, in [0, 1).
        ramp: Optimizer steps over which a new factor is reached linearly.
        rate_classes: Round factors to so many values over the range; ``"auto"``: to 16 where there
            are more layers than that; None: not at all.
        seed: Of a sketch; exact spectra do not use it.
        backend: ``"auto"``, ``"native"`` or ``"reference"``.
        **options: ``start``: optimizer steps before the map acts (0, as published), or ``"auto"``:
            a layer's factor stays 1 until its alpha leaves the band of Gaussian noise of its
            shape. ``warm_start=0``: steps over which the first measurement is spread, with factors
            of 1 until it is complete. ``history=1000``: refreshes kept. ``smooth``, ``k``,
            ``bins``, ``peak_compat``, ``filter_zeros``: of the fit. ``probes=8``, ``steps=20``: of
            a sketch. ``clip``, ``exp_temp``, ``factors``: of the mapping.

    Raises:
        ValueError: If no group comes from ``param_groups``, ``base`` is of another optimizer, or
            an option is out of range.
        TypeError: If ``base`` is not a scheduler, or an option does not exist.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        base: LRScheduler | None = None,
        *,
        preset: str = "tempbalance",
        mapping: MappingName | None = None,
        low: float | None = None,
        high: float | None = None,
        every: int = 1,
        budget: float | None = 0.01,
        fit: FitKind | None = None,
        xmin_pos: float | None = None,
        method: Method = "auto",
        of: Of = "weight",
        of_what: OfWhat = "lr",
        shape_correction: Literal["null", "farms"] | None = None,
        group_by: GroupBy | None = None,
        ema: float | None = None,
        ramp: int = 0,
        rate_classes: int | Literal["auto"] | None = "auto",
        seed: int = 0,
        backend: str = "auto",
        **options: Any,
    ) -> None:
        optimizer = unwrapped(optimizer)
        check_free(optimizer)
        _check_base(optimizer, base)
        self.optimizer = optimizer
        self.base = base
        self.balancer = Balancer(
            _tuned_groups(optimizer).values(),
            preset=preset,
            mapping=mapping,
            low=low,
            high=high,
            every=every,
            budget=budget,
            fit=fit,
            xmin_pos=xmin_pos,
            method=method,
            of=of,
            of_what=of_what,
            shape_correction=shape_correction,
            group_by=group_by,
            ema=ema,
            ramp=ramp,
            rate_classes=rate_classes,
            seed=seed,
            backend=backend,
            **options,
        )
        self.last_epoch = 0
        self._step_count = 1  # torch counts the initial step
        self._what = self.balancer.options.of_what
        check_scaled(optimizer, self._what)
        unshare_rates(optimizer)
        self.base_lrs = rates_of(optimizer)
        self._rates = BaseRates(optimizer, self._what)
        self._rates.take()
        self._hooks: StepHooks | None = None
        self._watch = Watch(layer.name for layer in self.balancer.layers)
        self._measure()
        self._write()
        self._install()

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Step the base scheduler with these arguments, measure if due, set all rates.

        Raises:
            RuntimeError: If no layer had finite weights in 3 refreshes in a row; the rates
                are then those of the last step.
        """
        if self._hooks is None:
            self._install()
        if self.balancer.due:
            self._measure()
        if self.base is None or self._what != "lr":  # what no schedule sets, the user does
            self._rates.take_foreign()
        if self.base is not None:
            self._rates.put_back()
            self.base.step(*args, **kwargs)
            self._rates.take()
        self.last_epoch += 1
        self._step_count += 1
        self._write()

    def detach(self) -> None:
        """Give every group its base rate, and the optimizer back to others."""
        if self._hooks is not None:
            self._hooks.remove()
        self._rates.put_back()
        release(self.optimizer)

    def state_dict(self) -> dict[str, Any]:
        """State of the base scheduler, the balancer and the rates; plain numbers and containers."""
        return {
            "base": None if self.base is None else self.base.state_dict(),
            "balancer": self.balancer.state_dict(),
            self._base_key: self._rates.state_dict(),
            "last_epoch": self.last_epoch,
            "step_count": self._step_count,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over a state and set the optimizer's rates by it.

        Before or after ``optimizer.load_state_dict``: both give the same rates.
        """
        if missing := {"base", "balancer", self._base_key} - set(state_dict):
            raise ValueError(
                f"this is not a state of TempBalance: it has no {min(missing)!r}; pass what "
                "TempBalance.state_dict() returned"
            )
        if (state_dict["base"] is None) != (self.base is None):
            raise ValueError(
                "the state was saved "
                f"{'without' if self.base is not None else 'with'} a base scheduler; build "
                "TempBalance as for the run that was saved"
            )
        if self.base is not None:
            self.base.load_state_dict(state_dict["base"])
        self.balancer.load_state_dict(state_dict["balancer"])
        self._rates.load_state_dict(state_dict[self._base_key])
        self.last_epoch = state_dict["last_epoch"]
        self._step_count = state_dict["step_count"]
        self._write()

    @property
    def _base_key(self) -> str:
        return f"base_{self._what}"

    def _measure(self) -> None:
        of = self.balancer.options.of
        tuned = [g for g in self.optimizer.param_groups if "kind" in g and g["params"]]
        self._watch.look({group["name"]: group["params"] for group in tuned})
        seen = {
            group["name"]: lora.seen(of)
            if (lora := lora_of_group(group))
            else seen_tensor(self.optimizer, group["params"][0], of)
            for group in tuned
        }
        self.balancer.update({name: tensor for name, tensor in seen.items() if tensor is not None})

    def _write(self) -> None:
        self._rates.write(self.balancer.factors)
        self._last_lr = rates_of(self.optimizer)

    def _install(self) -> None:
        self._groups = Regrouping(self.optimizer, self._what)
        self._hooks = StepHooks(self.optimizer, self._before_step, self._after_step)
        claim(self.optimizer)

    def _before_step(self, compiled: bool) -> None:
        self._groups.enter(steady=compiled)

    def _after_step(self, taken: bool) -> None:
        self._groups.leave()
        if taken:
            self.balancer.advance()

    def __getstate__(self) -> dict[str, Any]:
        # For copy and pickle: those of an optimizer leave its hooks behind.
        return {**self.__dict__, "_hooks": None, "_groups": None}

    @property
    def alphas(self) -> dict[str, float]:
        """See :attr:`Balancer.alphas`."""
        return self.balancer.alphas

    @property
    def errors(self) -> dict[str, float]:
        """See :attr:`Balancer.errors`."""
        return self.balancer.errors

    @property
    def factors(self) -> dict[str, float]:
        """See :attr:`Balancer.factors`."""
        return self.balancer.factors

    @property
    def overhead(self) -> float:
        """See :attr:`Balancer.overhead`."""
        return self.balancer.overhead

    @property
    def initial_seconds(self) -> float:
        """See :attr:`Balancer.initial_seconds`."""
        return self.balancer.initial_seconds

    @property
    def history(self) -> list[tuple[int, dict[str, float], dict[str, float]]]:
        """See :attr:`Balancer.history`."""
        return self.balancer.history

    def explained(self) -> dict[str, float]:
        """See :meth:`Balancer.explained`."""
        return self.balancer.explained()

    def freeze(self, by: Literal["type", "block"] | None = "type") -> None:
        """See :meth:`Balancer.freeze`; the rates follow at the next ``step``."""
        self.balancer.freeze(by)

    def plot(self, path: str | PathLike[str]) -> None:
        """See :meth:`Balancer.plot`."""
        self.balancer.plot(path)


def _check_base(optimizer: Optimizer, base: LRScheduler | None) -> None:
    if base is not None and not isinstance(base, LRScheduler):
        raise TypeError(f"base must be a torch scheduler or None, got {type(base).__name__}")
    if base is not None and unwrapped(getattr(base, "optimizer", optimizer)) is not optimizer:
        raise ValueError("base must be built on the same optimizer as TempBalance")
    if base is None and hasattr(optimizer.step, "_wrapped_by_lr_sched"):
        warnings.warn(
            "the optimizer already has a scheduler, but base is None: each would overwrite the "
            "other's rates; pass it as TempBalance(optimizer, base=scheduler) and step only that",
            UserWarning,
            stacklevel=3,
        )


def _tuned_groups(optimizer: Optimizer) -> dict[str, Layer]:
    layers = {
        group["name"]: Layer(
            name=group["name"],
            kind=group["kind"],
            shape=tuple((lora_of_group(group) or group["params"][0]).shape),
            role=group.get("role"),
        )
        for group in optimizer.param_groups
        if "name" in group and "kind" in group and group["params"]
    }
    if not layers:
        raise ValueError(
            "no group of the optimizer is a tuned layer; build it as "
            "Optimizer(tbfast.param_groups(model)), or use tbfast.attach(optimizer, model)"
        )
    return layers
