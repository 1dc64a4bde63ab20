"""What a merge will do, decided and checked before a byte is written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from tbfast import __version__
from tbfast.errors import CheckpointError
from tbfast.merging.dtypes import DTYPES, OUTPUT_DTYPES, TORCH_NAMES, DType
from tbfast.merging.header import Entry, write_header
from tbfast.merging.inputs import Source
from tbfast.merging.methods import Method, copying
from tbfast.names import natural

_SHOWN = 5  # names in a message
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_NO_AVERAGE = "which cannot be averaged; exclude it or merge it with method='select'"
_VOCABULARY = ("embed", "lm_head", "wte", "wpe")


@dataclass(frozen=True)
class Tensor:
    """One tensor of the output.

    Attributes:
        name: Its name.
        key: The name that its random numbers are drawn by: another's where two are tied.
        dtype: Of the output.
        shape: Its sizes.
        method: How it is merged.
        models: Where it lies in each model.
        base: Where it lies in the base, if it is read.
        must_agree: Why it is an error if the models differ in it; empty if it is none.
    """

    name: str
    key: str
    dtype: DType
    shape: tuple[int, ...]
    method: Method
    models: tuple[Entry, ...]
    base: Entry | None
    must_agree: str = ""

    @property
    def elements(self) -> int:
        """Number of elements."""
        return self.models[0].elements

    @property
    def bytes(self) -> int:
        """Bytes of the output."""
        return self.elements * self.dtype.width


@dataclass(frozen=True)
class Shard:
    """One file of the output.

    Attributes:
        name: Of the file.
        header: Its beginning.
        tensors: What follows, end to end.
    """

    name: str
    header: bytes
    tensors: tuple[Tensor, ...]

    @property
    def bytes(self) -> int:
        """Size of the file."""
        return len(self.header) + sum(tensor.bytes for tensor in self.tensors)


@dataclass(frozen=True)
class Plan:
    """A merge.

    Attributes:
        models: The models.
        base: What they were tuned from, if it is used.
        seed: Of the random numbers.
        shards: Files of the output.
        config: config.json of the output; empty for none.
        carried: Files that are copied beside the weights.
    """

    models: tuple[Source, ...]
    base: Source | None
    seed: int
    shards: tuple[Shard, ...]
    config: dict[str, Any]
    carried: tuple[Path, ...]

    @property
    def bytes(self) -> int:
        """Size of the output's weights."""
        return sum(shard.bytes for shard in self.shards)

    @property
    def sources(self) -> list[Source]:
        """Everything that is read."""
        return [*self.models, *([self.base] if self.base else [])]

    def digest(self) -> str:
        """Of everything that decides what is written, and of the state of the files read."""
        what = [
            __version__,
            self.seed,
            [source.fingerprint() for source in self.sources],
            [
                [t.name, t.key, t.dtype.name, asdict(t.method)]
                for s in self.shards
                for t in s.tensors
            ],
            [[shard.name, hashlib.sha256(shard.header).hexdigest()] for shard in self.shards],
            self.config,
        ]
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Wishes:
    """What a user wants of the output.

    Attributes:
        methods: Patterns of names and how tensors of such a name are merged; the first that
            matches counts. None: taken from the base or else the first model, as they are.
        dtype: ``"f16"``, ``"bf16"``, ``"f32"`` for floating tensors, or None to keep theirs.
        shard_size: Most bytes of a file.
        tied: ``"auto"``, ``"untie"`` or ``"drop"``: see :func:`tbfast.merge_checkpoints`.
        on_missing: ``"error"``, ``"base"`` or ``"skip"``.
        file: Name of the output if it is one file, else None: a folder.
    """

    methods: tuple[tuple[str, Method | None], ...]
    dtype: str | None
    shard_size: int
    tied: str
    on_missing: str
    file: str | None


