"""Checkpoints as lazy mappings: one tensor in memory at a time, whatever the format.

Nothing in a checkpoint is trusted: pickles load with ``weights_only=True`` or not at all, an
index cannot reach outside its folder, and every fault is a :class:`CheckpointError` of one line.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from tbfast.errors import CheckpointError as CheckpointError  # also from here
from tbfast.errors import brief
from tbfast.names import PICKLE_SUFFIXES, natural
from tbfast.shard_index import read_index

_SUFFIXES = (".safetensors", *PICKLE_SUFFIXES)

# Keys under which training scripts nest the state dict of the model.
_NESTED = ("state_dict", "model_state_dict", "model", "module")

# A file is memory-mapped and its pages count as ours once read; mapping it anew gives them back.
_REMAP_BYTES = 2**26

# What the safetensors library itself allows.
_MAX_HEADER = 100_000_000

_Reader = Callable[[str], Tensor]


class Checkpoint(Mapping[str, Tensor]):
    """Tensors of a checkpoint by name; ``checkpoint[name]`` reads one from the disk.

    Attributes:
        path: What was opened.
        keeps_order: Whether the names come in the order of the model. Only a ``torch.save`` file
            keeps it; elsewhere the names are sorted, with numbers as numbers.
    """

    def __init__(self, path: Path, files: dict[str, Path], *, keeps_order: bool) -> None:
        self.path = path
        self.keeps_order = keeps_order
        names = files if keeps_order else sorted(files, key=natural)
        self._files = {name: files[name] for name in names}
        self._open: tuple[Path, _Reader] | None = None
        self._mapped = 0

    def __getitem__(self, name: str) -> Tensor:
        """The tensor, on the CPU and in the dtype of the file.

        Raises:
            KeyError: If there is no such name.
            CheckpointError: If the file does not hold what its header says.
        """
        file = self._files[name]
        if self._open is None or self._open[0] != file or self._mapped > _REMAP_BYTES:
            self._open = None  # before the file is mapped again
            self._open, self._mapped = (file, _open_file(file)[1]), 0
        tensor = self._open[1](name)
        self._mapped += tensor.numel() * tensor.element_size()
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a checkpoint and read its list of tensors, not the tensors.

    Args:
        path: A ``.safetensors`` file; a ``.pt``, ``.pth``, ``.bin`` or ``.ckpt`` file of
            ``torch.save``, holding a dict of tensors, bare or under ``state_dict``,
            ``model_state_dict``, ``model`` or ``module``; an ``.index.json``; or a folder with
            an index or, failing that, with ``.safetensors`` files.

    Raises:
        CheckpointError: If there is none, or it is damaged, hostile or of no known format.
    """
    if not os.fspath(path):
        raise CheckpointError("the path of the checkpoint is empty; name a file or folder")
    path = Path(path)
    if not os.path.exists(path):
        raise CheckpointError.of(path, "does not exist; check the path")
    if path.is_dir():
        return _open_folder(path)
    if path.name.endswith(".index.json"):
        return _open_index(path)
    names, _ = _open_file(path)
    return Checkpoint(path, dict.fromkeys(names, path), keeps_order=path.suffix in PICKLE_SUFFIXES)


def _open_folder(folder: Path) -> Checkpoint:
    found = sorted(folder.glob("*.safetensors.index.json")) or sorted(folder.glob("*.index.json"))
    if len(found) > 1:
        names = " and ".join(f"'{index.name}'" for index in found[:2])
        raise CheckpointError.of(folder, f"has more than one index, {names}; pass one of them")
    if found:
        return _open_index(found[0])
    shards = sorted(file for file in folder.glob("*.safetensors") if not file.is_dir())
    if not shards:
        raise CheckpointError.of(
            folder, "is a folder without *.safetensors or *.index.json; pass the file itself"
        )
    files: dict[str, Path] = {}
    for shard in shards:
        for name in _open_file(shard)[0]:
            if name in files:
                raise CheckpointError.of(
                    folder,
                    f"has the tensor '{name}' in '{files[name].name}' and in '{shard.name}'; "
                    "pass one of these files",
                )
            files[name] = shard
    return Checkpoint(folder, files, keeps_order=False)


def _open_index(index: Path) -> Checkpoint:
    entries = {name: PurePosixPath(shard) for name, shard in read_index(index)[0].items()}
    held: dict[PurePosixPath, frozenset[str]] = {}
    for name, shard in entries.items():
        if shard not in held:
            held[shard] = frozenset(_open_file(_inside(index, shard))[0])
        if name not in held[shard]:
            raise CheckpointError.of(
                index, f"places '{name}' in '{shard}', which does not hold it; download both again"
            )
    files = {name: index.parent / shard for name, shard in entries.items()}
    return Checkpoint(index, files, keeps_order=False)


