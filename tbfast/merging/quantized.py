"""Scales of quantised weights, which mean nothing without the integers beside them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from tbfast.merging.methods import copying
from tbfast.merging.plan import Tensor

_INTEGERS = ("I8", "U8", "I32", "F8_E4M3", "F8_E5M2")
# Names of GPTQ, AWQ, compressed-tensors, DeepSeek, bitsandbytes and MXFP4.
_SCALE = re.compile(r"scale|absmax|zero|quant|SCB$|g_idx$")
_WHY = (
    "which quantised weights depend on; merge the models before they are quantised, or exclude "
    "these weights with their scales"
)


def with_scales(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors of a plan, of which selected scales of quantised weights have to agree."""
    integers = {t.name for t in tensors if t.dtype.name in _INTEGERS and len(t.shape) > 1}
    # Their modules, and themselves: bitsandbytes writes 'weight.absmax' beside 'weight'.
    owners = {name.rpartition(".")[0] for name in integers if not _is_scale(name)} | integers
    return [
        replace(t, method=copying(t.method), base=t.models[0], must_agree=_WHY)
        if _is_scale(t.name) and t.name.rpartition(".")[0] in owners and _draws(t)
        else t
        for t in tensors
    ]


def _draws(tensor: Tensor) -> bool:
    return tensor.method.name == "select" and sum(w > 0 for w in tensor.method.weights) > 1


def _is_scale(name: str) -> bool:
    return _SCALE.search(name.rpartition(".")[2]) is not None
