"""What is asked of an optimizer."""

from __future__ import annotations

import weakref

from torch import Tensor
from torch.optim import Optimizer

_OWNED: weakref.WeakSet[Optimizer] = weakref.WeakSet()


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


def claim(optimizer: Optimizer) -> None:
    """Note that factors are applied to this optimizer."""
    _OWNED.add(optimizer)


def release(optimizer: Optimizer) -> None:
    """The optimizer's rates are free again."""
    _OWNED.discard(optimizer)


def was_skipped(optimizer: Optimizer) -> bool:
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
