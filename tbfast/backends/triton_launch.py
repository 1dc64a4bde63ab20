"""Launches of Triton kernels that work in phases.

A kernel takes the first phase and the one after the last. A cooperative launch runs them all, with
a barrier of the grid after each. Where the device or the interpreter has none, every phase is a
launch of its own; results are the same bits.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

from tbfast.backends.gpu_checks import check_on_gpu
from tbfast.batch import Batch

INTERPRETED = bool(triton.knobs.runtime.interpret)
WARPS = {"cuda": 8, "hip": 4}  # of 32 and of 64 threads: with all registers that a processor has
STAGES = 3
# Each processor runs one program, so a thread may have as many registers as its instructions can
# name. Left to itself NVIDIA's assembler may keep room for a second program, and spill.
REGISTERS = 255
FUSED = True  # multiply-adds: Triton's default changes between versions

# Devices that have refused a cooperative launch.
_refused: set[torch.device] = set()
_counters: dict[torch.device, Tensor] = {}


def check_readable(batch: Batch) -> None:
    """Refuse weights that are not in the memory that kernels read.

    Raises:
        As ``gpu_checks.check_on_gpu``; the interpreter reads the CPU's.
    """
    if not INTERPRETED:
        check_on_gpu(batch.device, batch.names, "triton")


def current_device() -> torch.device:
    """Where kernels run that are given nothing on a device yet."""
    return torch.device("cpu") if INTERPRETED else torch.device("cuda", torch.cuda.current_device())


def programs(device: torch.device) -> int:
    """Programs of a launch: as many as certainly run at the same time."""
    if device.type != "cuda":
        return 1
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


def launch(kernel: Any, device: torch.device, *arguments: Any, **constants: Any) -> None:
    """Puts a kernel of one phase on the current stream."""
    with _guard(device):
        kernel[(programs(device),)](*arguments, **constants, **_options())


def launch_phases(
    kernel: Any, phases: int, device: torch.device, *arguments: Any, **constants: Any
) -> None:
    """Runs the phases of a kernel, in one launch where that is possible.

    Args:
        kernel: Takes the first phase, the one after the last, and the barrier's counter (None in a
            launch of one phase); then ``arguments`` and ``constants``.
        phases: Their number.
        device: That of the arguments.
    """
    grid, options = (programs(device),), constants | _options()
    with _guard(device):
        if device.type == "cuda" and device not in _refused:
            together = options | {"launch_cooperative_grid": True}
            try:
                kernel[grid](0, phases, _counter(device), *arguments, **together)
                return
            except (RuntimeError, AssertionError):
                # If there is another cause than the kind of launch, the error comes again below.
                _refused.add(device)
        for phase in range(phases):
            kernel[grid](phase, phase + 1, None, *arguments, **options)


def _guard(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, whatever device its arguments are on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _options() -> dict[str, Any]:
    return compile_options("hip" if torch.version.hip else "cuda")


def compile_options(platform: str) -> dict[str, Any]:
    """How every kernel is compiled for ``"cuda"`` or ``"hip"``."""
    options = {"num_warps": WARPS[platform], "num_stages": STAGES, "enable_fp_fusion": FUSED}
    return options | ({"maxnreg": REGISTERS} if platform == "cuda" else {})


def _counter(device: torch.device) -> Tensor:
    if device not in _counters:
        _counters[device] = torch.zeros(1, dtype=torch.int32, device=device)
    return _counters[device]
