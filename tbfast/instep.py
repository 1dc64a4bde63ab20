"""Factors that exist only inside ``optimizer.step()``: one line after the optimizer is built."""

from __future__ import annotations

import functools
import types
import weakref
from typing import Any

from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from tbfast.balancer import Balancer
from tbfast.matrices import Pattern
from tbfast.optim import check_free, claim, release, seen_tensor, was_skipped
from tbfast.presets import TieNorms, select_options
from tbfast.selection import TunedLayer, tuned_layers


def attach(
    optimizer: Optimizer,
    model: nn.Module,
    *,
    preset: str = "tempbalance",
    include: Pattern = None,
    exclude: Pattern = None,
    skip_first: bool | None = None,
    skip_last: bool | None = None,
    tie_norms: TieNorms | None = None,
    min_eigs: int | None = None,
    **options: Any,
) -> Balancer:
    """Attach layer-wise factors to an optimizer; returns their :class:`tbfast.Balancer`.

    While ``optimizer.step()`` runs, the optimizer's groups are split by factor, each with its
    group's rate times the factor; afterwards, also if the step raised, they are the same objects
    as before. So schedulers, checkpoints and logs see nothing of it, and a scheduler may be built
    before or after. Nothing has to be called: every ``every`` steps, after the step, the spectra
    are measured, and ``.factors`` says what the next step will use.

    Save and load ``balancer.state_dict()`` with the optimizer's. ``copy.deepcopy`` and pickle of
    an optimizer leave the factors behind.

    Args:
        optimizer: Any torch optimizer over parameters of ``model``, with any groups, but not
            ``LBFGS``, which has one rate for all parameters.
        model: The model; a tuned parameter that the optimizer does not hold is skipped.
        preset, include, exclude, skip_first, skip_last, tie_norms, min_eigs: See
            :func:`tbfast.param_groups`.
        **options: See :class:`tbfast.TempBalance`.

    Raises:
        ValueError: If the optimizer has factors already, no layer is left to tune, or an option is
            out of range.
        TypeError: On ``LBFGS``, or an option that does not exist.
    """
    check_free(optimizer)
    if isinstance(optimizer, LBFGS):
        raise TypeError("LBFGS has one learning rate for all parameters; use another optimizer")
    given = {
        "skip_first": skip_first,
        "skip_last": skip_last,
        "tie_norms": tie_norms,
        "min_eigs": min_eigs,
    }
    tuned = tuned_layers(model, select_options(preset, given), include=include, exclude=exclude)
    return _Attached(optimizer, model, tuned, preset=preset, **options)


class _Attached(Balancer):
    """A Balancer on an optimizer."""

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module,
        tuned: list[TunedLayer],
        *,
        preset: str,
        **options: Any,
    ) -> None:
        self._optimizer = optimizer
        self._model = model
        self._owner = {member: entry.layer.name for entry in tuned for member in entry.members}
        self._names: dict[int, tuple[weakref.ref[Tensor], str | None]] = {}
        self._canonical: list[dict[str, Any]] | None = None  # the groups, while a step runs
        held = {self._name(p) for group in optimizer.param_groups for p in group["params"]}
        layers = [entry.layer for entry in tuned if entry.layer.name in held]
        if not layers:
            raise ValueError(
                f"the optimizer holds none of the {len(tuned)} tuned weights of the model "
                f"({tuned[0].layer.name}, ...); build it on the parameters of the same model"
            )
        super().__init__(layers, preset=preset, **options)
        self.update(self._seen())
        claim(optimizer)
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        self._guard()

    def detach(self) -> None:
        """Take the factors off the optimizer; its groups and steps are then plain again."""
        self._restore()
        for handle in self._handles:
            handle.remove()
        if self._optimizer.__dict__.get("step") is self._guarded:
            if self._unguarded is None:
                del self._optimizer.__dict__["step"]
            else:
                self._optimizer.__dict__["step"] = self._unguarded
        release(self._optimizer)

    def _guard(self) -> None:
        """Wrap ``optimizer.step`` so that the groups come back if it raises.

        torch's schedulers, built before or after, look at two things: the wrapped step's
        attributes, which ``wraps`` copies, and ``step.__func__``, which a bound method has.
        """
        self._unguarded = self._optimizer.__dict__.get("step")
        inner = self._unguarded or type(self._optimizer).step.__get__(self._optimizer)

        @functools.wraps(inner)
        def step(optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
            try:
                return inner(*args, **kwargs)
            finally:
                self._restore()

        self._guarded = types.MethodType(step, self._optimizer)
        self._optimizer.__dict__["step"] = self._guarded

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._restore()  # a step that calls its parent's fires the hooks twice
        factors = self.factors
        self._canonical = optimizer.param_groups
        self._parts = [self._split(group, factors) for group in self._canonical]
        optimizer.param_groups = [part for parts in self._parts for part in parts]

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._canonical is None:
            return
        self._restore()
        if was_skipped(optimizer):
            return
        self.advance()
        if self.due:
            self.update(self._seen())

    def _split(self, group: dict[str, Any], factors: dict[str, float]) -> list[dict[str, Any]]:
        """The group by factor; the same object where its rate is the rate of all."""
        buckets: dict[float, list[Tensor]] = {}
        for parameter in group["params"]:
            owner = self._owner.get(self._name(parameter) or "")
            buckets.setdefault(factors.get(owner or "", 1.0), []).append(parameter)
        if set(buckets) <= {1.0}:
            return [group]
        return [
            {**group, "params": params, "lr": group["lr"] * factor}
            for factor, params in buckets.items()
        ]

    def _restore(self) -> None:
        """Put the canonical groups back, with what the step changed in their parts."""
        if self._canonical is None:
            return
        for group, parts in zip(self._canonical, self._parts, strict=True):
            if parts[0] is not group:
                group.update({k: v for k, v in parts[0].items() if k not in ("params", "lr")})
        self._optimizer.param_groups = self._canonical
        self._canonical = None
        self._parts = []

    def _seen(self) -> dict[str, Tensor]:
        found = {
            self._name(parameter): seen_tensor(self._optimizer, parameter, self.options.of)
            for group in self._optimizer.param_groups
            for parameter in group["params"]
        }
        return {
            layer.name: tensor
            for layer in self.layers
            if (tensor := found.get(layer.name)) is not None
        }

    def _name(self, parameter: Tensor) -> str | None:
        """Name of a parameter in the model, which may have replaced its parameters since."""
        known = self._names.get(id(parameter))
        if known is None or known[0]() is not parameter:
            for name, p in self._model.named_parameters():
                self._names[id(p)] = (weakref.ref(p), name)
            known = self._names.setdefault(id(parameter), (weakref.ref(parameter), None))
        return known[1]
