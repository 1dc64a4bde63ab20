"""Warnings of what may be meant, but is more likely a mistake."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from tbfast.merging.header import Entry
from tbfast.merging.inputs import Source
from tbfast.merging.jobs import descriptors
from tbfast.merging.methods import OPTIONS, Method
from tbfast.merging.plan import Plan

_PROBE = 1 << 12  # bytes of each tensor that are compared first: where models differ, they do there
_PIECE = 1 << 20
_ALL = {option for options in OPTIONS.values() for option in options}


def warn_of_repeats(models: Sequence[Any], base: Any) -> None:
    """Of a path that is there twice."""
    seen = {os.path.realpath(base): "is the base itself"} if base is not None else {}
    for path in models:
        real = os.path.realpath(path)
        if real in seen:
            message = f"model '{path}' {seen[real]}; is it meant to be?"
            warnings.warn(message, stacklevel=3)
        seen[real] = "is there twice"


def warn_of_copies(plan: Plan) -> None:
    """Of a model in another place that has changed nothing."""
    if plan.base is None:
        return
    for model in plan.models:
        is_base = os.path.realpath(model.path) == os.path.realpath(plan.base.path)
        if not is_base and _are_equal(model, plan.base):
            message = f"model '{model.path}' equals the base in every bit; is it meant to?"
            warnings.warn(message, stacklevel=3)


def warn_of_idle(methods: Sequence[tuple[str, Method | None]], plan: Plan) -> None:
    """Of patterns that match no tensor."""
    names = [tensor.name for shard in plan.shards for tensor in shard.tensors]
    for pattern, _ in methods:
        if not any(fnmatchcase(name, pattern) for name in names):
            message = f"{pattern!r} is the name of no tensor; is it misspelt?"
            warnings.warn(message, stacklevel=3)


def warn_of_unused(given: Mapping[str, Any]) -> None:
    """Of options that no method uses.

    Args:
        given: Arguments of :func:`tbfast.merge_checkpoints` that a user has named.
    """
    method = given.get("method", "select")
    overrides = given.get("overrides", ())
    methods = [method, *(override.get("method", method) for override in overrides)]
    found = [(option, methods, "") for option in given]
    for override, name in zip(overrides, methods[1:], strict=True):
        where = f" for {override.get('match')!r}"
        found += [(option, [name], where) for option in override]
    for option, by, where in found:
        if option in _ALL and not any(_uses(name, option) for name in by):
            names = list(dict.fromkeys(by))
            use = "do not use it" if len(names) > 1 else "does not use it"
            message = f"{option}{where} changes nothing: {' and '.join(names)} {use}"
            warnings.warn(message, stacklevel=3)


def _uses(method: str, option: str) -> bool:
    return method not in OPTIONS or option in OPTIONS[method]


def _are_equal(one: Source, other: Source) -> bool:
    """Whether two models hold the same tensors, bit for bit; cheap where they do not."""
    if one.entries.keys() != other.entries.keys():
        return False
    pairs = [(entry, other.entries[name]) for name, entry in one.entries.items()]
    if any((a.dtype, a.shape) != (b.dtype, b.shape) for a, b in pairs):
        return False
    with descriptors() as descriptor:

        def bits(entry: Entry, begin: int, end: int) -> bytes:
            file = descriptor(entry.file)
            os.lseek(file, entry.begin + begin, os.SEEK_SET)
            return os.read(file, min(end, entry.bytes) - begin)

        def are_alike(a: Entry, b: Entry, begin: int, size: int) -> bool:
            return bits(a, begin, begin + size) == bits(b, begin, begin + size)

        try:
            return all(are_alike(a, b, 0, _PROBE) for a, b in pairs) and all(
                are_alike(a, b, begin, _PIECE)
                for a, b in pairs
                for begin in range(0, a.bytes, _PIECE)
            )
        except OSError:
            return False  # who merges them will say what is wrong
