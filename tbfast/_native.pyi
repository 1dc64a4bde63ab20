"""Types of the compiled kernels; csrc/bind_*.cpp says what they do."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_Floats = NDArray[np.float32]
_Doubles = NDArray[np.float64]
_Integers = NDArray[np.int64]
_Bits = NDArray[np.uint16]

class MergeFault(Exception): ...

class Merge:
    def __init__(
        self,
        *,
        method: int,
        elements: int,
        start: int,
        width: int,
        type: int,
        models: Sequence[tuple[int, int, int, int]],
        base: Sequence[tuple[int, int, int, int]],
        out: tuple[int, int, int],
        weights: Sequence[float],
        bounds: Sequence[int],
        select: Sequence[int],
        reselect: Sequence[Sequence[int]],
        redraw_changed: bool,
        drop: Sequence[Sequence[int]],
        density: float,
        scale: float,
        t: float,
        rescale: int,
    ) -> None: ...

class Table:
    def __init__(self, descriptors: _Integers, names: Sequence[int]) -> None: ...
    def __len__(self) -> int: ...

def bf16_multiply(
    engine: str, rows: _Bits, pairs: _Bits, sums: _Floats, *, share_rows: bool
) -> _Floats: ...
def differences(
    tensors: Sequence[Merge], *, threads: int
) -> list[tuple[list[int], list[int], list[float], int]]: ...
def dot(
    table: Table, values: NDArray[np.int8], scales: _Floats, *, threads: int
) -> tuple[_Doubles, _Doubles]: ...
def drift(
    table: Table, rows: _Integers, values: _Floats, *, threads: int
) -> tuple[_Doubles, _Doubles, _Doubles]: ...
def fit(
    values: _Doubles,
    offsets: _Integers,
    *,
    kind: int,
    xmin_pos: float,
    smooth: float,
    k: int,
    bins: int,
    peak_compat: bool,
    max_alpha: float,
    threads: int,
) -> tuple[_Doubles, _Doubles, _Doubles, _Integers, _Integers, _Integers]: ...
def gauss_quadrature(diagonal: _Doubles, off_diagonal: _Doubles) -> tuple[_Doubles, _Doubles]: ...
def gram_apply(table: Table, x: _Floats, *, probes: int, threads: int) -> _Floats: ...
def gram_bf16(engine: str, w: _Bits, x: _Floats, y: _Floats, *, wide: bool) -> _Floats: ...
def gram_bf16_engines() -> list[str]: ...
def isa() -> str: ...
def isas() -> list[str]: ...
def lanczos(
    table: Table,
    *,
    probes: int,
    steps: int,
    seed: int,
    draw: int,
    starts: _Floats | None,
    threads: int,
) -> tuple[_Doubles, _Doubles, NDArray[np.int32], _Integers, _Integers, float]: ...
def merge(merges: Sequence[Merge], *, threads: int) -> list[tuple[list[int], int, int, int]]: ...
def multiply_adds(flops: int, *, threads: int) -> int: ...
def num_threads() -> int: ...
def philox(counter: Sequence[int], key: Sequence[int]) -> list[int]: ...
def quadrature_fit(
    diagonal: _Doubles,
    off_diagonal: _Doubles,
    taken: NDArray[np.int32],
    first: _Integers,
    count: _Integers,
    *,
    eps: float,
    kind: int,
    xmin_pos: float,
    smooth: float,
    k: int,
    bins: int,
    peak_compat: bool,
    max_alpha: float,
    threads: int,
) -> tuple[Any, ...]: ...
def rsvd(
    table: Table, *, rank: int, oversample: int, power_iters: int, seed: int, threads: int
) -> list[Any]: ...
def stream_sum(words: NDArray[np.uint64], *, threads: int) -> int: ...
def symmetric_eigenvalues(a: NDArray[Any]) -> _Doubles: ...
def hermitian_eigenvalues(a: NDArray[Any]) -> _Doubles: ...
def workspace_bytes(table: Table) -> int: ...
