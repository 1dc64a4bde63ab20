"""The index of a sharded checkpoint, as Hugging Face writes it; needs neither torch nor NumPy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tbfast.errors import CheckpointError, brief

_MOST_BYTES = 256_000_000  # of a million tensors with names of 200 characters


def read_index(index: Path) -> tuple[dict[str, str], Any]:
    """Read a ``*.index.json``.

    Returns:
        The shard that the index gives for the name of each tensor, as it is written there, and
        what it has as metadata, or None.

    Raises:
        CheckpointError: If it cannot be read, is too large, or is of another form.
    """
    try:
        if (size := index.stat().st_size) > _MOST_BYTES:
            raise ValueError(f"{size} bytes are more than any has, {_MOST_BYTES}")
        content = json.loads(index.read_bytes())
        shards = dict(content["weight_map"].items())
        strange = [shard for shard in shards.values() if not isinstance(shard, str)]
        if strange:
            raise TypeError(f"{strange[0]!r:.40} is no name of a file")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise CheckpointError.of(
            index, f"is no index of shards ({brief(error)}); it needs a 'weight_map' of files"
        ) from error
    return shards, content.get("metadata")
