"""Models to be merged: safetensors files and folders of them, opened without reading a tensor."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from tbfast.errors import CheckpointError, brief
from tbfast.merging.header import Entry, read_header
from tbfast.names import PICKLE_SUFFIXES
from tbfast.shard_index import read_index

# What lies beside weights and belongs to the model.
_CARRIED = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".py")


@dataclass(frozen=True)
class Source:
    """A model on disk.

    Attributes:
        path: What was named.
        entries: Its tensors by name.
        digests: SHA-256 of the header of each file.
        config: config.json, if there is one; else empty.
        carried: Files beside the weights that belong to the model.
    """

    path: Path
    entries: dict[str, Entry]
    digests: dict[Path, str]
    config: dict[str, Any]
    carried: tuple[Path, ...]

    def fingerprint(self) -> list[tuple[str, int, int, str]]:
        """Of each file of weights its path, size, time of change and digest of the header."""
        found = []
        for file, digest in self.digests.items():
            stat = os.stat(file)
            found.append((str(file), stat.st_size, stat.st_mtime_ns, digest))
        return found


def open_source(path: str | os.PathLike[str]) -> Source:
    """Read the headers of a model's files.

    Args:
        path: A ``.safetensors`` file, a ``*.safetensors.index.json``, or a folder with one of these
            or with several ``.safetensors`` files.

    Raises:
        CheckpointError: If there is none, or it is damaged or hostile.
    """
    if not os.fspath(path):
        raise CheckpointError("the path of a checkpoint is empty; name a file or folder")
    path = Path(path)
    try:
        if path.is_dir():
            return _open_folder(path)
        if not path.exists():
            raise CheckpointError.of(path, "does not exist; check the path")
        if path.name.endswith(".index.json"):
            return _open_index(path, path)
        if path.suffix != ".safetensors":
            raise CheckpointError.of(path, f"is no .safetensors file; {_hint(path)}")
        return _source(path, [path], {})
    except OSError as error:
        raise CheckpointError.of(path, f"cannot be read ({brief(error)})") from error


def _open_folder(folder: Path) -> Source:
    found = sorted(folder.glob("*.safetensors.index.json"))
    if len(found) > 1:
        names = " and ".join(f"'{index.name}'" for index in found[:2])
        raise CheckpointError.of(folder, f"has more than one index, {names}; pass one of them")
    if found:
        return _open_index(found[0], folder)
    files = sorted(file for file in folder.glob("*.safetensors") if not file.is_dir())
    if not files:
        pickles = [file for file in sorted(folder.iterdir()) if file.suffix in PICKLE_SUFFIXES]
        hint = _hint(pickles[0]) if pickles else "pass the folder that holds the weights"
        raise CheckpointError.of(folder, f"has no .safetensors file; {hint}")
    return _source(folder, files, {})


def _open_index(index: Path, path: Path) -> Source:
    shards, metadata = read_index(index)
    files = [_inside(index, shard) for shard in sorted(set(shards.values()))]
    source = _source(path, files, {name: index.parent / shard for name, shard in shards.items()})
    _check_total(index, metadata, source)
    return source


def _check_total(index: Path, metadata: Any, source: Source) -> None:
    """Warn of a wrong sum: the tensors are all there, but who wrote it meant others."""
    stated = metadata.get("total_size") if isinstance(metadata, dict) else None
    total = sum(entry.bytes for entry in source.entries.values())
    if stated is not None and stated != total:
        message = f"gives its tensors {stated!r:.40} bytes, but they have {total}; is one missing?"
        warnings.warn(str(CheckpointError.of(index, message)), stacklevel=2)


def _inside(index: Path, shard: str) -> Path:
    """The file that an index names, which must be a bare name of a file beside it."""
    windows = PureWindowsPath(shard)
    if (
        not shard
        or "\0" in shard
        or shard in (".", "..")
        or windows.name != shard
        or PurePosixPath(shard).name != shard
    ):
        raise CheckpointError.of(
            index,
            f"names the shard {shard!r}, which is no name of a file beside it; it is broken or "
            "hostile, do not use it",
        )
    file = index.parent / shard
    if not file.is_file():  # a link to a file is one: download caches are made of them
        raise CheckpointError.of(index, f"names the shard '{shard}', which is missing; download it")
    return file


def _source(path: Path, files: list[Path], weight_map: Mapping[str, Path]) -> Source:
    entries: dict[str, Entry] = {}
    digests = {}
    for file in files:
        header = read_header(file)
        digests[file] = header.digest
        for name, entry in header.entries.items():
            if name in entries:
                raise CheckpointError.of(
                    path,
                    f"has the tensor '{name}' in '{entries[name].file.name}' and in '{file.name}'; "
                    "keep one of these files",
                )
            entries[name] = entry
    for name, file in weight_map.items():
        if name not in entries or entries[name].file != file:
            raise CheckpointError.of(
                path,
                f"has an index that places '{name}' in '{file.name}', which does not hold it; "
                "download both again",
            )
    if weight_map and (extra := entries.keys() - weight_map.keys()):
        raise CheckpointError.of(
            path, f"has '{min(extra)}' in a shard but not in its index; download both again"
        )
    folder = path if path.is_dir() else path.parent
    if not entries:
        raise CheckpointError.of(path, "holds no tensors")
    is_folder = path.is_dir() or bool(weight_map)
    config = _config(folder / "config.json") if is_folder else {}
    carried = [
        file
        for file in (sorted(folder.iterdir()) if is_folder else [])
        if file.is_file()
        and file.suffix in _CARRIED
        and not file.name.endswith(".index.json")
        and file.name not in ("config.json", "merge_report.json")
    ]
    return Source(path, entries, digests, config, tuple(carried))


def _config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError.of(file, f"is no valid JSON ({brief(error)})") from error
    if not isinstance(content, dict):
        raise CheckpointError.of(file, "is no object; download it again")
    return content


def _hint(file: Path) -> str:
    if file.suffix in PICKLE_SUFFIXES:
        return (
            f"'{file.name}' is a pickle, which may run code and is not opened: load it where you "
            "trust it and save it with safetensors"
        )
    return "known are .safetensors files, their index.json, and folders of them"
