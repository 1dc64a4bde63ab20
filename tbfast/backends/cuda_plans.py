"""Plans of the CUDA kernels, kept with the batch they were made for, and what their rows mean."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tbfast import _cuda as kernels
from tbfast.backends.gpu_checks import check_driver, check_on_gpu, check_table, planning
from tbfast.batch import Batch
from tbfast.fitting import FitOptions, FitTable
from tbfast.sketching import SketchTable

# Krylov bases of the matrices that are worked on at the same time; others have to wait.
_BASIS_BYTES = 1 << 30

SKETCH_COLUMNS = 10  # of the rows of sketch_table


class Planned:
    """A plan of the kernels, with the memory that it works in."""

    def __init__(self, plan: Any, device: torch.device) -> None:
        self.plan = plan
        self.device = device
        with planning(plan.workspace_bytes, device):
            self.workspace = torch.empty(plan.workspace_bytes, dtype=torch.uint8, device=device)
        image = torch.from_numpy(plan.image())
        self.workspace[: len(image)].copy_(image)

    def launch(self, **arguments: Any) -> None:
        """On the current stream. Tensors stand for their addresses."""
        addresses = {
            name: value.data_ptr() if isinstance(value, Tensor) else value
            for name, value in arguments.items()
        }
        with _guard(self.device):
            if self.device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
                self.workspace.record_stream(torch.cuda.current_stream(self.device))
            self.plan.launch(
                workspace=self.workspace.data_ptr(), stream=_stream(self.device), **addresses
            )

    def read(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> NDArray[Any]:
        """Numbers that a launch has left in the workspace; waits for it."""
        size = torch.Size(shape).numel() * dtype.itemsize
        part = self.workspace[offset : offset + size].view(dtype).view(shape).cpu()
        numbers: NDArray[Any] = part.numpy().copy()
        return numbers


# The last plan of each verb of each batch, with what it was made for.
_plans: WeakKeyDictionary[Batch, dict[str, tuple[Any, Planned]]] = WeakKeyDictionary()


def planned_for(batch: Batch, verb: str, key: tuple[Any, ...], make: Callable[..., Any]) -> Planned:
    """The plan ``make(descriptors)`` of a batch, kept until its weights move or `key` changes."""
    described = batch.descriptors()
    kept = _plans.setdefault(batch, {})
    if verb in kept:
        (seen, known), planned = kept[verb]
        if seen is described and known == key:
            return planned
        del kept[verb]  # its memory is free before that of the next is taken
    planned = make_plan(batch, make)
    kept[verb] = ((described, key), planned)
    return planned


def make_plan(batch: Batch, make: Callable[..., Any]) -> Planned:
    """The plan ``make(descriptors)`` of a batch, if a GPU can run it."""
    described = batch.descriptors()
    check_on_gpu(batch.device, batch.names, "cuda", kernels.device_type)
    check_driver(kernels, batch.device.index or 0)
    check_table(described, batch.names, "cuda")
    with _guard(batch.device):
        return Planned(make(described), batch.device)


def spectral(batch: Batch, probes: int, steps: int, options: FitOptions) -> Callable[..., Any]:
    """Makes the plan of a sketch from descriptors."""

    def make(described: NDArray[np.int64]) -> Any:
        return kernels.SpectralPlan(
            described,
            batch.keys,
            probes=probes,
            steps=steps,
            memory=_BASIS_BYTES,
            **options.arguments(),
        )

    return make


def spectral_plan(batch: Batch, probes: int, steps: int, options: FitOptions) -> Planned:
    make = spectral(batch, probes, steps, options)
    return planned_for(batch, "spectral", (probes, steps, options), make)


def fit_table(rows: NDArray[np.float64]) -> FitTable:
    """From rows of alpha, xmin, ks, start, n_tail, reason."""
    real = [rows[:, column].copy() for column in range(3)]
    whole = [rows[:, column].astype(np.int64) for column in range(3, 6)]
    return FitTable(real[0], real[1], real[2], whole[0], whole[1], whole[2])


def sketch_table(rows: NDArray[np.float64]) -> SketchTable:
    """From rows of a fit and n_zeros, max_eigenvalue, sum_eigenvalues, sketch_error."""
    return SketchTable(fit_table(rows), rows[:, 6].astype(np.int64), *rows[:, 7:].T.copy())


def current_device() -> torch.device:
    if kernels.device_type != "cuda":
        return torch.device(kernels.device_type)
    check_driver(kernels, torch.cuda.current_device())
    return torch.device("cuda", torch.cuda.current_device())


def _guard(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
