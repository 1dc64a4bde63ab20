"""Backends: the same verbs, written once plainly and once for speed.

Every backend is a module with these verbs, each for all layers in one call:

- ``eigenvalues(stacks, shares) -> list[Tensor]``
- ``fit(spectra, options) -> FitTable``
- ``gram_apply(batch, x) -> list[Tensor]``
- ``lanczos(batch, probes, steps, seed, draw) -> Tridiagonals``
- ``quadrature_fit(runs, options) -> SketchTable``
- ``rsvd(batch, rank, oversample, power_iters, seed)``
- ``dot(batch, values, scales)`` and ``drift(batch, rows, values)``

``reference`` defines the result, the others must agree with it.
"""

from __future__ import annotations

import importlib
import os
from types import ModuleType

BACKENDS = ("auto", "reference", "native", "cuda", "triton")

_MISSING = {
    "cuda": "this version of tbfast has no CUDA kernels; use backend='native'",
    "triton": "this version of tbfast has no Triton kernels; use backend='native'",
}


def get_backend(name: str = "auto") -> ModuleType:
    """The module that implements a backend.

    Args:
        name: One of ``BACKENDS``. ``"auto"`` takes the environment variable ``TBFAST_BACKEND``
            and, where that is unset, ``"native"``; it never falls back.

    Raises:
        ValueError: If there is no backend of this name.
        RuntimeError: If the backend exists but not in this installation.
    """
    if name == "auto":
        name = os.environ.get("TBFAST_BACKEND") or "native"
        name = "native" if name == "auto" else name
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {name!r}")
    if name in _MISSING:
        raise RuntimeError(f"backend={name!r} is not available: {_MISSING[name]}")
    try:
        return importlib.import_module(f"tbfast.backends.{name}")
    except ImportError as error:
        raise RuntimeError(
            f"backend={name!r} failed to import ({error}); reinstall tbfast from a wheel, "
            "or build it with 'pip install .'"
        ) from error
