"""A ragged batch of weights: looked at once, measured many times.

A ``Batch`` writes down where every matrix of a list of weights lies, and of what shape and type it
is. The compiled verbs replay that table: no Python per layer, no copy of a weight. Before each use
the tensors are looked at again, so that one that was moved, freed or replaced is noticed.
"""

from __future__ import annotations

import weakref
import zlib
from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tbfast._native import Table
from tbfast.matrices import (
    MEASURABLE,
    Kind,
    Pattern,
    as_matrices,
    find_layers,
    guess_kind,
)

# The numbers are those of csrc/ragged.h.
_DTYPES = {
    torch.float16: 0,
    torch.bfloat16: 1,
    torch.float32: 2,
    torch.float64: 3,
    torch.complex64: 4,
    torch.complex128: 5,
}

_shape_and_type = attrgetter("shape", "dtype")


class Batch:
    """The matrices of many weights as one table that the compiled verbs read.

    Holds the weights weakly: the caller keeps them alive, and a weight that is gone is an error
    that names it. A weight whose memory, strides or dtype have changed since the last use is
    looked up again by itself; one whose *shape* has changed is an error. Safe to build and to use
    from several threads.

    Args:
        weights: Tensors by name, or a list of tensors (then named ``"0"``, ``"1"``, ...): all on
            the CPU or all on one GPU, dense, float16, bfloat16, float32, float64, complex64 or
            complex128, any strides. Parameters that share memory are measured once for each name.
        kinds: What each weight stands for, see :mod:`tbfast.matrices`; None guesses from name and
            shape.

    Raises:
        TypeError: On a tensor that has no plain memory of its own: one of a wrapper subclass
            (quantised, distributed, fake, functional), on the meta device, or sparse.
        ValueError: On an empty weight, one of another shape than its kind asks for, or one on
            another device than the first.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor] | Sequence[Tensor],
        kinds: Sequence[Kind] | None = None,
    ) -> None:
        if not isinstance(weights, Mapping):
            weights = {str(row): weight for row, weight in enumerate(weights)}
        self.names = tuple(weights)
        tensors = list(weights.values())
        for name, tensor in zip(self.names, tensors, strict=True):
            check_plain(tensor, name)
        self.device = tensors[0].device if tensors else torch.device("cpu")
        if kinds is None:
            kinds = [guess_kind(n, t) for n, t in zip(self.names, tensors, strict=True)]
        self.kinds = tuple(kinds)
        if len(self.kinds) != len(self.names):
            raise ValueError(f"got {len(self.names)} weights but {len(self.kinds)} kinds")
        self.shapes = tuple(tuple(tensor.shape) for tensor in tensors)
        self.keys = [zlib.crc32(name.encode()) for name in self.names]
        self._references = [weakref.ref(tensor) for tensor in tensors]
        self._seen: tuple[Any, ...] = ()
        self._table: Table | None = None
        self._described: NDArray[np.int64] | None = None
        self.descriptors()

    @classmethod
    def of_model(
        cls, model: nn.Module, *, include: Pattern = None, exclude: Pattern = None
    ) -> Batch:
        """The batch of a model's weights; see :func:`tbfast.matrices.find_layers`."""
        layers = find_layers(model, include=include, exclude=exclude)
        parameters = dict(model.named_parameters())
        weights = {layer.name: parameters[layer.name] for layer in layers}
        return cls(weights, [layer.kind for layer in layers])

    def __len__(self) -> int:
        return len(self.names)

    def tensors(self) -> list[Tensor]:
        """The weights.

        Raises:
            RuntimeError: If one is gone.
        """
        alive = [reference() for reference in self._references]
        for name, tensor in zip(self.names, alive, strict=True):
            if tensor is None:
                raise RuntimeError(
                    f"{name} was freed after this Batch was made; keep a reference to the weights, "
                    "or make a new Batch"
                )
        return alive  # type: ignore[return-value]

    def stacks(self) -> list[Tensor]:
        """For each weight its matrices, shape (matrices, rows, cols); views where they exist."""
        return [as_matrices(t, kind) for t, kind in zip(self.tensors(), self.kinds, strict=True)]

    def table(self) -> Table:
        """The table for the compiled verbs of the CPU, looked up again where a weight has changed.

        Raises:
            TypeError: If the weights are on a GPU, or one has become something that cannot be read.
            RuntimeError: If a weight is gone or has given up its memory.
            ValueError: If a weight has another shape or device than before.
        """
        if self.device.type != "cpu":
            raise TypeError(
                f"{self.names[0]} is on {self.device}; this backend reads CPU memory, use .cpu()"
            )
        described = self.descriptors()
        if self._table is None:
            self._table = Table(described, self.keys)
        return self._table

    def descriptors(self) -> NDArray[np.int64]:
        """Where every matrix lies, shape (matrices, 7); another array where a weight has changed.

        Columns: address, rows, columns, row stride and column stride in elements, the dtype's
        number in csrc/ragged.h, and the layer.

        Raises:
            As :meth:`table`, but weights may be on a GPU.
        """
        tensors = self.tensors()
        seen = (
            tuple(map(Tensor.data_ptr, tensors)),
            tuple(map(Tensor.stride, tensors)),
            tuple(map(_shape_and_type, tensors)),
        )
        if self._described is None or seen != self._seen:
            self._described, self._table = self._look(tensors), None
            self._seen = seen
        return self._described

    def _look(self, tensors: Sequence[Tensor]) -> NDArray[np.int64]:
        described: list[tuple[int, ...]] = []
        for layer, (tensor, name, kind, shape) in enumerate(
            zip(tensors, self.names, self.kinds, self.shapes, strict=True)
        ):
            check_plain(tensor, name)
            if tensor.device != self.device:
                raise ValueError(
                    f"{name} is on {tensor.device}, but {self.names[0]} is on {self.device}; "
                    "make one Batch for each device"
                )
            if tuple(tensor.shape) != shape:
                raise ValueError(
                    f"{name} had the shape {shape} when this Batch was made and has "
                    f"{tuple(tensor.shape)} now; make a new Batch"
                )
            if tensor.untyped_storage().nbytes() == 0:
                raise RuntimeError(f"{name} has given up its memory; gather it before measuring")
            places, rows, cols, row_stride, col_stride = _layout(tensor, kind)
            described += [
                (
                    tensor.data_ptr() + place * tensor.element_size(),
                    rows,
                    cols,
                    row_stride,
                    col_stride,
                    _DTYPES[tensor.dtype],
                    layer,
                )
                for place in places
            ]
        return np.array(described, dtype=np.int64).reshape(-1, 7)


