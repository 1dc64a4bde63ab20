"""Carries out a plan: shard by shard, complete or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from tbfast import _native
from tbfast.errors import CheckpointError
from tbfast.merging.header import Entry
from tbfast.merging.jobs import at, descriptors, faults, job
from tbfast.merging.plan import Plan, Shard, Tensor, index_of
from tbfast.merging.ranks import Ranks
from tbfast.merging.report import MergeReport, Totals
from tbfast.merging.workplace import Workplace
from tbfast.progress import Progress, ticking

_TOGETHER = 1 << 28  # bytes of output between two looks at Ctrl-C
_APART = 5.0  # seconds that ranks work without a word: so long a failure of one may go unheard

Records = dict[str, dict[str, Any]]  # of finished files


class Step(NamedTuple):
    """What was done.

    Attributes:
        shard: Name of the file.
        tensors: Number of tensors written.
        totals: Of the file, if it is complete.
    """

    shard: str
    tensors: int
    totals: dict[str, Any] | None = None


def run(
    plan: Plan,
    ranks: Ranks,
    out: Path,
    *,
    is_file: bool,
    on_nan: str,
    threads: int,
    resume: bool,
    progress: Progress,
) -> MergeReport:
    """Write the output of a plan.

    Every rank writes its share of the files. The rest is done by rank 0: it holds the lock, notes
    what is finished, adds what lies beside the weights, and gives the output its name.

    Raises:
        CheckpointError: If an input is damaged, changes, or holds what ``on_nan`` refuses.
        OSError: If there is no room or no permission; finished files wait for ``resume``.
    """
    began = time.perf_counter()
    fingerprints = [source.fingerprint() for source in plan.sources]
    totals = Totals(len(plan.models))
    place = Workplace(out, plan.digest())
    with ExitStack() as held:

        def enter() -> Records:
            with _worded(out):
                held.enter_context(place.opened(resume))
                _check_room(plan, place)
            return place.finished

        def close() -> MergeReport:
            with _worded(out):
                if [source.fingerprint() for source in plan.sources] != fingerprints:
                    raise CheckpointError(
                        "an input was changed while it was merged; merge again when it is complete"
                    )
                report = MergeReport.of(plan, totals, time.perf_counter() - began, threads)
                if not is_file:
                    _write_companions(plan, place, report)
                place.publish(plan.shards[0].name if is_file else None)
            return report

        finished = ranks.first(enter)
        try:
            ranks.each(place.check_shared)
            _write_all(plan, ranks, place, finished, totals, on_nan, threads, progress)
            return ranks.first(close)
        except ValueError:
            if not (resume and finished):
                ranks.first(place.discard)
            raise


def _write_all(
    plan: Plan,
    ranks: Ranks,
    place: Workplace,
    finished: Records,
    totals: Totals,
    on_nan: str,
    threads: int,
    progress: Progress,
) -> None:
    """Write the files that are not finished, and count what is in all of them."""
    for record in finished.values():
        totals.load(record["totals"])
    left = [shard for shard in plan.shards if shard.name not in finished]
    owners = ranks.shares([shard.bytes for shard in left])
    steps = (
        step
        for shard, owner in zip(left, owners, strict=True)
        if owner == ranks.number
        for step in _write(plan, shard, place, on_nan, threads)
    )

    def some() -> list[Step]:
        """What can be done before the ranks meet again."""
        until = time.monotonic() + (_APART if ranks.size > 1 else 0)
        mine: list[Step] = []
        with _worded(place.out):
            for step in steps:
                mine.append(step)
                if time.monotonic() >= until:
                    break
        return mine

    def note() -> None:
        with _worded(place.out):
            for step in done:
                if step.totals is not None:
                    place.finish(step.shard, {"totals": step.totals})
        tick(count - missing, count, done[-1].shard)

    count = sum(len(shard.tensors) for shard in plan.shards)
    missing = sum(len(shard.tensors) for shard in left)
    shown = progress if ranks.number == 0 else None
    with closing(steps), ticking(shown, "merging", count) as tick:
        while done := list(chain.from_iterable(ranks.each(some))):
            missing -= sum(step.tensors for step in done)
            for step in done:
                if step.totals is not None:
                    totals.load(step.totals)
            ranks.first(note)


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


def _write(plan: Plan, shard: Shard, place: Workplace, on_nan: str, threads: int) -> Iterator[Step]:
    """Write one file, step by step."""
    totals = Totals(len(plan.models))
    temporary = place.path(f"{shard.name}.part")
    # No room is reserved: in memory and on some disks that takes as long as to write.
    with ExitStack() as stack:
        descriptor = stack.enter_context(descriptors())
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0)
        out = os.open(temporary, flags, 0o644)
        stack.callback(os.close, out)
        os.write(out, shard.header)
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
            yield Step(shard.name, len(group))
        os.fsync(out)
    temporary.replace(place.path(shard.name))
    yield Step(shard.name, 0, totals.to_dict())


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
            f"and the others differ in '{tensor.name}' ({tensor.dtype.name}), {tensor.must_agree}",
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
    warnings.warn(message, stacklevel=9)


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


@contextmanager
def _worded(out: Path) -> Iterator[None]:
    """Words for what stops the writing of an output."""
    try:
        yield
    except OSError as error:
        raise _in_words(error, out) from error


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
