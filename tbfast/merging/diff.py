"""What fine-tuning has changed: ``diff_checkpoints``."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tbfast import _native
from tbfast.errors import CheckpointError
from tbfast.merging.inputs import Source, open_source
from tbfast.merging.jobs import at, descriptors, faults, job
from tbfast.merging.methods import MOST_MODELS, copying, make_method
from tbfast.names import natural
from tbfast.progress import Progress, ticking

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class TensorDiff:
    """How models differ from their base in one tensor, or in all of some.

    Attributes:
        name: Of the tensor.
        shape: Its sizes.
        elements: Number of elements.
        changed: Share of the elements of each model that have other bits than the base's.
        unchanged: Share of the elements in which every model has the base's bits: what resampling
            cannot change.
        norms: Euclidean norm of each model's difference to the base; NaN where it is not finite.
            Empty for integers.
        cosines: Of the angles between the differences, (models, models); NaN where one is zero or
            not finite. Empty for integers.
        nan_count: Elements of each model that are NaN or infinite.
    """

    name: str
    shape: tuple[int, ...]
    elements: int
    changed: list[float]
    unchanged: float
    norms: list[float]
    cosines: list[list[float]]
    nan_count: list[int]

    @property
    def cosine(self) -> float:
        """Mean cosine of the pairs of models; NaN if there is none."""
        count = len(self.cosines)
        pairs = [self.cosines[i][j] for i in range(count) for j in range(i)]
        return sum(pairs) / len(pairs) if pairs else math.nan

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts; None for NaN, which JSON lacks."""
        content = vars(self) | {"cosine": self.cosine, "shape": list(self.shape)}
        return {name: _without_nan(value) for name, value in content.items()}


def diff_checkpoints(
    models: Sequence[PathLike],
    base: PathLike,
    *,
    threads: int | None = None,
    progress: Progress = None,
) -> list[TensorDiff]:
    """Compare fine-tuned models with their base, tensor by tensor, streamed from their files.

    Args:
        models: One or more ``.safetensors`` files, index files or folders.
        base: What they were tuned from, in the same dtypes.
        threads: Number of threads; None for ``TBFAST_NUM_THREADS`` or all cores.
        progress: None, True for a bar, or a callable ``(done, total, name)``.

    Returns:
        One record for each tensor that all have, ordered by name.

    Warns:
        UserWarning: If there are others.

    Raises:
        CheckpointError: If a model is damaged, shapes or dtypes differ, or no name is in all.
        ValueError: If there is no model, or more than 32.
    """
    if isinstance(models, (str, os.PathLike)) or not 1 <= len(models) <= MOST_MODELS:
        raise ValueError(f"need 1 to {MOST_MODELS} models, got {models!r}")
    sources = [open_source(path) for path in [*models, base]]
    names = set.intersection(*(set(source.entries) for source in sources))
    if not names:
        raise CheckpointError.of(
            models[0], f"and '{base}' have no name of a tensor in common; is it tuned from it?"
        )
    if others := set[str]().union(*(source.entries for source in sources)) - names:
        warnings.warn(
            f"left out: {len(others)} tensors that are not in all models and the base, the first "
            f"'{min(others, key=natural)}'",
            stacklevel=2,
        )
    found = []
    with descriptors() as descriptor, ticking(progress, "comparing", len(names)) as tick:
        for done, name in enumerate(sorted(names, key=natural), 1):
            found.append(_difference(name, sources, descriptor, threads or _native.num_threads()))
            tick(done, len(names), name)
    return found


def total(diffs: Iterable[TensorDiff]) -> TensorDiff:
    """All tensors as one, under the name ``all``."""
    diffs = [diff for diff in diffs if diff.elements]
    numbers = [diff for diff in diffs if diff.norms]
    count = sum(diff.elements for diff in diffs)
    models = len(diffs[0].changed) if diffs else 0
    every = range(models)
    norms = [math.sqrt(sum(d.norms[i] ** 2 for d in numbers)) for i in every]
    inner = [[sum(_inner(d, i, j) for d in numbers) for j in every] for i in every]
    return TensorDiff(
        "all",
        (count,),
        count,
        [sum(d.changed[i] * d.elements for d in diffs) / count for i in every],
        sum(d.unchanged * d.elements for d in diffs) / count if count else math.nan,
        norms,
        [[_ratio(inner[i][j], norms[i] * norms[j]) for j in every] for i in every],
        [sum(d.nan_count[i] for d in diffs) for i in every],
    )


def _inner(diff: TensorDiff, i: int, j: int) -> float:
    size = diff.norms[i] * diff.norms[j]
    return diff.cosines[i][j] * size if size else 0.0


def _difference(name: str, sources: Sequence[Source], descriptor: Any, threads: int) -> TensorDiff:
    entries = [source.entries[name] for source in sources]
    first = entries[-1]
    for source, entry in zip(sources, entries, strict=True):
        if entry.shape != first.shape or entry.dtype != first.dtype:
            raise CheckpointError.of(
                source.path,
                f"has '{name}' as {list(entry.shape)} of {entry.dtype.name}, the base as "
                f"{list(first.shape)} of {first.dtype.name}; they are not tuned from it",
            )
    models = len(entries) - 1
    work = job(
        copying(make_method("select", models, has_base=True)),
        name,
        0,
        elements=first.elements,
        start=0,
        dtype=first.dtype,
        models=[at(entry, descriptor) for entry in entries[:-1]],
        base=at(first, descriptor),
        out=(0, -1, 0),
    )
    with faults([(name, [entry.file for entry in entries])]):
        ((changed, bad, products, unchanged),) = _native.differences([work], threads=threads)
    count = max(first.elements, 1)
    numbers = range(models if first.dtype.number else 0)
    squares = [products[i * models + i] for i in numbers]
    norms = [math.sqrt(square) if square >= 0 else math.nan for square in squares]
    cosines = [
        [_ratio(products[max(i, j) * models + min(i, j)], norms[i] * norms[j]) for j in numbers]
        for i in numbers
    ]
    return TensorDiff(
        name,
        first.shape,
        first.elements,
        [number / count for number in changed],
        unchanged / count if first.elements else math.nan,
        norms,
        cosines,
        list(bad),
    )


def _without_nan(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _ratio(a: float, b: float) -> float:
    return a / b if b else math.nan
