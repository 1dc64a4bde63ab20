"""The types of elements that safetensors files hold, and what merging does with them."""

from __future__ import annotations

from typing import NamedTuple


class DType(NamedTuple):
    """A type of elements.

    Attributes:
        name: As safetensors writes it.
        width: Bytes of an element.
        number: As of ``tb::Number`` in csrc/merge.h; 0 for mere bits.
        computes: Whether arithmetic methods take it.
    """

    name: str
    width: int
    number: int = 0
    computes: bool = False


DTYPES = {
    dtype.name: dtype
    for dtype in (
        DType("BOOL", 1),
        DType("U8", 1),
        DType("I8", 1),
        DType("F8_E4M3", 1, 1),
        DType("F8_E5M2", 1, 2),
        DType("F8_E8M0", 1),
        DType("U16", 2),
        DType("I16", 2),
        DType("F16", 2, 3, True),
        DType("BF16", 2, 4, True),
        DType("U32", 4),
        DType("I32", 4),
        DType("F32", 4, 5, True),
        DType("U64", 8),
        DType("I64", 8),
        DType("F64", 8, 6, True),
        DType("C64", 8),
    )
}

# What users may ask for, and how config.json calls it.
OUTPUT_DTYPES = {"f16": "F16", "bf16": "BF16", "f32": "F32"}
TORCH_NAMES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