def _layout(tensor: Tensor, kind: Kind) -> tuple[list[int], int, int, int, int]:
    """Where the matrices of ``as_matrices(tensor, kind)`` begin, their shape and strides.

    All in elements. Worked out from the strides alone, because ``as_matrices`` copies where no
    view exists.
    """
    shape, stride = tensor.shape, tensor.stride()
    if kind == "linear":
        return [0], shape[0], shape[1], stride[0], stride[1]
    if kind == "packed":
        rows = shape[0] // 3
        return [i * rows * stride[0] for i in range(3)], rows, shape[1], stride[0], stride[1]
    if kind == "experts":
        places = [i * stride[0] for i in range(shape[0])]
        return places, shape[1], shape[2], stride[1], stride[2]
    places = [0]
    for size, step in zip(shape[2:], stride[2:], strict=True):
        places = [place + i * step for place in places for i in range(size)]
    return places, shape[0], shape[1], stride[0], stride[1]


def check_plain(tensor: Any, name: str) -> None:
    """Refuse, by name, what has no memory that can be read as it is.

    Raises:
        TypeError: With the reason and the remedy.
        ValueError: On an empty tensor or one of fewer than two dimensions.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        raise TypeError(
            f"{name} is a {type(tensor).__name__}, a wrapper without plain memory of its own; "
            "pass the tensor it wraps (to_local(), dequantize() or full_tensor())"
        )
    if torch._is_functional_tensor(tensor) or torch._C._functorch.is_functorch_wrapped_tensor(
        tensor
    ):
        raise TypeError(f"{name} is a functional tensor; measure outside the transformed function")
    if tensor.is_meta:
        raise TypeError(f"{name} is on the meta device and holds no values; load the weights first")
    if tensor.device.type not in ("cpu", "cuda"):
        raise TypeError(f"{name} is on {tensor.device}, which no backend reads; use .cpu()")
    if tensor.layout != torch.strided or tensor.is_quantized:
        kind = "quantised" if tensor.is_quantized else f"of layout {tensor.layout}"
        raise TypeError(f"{name} is {kind}; use .dequantize() or .to_dense()")
    if tensor.dtype not in MEASURABLE:
        raise TypeError(f"{name} must be floating point or complex, got {tensor.dtype}")
    if tensor.ndim < 2 or tensor.numel() == 0:
        raise ValueError(
            f"{name} must have two or more dimensions, none of them 0; got {tuple(tensor.shape)}"
        )