def make_plan(
    models: Sequence[Source], base: Source | None, seed: int, wishes: Wishes, method: Method
) -> Plan:
    """Decide for every tensor where it comes from and where it goes.

    Raises:
        CheckpointError: If the models do not fit together.
        ValueError: If no tensor is left to merge.
    """
    from tbfast.merging.quantized import with_scales
    from tbfast.merging.tied import tie

    _check_configs(models)
    entries, keys, is_tied = tie(models, base, wishes.tied)
    names = _names(models, entries, base, wishes.on_missing)
    tensors = with_scales(
        [
            _tensor(name, keys.get(name, name), models, entries, base, wishes, method)
            for name in sorted(names, key=natural)
        ]
    )
    if not tensors:
        raise ValueError("no tensor is in all models; there is nothing to merge")
    if all(_method(tensor.name, wishes.methods) is None for tensor in tensors):
        raise ValueError(
            f"include and exclude leave no tensor to merge; names are like '{tensors[0].name}'"
        )
    used = base if base and any(tensor.base for tensor in tensors) else None
    leader = models[0]
    config = _config(leader.config, tensors, is_tied)
    metadata = {"format": "pt", "tbfast_merge": _account(tensors, seed, len(models))}
    shards = _shards(tensors, wishes, metadata)
    carried = () if wishes.file else leader.carried
    return Plan(tuple(models), used, seed, shards, {} if wishes.file else config, carried)


def parse_size(text: str | int) -> int:
    """Bytes of ``"5GB"``, ``"800 MB"`` or a number.

    Raises:
        ValueError: If it is none.
    """
    if isinstance(text, int) and not isinstance(text, bool) and text > 0:
        return text
    compact = str(text).upper().replace(" ", "")
    digits = compact.rstrip("BKMGT")
    unit = compact[len(digits) :]
    try:
        size = int(float(digits) * _UNITS[unit])
    except (ValueError, KeyError, OverflowError):
        size = 0
    if size <= 0:
        raise ValueError(f"shard_size must be a size like '5GB' or '800MB', got {text!r}")
    return size


def _names(
    models: Sequence[Source],
    entries: Sequence[Mapping[str, Entry]],
    base: Source | None,
    on_missing: str,
) -> set[str]:
    every = set().union(*entries)
    common = set(every).intersection(*entries)
    if every == common or on_missing == "skip":
        return common
    in_base = set(base.entries) if base else set()
    if on_missing == "base" and every - common <= in_base:
        return every
    for model, mine in zip(models, entries, strict=True):
        missing = sorted(every - set(mine) - (in_base if on_missing == "base" else set()))
        if missing:
            shown = ", ".join(f"'{name}'" for name in missing[:_SHOWN])
            rest = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
            raise CheckpointError.of(
                model.path,
                f"lacks {shown}{rest}, which another model has; use on_missing='base' or 'skip', "
                "or check that the models were tuned from the same one",
            )
    raise AssertionError("unreachable")


def _tensor(
    name: str,
    key: str,
    models: Sequence[Source],
    entries: Sequence[Mapping[str, Entry]],
    base: Source | None,
    wishes: Wishes,
    default: Method,
) -> Tensor:
    in_base = base.entries.get(name) if base else None
    found = [mine.get(name, in_base) for mine in entries]
    mine = [entry for entry in found if entry is not None]
    first = mine[0]
    for model, entry in zip(models, mine, strict=True):
        _check_shape(name, first, entry, model)
    if in_base is not None and base is not None:
        _check_shape(name, first, in_base, base)
    method = _method(name, wishes.methods)
    dtype = _dtype(name, mine, wishes.dtype, method is None or method.name == "select")
    if method is None:
        source = in_base or first
        dtype = dtype if wishes.dtype else source.dtype
        return Tensor(name, key, dtype, first.shape, copying(default), (source,) * len(mine), None)
    if not first.dtype.computes and method.name != "select":
        # Numbers that cannot be averaged have to be the same.
        copies = copying(method)
        return Tensor(name, key, dtype, first.shape, copies, tuple(mine), first, _NO_AVERAGE)
    needs = method.needs_base or method.resample != "off"
    if needs and in_base is None:
        assert base is not None
        raise CheckpointError.of(
            base.path, f"lacks '{name}', which method={method.name!r} needs; exclude it"
        )
    if needs and in_base is not None and in_base.dtype.computes != first.dtype.computes:
        raise CheckpointError.of(
            in_base.file,
            f"has '{name}' in {in_base.dtype.name}, the models in {first.dtype.name}; exclude it",
        )
    return Tensor(name, key, dtype, first.shape, method, tuple(mine), in_base if needs else None)


