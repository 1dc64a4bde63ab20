"""The sources of the Python standard library as bytes, divided by file."""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

# Packages that belong to an installation rather than to the library, or are long tables.
SKIPPED = {"site-packages", "dist-packages", "encodings", "idlelib", "pydoc_data", "test"}


@dataclass(frozen=True)
class Text:
    """Bytes of the files that train, and of two sets of other files, each (bytes,), uint8."""

    train: Tensor
    validation: Tensor
    test: Tensor


@lru_cache
def read() -> Text:
    """The text of this interpreter's library: of ten files eight train, one validates, one tests.

    Another version of Python has other files, and so other losses.
    """
    root = Path(sysconfig.get_path("stdlib"))
    found = {path.relative_to(root).as_posix(): path for path in root.glob("*.py")}
    found |= {path.relative_to(root).as_posix(): path for path in root.glob("*/*.py")}
    names = sorted(name for name in found if name.split("/")[0] not in SKIPPED)
    parts: tuple[list[bytes], ...] = ([], [], [])
    for index, name in enumerate(names):
        parts[{8: 1, 9: 2}.get(index % 10, 0)].append(found[name].read_bytes())
    return Text(*(torch.frombuffer(bytearray(b"".join(p)), dtype=torch.uint8) for p in parts))


def windows(source: Tensor, starts: Tensor, length: int) -> Tensor:
    """The pieces of a text that begin at ``starts``, (pieces, length), int64."""
    return source[starts[:, None] + torch.arange(length)].long()
