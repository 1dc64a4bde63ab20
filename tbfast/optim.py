"""What is asked of an optimizer."""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

_OWNED: weakref.WeakSet[Optimizer] = weakref.WeakSet()


def unwrapped(optimizer: Optimizer) -> Optimizer:
    """The optimizer inside a wrapper that takes no hooks, as ``accelerator.prepare`` returns."""
    inner = getattr(optimizer, "optimizer", None)
    takes_hooks = hasattr(optimizer, "_optimizer_step_post_hooks")
    return inner if isinstance(inner, Optimizer) and not takes_hooks else optimizer


def check_free(optimizer: Optimizer) -> None:
    """Refuse an optimizer whose rates have factors already: two that multiply would compound.

    Raises:
        TypeError: If it is not a torch optimizer.
        ValueError: If it has a TempBalance or an attached Balancer already.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}"
        )
    if optimizer in _OWNED:
        raise ValueError(
            "the optimizer has a TempBalance or an attached Balancer already, and factors must "
            "not multiply; call .detach() on that first"
        )


def check_scaled(optimizer: Optimizer, scaled: str) -> None:
    """Refuse an optimizer in which there is nothing to multiply by factors.

    Raises:
        ValueError: If no group has this hyperparameter, or it is 0 in all.
    """
    if scaled != "lr" and not any(group.get(scaled) for group in optimizer.param_groups):
        raise ValueError(
            f"of_what={scaled!r}: no group of this {type(optimizer).__name__} has a {scaled} above "
            "0; give it one, or use of_what='lr'"
        )


def claim(optimizer: Optimizer) -> None:
    """Note that factors are applied to this optimizer."""
    _OWNED.add(optimizer)


def release(optimizer: Optimizer) -> None:
    """The optimizer's rates are free again."""
    _OWNED.discard(optimizer)


class StepHooks:
    """Calls ``before(compiled)`` ahead of each step of an optimizer, ``after(taken)`` at its end.

    ``compiled`` tells a step that ``torch.compile`` traces. ``taken`` is False if the step raised,
    or if GradScaler made a fused optimizer skip it. A step function that calls its parent's fires
    torch's hooks twice; that is one step here.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        before: Callable[[bool], None],
        after: Callable[[bool], None],
    ) -> None:
        self._optimizer = optimizer
        # What they do is no part of a compiled step.
        untraced: Callable[[Any], Any] = torch.compiler.disable
        self._before = untraced(before)
        self._after = untraced(after)
        self._depth = 0  # step functions between their hooks
        self._guards = False
        self._handles = [
            optimizer.register_step_pre_hook(self._enter),
            optimizer.register_step_post_hook(self._leave),
        ]
        # Torch's hooks do not tell of a step that raises.
        self._unguarded = optimizer.__dict__.get("step")
        self._guarded = types.MethodType(self._guard(), optimizer)
        optimizer.__dict__["step"] = self._guarded

    def remove(self) -> None:
        """Leave the optimizer as it was."""
        self._close(taken=False)
        for handle in self._handles:
            handle.remove()
        own = self._optimizer.__dict__
        if own.get("step") is self._guarded:
            own["step"] = self._unguarded
            if self._unguarded is None:
                del own["step"]

    def _guard(self) -> Callable[..., Any]:
        """The optimizer's step, with its end noticed if it raises.

        torch's schedulers, built before or after, look at two things: the wrapped step's
        attributes, which ``wraps`` copies, and ``step.__func__``, which a bound method has.
        """
        inner = self._unguarded or type(self._optimizer).step.__get__(self._optimizer)

        @functools.wraps(inner)
        def step(optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
            self._close(taken=False)
            self._guards = True
            try:
                return inner(*args, **kwargs)
            finally:
                self._guards = False
                self._close(taken=False)

        return step

    def _enter(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._depth and self._guards:
            self._depth += 1
            return
        self._close(taken=False)  # a step that raised where something bypasses the guard
        self._depth = 1
        self._before(torch.compiler.is_compiling())

    def _leave(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._depth > 1:
            self._depth -= 1
        else:
            self._close(taken=not _is_skipped(optimizer))

    def _close(self, taken: bool) -> None:
        if self._depth:
            self._depth = 0
            self._after(taken)


def _is_skipped(optimizer: Optimizer) -> bool:
    """Whether the step being taken is one that GradScaler made a fused optimizer skip."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and float(found) != 0


def seen_tensor(optimizer: Optimizer, parameter: Tensor, of: str) -> Tensor | None:
    """The tensor of a parameter whose spectrum is measured; None if there is none yet."""
    if of == "weight":
        return parameter
    if of == "grad":
        return parameter.grad
    state = optimizer.state.get(parameter, {})
    found = state.get("exp_avg", state.get("momentum_buffer"))
    return found if isinstance(found, Tensor) else None
