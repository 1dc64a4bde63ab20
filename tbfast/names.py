"""Names of parameters and files, and words for how many there are."""

from __future__ import annotations

import re

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")  # of files that torch.save writes


def natural(name: str) -> str:
    """Sorts ``layer.2`` before ``layer.10``."""
    return re.sub(r"\d+", lambda digits: digits[0].zfill(12), name)


def counted(number: int, noun: str) -> str:
    """``1 file`` or ``3 files``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
