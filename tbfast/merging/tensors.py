"""``merge_tensors``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from tbfast import _native
from tbfast.merging.draws import check_seed
from tbfast.merging.dtypes import DTYPES, DType
from tbfast.merging.jobs import job
from tbfast.merging.methods import make_method

# NumPy's names of what safetensors names otherwise.
_NUMPY = {
    "bool": "BOOL",
    "float16": "F16",
    "float32": "F32",
    "float64": "F64",
    "complex64": "C64",
    **{
        f"{kind}int{bits}": f"{kind.upper() or 'I'}{bits}"
        for kind in ("", "u")
        for bits in (8, 16, 32, 64)
    },
}
_TORCH = _NUMPY | {"bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}
_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def merge_tensors(
    tensors: Sequence[Any],
    *,
    name: str,
    method: str = "select",
    base: Any = None,
    weights: Sequence[float] | None = None,
    seed: int = 0,
    start: int = 0,
    resample: str | int = "auto",
    density: float = 0.5,
    scale: float = 1.0,
    t: float = 0.5,
    rescale: str = "paper",
) -> Any:
    """Merge tensors in memory, with the draws that files get.

    Args:
        tensors: CPU tensors of torch, or NumPy arrays, of one shape and dtype.
        name: Of the tensor: the random numbers belong to it.
        method: As of :func:`merge_checkpoints`, as are the other options.
        base: What the tensors were tuned from.
        weights: One for each tensor.
        seed: Of the random numbers.
        start: Place of the first element in the whole tensor: of a slice in row-major order.
        resample: See :func:`merge_checkpoints`.
        density: See there.
        scale: See there.
        t: See there.
        rescale: See there.

    Returns:
        A new tensor or array of that shape and dtype.

    Raises:
        ValueError: If shapes or dtypes differ, or an option is out of range.
    """
    check_seed(seed)
    if start < 0:
        raise ValueError(f"start must be 0 or more, got {start}")
    chosen = make_method(
        method,
        len(tensors),
        has_base=base is not None,
        weights=weights,
        resample=resample,
        density=density,
        scale=scale,
        t=t,
        rescale=rescale,
    )
    if start and chosen.looks_at_all:
        raise ValueError(f"method={method!r} looks at whole tensors; it has no start={start}")
    needs_base = chosen.needs_base or chosen.resample != "off"
    arrays = [_bits(item, f"{name}: tensor {i}") for i, item in enumerate(tensors)]
    old = [_bits(base, f"{name}: base")] if needs_base else []
    shape, dtype = arrays[0][0].shape, arrays[0][1]
    for i, (array, kind) in enumerate([*arrays, *old]):
        if array.shape != shape or kind != dtype:
            what = "the base" if i == len(arrays) else f"tensor {i}"
            raise ValueError(
                f"{name}: {what} has shape {array.shape} and dtype {kind.name}, "
                f"tensor 0 has {shape} and {dtype.name}"
            )
    if method != "select" and not dtype.computes:
        raise ValueError(f"{name}: method={method!r} does not take {dtype.name}; use 'select'")
    merged = np.empty(shape, arrays[0][0].dtype)
    work = job(
        chosen,
        name,
        seed,
        elements=merged.size,
        start=start,
        dtype=dtype,
        models=[((array.ctypes.data, -1, 0), kind) for array, kind in arrays],
        base=((old[0][0].ctypes.data, -1, 0), dtype) if old else None,
        out=(merged.ctypes.data, -1, 0),
    )
    _native.merge([work], threads=_native.num_threads())
    return _like(tensors[0], merged)


def _bits(given: Any, label: str) -> tuple[np.ndarray[Any, Any], DType]:
    """The elements as contiguous words, and what they are."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(given, torch.Tensor):
        name = _TORCH.get(str(given.dtype).removeprefix("torch."))
        if given.device.type != "cpu" or given.layout != torch.strided or name is None:
            raise ValueError(
                f"{label} must be a dense CPU tensor, got {given.dtype} on {given.device}"
            )
        dtype = DTYPES[name]
        dense = given.detach().resolve_conj().resolve_neg().contiguous()
        words = (
            dense.flatten().view(torch.uint8).numpy() if dense.numel() else np.empty(0, np.uint8)
        )
        return words.view(_WORDS[dtype.width]).reshape(tuple(given.shape)), dtype
    array = np.asarray(given)
    if array.dtype.name not in _NUMPY:
        raise ValueError(f"{label} has the dtype {array.dtype}, which cannot be merged")
    dtype = DTYPES[_NUMPY[array.dtype.name]]
    return np.ascontiguousarray(array).view(_WORDS[dtype.width]).reshape(array.shape), dtype


def _like(given: Any, merged: np.ndarray[Any, Any]) -> Any:
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(given, torch.Tensor):
        flat = (
            torch.from_numpy(merged.reshape(-1).view(np.uint8))
            if merged.size
            else torch.empty(0, dtype=torch.uint8)
        )
        return flat.view(given.dtype).view(given.shape)
    return merged.view(np.asarray(given).dtype)
