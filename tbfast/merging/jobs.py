"""Tensors of a plan as work for the compiled kernels."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tbfast import _native
from tbfast.errors import CheckpointError
from tbfast.merging.draws import bounds, key
from tbfast.merging.dtypes import DType
from tbfast.merging.header import Entry
from tbfast.merging.methods import RESCALES, Method

Place = tuple[int, int, int]  # address, file descriptor, offset: memory if there is an address


def job(
    method: Method,
    name: str,
    seed: int,
    *,
    elements: int,
    start: int,
    dtype: DType,
    models: Sequence[tuple[Place, DType]],
    base: tuple[Place, DType] | None,
    out: Place,
) -> _native.Merge:
    """One tensor.

    Args:
        method: How it is merged.
        name: What its random numbers are drawn by.
        seed: Of the random numbers.
        elements: Number of elements.
        start: Place of the first of them in the whole tensor.
        dtype: Of the output.
        models: Where each model's elements are, and what.
        base: The same of the base, where the method needs one.
        out: Where the result goes.
    """
    selects = method.name == "select"
    draws = 1 if method.resample == "changed" else 0
    if isinstance(method.resample, int):
        draws = method.resample
    return _native.Merge(
        method=method.code,
        elements=elements,
        start=start,
        width=dtype.width,
        type=dtype.number,
        models=[(*place, kind.number) for place, kind in models],
        base=[(*base[0], base[1].number)] if base else [],
        out=out,
        weights=list(method.weights),
        bounds=bounds(method.weights) if selects else [],
        select=key(seed, "select", name),
        reselect=[key(seed, f"reselect/{i}", name) for i in range(draws)],
        redraw_changed=method.resample == "changed",
        drop=[key(seed, f"drop/{i}", name) for i in range(len(models))],
        density=method.density,
        scale=method.scale,
        t=method.t,
        rescale=RESCALES.index(method.rescale),
    )


def at(entry: Entry, descriptor: Callable[[Path], int]) -> tuple[Place, DType]:
    """A tensor in a file."""
    return (0, descriptor(entry.file), entry.begin), entry.dtype


@contextmanager
def descriptors() -> Iterator[Callable[[Path], int]]:
    """Opens files for reading when they are first asked for; closes all at the end."""
    opened: dict[Path, int] = {}

    def descriptor(file: Path) -> int:
        if file not in opened:
            opened[file] = os.open(file, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        return opened[file]

    try:
        yield descriptor
    finally:
        for number in opened.values():
            os.close(number)


@contextmanager
def faults(tensors: Sequence[tuple[str, Sequence[Path]]]) -> Iterator[None]:
    """Words for what stops the kernels.

    Args:
        tensors: Name and files of each job.

    Raises:
        CheckpointError: If an input cannot be read.
        OSError: If the output cannot be written.
    """
    try:
        yield
    except _native.MergeFault as fault:
        number, source, code = fault.args
        if source < 0:
            raise OSError(code, os.strerror(code)) from None
        name, files = tensors[number]
        what = f"cannot be read at '{name}' ({os.strerror(code)})"
        if not code:
            what = f"ends within '{name}': it was cut while it was read; repeat"
        raise CheckpointError.of(files[source], what) from None
