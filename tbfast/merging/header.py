"""Headers of safetensors files, read from strangers and written for libraries.

Nothing in a file is believed before it has been held against the file's size.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

from tbfast.errors import CheckpointError, brief
from tbfast.merging.dtypes import DTYPES, DType

_MOST_BYTES = 100_000_000  # of a header: what the safetensors library itself allows
_MOST_SIDE = 2**63
_FIELDS = ["dtype", "shape", "data_offsets"]


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies.

    Attributes:
        file: The file.
        dtype: Of its elements.
        shape: Sizes; empty for a scalar.
        begin: First byte in the file.
    """

    file: Path
    dtype: DType
    shape: tuple[int, ...]
    begin: int

    @property
    def elements(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def bytes(self) -> int:
        """Bytes of all elements."""
        return self.elements * self.dtype.width


@dataclass(frozen=True)
class Header:
    """What a safetensors file holds.

    Attributes:
        entries: Tensors by name, in the order of their bytes.
        digest: SHA-256 of the header, in hexadecimal digits.
    """

    entries: dict[str, Entry]
    digest: str


def read_header(file: Path) -> Header:
    """The tensors of a file, every number of the header checked.

    Raises:
        CheckpointError: Naming the file and the first fault.
        OSError: If the file cannot be read.
    """
    size = os.stat(file).st_size
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8:
            raise _damaged(file, f"has {size} bytes, too few for a header")
        if length == 0:
            raise _damaged(file, "claims a header of 0 bytes")
        if length > size - 8:
            raise _damaged(
                file, f"claims a header of {length} bytes, but the file has {size} bytes"
            )
        if length > _MOST_BYTES:
            raise _damaged(
                file, f"claims a header of {length} bytes, more than the {_MOST_BYTES} allowed"
            )
        text = stream.read(length)
    if len(text) < length:
        raise _damaged(file, f"ends after {8 + len(text)} bytes, in its header")
    try:
        content = json.loads(text.decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _damaged(file, f"has a header that is no valid JSON ({brief(error)})") from error
    if not isinstance(content, dict):
        raise _damaged(file, "has a header that is no object")
    metadata = content.pop("__metadata__", {})
    if not _is_object_of_strings(metadata):
        raise _damaged(file, "has a __metadata__ that does not map strings to strings")
    entries = {name: _entry(file, 8 + length, name, given) for name, given in content.items()}
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].begin, item[1].bytes)))
    _check_layout(file, entries, 8 + length, size)
    return Header(entries, hashlib.sha256(text).hexdigest())


def write_header(
    tensors: Iterable[tuple[str, DType, tuple[int, ...]]], metadata: Mapping[str, str]
) -> bytes:
    """The beginning of a file that holds these tensors one after the other."""
    content: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, dtype, shape in tensors:
        begin, end = end, end + prod(shape) * dtype.width
        content[name] = {"dtype": dtype.name, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # so that the data are aligned
    return len(text).to_bytes(8, "little") + text


def _entry(file: Path, data: int, name: str, given: Any) -> Entry:
    if not isinstance(given, dict) or sorted(given) != sorted(_FIELDS):
        raise _damaged(file, f"describes '{name}' by other fields than {_FIELDS}")
    if not isinstance(given["dtype"], str) or given["dtype"] not in DTYPES:
        raise CheckpointError.of(
            file,
            f"has '{name}' in the dtype {given['dtype']!r:.40}, which cannot be merged; known are "
            f"{', '.join(DTYPES)}",
        )
    dtype = DTYPES[given["dtype"]]
    shape, offsets = given["shape"], given["data_offsets"]
    if not _is_list_of_sizes(shape) or not _is_list_of_sizes(offsets) or len(offsets) != 2:
        raise _damaged(
            file, f"has '{name}' with shape {shape!r:.60} and data_offsets {offsets!r:.60}"
        )
    begin, end = offsets
    if end - begin != prod(shape) * dtype.width:
        raise _damaged(
            file,
            f"gives '{name}' {end - begin} bytes (data_offsets {offsets}), but its shape {shape} "
            f"of {dtype.name} takes {prod(shape) * dtype.width}",
        )
    return Entry(file, dtype, tuple(shape), data + begin)


def _check_layout(file: Path, entries: Mapping[str, Entry], data: int, size: int) -> None:
    """Refuse holes, overlaps, and data that the file does not hold or does not describe."""
    bounds = [("the header", data), *((n, e.begin + e.bytes) for n, e in entries.items())]
    for (before, end), (name, entry) in zip(bounds, entries.items(), strict=False):
        if entry.begin != end:
            what = "overlaps" if entry.begin < end else "leaves a hole after"
            raise _damaged(
                file, f"has '{name}' begin at byte {entry.begin}, which {what} '{before}' ({end})"
            )
    if bounds[-1][1] != size:
        state = "is truncated" if bounds[-1][1] > size else "is too long"
        raise _damaged(
            file, f"{state}: its header describes {bounds[-1][1]} bytes, the file has {size}"
        )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = sorted(name for name, _ in pairs)
        twice = next(a for a, b in pairwise(names) if a == b)
        raise ValueError(f"the key {twice!r:.60} is there twice")
    return found


def _is_object_of_strings(given: Any) -> bool:
    return isinstance(given, dict) and all(isinstance(value, str) for value in given.values())


def _is_list_of_sizes(given: Any) -> bool:
    return isinstance(given, list) and all(
        type(size) is int and 0 <= size < _MOST_SIDE for size in given
    )


def _damaged(file: Path, fault: str) -> CheckpointError:
    return CheckpointError.of(file, f"{fault}; download or save it again")
