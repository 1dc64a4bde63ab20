"""Types of the GPU kernels; csrc/bind_cuda*.cpp and csrc/cuda/*.h say what they do."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tbfast.backends.gpu_checks import DeviceInfo

_Integers = NDArray[np.int64]

device_type: str

def device(index: int) -> DeviceInfo: ...
def device_count() -> tuple[int, str]: ...
def launch_count() -> int: ...
def targets() -> str: ...

class _Plan:
    @property
    def workspace_bytes(self) -> int: ...
    def image(self) -> NDArray[np.uint8]: ...

class SpectralPlan(_Plan):
    def __init__(
        self,
        descriptors: _Integers,
        names: Sequence[int],
        *,
        probes: int,
        steps: int,
        memory: int,
        kind: int,
        xmin_pos: float,
        smooth: float,
        k: int,
        bins: int,
        peak_compat: bool,
        max_alpha: float,
    ) -> None: ...
    @property
    def diagonal(self) -> int: ...
    @property
    def off_diagonal(self) -> int: ...
    @property
    def taken(self) -> int: ...
    @property
    def least_blocks(self) -> int: ...
    @property
    def most_blocks(self) -> int: ...
    def launch(
        self,
        *,
        workspace: int,
        mode: str,
        given: int = 0,
        out: int = 0,
        seed: int = 0,
        draw: int = 0,
        replayed: bool = False,
        finished: int = 0,
        sequence: float = 0.0,
        stream: int = 0,
        blocks: int = 0,
    ) -> None: ...

class FitPlan(_Plan):
    def __init__(
        self,
        offsets: _Integers,
        *,
        kind: int,
        xmin_pos: float,
        smooth: float,
        k: int,
        bins: int,
        peak_compat: bool,
        max_alpha: float,
    ) -> None: ...
    def launch(
        self, *, values: int, workspace: int, results: int, stream: int = 0, blocks: int = 0
    ) -> None: ...

class QuadraturePlan(_Plan):
    def __init__(
        self,
        first: _Integers,
        count: _Integers,
        *,
        probes: int,
        steps: int,
        eps: float,
        kind: int,
        xmin_pos: float,
        smooth: float,
        k: int,
        bins: int,
        peak_compat: bool,
        max_alpha: float,
    ) -> None: ...
    def launch(
        self,
        *,
        diagonal: int,
        off_diagonal: int,
        taken: int,
        workspace: int,
        results: int,
        stream: int = 0,
        blocks: int = 0,
    ) -> None: ...

class RsvdPlan(_Plan):
    def __init__(
        self, descriptors: _Integers, *, rank: int, oversample: int, power_iters: int
    ) -> None: ...
    @property
    def factors_bytes(self) -> int: ...
    @property
    def offsets(self) -> _Integers: ...
    @property
    def most_blocks(self) -> int: ...
    def launch(
        self,
        *,
        workspace: int,
        factors: int,
        results: int,
        seed: int = 0,
        stream: int = 0,
        blocks: int = 0,
    ) -> None: ...

class DotPlan(_Plan):
    def __init__(self, descriptors: _Integers, layers: int) -> None: ...
    def launch(
        self,
        *,
        values: int,
        scales: int,
        workspace: int,
        results: int,
        stream: int = 0,
        blocks: int = 0,
    ) -> None: ...

class DriftPlan(_Plan):
    def __init__(self, descriptors: _Integers, layers: int, rows: _Integers) -> None: ...
    def launch(
        self, *, values: int, workspace: int, results: int, stream: int = 0, blocks: int = 0
    ) -> None: ...
