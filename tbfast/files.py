"""Output files that are complete or absent."""

from __future__ import annotations

import os
from pathlib import Path

PathLike = str | os.PathLike[str]


def write_whole(path: PathLike, content: str | bytes) -> None:
    """Write a file so that no reader ever sees half of it.

    The content goes to a temporary file beside the target, which then takes the target's name.
    A target that is no regular file (``/dev/stdout``, a pipe) is written to directly. Text is
    UTF-8; what UTF-8 cannot hold is written as an escape.

    Raises:
        OSError: If the folder is missing or not writable.
    """
    # The real path: replacing a link would leave the file it points to as it was.
    target = _target(path)
    data = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    if _is_stream(target):
        target.write_bytes(data)
        return
    check_writable(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        temporary.replace(target)
    except OSError as error:
        raise OSError(
            f"cannot write '{path}': {error.strerror or error}; choose another place"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _target(path: PathLike) -> Path:
    """What is written: the file behind a link, but a device or pipe by its own name."""
    given = Path(path)
    return given if given.exists() and not given.is_file() else Path(os.path.realpath(path))


def _is_stream(target: Path) -> bool:
    """Whether the target is a device or a pipe, which cannot be replaced."""
    return target.exists() and not (target.is_file() or target.is_dir())


def check_writable(path: PathLike) -> None:
    """Refuse an output path that could not be written, before the work that fills it.

    Raises:
        OSError: One line that names the path and the remedy.
    """
    target = _target(path)
    if _is_stream(target):
        return
    folder = target.parent
    if target.is_dir():
        raise IsADirectoryError(f"cannot write '{path}': it is a folder; name a file in it")
    if not folder.is_dir():
        raise FileNotFoundError(
            f"cannot write '{path}': there is no folder '{folder}'; create it first"
        )
    # A new file replaces the old one, so the folder's permission counts, and the file's as well:
    # a file made read-only is meant to stay.
    if not os.access(folder, os.W_OK) or (target.exists() and not os.access(target, os.W_OK)):
        raise PermissionError(f"cannot write '{path}': permission denied; choose another place")
