"""Callbacks for trainers, and what both of them log.

``TempBalanceCallback`` is for the Hugging Face ``Trainer``, ``LightningTempBalance`` for
Lightning; each loads its trainer's package on first use.
"""

from __future__ import annotations

import importlib
import math
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

from tbfast.balancer import Balancer

if TYPE_CHECKING:
    from tbfast.trainers_hf import TempBalanceCallback as TempBalanceCallback
    from tbfast.trainers_lightning import LightningTempBalance as LightningTempBalance

LogKind = Literal["summary", "layers"]

_HOME = {
    "TempBalanceCallback": ("tbfast.trainers_hf", "transformers>=5 and accelerate"),
    "LightningTempBalance": ("tbfast.trainers_lightning", "lightning>=2.5"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'tbfast.trainers' has no attribute {name!r}")
    module, needs = _HOME[name]
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise ImportError(
            f"{name} needs {needs}: pip install 'tbfast[trainers]' ({error})"
        ) from error


def check_log(log: str) -> LogKind:
    """The argument, checked.

    Raises:
        ValueError: If it is neither ``"summary"`` nor ``"layers"``.
    """
    if log == "summary":
        return "summary"
    if log == "layers":
        return "layers"
    raise ValueError(f"log must be summary or layers; got {log!r}")


def metrics(balancer: Balancer, log: LogKind) -> dict[str, float]:
    """What is logged of a Balancer, by metric name.

    ``tempbalance/factor_min``, ``_mean`` and ``_max`` over the layers, the same of ``alpha``, and
    ``tempbalance/overhead``; with ``log="layers"`` also ``tempbalance/factor/<layer>`` and
    ``tempbalance/alpha/<layer>``. An alpha that is not known is left out.
    """
    found: dict[str, float] = {}
    for what, by_layer in (("factor", balancer.factors), ("alpha", balancer.alphas)):
        known = {name: value for name, value in by_layer.items() if math.isfinite(value)}
        if known:
            for statistic, of in (("min", min), ("mean", fmean), ("max", max)):
                found[f"tempbalance/{what}_{statistic}"] = of(known.values())
        if log == "layers":
            found |= {f"tempbalance/{what}/{name}": value for name, value in known.items()}
    found["tempbalance/overhead"] = balancer.overhead
    return found
