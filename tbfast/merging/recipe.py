"""Recipes: the options of a merge as a YAML or JSON file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tbfast.errors import brief

_Kind = tuple[str, Callable[[Any], bool]]

_MOST_BYTES = 10_000_000

_TEXT = "a text", lambda value: isinstance(value, str)
_TEXTS = "a list of texts", lambda value: _holds(value, str)
_GLOBS = "a glob or a list of globs", lambda value: isinstance(value, str) or _holds(value, str)
_NUMBER = "a number", lambda value: _is(value, (int, float))
_NUMBERS = "a list of numbers", lambda value: _holds(value, (int, float))
_WHOLE = "a whole number", lambda value: _is(value, int)
_WHOLE_OR_TEXT = "a whole number or a text", lambda value: _is(value, (int, str))
_FLAG = "true or false", lambda value: isinstance(value, bool)
_OBJECTS = "a list of objects", lambda value: _holds(value, dict)

_OF_A_TENSOR: dict[str, _Kind] = {
    "method": _TEXT,
    "weights": _NUMBERS,
    "resample": _WHOLE_OR_TEXT,
    "density": _NUMBER,
    "scale": _NUMBER,
    "t": _NUMBER,
    "rescale": _TEXT,
}
_OF_A_MERGE: dict[str, _Kind] = _OF_A_TENSOR | {
    "models": _TEXTS,
    "out": _TEXT,
    "base": _TEXT,
    "seed": _WHOLE,
    "dtype": _TEXT,
    "shard_size": _WHOLE_OR_TEXT,
    "include": _GLOBS,
    "exclude": _GLOBS,
    "tensors": _OBJECTS,
    "tied": _TEXT,
    "on_nan": _TEXT,
    "on_missing": _TEXT,
    "threads": _WHOLE,
    "resume": _FLAG,
    "overwrite": _FLAG,
    "dry_run": _FLAG,
    "distributed": _FLAG,
}


def read_recipe(file: Path) -> dict[str, Any]:
    """Arguments of :func:`tbfast.merge_checkpoints`; ``tensors`` stands for ``overrides``.

    Args:
        file: ``.json``, ``.yaml`` or ``.yml``, an object of these names. Paths in it are relative
            to its folder. Null stands for what is not given.

    Raises:
        ValueError: If it is no such object, or needs PyYAML, which is not installed.
        OSError: If it cannot be read.
    """
    if not file.is_file():
        raise FileNotFoundError(f"recipe '{file}' is no file; check the path")
    if file.stat().st_size > _MOST_BYTES:
        raise ValueError(f"recipe '{file}' has more than {_MOST_BYTES} bytes; it is none")
    content = _checked(_parsed(file), _OF_A_MERGE, f"recipe '{file}'")
    if "tensors" in content:
        known = {"match": _TEXT, **_OF_A_TENSOR}
        content["overrides"] = [
            _checked(given, known, f"entry {number} of the tensors of recipe '{file}'")
            for number, given in enumerate(content.pop("tensors"), 1)
        ]
    for name in ("base", "out"):
        if name in content:
            content[name] = str(file.parent / content[name])
    if "models" in content:
        content["models"] = [str(file.parent / model) for model in content["models"]]
    return content


def _checked(content: Any, known: dict[str, _Kind], where: str) -> dict[str, Any]:
    """The options that are given, of the kinds they have to be."""
    if not isinstance(content, dict):
        raise ValueError(f"{where} holds no object of options")
    for name, value in content.items():
        if name not in known:
            names = ", ".join(sorted(known))
            raise ValueError(f"{where} has the unknown option {name!r}; known are {names}")
        if name == "resample" and value is False:
            content[name] = "off"  # how YAML 1.1 reads an off without quotes
        elif value is not None and not known[name][1](value):
            raise ValueError(f"{where}: {name} must be {known[name][0]}, got {value!r}")
    return {name: value for name, value in content.items() if value is not None}


def _is(value: Any, kind: type | tuple[type, ...]) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _holds(value: Any, kind: type | tuple[type, ...]) -> bool:
    return isinstance(value, list) and all(_is(item, kind) for item in value)


def _parsed(file: Path) -> Any:
    language, parse = ("JSON", json.loads) if file.suffix == ".json" else ("YAML", _yaml(file))
    content = file.read_bytes()
    try:
        return parse(content.decode("utf-8"))
    except RecursionError as error:
        raise ValueError(f"recipe '{file}' is nested too deeply") from error
    except Exception as error:
        raise ValueError(f"recipe '{file}' is no valid {language} ({brief(error)})") from error


def _yaml(file: Path) -> Callable[[str], Any]:
    try:
        from yaml import safe_load
    except ImportError:
        raise ValueError(
            f"recipe '{file}' needs PyYAML; 'pip install pyyaml', or write the recipe as JSON"
        ) from None
    loader: Callable[[str], Any] = safe_load
    return loader
