"""Factors that exist only inside ``optimizer.step()``: one line after the optimizer is built."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from tbfast.balancer import Balancer
from tbfast.lora_layers import Weight
from tbfast.matrices import Pattern
from tbfast.optim import StepHooks, check_free, check_scaled, claim, release, seen_tensor, unwrapped
from tbfast.presets import TieNorms, select_options
from tbfast.regroup import Regrouping
from tbfast.selection import TunedLayer, tuned_layers
from tbfast.watch import Watch, settle


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
    group's rate (or weight decay) times the factor; afterwards, also if the step raised, they are
    the same objects as before. So schedulers, checkpoints and logs see nothing of it, and a
    scheduler may be built before or after. Nothing has to be called: every ``every`` steps, after
    the step, the spectra are measured, and ``.factors`` says what the next step will use.

    Save ``balancer.state_dict()`` with the optimizer's and load it after that one:
    ``torch.distributed.checkpoint`` takes an empty step to make the optimizer's state.
    ``copy.deepcopy`` and pickle of an optimizer leave the factors behind.

    Args:
        optimizer: Any torch optimizer over parameters of ``model``, with any groups, but not
            ``LBFGS``, which has one rate for all parameters.
        model: The model; a tuned parameter that the optimizer does not hold is skipped.
        preset, include, exclude, skip_first, skip_last, tie_norms, min_eigs: See
            :func:`tbfast.param_groups`.
        **options: See :class:`tbfast.TempBalance`.

    Raises:
        ValueError: If the optimizer has factors already or no weight decay to multiply, no layer
            is left to tune, or an option is out of range.
        TypeError: On ``LBFGS``, or an option that does not exist.
    """
    optimizer = unwrapped(optimizer)
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
        self._layer_of = {member: entry.layer.name for entry in tuned for member in entry.members}
        self._led: dict[str | None, str]
        self._led = {entry.members[0]: entry.layer.name for entry in tuned}
        self._names: dict[int, tuple[weakref.ref[Tensor], str | None]] = {}
        held = {self._name(p) for group in optimizer.param_groups for p in group["params"]}
        tuned_here = [entry for entry in tuned if entry.members[0] in held]
        layers = [entry.layer for entry in tuned_here]
        self._lora = {entry.layer.name: entry.lora for entry in tuned_here if entry.lora}
        if not layers:
            raise ValueError(
                f"the optimizer holds none of the {len(tuned)} tuned weights of the model "
                f"({tuned[0].layer.name}, ...); build it on the parameters of the same model"
            )
        super().__init__(layers, preset=preset, **options)
        check_scaled(optimizer, self.options.of_what)
        settle(model)
        self._watch = Watch(layer.name for layer in layers)
        self.update(self._seen())
        self._groups = Regrouping(optimizer, self.options.of_what, self._owner)
        self._hooks = StepHooks(optimizer, self._before_step, self._after_step)
        claim(optimizer)

    def detach(self) -> None:
        """Take the factors off the optimizer; its groups and steps are then plain again."""
        self._hooks.remove()
        release(self._optimizer)

    def _before_step(self, compiled: bool) -> None:
        self._groups.enter(self.factors, steady=compiled)

    def _after_step(self, taken: bool) -> None:
        self._groups.leave()
        if taken:
            self.advance()
            if self.due:
                self.update(self._seen())

    def _owner(self, parameter: Tensor) -> str | None:
        return self._layer_of.get(self._name(parameter) or "")

    def _seen(self) -> dict[str, Weight]:
        own = {
            name: parameter
            for group in self._optimizer.param_groups
            for parameter in group["params"]
            if (name := self._name(parameter)) in self._led
        }
        self._watch.look({self._led[name]: [parameter] for name, parameter in own.items()})
        of = self.options.of
        found: dict[str, Weight | None] = {}
        for layer in self.layers:
            if lora := self._lora.get(layer.name):
                found[layer.name] = lora.seen(of)
            elif layer.name in own:
                found[layer.name] = seen_tensor(self._optimizer, own[layer.name], of)
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def _name(self, parameter: Tensor) -> str | None:
        """Name of a parameter in the model, which may have replaced its parameters since."""
        known = self._names.get(id(parameter))
        if known is None or known[0]() is not parameter:
            self._names = {
                key: entry for key, entry in self._names.items() if entry[0]() is not None
            }
            for name, p in self._model.named_parameters():
                self._names[id(p)] = (weakref.ref(p), name)
            known = self._names.setdefault(id(parameter), (weakref.ref(parameter), None))
        return known[1]