def _method(name: str, methods: Sequence[tuple[str, Method | None]]) -> Method | None:
    return next((method for pattern, method in methods if fnmatchcase(name, pattern)), None)


def _check_shape(name: str, first: Entry, other: Entry, source: Source) -> None:
    if first.shape == other.shape:
        return
    hint = "they are not tuned from the same model"
    if any(word in name for word in _VOCABULARY) and first.shape[1:] == other.shape[1:]:
        hint = "the vocabularies differ: give all models the tokenizer of one"
    raise CheckpointError.of(
        source.path,
        f"has '{name}' with shape {list(other.shape)}, but '{first.file}' with "
        f"{list(first.shape)}; {hint}",
    )


def _dtype(name: str, entries: Sequence[Entry], wish: str | None, copies: bool) -> DType:
    first = entries[0].dtype
    if wish is not None and first.computes:
        return DTYPES[OUTPUT_DTYPES[wish]]
    for entry in entries:
        if entry.dtype != first:
            raise CheckpointError.of(
                entry.file,
                f"has '{name}' in {entry.dtype.name}, but '{entries[0].file}' in {first.name}; "
                "say what to write with dtype='bf16', 'f16' or 'f32'",
            )
    return first


def _check_configs(models: Sequence[Source]) -> None:
    first = models[0]
    for other in models[1:]:
        for field in ("architectures", "model_type", "num_hidden_layers", "hidden_size"):
            a, b = first.config.get(field), other.config.get(field)
            if first.config and other.config and a != b:
                raise CheckpointError.of(
                    other.path,
                    f"has {field}={b!r} in its config.json, but '{first.path}' has {a!r}; merge "
                    "models of one kind",
                )


def _config(
    given: dict[str, Any], tensors: Sequence[Tensor], is_tied: bool | None
) -> dict[str, Any]:
    config = dict(given)
    if not config:
        return config
    computed = [t for t in tensors if t.dtype.computes]
    kinds = {t.dtype.name for t in computed}
    for field in ("torch_dtype", "dtype"):
        if isinstance(config.get(field), str) and len(kinds) == 1:
            config[field] = TORCH_NAMES[kinds.pop()]
            kinds = {t.dtype.name for t in computed}
    if is_tied is not None:
        config["tie_word_embeddings"] = is_tied
    return config


def _account(tensors: Sequence[Tensor], seed: int, models: int) -> str:
    """What the metadata say of the merge: nothing that depends on paths or on files."""
    methods = []
    for tensor in tensors:
        method = asdict(tensor.method)
        if method not in methods:
            methods.append(method)
    content = {"version": __version__, "rng": "v1", "seed": seed, "models": models}
    return json.dumps(content | {"methods": methods}, sort_keys=True)


def _shards(
    tensors: Sequence[Tensor], wishes: Wishes, metadata: Mapping[str, str]
) -> tuple[Shard, ...]:
    groups: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and size + tensor.bytes > wishes.shard_size and not wishes.file:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.bytes
    shards = []
    for number, group in enumerate(groups, 1):
        name = wishes.file or "model.safetensors"
        if len(groups) > 1:
            name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        # Wide elements first: then all are aligned.
        group = sorted(group, key=lambda t: -t.dtype.width)
        header = write_header(((t.name, t.dtype, t.shape) for t in group), metadata)
        shards.append(Shard(name, header, tuple(group)))
    return tuple(shards)


def index_of(plan: Plan) -> str:
    """model.safetensors.index.json of several shards."""
    total = sum(tensor.bytes for shard in plan.shards for tensor in shard.tensors)
    names = {tensor.name: shard.name for shard in plan.shards for tensor in shard.tensors}
    ordered = dict(sorted(names.items(), key=lambda item: natural(item[0])))
    content = {"metadata": {"total_size": total}, "weight_map": ordered}
    return json.dumps(content, indent=2) + "\n"
