"""Recipes: the options of a merge as a YAML or JSON file."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

from tbfast.errors import brief

_MOST_BYTES = 10_000_000


def read_recipe(file: Path) -> dict[str, Any]:
    """Arguments of :func:`tbfast.merge_checkpoints`; ``tensors`` stands for ``overrides``.

    Args:
        file: ``.json``, ``.yaml`` or ``.yml``, an object of these names. Paths in it are relative
            to its folder.

    Raises:
        ValueError: If it is no such object, or needs PyYAML, which is not installed.
        OSError: If it cannot be read.
    """
    from tbfast.merging.api import merge_checkpoints

    if file.stat().st_size > _MOST_BYTES:
        raise ValueError(f"'{file}' has more than {_MOST_BYTES} bytes; it is no recipe")
    content = _parsed(file, file.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"'{file}' holds no object of options")
    if "tensors" in content:
        content["overrides"] = content.pop("tensors")
    known = set(inspect.signature(merge_checkpoints).parameters) - {"progress"}
    if unknown := content.keys() - known:
        names = sorted((known - {"overrides"}) | {"tensors"})
        raise ValueError(
            f"'{file}' has the unknown option {min(map(str, unknown))!r}; known are "
            f"{', '.join(names)}"
        )
    for name in ("base", "out"):
        if isinstance(content.get(name), str):
            content[name] = str(file.parent / content[name])
    if isinstance(content.get("models"), list):
        content["models"] = [str(file.parent / str(model)) for model in content["models"]]
    return content


def _parsed(file: Path, text: str) -> Any:
    try:
        if file.suffix == ".json":
            return json.loads(text)
        try:
            import yaml
        except ImportError:
            raise ValueError(
                f"'{file}' needs PyYAML; 'pip install pyyaml', or write the recipe as JSON"
            ) from None
        return yaml.safe_load(text)
    except RecursionError as error:
        raise ValueError(f"'{file}' is nested too deeply") from error
    except ValueError as error:
        if "PyYAML" in str(error):
            raise
        raise ValueError(f"'{file}' is no valid JSON ({brief(error)})") from error
    except Exception as error:
        raise ValueError(f"'{file}' is no valid YAML ({brief(error)})") from error
