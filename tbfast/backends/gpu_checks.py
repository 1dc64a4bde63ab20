"""What a GPU backend refuses, each with one message: the machine, the weights, the memory.

Nothing here imports a kernel or touches a GPU: what is known of the driver and of a device comes in
through a small protocol, which ``tbfast._cuda`` meets and tests make up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray

# The first generation with asynchronous copies, bfloat16 tensor cores and 99 KiB of shared memory.
LEAST_CAPABILITY = (8, 0)
# Matrices of one batch: the tables of a plan stay below 256 MiB, its offsets within int32.
MAX_MATRICES = 1 << 20
# Rows or columns of a matrix below this: work items hold them in int32.
MAX_SIDE = 1 << 31
# Elements of a layer: with their strides in bytes far inside int64, in which kernels index.
MAX_ELEMENTS = 1 << 40

_ELEMENT_BYTES = (2, 2, 4, 8, 8, 16)  # by the number of the dtype in csrc/ragged.h


class DeviceInfo(TypedDict):
    """A device, as ``tbfast._cuda.device(index)`` describes it."""

    name: str
    major: int
    minor: int
    multiprocessors: int
    shared_per_block: int
    cooperative: bool


class Driver(Protocol):
    """The part of ``tbfast._cuda`` that tells what the machine has."""

    def device_count(self) -> tuple[int, str]:
        """Number of devices, and where it is 0 why, in the driver's words."""

    def device(self, index: int) -> DeviceInfo:
        """One of them."""


def check_on_gpu(
    device: torch.device, names: Sequence[str], backend: str, reads: str = "cuda"
) -> None:
    """Refuse weights that are not on a GPU.

    Args:
        device: Of all weights of the batch; a Batch refuses mixed ones itself.
        names: Of the layers.
        backend: Name of the backend that is to read them.
        reads: The type of device whose memory it reads: the emulator's is ``"cpu"``.

    Raises:
        ValueError: Naming the first layer.
    """
    if device.type != reads:
        layer = f"{names[0]!r} is" if names else "the batch is"
        raise ValueError(
            f"backend={backend!r} needs a CUDA device, but {layer} on {device.type}; "
            "use backend='native'"
        )


def check_driver(driver: Driver, index: int) -> DeviceInfo:
    """The device of this index, if the driver can use it and the kernels run on it.

    Raises:
        RuntimeError: Where there is no driver or one too old, no such device, a device that is too
            old, or one that cannot launch cooperative grids.
    """
    count, reason = driver.device_count()
    if count == 0:
        why = f": {reason}" if reason else ""
        raise RuntimeError(
            f"backend='cuda' found no usable GPU{why}; install or update the NVIDIA driver, "
            "or use backend='triton' or 'native'"
        )
    if not 0 <= index < count:
        raise RuntimeError(
            f"backend='cuda' found {count} GPUs, but the weights are on cuda:{index}"
        )
    info = driver.device(index)
    check_device(info, index)
    return info


def check_device(info: DeviceInfo, index: int) -> None:
    """Refuse a device that the kernels cannot run on.

    Raises:
        RuntimeError: Naming the device and what it lacks.
    """
    label = f"cuda:{index} ({info['name']})"
    if (info["major"], info["minor"]) < LEAST_CAPABILITY:
        least = ".".join(map(str, LEAST_CAPABILITY))
        raise RuntimeError(
            f"backend='cuda' needs compute capability {least} or higher, but {label} has "
            f"{info['major']}.{info['minor']}; use backend='native', which computes on the CPU"
        )
    if not info["cooperative"]:
        raise RuntimeError(
            f"backend='cuda' needs cooperative launches, which {label} does not offer (a "
            "virtual GPU, or one shared through MPS); use backend='triton' or 'native'"
        )


def check_table(described: NDArray[np.int64], names: Sequence[str], backend: str) -> None:
    """Refuse matrices that do not fit the kernels' tables, or that lie askew in memory.

    Args:
        described: As of ``Batch.descriptors()``: (matrices, 7).
        names: Of the layers.
        backend: Name of the backend.

    Raises:
        ValueError: Naming the first such layer.
    """
    if len(described) > MAX_MATRICES:
        raise ValueError(
            f"backend={backend!r} takes up to {MAX_MATRICES} matrices at once, got "
            f"{len(described)}; make several batches"
        )
    address, rows, cols, _, _, dtype, layer = described.T
    long = np.maximum(rows, cols) >= MAX_SIDE
    if long.any():
        row = int(long.argmax())
        raise ValueError(
            f"backend={backend!r} takes matrices of fewer than 2^31 rows and columns, but "
            f"{names[layer[row]]!r} is {rows[row]} x {cols[row]}; leave it out"
        )
    elements = np.bincount(layer, rows.astype(float) * cols, len(names))
    if (elements > MAX_ELEMENTS).any():
        large = int(elements.argmax())
        raise ValueError(
            f"backend={backend!r} takes layers of up to 2^40 elements, but {names[large]!r} has "
            f"{elements[large]:.0f}; leave it out"
        )
    size = np.array(_ELEMENT_BYTES)[dtype]
    askew = address % size != 0
    if askew.any():
        row = int(askew.argmax())
        raise ValueError(
            f"{names[layer[row]]!r} begins at address {address[row]:#x}, which is not a multiple "
            f"of its element size of {size[row]} bytes; use .clone()"
        )


def check_length(name: str, values: torch.Tensor, wanted: int) -> None:
    """Refuse values that are not one-dimensional or not as many as the weights call for.

    Raises:
        ValueError: With the number wanted and found.
    """
    if values.shape != (wanted,):
        raise ValueError(f"{name} must have {wanted} elements, got shape {tuple(values.shape)}")


def row_widths(described: NDArray[np.int64]) -> NDArray[np.int64]:
    """Real numbers in a row of each matrix."""
    widths: NDArray[np.int64] = described[:, 2] * np.where(described[:, 5] >= 4, 2, 1)
    return widths


@contextmanager
def planning(wanted: int, device: torch.device) -> Iterator[None]:
    """Words for running out of memory while a plan takes its own.

    Args:
        wanted: Bytes that the plan asks for.
        device: Where.

    Raises:
        RuntimeError: For a ``torch.cuda.OutOfMemoryError`` inside; with the bytes wanted and free.
    """
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        free, _ = torch.cuda.mem_get_info(device)
        raise RuntimeError(
            f"a plan needs {wanted} bytes on {device}, where {free} are free; "
            "use fewer probes or steps, or several smaller batches"
        ) from error
