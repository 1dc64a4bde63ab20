"""What this installation is made of, what is missing, and how to get it."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import re
from collections.abc import Iterator

from tbfast import __version__
from tbfast.backends import BACKENDS, REBUILD, choose, get_backend, has_cuda_kernels
from tbfast.backends.gpu_checks import check_device

VARIABLES = ("TBFAST_NUM_THREADS", "TBFAST_ISA", "TBFAST_BACKEND")

_OPTIONAL = {
    "matplotlib": ("pictures", "pip install matplotlib"),
    "pandas": ("Report.to_pandas", "pip install pandas"),
    "triton": ("Triton kernels", "comes with torch for CUDA on Linux"),
}


def diagnose() -> tuple[str, bool]:
    """A report of the installation as text, and whether tbfast can work in it."""
    native, works = _native()
    lines = [*_versions(), *native, *_cuda(), *_backends(), _chosen(), *_optional()]
    lines += _environment()
    width = max(len(label) for label, _ in lines)
    text = "\n".join(f"{label:<{width}}  {value}" for label, value in lines)
    return text, works


def _versions() -> Iterator[tuple[str, str]]:
    import numpy as np
    import torch

    yield "tbfast", __version__
    yield "python", f"{platform.python_version()} ({platform.machine()}, {platform.system()})"
    yield "torch", torch.__version__
    yield "numpy", np.__version__
    found = re.search(r"\bLAPACK_INFO=(\w+)", torch.__config__.show())
    lapack = found[1] if found else "of unknown make"
    mkl = "with MKL" if torch._C.has_mkl else "without MKL"
    missing = "missing; install an official build of torch"
    yield "torch LAPACK", f"{lapack}, {mkl}" if torch._C.has_lapack else missing


def _native() -> tuple[list[tuple[str, str]], bool]:
    try:
        native = importlib.import_module("tbfast._native")
        lines = [
            ("kernels", native.__file__ or "built in"),
            (
                "instruction set",
                f"{native.isa()} (this machine can run {', '.join(native.isas())})",
            ),
            ("threads", str(native.num_threads())),
        ]
    except ImportError as error:
        return [("kernels", f"missing ({error}); {REBUILD}")], False
    except (ValueError, RuntimeError) as error:  # an environment variable out of range
        return [("kernels", f"refused: {error}")], False
    return lines, True


def _cuda() -> Iterator[tuple[str, str]]:
    """The CUDA kernels of this installation, and what they could run on."""
    if not has_cuda_kernels():
        yield "CUDA kernels", "not in this installation"
        return
    try:
        kernels = importlib.import_module("tbfast._cuda")
    except ImportError as error:
        yield "CUDA kernels", f"broken ({error}); {REBUILD}"
        return
    yield "CUDA kernels", f"{kernels.targets()} (CUDA {kernels.cuda_version()})"
    count, reason = kernels.device_count()
    if count == 0:
        yield "CUDA devices", f"none: {reason}" if reason else "none"
    for index in range(count):
        info = kernels.device(index)
        label = f"{info['name']}, compute capability {info['major']}.{info['minor']}"
        try:
            check_device(info, index)
        except RuntimeError as error:
            label = f"{label}; refused: {error}"
        yield f"cuda:{index}", label


def _chosen() -> tuple[str, str]:
    """What ``backend="auto"`` means for weights on a GPU, and why."""
    import torch

    name = os.environ.get("TBFAST_BACKEND") or "auto"
    if name != "auto":
        return "auto on a GPU", f"{name}, because TBFAST_BACKEND says so"
    hip, built = torch.version.hip is not None, has_cuda_kernels()
    why = "this torch is for AMD GPUs" if hip else "this installation has no CUDA kernels"
    if built and not hip:
        why = "this installation has CUDA kernels"
    return "auto on a GPU", f"{choose('cuda', hip, built)}, because {why}"


def _backends() -> Iterator[tuple[str, str]]:
    for name in BACKENDS:
        try:
            module = get_backend(name)
        except (RuntimeError, ValueError) as error:
            yield f"backend {name}", f"no; {error}"
        else:
            yield f"backend {name}", f"yes, {module.__name__}"


def _optional() -> Iterator[tuple[str, str]]:
    for name, (purpose, remedy) in _OPTIONAL.items():
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield name, f"not installed, needed for {purpose}; {remedy}"


def _environment() -> Iterator[tuple[str, str]]:
    for name in sorted({*VARIABLES, *(v for v in os.environ if v.startswith("TBFAST_"))}):
        value = os.environ.get(name, "not set")
        yield name, value if name in VARIABLES else f"{value} (no such variable)"
