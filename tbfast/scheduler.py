"""Factors as a scheduler: named parameter groups whose rate is base rate times factor."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from os import PathLike
from typing import Any, Literal

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from tbfast.balancer import Balancer
from tbfast.fitting import FitKind
from tbfast.matrices import Layer
from tbfast.optim import check_free, claim, release, seen_tensor, was_skipped
from tbfast.presets import GroupBy, Of
from tbfast.rates import MappingName
from tbfast.spectra import Method


class TempBalance(LRScheduler):
    """Learning-rate scheduler that gives each layer the base rate times a factor of its alpha.

    Built on the groups of :func:`tbfast.param_groups`; the factors apply from construction on.
    ``step`` steps ``base`` on the rates without factors and puts the factors back on, so nothing
    compounds. It may be called as often as the base schedule wants (each batch, each epoch):
    spectra are measured only when the optimizer has taken ``every`` steps since the last time,
    which a hook on the optimizer counts, without the steps that a GradScaler skipped.

    Args:
        optimizer: Any torch optimizer with groups from :func:`tbfast.param_groups`.
        base: Any torch scheduler on the same optimizer. None: the rates stay what the user sets;
            a rate that somebody else writes into a group becomes that group's base rate.
        preset: ``"tempbalance"``, ``"model-balancing"`` or ``"llr"``; None below takes its value.
        mapping, low, high: See :func:`tbfast.lr_factors`.
        every: Optimizer steps between refreshes.
        budget: Largest share of wall time spent measuring; None for no limit. Only models whose
            refresh takes more than 50 ms are rationed: the stalest layers first. Which these are
            depends on the clock, so such a run is not reproducible bit for bit.
        fit, xmin_pos: The fit; see :func:`tbfast.fit_alpha`.
        method: ``"exact"``, ``"sketch"`` or ``"auto"``; see :func:`tbfast.analyze`. A sketch draws
            new probes at each step.
        of: Whose spectrum: the ``"weight"``, its ``"grad"``, or the optimizer's ``"momentum"``
            (``exp_avg`` or ``momentum_buffer``). A layer without one yet has the factor 1.
        shape_correction: ``"null"``: alpha minus that of Gaussian noise of the same shape, plus
            that of square noise. ``"farms"``: alpha of square sub-matrices.
        group_by: One factor from the mean alpha of each ``"block"`` (layers outside any: 1) or
            ``"type"``; ``"layer"`` for one each.
        ema: Weight of the old alpha at a refresh, in [0, 1).
        ramp: Optimizer steps over which a new factor is reached linearly.
        rate_classes: Round factors to so many values over the range.
        seed: Of a sketch; exact spectra do not use it.
        backend: ``"auto"``, ``"native"`` or ``"reference"``.
        **options: ``start``: optimizer steps before the map acts (0, as published), or ``"auto"``:
            a layer's factor stays 1 until its alpha leaves the band of Gaussian noise of its
            shape. ``history=1000``: refreshes kept. ``smooth``, ``k``, ``bins``,
            ``peak_compat``, ``filter_zeros``: of the fit. ``probes=8``, ``steps=20``: of a sketch.
            ``clip``, ``exp_temp``, ``factors``: of the mapping.

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
        shape_correction: Literal["null", "farms"] | None = None,
        group_by: GroupBy | None = None,
        ema: float | None = None,
        ramp: int = 0,
        rate_classes: int | None = None,
        seed: int = 0,
        backend: str = "auto",
        **options: Any,
    ) -> None:
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
        self._in_step = False
        _unshare_rates(optimizer)
        self._base_rates = self._read()
        self.base_lrs = list(self._base_rates.values())
        self._measure()
        self._count_steps()
        self._write()
        claim(optimizer)

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Step the base scheduler with these arguments, measure if due, set all rates.

        Raises:
            RuntimeError: If no layer had finite weights in 3 refreshes in a row; the rates
                are then those of the last step.
        """
        if self._handles[1].id not in self.optimizer._optimizer_step_post_hooks:
            self._count_steps()  # copying or unpickling an optimizer leaves its hooks behind
        if self.balancer.due:
            self._measure()
        if self.base is None:
            written = self._written
            now = self._read()
            foreign = {k: v for k, v in now.items() if written.get(k) != v}
            self._base_rates.update(foreign)
        else:
            for key, group in _keyed(self.optimizer):
                if key in self._base_rates:
                    _set_rate(group, self._base_rates[key])
            self.base.step(*args, **kwargs)
            self._base_rates = self._read()
        self.last_epoch += 1
        self._step_count += 1
        self._write()

    def detach(self) -> None:
        """Give every group its base rate, and the optimizer back to others."""
        for key, group in _keyed(self.optimizer):
            if key in self._base_rates:
                _set_rate(group, self._base_rates[key])
        for handle in self._handles:
            handle.remove()
        release(self.optimizer)

    def state_dict(self) -> dict[str, Any]:
        """State of the base scheduler, the balancer and the rates; plain numbers and containers."""
        return {
            "base": None if self.base is None else self.base.state_dict(),
            "balancer": self.balancer.state_dict(),
            "base_rates": dict(self._base_rates),
            "last_epoch": self.last_epoch,
            "step_count": self._step_count,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over a state and set the optimizer's rates by it.

        Before or after ``optimizer.load_state_dict``: both give the same rates.
        """
        if missing := {"base", "balancer", "base_rates"} - set(state_dict):
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
        self._base_rates = dict(state_dict["base_rates"])
        self.last_epoch = state_dict["last_epoch"]
        self._step_count = state_dict["step_count"]
        self._write()

    def _measure(self) -> None:
        of = self.balancer.options.of
        seen = {
            group["name"]: seen_tensor(self.optimizer, group["params"][0], of)
            for group in self.optimizer.param_groups
            if "kind" in group and group["params"]
        }
        self.balancer.update({name: tensor for name, tensor in seen.items() if tensor is not None})

    def _read(self) -> dict[str, float]:
        return {key: float(group["lr"]) for key, group in _keyed(self.optimizer)}

    def _write(self) -> None:
        factors = self.balancer.factors
        for key, group in _keyed(self.optimizer):
            factor = factors.get(group.get("layer", key), 1.0)
            _set_rate(group, self._base_rates.setdefault(key, float(group["lr"])) * factor)
        self._written = self._read()
        self._last_lr: list[float | Tensor] = list(self._written.values())

    def _count_steps(self) -> None:
        self._handles = [
            self.optimizer.register_step_pre_hook(self._before_step),
            self.optimizer.register_step_post_hook(self._after_step),
        ]

    # A step function that calls its parent's fires both hooks twice: only a pair counts.
    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._in_step = True

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._in_step and not was_skipped(optimizer):
            self.balancer.advance()
        self._in_step = False

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
    if base is not None and getattr(base, "optimizer", optimizer) is not optimizer:
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
            shape=tuple(group["params"][0].shape),
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


def _keyed(optimizer: Optimizer) -> list[tuple[str, dict[str, Any]]]:
    groups = optimizer.param_groups
    return [(group.get("name", f"#{index}"), group) for index, group in enumerate(groups)]


def _unshare_rates(optimizer: Optimizer) -> None:
    """Give each group a tensor of its own where one tensor is the rate of several."""
    seen: set[int] = set()
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor) and id(group["lr"]) in seen:
            group["lr"] = group["lr"].clone()
        seen.add(id(group["lr"]))


def _set_rate(group: dict[str, Any], rate: float) -> None:
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)  # in place: a compiled step keeps its graph
    else:
        group["lr"] = rate
