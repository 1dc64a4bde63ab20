"""Warnings of what may be meant, but is more likely a mistake."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, BinaryIO

from tbfast.merging.header import Entry
from tbfast.merging.inputs import Source
from tbfast.merging.methods import METHODS, Method
from tbfast.merging.plan import Plan

_PROBE = 1 << 12  # bytes of each tensor that are compared first: where models differ, they do there
_PIECE = 1 << 20

_DIFFERENCES = ("weights", "density", "scale")
_USED = {
    "select": ("weights", "resample"),
    "linear": ("weights",),
    "task": ("weights", "scale"),
    "slerp": ("t",),
    "ties": _DIFFERENCES,
    "dare_linear": (*_DIFFERENCES, "rescale"),
    "dare_ties": (*_DIFFERENCES, "rescale"),
}
_OPTIONS = {option for options in _USED.values() for option in options}


def warn_of_repeats(models: Sequence[Any], base: Any, *, stacklevel: int) -> None:
    """Of a path that is there twice."""
    seen = {os.path.realpath(base): "is the base itself"} if base is not None else {}
    for path in models:
        real = os.path.realpath(path)
        if real in seen:
            message = f"model '{path}' {seen[real]}; is it meant to be?"
            warnings.warn(message, stacklevel=stacklevel + 1)
        seen[real] = "is there twice"


def warn_of_copies(plan: Plan, *, stacklevel: int) -> None:
    """Of a model in another place that has changed nothing."""
    if plan.base is None:
        return
    for model in plan.models:
        is_base = os.path.realpath(model.path) == os.path.realpath(plan.base.path)
        if not is_base and _are_equal(model, plan.base):
            message = f"model '{model.path}' equals the base in every bit; is it meant to?"
            warnings.warn(message, stacklevel=stacklevel + 1)


def warn_of_idle(
    methods: Sequence[tuple[str, Method | None]], plan: Plan, *, stacklevel: int
) -> None:
    """Of patterns that match no tensor."""
    names = [tensor.name for shard in plan.shards for tensor in shard.tensors]
    for pattern, _ in methods:
        if not any(fnmatchcase(name, pattern) for name in names):
            message = f"{pattern!r} is the name of no tensor; is it misspelt?"
            warnings.warn(message, stacklevel=stacklevel + 1)


def warn_of_unused(given: Mapping[str, Any], *, stacklevel: int) -> None:
    """Of options that no method uses.

    Args:
        given: Arguments of :func:`tbfast.merge_checkpoints` that a user has named.
        stacklevel: 1 for the caller.
    """
    method = given.get("method", "select")
    overrides = given.get("overrides", ())
    methods = [method, *(override.get("method", method) for override in overrides)]
    found = [(option, methods, "") for option in given]
    for override, name in zip(overrides, methods[1:], strict=True):
        where = f" for {override.get('match')!r}"
        found += [(option, [name], where) for option in override]
    for option, by, where in found:
        if option in _OPTIONS and not _any_uses(by, option):
            names = list(dict.fromkeys(by))
            use = "do not use it" if len(names) > 1 else "does not use it"
            message = f"{option}{where} changes nothing: {' and '.join(names)} {use}"
            warnings.warn(message, stacklevel=stacklevel + 1)


def _any_uses(methods: Iterable[str], option: str) -> bool:
    return any(method not in METHODS or option in _USED[method] for method in methods)


def _are_equal(one: Source, other: Source) -> bool:
    """Whether two models hold the same tensors, bit for bit; cheap where they do not."""
    if one.entries.keys() != other.entries.keys():
        return False
    pairs = [(entry, other.entries[name]) for name, entry in one.entries.items()]
    if any((a.dtype, a.shape) != (b.dtype, b.shape) for a, b in pairs):
        return False
    try:
        return _hold_the_same(one, other, pairs)
    except OSError:
        return False  # who merges them will say what is wrong


def _hold_the_same(one: Source, other: Source, pairs: list[tuple[Entry, Entry]]) -> bool:
    with ExitStack() as stack:
        files: dict[Path, BinaryIO] = {}
        for file in (*one.digests, *other.digests):
            files[file] = stack.enter_context(open(file, "rb", buffering=0))

        def bits(entry: Entry, begin: int, end: int) -> bytes:
            files[entry.file].seek(entry.begin + begin)
            return files[entry.file].read(min(end, entry.bytes) - begin)

        def alike(a: Entry, b: Entry, begin: int, end: int) -> bool:
            return bits(a, begin, end) == bits(b, begin, end)

        return all(alike(a, b, 0, _PROBE) for a, b in pairs) and all(
            alike(a, b, begin, begin + _PIECE)
            for a, b in pairs
            for begin in range(0, a.bytes, _PIECE)
        )
