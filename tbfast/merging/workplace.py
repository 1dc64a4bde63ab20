"""Where the output is made: a folder beside it that takes its name when it is complete.

The folder holds a lock, a journal of finished files, and the files. A process that is killed leaves
it behind; ``resume`` goes on from the journal, anything else begins anew.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_JOURNAL = "journal.jsonl"
_LOCK = "lock"
_OWN = (_JOURNAL, _LOCK)


class Workplace:
    """The folder ``.NAME.merging`` beside the output NAME.

    Args:
        out: The output.
        digest: Of the plan.
    """

    def __init__(self, out: Path, digest: str) -> None:
        self.out = out
        self.folder = out.parent / f".{out.name}.merging"
        self.digest = digest
        self.finished: dict[str, dict[str, Any]] = {}  # what the journal says of each file

    @contextmanager
    def opened(self, resume: bool) -> Iterator[None]:
        """Hold the folder; what was in it counts only if ``resume``.

        Raises:
            RuntimeError: If another process holds it.
            ValueError: If it was begun with another plan.
        """
        self.folder.mkdir(exist_ok=True)
        with _locked(self.folder / _LOCK, self.out):
            if resume:
                self._take_up()
            self._clear()
            if not self.finished:
                self._write({"plan": self.digest}, mode="w")
            yield

    def check_shared(self) -> None:
        """See that this is the folder that another process has opened.

        Raises:
            FileNotFoundError: If it is not there, or another.
        """
        if {"plan": self.digest} not in self._read()[:1]:
            raise FileNotFoundError(
                f"cannot write '{self.out}': '{self.folder}' is not the folder that rank 0 has "
                "made; choose an output that all processes share"
            )

    def path(self, name: str) -> Path:
        """A file of the output, before it is in place."""
        return self.folder / name

    def finish(self, name: str, record: Mapping[str, Any]) -> None:
        """Note that a file is complete; it and the note outlive a crash from here on."""
        _sync_folder(self.folder)
        size = self.path(name).stat().st_size
        self._write({"file": name, "size": size, **record}, mode="a")

    def publish(self, file: str | None) -> None:
        """Give the output its name: the folder, or one file of it."""
        for name in _OWN:
            (self.folder / name).unlink(missing_ok=True)
        old = self.out.parent / f".{self.out.name}.replaced"
        if self.out.is_dir() and not self.out.is_symlink():
            if old.exists():
                shutil.rmtree(old)
            self.out.rename(old)
        if file is None:
            self.folder.rename(self.out)
        else:
            self.path(file).replace(self.out)
            shutil.rmtree(self.folder)
        _sync_folder(self.out.parent)
        if old.exists():
            shutil.rmtree(old)

    def discard(self) -> None:
        """Leave nothing."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _take_up(self) -> None:
        records = self._read()
        if not records:
            return
        if records[0].get("plan") != self.digest:
            raise ValueError(
                f"cannot resume '{self.out}': the models or the options are not those it was begun "
                f"with; repeat them, or begin anew without resume (this discards '{self.folder}')"
            )
        for record in records[1:]:
            file = self.path(record["file"])
            if file.is_file() and file.stat().st_size == record["size"]:
                self.finished[record["file"]] = record

    def _read(self) -> list[dict[str, Any]]:
        lines: list[str] = []
        records = []
        with contextlib.suppress(OSError):
            lines = self.path(_JOURNAL).read_text(encoding="utf-8").splitlines()
        for line in lines:
            try:
                records.append(json.loads(line))
            except ValueError:  # the line at which it was killed
                break
        return records

    def _clear(self) -> None:
        """Remove all but finished files."""
        keep = {*self.finished, *(_OWN if self.finished else (_LOCK,))}
        for file in self.folder.iterdir():
            if file.name not in keep:
                shutil.rmtree(file) if file.is_dir() else file.unlink()

    def _write(self, record: Mapping[str, Any], mode: str) -> None:
        with open(self.path(_JOURNAL), mode, encoding="utf-8") as journal:
            journal.write(json.dumps(record) + "\n")
            journal.flush()
            os.fsync(journal.fileno())
        _sync_folder(self.folder)


@contextmanager
def _locked(file: Path, out: Path) -> Iterator[None]:
    """Hold a lock that ends with the process, however it ends."""
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            if os.name == "nt":
                import msvcrt

                msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
            else:
                import fcntl

                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RuntimeError(
                f"another process is writing '{out}'; wait for it, or choose another output"
            ) from error
        yield
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    """Make the names in a folder outlive a crash; where folders cannot be opened, nothing."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
