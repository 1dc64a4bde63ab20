"""Names of parameters and files."""

from __future__ import annotations

import re


def natural(name: str) -> str:
    """Sorts ``layer.2`` before ``layer.10``."""
    return re.sub(r"\d+", lambda digits: digits[0].zfill(12), name)
