"""What is asked of an optimizer."""

from __future__ import annotations

from torch import Tensor
from torch.optim import Optimizer


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
