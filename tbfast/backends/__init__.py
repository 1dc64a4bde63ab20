"""Backends: the same verbs, written once plainly and once for speed.

Every backend is a module with these verbs, each for all layers in one call:

- ``eigenvalues(stacks, shares) -> list[Tensor]``
- ``fit(spectra, options) -> FitTable``
- ``gram_apply(batch, x) -> list[Tensor]``
- ``lanczos(batch, probes, steps, seed, draw) -> Tridiagonals``
- ``quadrature_fit(runs, options) -> SketchTable``
- ``rsvd(batch, rank, oversample, power_iters, seed)``
- ``dot(batch, values, scales)`` and ``drift(batch, rows, values)``

``reference`` defines the result, the others must agree with it. ``native`` reads CPU memory,
``cuda`` and ``triton`` that of a GPU.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import device as Device

BACKENDS = ("auto", "reference", "native", "cuda", "triton")
CPU_BACKENDS = ("reference", "native")  # the others read a GPU's memory
LEAST_TRITON = (3, 4)  # the oldest with which the kernels have been compiled and interpreted

REBUILD = "reinstall tbfast from a wheel, or build it with 'pip install .'"
# What a backend needs beside tbfast's Python, and how to get it.
_NEEDS = {
    "cuda": (
        "tbfast._cuda",
        "build tbfast where nvcc is, with 'pip install . "
        "--config-settings=cmake.define.TB_CUDA=ON', or use backend='triton' or 'native'",
    ),
    "triton": (
        "triton",
        "'pip install triton' (torch for CUDA or ROCm on Linux brings it), or use backend='native'",
    ),
}


def choose(device_type: str, hip: bool, has_cuda_kernels: bool) -> str:
    """The backend that ``"auto"`` means for weights on such a device.

    Args:
        device_type: Of the weights, as torch names it.
        hip: Whether torch was built for AMD GPUs, which it calls ``"cuda"`` too.
        has_cuda_kernels: Whether this installation holds ``tbfast._cuda``.
    """
    if device_type != "cuda":
        return "native"
    return "cuda" if has_cuda_kernels and not hip else "triton"


def has_cuda_kernels() -> bool:
    """Whether this installation holds ``tbfast._cuda``; it is not loaded."""
    return importlib.util.find_spec("tbfast._cuda") is not None


def get_backend(name: str = "auto", *, device: Device | None = None) -> ModuleType:
    """The module that implements a backend.

    Args:
        name: One of ``BACKENDS``. ``"auto"`` takes the environment variable ``TBFAST_BACKEND``
            and, where that is unset, what :func:`choose` says; it never falls back.
        device: Where the weights are; None stands for the CPU.

    Raises:
        ValueError: If there is no backend of this name.
        RuntimeError: If the backend exists but not in this installation.
    """
    if name == "auto":
        name = os.environ.get("TBFAST_BACKEND") or "auto"
    if name == "auto":
        name = "native" if device is None else _chosen(device)
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {name!r}")
    try:
        if name == "triton":
            _check_triton()
        return importlib.import_module(f"tbfast.backends.{name}")
    except ImportError as error:
        needed, remedy = _NEEDS.get(name, ("tbfast", ""))
        remedy = remedy if importlib.util.find_spec(needed) is None else REBUILD
        raise RuntimeError(f"backend={name!r} is not available: {error}; {remedy}") from error


def engine_for(name: str, device: Device) -> tuple[ModuleType, Device]:
    """The backend for weights on a device, and where they must be for it to read them.

    Args:
        name: As of :func:`get_backend`.
        device: Where the weights are.

    Raises:
        As :func:`get_backend`.
    """
    import torch

    engine = get_backend(name, device=device)
    reads_cpu = engine.__name__.rpartition(".")[2] in CPU_BACKENDS
    return engine, torch.device("cpu") if reads_cpu else device


def _check_triton() -> None:
    import triton

    if tuple(map(int, triton.__version__.split(".")[:2])) < LEAST_TRITON:
        least = ".".join(map(str, LEAST_TRITON))
        raise RuntimeError(
            f"backend='triton' needs Triton {least} or newer, found {triton.__version__}; "
            "update torch to 2.8 or newer, which brings it, or use backend='native'"
        )


def _chosen(device: Device) -> str:
    import torch

    return choose(device.type, torch.version.hip is not None, has_cuda_kernels())
