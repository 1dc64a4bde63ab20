"""tbfast: layer-wise learning rates from heavy-tailed spectra.

The names below load their modules, and torch, on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tbfast.alpha import AlphaFit, fit_alpha
    from tbfast.analyzer import analyze
    from tbfast.balancer import Balancer
    from tbfast.compare_report import Comparison
    from tbfast.compare_run import compare
    from tbfast.groups import param_groups
    from tbfast.instep import attach
    from tbfast.lowrank import SVD, rsvd
    from tbfast.merging.api import merge_checkpoints
    from tbfast.merging.diff import TensorDiff, diff_checkpoints
    from tbfast.merging.lora import LoraReport, extract_lora, lora_factors
    from tbfast.merging.report import MergeReport
    from tbfast.merging.tensors import merge_tensors
    from tbfast.rates import lr_factors
    from tbfast.report import LayerSpectrum, Report
    from tbfast.scheduler import TempBalance
    from tbfast.spectra import eigenvalues

__version__ = "0.1.0"

__all__ = [  # noqa: RUF022 - in the order of sorted()
    "AlphaFit",
    "Balancer",
    "Comparison",
    "LayerSpectrum",
    "LoraReport",
    "MergeReport",
    "Report",
    "SVD",
    "TempBalance",
    "TensorDiff",
    "analyze",
    "attach",
    "compare",
    "diff_checkpoints",
    "eigenvalues",
    "extract_lora",
    "fit_alpha",
    "lora_factors",
    "lr_factors",
    "merge_checkpoints",
    "merge_tensors",
    "param_groups",
    "rsvd",
]

_HOME = {
    "AlphaFit": "tbfast.alpha",
    "Balancer": "tbfast.balancer",
    "Comparison": "tbfast.compare_report",
    "LayerSpectrum": "tbfast.report",
    "LoraReport": "tbfast.merging.lora",
    "MergeReport": "tbfast.merging.report",
    "Report": "tbfast.report",
    "SVD": "tbfast.lowrank",
    "TempBalance": "tbfast.scheduler",
    "TensorDiff": "tbfast.merging.diff",
    "analyze": "tbfast.analyzer",
    "attach": "tbfast.instep",
    "compare": "tbfast.compare_run",
    "diff_checkpoints": "tbfast.merging.diff",
    "eigenvalues": "tbfast.spectra",
    "extract_lora": "tbfast.merging.lora",
    "fit_alpha": "tbfast.alpha",
    "lora_factors": "tbfast.merging.lora",
    "lr_factors": "tbfast.rates",
    "merge_checkpoints": "tbfast.merging.api",
    "merge_tensors": "tbfast.merging.tensors",
    "param_groups": "tbfast.groups",
    "rsvd": "tbfast.lowrank",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'tbfast' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