def _inside(index: Path, shard: PurePosixPath) -> Path:
    # Judged by the words, not resolved: the shards of a download cache are links to elsewhere.
    windows = PureWindowsPath(shard)
    if shard.is_absolute() or windows.drive or windows.root or ".." in windows.parts:
        raise CheckpointError.of(
            index,
            f"points outside its folder, to '{shard}'; it is broken or hostile, do not use it",
        )
    file = index.parent / shard
    if not os.path.isfile(file):
        raise CheckpointError.of(index, f"names the shard '{shard}', which is missing; download it")
    return file


def _open_file(file: Path) -> tuple[list[str], _Reader]:
    """Names of the tensors of one file, and the function that reads one of them."""
    if file.suffix not in _SUFFIXES:
        raise CheckpointError.of(
            file, f"has the unknown extension '{file.suffix}'; known are {', '.join(_SUFFIXES)}"
        )
    try:
        size = file.stat().st_size
        readable = file.is_file() and os.access(file, os.R_OK)
    except OSError as error:
        raise CheckpointError.of(file, f"cannot be read ({brief(error)})") from error
    if not readable:
        raise CheckpointError.of(file, "is no file that can be read; check its permissions")
    if size == 0:
        raise CheckpointError.of(file, "is empty (0 bytes); download it again")
    return _open_safetensors(file) if file.suffix == ".safetensors" else _open_torch(file)


def _open_safetensors(file: Path) -> tuple[list[str], _Reader]:
    try:
        handle: Any = safe_open(str(file), framework="pt")
        names = list(handle.keys())
    except Exception as error:
        fault = _safetensors_fault(file) or f"is no valid safetensors file ({brief(error)})"
        raise CheckpointError.of(file, f"{fault}; download or save it again") from error

    def read(name: str) -> Tensor:
        try:
            tensor: Tensor = handle.get_tensor(name)
        except Exception as error:
            raise CheckpointError.of(
                file, f"has a tensor '{name}' that cannot be read ({brief(error)})"
            ) from error
        return tensor

    return names, read


def _safetensors_fault(file: Path) -> str | None:
    """What is wrong with the lengths in a safetensors file, in numbers; None if nothing is."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            claim = f"claims a header of {length} bytes" if size >= 8 else "has no header"
            return f"{claim}, but the file has {size} bytes"
        if length > _MAX_HEADER:
            return f"claims a header of {length} bytes, more than the {_MAX_HEADER} allowed"
        try:
            header = json.loads(stream.read(length))
            ends = [t["data_offsets"][1] for n, t in header.items() if n != "__metadata__"]
            end = 8 + length + max(ends, default=0)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
            return None
    if end == size:
        return None
    state = "is truncated" if end > size else "is too long"
    return f"{state}: its header describes {end} bytes, the file has {size}"


def _open_torch(file: Path) -> tuple[list[str], _Reader]:
    with file.open("rb") as stream:
        zipped = stream.read(2) == b"PK"  # only the zip format of torch >= 1.6 can be mapped
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about old formats, which load nevertheless
            content = torch.load(str(file), map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:
        raise CheckpointError.of(file, _torch_fault(error)) from error
    tensors = _state_dict(content)
    if not tensors:
        raise CheckpointError.of(
            file,
            f"holds no dict of tensors but {type(content).__name__}; save model.state_dict()",
        )
    for name, tensor in tensors.items():
        # A view with stride 0 may claim any size; reading it would fill the memory.
        if tensor.layout == torch.strided and tensor.numel() > (
            tensor.untyped_storage().nbytes() // tensor.element_size()
        ):
            raise CheckpointError.of(
                file, f"has a tensor '{name}' of {tensor.numel()} elements but stores fewer"
            )
    return list(tensors), tensors.__getitem__


def _torch_fault(error: Exception) -> str:
    text = str(error)
    if match := re.search(r"(?i:unsupported) (?:global: )?GLOBAL (\S+)", text):
        return (
            f"is a pickle of more than weights ('{match[1]}') and was not loaded, because that "
            "could run its code; save model.state_dict() instead"
        )
    if "Weights only load failed" in text:
        return (
            "is a pickle of more than weights and was not loaded, because that could run its "
            "code; save model.state_dict() with torch.save instead"
        )
    if "TorchScript" in text:
        return "is a TorchScript archive; save model.state_dict() instead"
    return (
        f"is damaged or no torch.save file of weights ({brief(error)}); "
        "download it again or save model.state_dict()"
    )


def _state_dict(content: Any) -> dict[str, Tensor]:
    """The tensors of a state dict, wherever a training script nested it; empty if there is none."""
    if not isinstance(content, Mapping):
        return {}
    for key in _NESTED:
        if isinstance(content.get(key), Mapping) and (inner := _state_dict(content[key])):
            return inner
    return {
        name: value
        for name, value in content.items()
        if isinstance(name, str) and isinstance(value, Tensor)
    }
