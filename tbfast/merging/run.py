"""Carries out a plan: shard by shard, complete or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from tbfast import _native
from tbfast.errors import CheckpointError
from tbfast.merging.header import Entry
from tbfast.merging.jobs import at, faults, job
from tbfast.merging.plan import Plan, Shard, Tensor, index_of
from tbfast.merging.report import MergeReport, Totals
from tbfast.merging.workplace import Workplace
from tbfast.progress import Progress, ticking

_TOGETHER = 1 << 28  # bytes of output between two looks at Ctrl-C


def run(
    plan: Plan,
    out: Path,
    *,
    is_file: bool,
    on_nan: str,
    threads: int,
    resume: bool,
    progress: Progress,
) -> MergeReport:
    """Write the output of a plan.

    Raises:
        CheckpointError: If an input is damaged, changes, or holds what ``on_nan`` refuses.
        OSError: If there is no room or no permission; finished files wait for ``resume``.
    """
    began = time.perf_counter()
    check_output(plan, out)
    digest, fingerprints = plan.digest(), [s.fingerprint() for s in plan.sources]
    totals = Totals(len(plan.models))
    place = Workplace(out, digest)
    entered = False
    try:
        with place.opened(resume):
            entered = True
            _check_room(plan, place)
            count = sum(len(shard.tensors) for shard in plan.shards)
            with ticking(progress, "merging", count) as tick:
                done = 0
                for shard in plan.shards:
                    if shard.name in place.finished:
                        totals.load(place.finished[shard.name]["totals"])
                        done += len(shard.tensors)
                        continue
                    mine = Totals(len(plan.models))
                    for tensors in _write(plan, shard, place, on_nan, threads, mine):
                        done += tensors
                        tick(done, count, shard.name)
                    place.finish(shard.name, {"totals": mine.to_dict()})
                    totals.load(mine.to_dict())
            if [source.fingerprint() for source in plan.sources] != fingerprints:
                raise CheckpointError(
                    "an input was changed while it was merged; merge again when it is complete"
                )
            report = MergeReport.of(plan, totals, time.perf_counter() - began)
            if not is_file:
                _write_companions(plan, place, report)
            place.publish(plan.shards[0].name if is_file else None)
    except (CheckpointError, ValueError):
        if entered and not (resume and place.finished):
            place.discard()
        raise
    except OSError as error:
        raise _in_words(error, out) from error
    return report


def check_output(plan: Plan, out: Path) -> None:
    """Refuse an output that would be written over an input, or where there is no folder for it."""
    real = Path(os.path.realpath(out))
    for source in plan.sources:
        for file in (source.path, *source.digests):
            other = Path(os.path.realpath(file))
            if real == other or real in other.parents or (file.is_dir() and other in real.parents):
                raise ValueError(
                    f"'{out}' is or holds the input '{source.path}', or lies in it; "
                    "choose another output"
                )
    if not out.parent.is_dir():
        raise FileNotFoundError(
            f"cannot write '{out}': there is no folder '{out.parent}'; create it first"
        )


def _check_room(plan: Plan, place: Workplace) -> None:
    wanted = sum(s.bytes for s in plan.shards if s.name not in place.finished)
    free = shutil.disk_usage(place.folder).free
    if wanted > free:
        raise OSError(
            errno.ENOSPC, f"{wanted} bytes are to be written and {free} are free", str(place.out)
        )


def _write(
    plan: Plan, shard: Shard, place: Workplace, on_nan: str, threads: int, totals: Totals
) -> Iterator[int]:
    """Write one file; yields how many tensors were written since."""
    temporary = place.path(f"{shard.name}.part")
    with ExitStack() as stack:
        opened: dict[Path, int] = {}

        def descriptor(file: Path) -> int:
            if file not in opened:
                opened[file] = os.open(file, os.O_RDONLY | getattr(os, "O_BINARY", 0))
                stack.callback(os.close, opened[file])
            return opened[file]

        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0)
        out = os.open(temporary, flags, 0o644)
        stack.callback(os.close, out)
        os.write(out, shard.header)
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(out, 0, shard.bytes)
        offset = len(shard.header)
        for group in _groups(shard.tensors):
            jobs = []
            for tensor in group:
                jobs.append(
                    job(
                        tensor.method,
                        tensor.key,
                        plan.seed,
                        elements=tensor.elements,
                        start=0,
                        dtype=tensor.dtype,
                        models=[at(entry, descriptor) for entry in tensor.models],
                        base=at(tensor.base, descriptor) if tensor.base else None,
                        out=(0, out, offset),
                    )
                )
                offset += tensor.bytes
            files = [(t.name, [entry.file for entry in _entries(t)]) for t in group]
            with faults(files):
                merged = _native.merge(jobs, threads=threads)
            for tensor, found in zip(group, merged, strict=True):
                _judge(plan, tensor, found, on_nan)
                totals.add(tensor, found)
            yield len(group)
        os.fsync(out)
    temporary.replace(place.path(shard.name))


def _groups(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    group: list[Tensor] = []
    for tensor in tensors:
        group.append(tensor)
        if sum(t.bytes for t in group) >= _TOGETHER:
            yield group
            group = []
    if group:
        yield group


def _entries(tensor: Tensor) -> list[Entry]:
    """What it is made of: the models, then the base."""
    return [*tensor.models, *([tensor.base] if tensor.base else [])]


def _judge(plan: Plan, tensor: Tensor, found: tuple[list[int], int, int, int], on_nan: str) -> None:
    _, unchanged, element, source = found
    if tensor.must_agree and unchanged != tensor.elements:
        raise CheckpointError.of(
            plan.models[0].path,
            f"and the others differ in '{tensor.name}' ({tensor.dtype.name}), which cannot be "
            "averaged; exclude it or merge it with method='select'",
        )
    if element < 0 or on_nan == "allow":
        return
    if source < 0:
        fault = f"'{tensor.name}' overflows {tensor.dtype.name} at element {element} when merged"
        message = f"{fault}; use a wider dtype"
    else:
        file = _entries(tensor)[source].file
        message = str(
            CheckpointError.of(
                file,
                f"holds NaN or infinity in '{tensor.name}', first at element {element}; repair "
                "it, or use on_nan='warn' or 'allow'",
            )
        )
    if on_nan == "error":
        raise CheckpointError(message)
    warnings.warn(message, stacklevel=6)


def _write_companions(plan: Plan, place: Workplace, report: MergeReport) -> None:
    for file in plan.carried:
        shutil.copyfile(file, place.path(file.name))
    if plan.config:
        _write_text(place.path("config.json"), json.dumps(plan.config, indent=2) + "\n")
    _write_text(place.path("merge_report.json"), json.dumps(report.to_dict(), indent=2) + "\n")
    if len(plan.shards) > 1:
        _write_text(place.path("model.safetensors.index.json"), index_of(plan))


def _write_text(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _in_words(error: OSError, out: Path) -> OSError:
    if error.errno == errno.ENOSPC:
        detail = f" ({error.strerror})" if error.filename else ""
        return OSError(
            error.errno,
            f"cannot write '{out}': no space left{detail}; make room and repeat with resume",
        )
    if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return PermissionError(
            error.errno, f"cannot write '{out}': {error.strerror}; choose another place"
        )
    return error
