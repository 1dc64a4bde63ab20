"""Errors that several parts of tbfast raise; needs neither torch nor NumPy."""

from __future__ import annotations

import os


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: one line with the file, the fault and the remedy."""

    @classmethod
    def of(cls, file: str | os.PathLike[str], fault: str) -> CheckpointError:
        """The error ``checkpoint '<file>' <fault>``."""
        return cls(" ".join(f"checkpoint '{file}' {fault}".split()))


def brief(error: BaseException) -> str:
    """The error in a few words: libraries add paragraphs, some with advice we do not share."""
    text = str(error).strip().partition("\n")[0][:120]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
