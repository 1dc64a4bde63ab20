"""``merge_checkpoints``."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from tbfast.errors import CheckpointError
from tbfast.merging.doubts import warn_of_copies, warn_of_idle, warn_of_repeats
from tbfast.merging.draws import check_seed
from tbfast.merging.dtypes import OUTPUT_DTYPES
from tbfast.merging.inputs import open_source
from tbfast.merging.methods import Method, make_method
from tbfast.merging.plan import Plan, Wishes, make_plan, parse_size
from tbfast.merging.ranks import Ranks, meeting
from tbfast.merging.report import MergeReport, Totals
from tbfast.merging.run import check_output, run
from tbfast.names import PICKLE_SUFFIXES
from tbfast.progress import Progress

PathLike = str | os.PathLike[str]
Patterns = str | Sequence[str]

_CHOICES = {
    "tied": ("auto", "untie", "drop"),
    "on_nan": ("error", "warn", "allow"),
    "on_missing": ("error", "base", "skip"),
}
_OTHER_FORMATS = (*PICKLE_SUFFIXES, ".gguf", ".h5", ".json", ".msgpack", ".npz", ".onnx")


def merge_checkpoints(
    models: Sequence[PathLike],
    out: PathLike,
    *,
    method: str = "select",
    base: PathLike | None = None,
    weights: Sequence[float] | None = None,
    seed: int = 0,
    resample: str | int = "auto",
    density: float = 0.5,
    scale: float = 1.0,
    t: float = 0.5,
    rescale: str = "paper",
    dtype: str | None = None,
    shard_size: str | int = "5GB",
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    overrides: Sequence[Mapping[str, Any]] = (),
    tied: str = "auto",
    on_nan: str = "error",
    on_missing: str = "error",
    threads: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress = None,
    distributed: bool = True,
) -> MergeReport:
    """Merge fine-tuned models, from files to files, at about the speed of copying one.

    The same inputs, seed and options give the same bytes, whatever the shards of the inputs, the
    order of tensors in them, or the number of threads. Memory does not grow with the models.

    Under ``torchrun``, or where ``torch.distributed`` is initialized, every process has to call
    this, with the same arguments and an output that all share. Each writes some of the files, so
    ``shard_size`` bounds how many can help; a single file is written by one. All get the report.

    Args:
        models: Two or more ``.safetensors`` files, index files or folders, of one architecture.
        out: A new ``*.safetensors`` file, or a new folder in the layout of Hugging Face, with the
            first model's configuration and tokenizer. It appears when it is complete.
        method: ``"select"``: each scalar parameter from one of the models, drawn by weight (Ju et
            al. 2024); copies bits, of any dtype. ``"linear"``: weighted average. ``"slerp"``: of
            two models, by tensor. With a base: ``"task"``: base + scale · Σ weight · (model -
            base); ``"ties"`` (Yadav et al. 2023); ``"dare_linear"`` and ``"dare_ties"`` (Yu et al.
            2024). All but the first compute in float32 (float64 where an input is), in the order
            of the models, and round once.
        base: The model that the others were tuned from.
        weights: One for each model; equal ones by default. Made to add up to 1 for ``"select"`` and
            ``"linear"``.
        seed: Of the random numbers, from 0 to 2^64 - 1.
        resample: Of ``"select"``: ``"auto"``: with a base, a draw that equals the base is drawn
            again among the models that changed it; a number n: up to n further draws among all
            models; ``"off"``.
        density: Share of the differences that TIES keeps (the largest of each tensor; all that tie
            with the least) and DARE (at random).
        scale: Of the merged differences.
        t: Of SLERP, 0 for the first model, 1 for the second.
        rescale: What DARE multiplies the kept differences by: ``"paper"``: 1 / density; ``"l1"``:
            what restores the L1 norm of the tensor; ``"none"``.
        dtype: ``"bf16"``, ``"f16"`` or ``"f32"`` for floating tensors; None keeps theirs.
        shard_size: Most bytes of a file of a folder.
        include: Globs of names to merge; others are taken from the base, else the first model.
        exclude: Globs of names not to merge.
        overrides: Mappings with ``match``, a glob, and any of method, weights, resample, density,
            scale, t and rescale for tensors of such names; the first that matches counts.
        tied: Where some models share embedding and head and others do not: ``"auto"``: an error;
            ``"untie"``: all get a head; ``"drop"``: none.
        on_nan: ``"error"``, ``"warn"`` or ``"allow"`` for NaN and infinity.
        on_missing: For tensors that not all models have: ``"error"``; ``"base"``: of the base, for
            the models without; ``"skip"``: left out.
        threads: Number of threads; None for ``TBFAST_NUM_THREADS`` or all cores, which processes
            of one machine share.
        resume: Go on with what an interrupted run with these options has finished.
        overwrite: Replace an output that exists.
        dry_run: Check everything, write nothing.
        progress: None, True for a bar, or a callable ``(done, total, name)``; of the first process.
        distributed: False merges in this process alone, wherever it runs.

    Raises:
        CheckpointError: A ValueError: a model is damaged, hostile, or does not fit the others.
        ValueError: An option is out of range.
        OSError: The output cannot be written.
        RuntimeError: Another merge writes the output; or, of several processes, one has ended, did
            not come, or was called otherwise. Where one fails, all raise, naming it.
    """
    if isinstance(models, (str, os.PathLike)) or len(models) < 2:
        raise ValueError(f"need two or more models, got {models!r}")
    for name, given in (("tied", tied), ("on_nan", on_nan), ("on_missing", on_missing)):
        if given not in _CHOICES[name]:
            raise ValueError(f"{name} must be one of {', '.join(_CHOICES[name])}; got {given!r}")
    if dtype is not None and dtype not in OUTPUT_DTYPES:
        raise ValueError(f"dtype must be None or one of {', '.join(OUTPUT_DTYPES)}; got {dtype!r}")
    check_seed(seed)
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be 1 or more, got {threads}")
    if on_missing == "base" and base is None:
        raise ValueError("on_missing='base' needs base=")
    options: dict[str, Any] = dict(
        weights=weights, resample=resample, density=density, scale=scale, t=t, rescale=rescale
    )
    default = make_method(method, len(models), has_base=base is not None, **options)
    warn_of_repeats(models, base)
    methods = _methods(default, len(models), base is not None, options, include, exclude, overrides)
    target = Path(out)
    file = target.name if target.suffix == ".safetensors" else None
    wishes = Wishes(methods, dtype, parse_size(shard_size), tied, on_missing, file)

    def planned() -> Plan:
        _check_free(target, overwrite)
        sources = [open_source(path) for path in models]
        plan = make_plan(sources, open_source(base) if base else None, seed, wishes, default)
        check_output(plan, target)
        return plan

    with meeting() if distributed else nullcontext(Ranks()) as ranks:
        workers = threads or ranks.threads()
        plan = ranks.same(planned, lambda p: f"{p.digest()} {target} {on_nan} {resume} {dry_run}")
        if ranks.number == 0:
            warn_of_idle(methods, plan)
            warn_of_copies(plan)
        if dry_run:
            return MergeReport.of(plan, Totals(len(models)), 0.0, workers)
        return run(
            plan,
            ranks,
            target,
            is_file=file is not None,
            on_nan=on_nan,
            threads=workers,
            resume=resume,
            progress=progress,
        )


def _methods(
    default: Method,
    models: int,
    has_base: bool,
    options: dict[str, Any],
    include: Patterns | None,
    exclude: Patterns | None,
    overrides: Sequence[Mapping[str, Any]],
) -> tuple[tuple[str, Method | None], ...]:
    """Patterns and methods, the first that matches counts."""
    found: list[tuple[str, Method | None]] = [(p, None) for p in _patterns(exclude)]
    for override in overrides:
        given = dict(override)
        pattern = given.pop("match", None)
        if not isinstance(pattern, str):
            raise ValueError(f"an override needs match=, a glob of names; got {override!r}")
        name = given.pop("method", default.name)
        if unknown := given.keys() - options.keys():
            raise ValueError(
                f"unknown option {min(unknown)!r} of the override {pattern!r}; known are method, "
                f"{', '.join(options)}"
            )
        inherited = {**options, "resample": "auto"} if name != default.name else options
        found.append((pattern, make_method(name, models, has_base=has_base, **inherited | given)))
    wanted = _patterns(include)
    found += [(p, default) for p in (wanted if include is not None else ["*"])]
    return tuple(found)


def _patterns(given: Patterns | None) -> list[str]:
    if given is None:
        return []
    return [given] if isinstance(given, str) else list(given)


def _check_free(out: Path, overwrite: bool) -> None:
    if out.suffix in _OTHER_FORMATS:
        raise ValueError(f"cannot write '{out}': name a .safetensors file or a folder")
    if out.suffix == ".safetensors" and out.is_dir():
        raise IsADirectoryError(f"cannot write '{out}': it is a folder; name a file in it")
    exists = any(out.iterdir()) if out.is_dir() else out.exists()
    if exists and not overwrite:
        raise FileExistsError(f"'{out}' exists; choose another output or use overwrite")
    if exists and out.is_file() and out.suffix != ".safetensors":
        raise CheckpointError(f"'{out}' is a file, but a folder is to be written; name another")
