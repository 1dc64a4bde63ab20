"""Finished runs in a file, so that an interrupted experiment goes on where it stopped."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tbfast.compare_stats import Goal, Key, Run
from tbfast.files import PathLike, check_writable

FILE = "runs.jsonl"


class Journal:
    """Runs by variant, rate and seed; with a folder, also in its ``runs.jsonl``.

    A header line says what the variants and the goal are; then each finished run is a line,
    appended in one write. A last line that a crash cut short is dropped. Variants, rates and seeds
    may be added later; those that are there must mean the same.

    Args:
        folder: Where; made if missing. None keeps the runs in memory.
        meanings: What each variant is: whatever must not change between two sessions.
        goal: Whether small or large metrics are good.

    Raises:
        ValueError: If the file is of another experiment or damaged.
        OSError: If it cannot be written.
    """

    def __init__(self, folder: PathLike | None, meanings: Mapping[str, object], goal: Goal) -> None:
        self.runs: dict[Key, Run] = {}
        self._path: Path | None = None
        if folder is None:
            return
        if Path(folder).exists() and not Path(folder).is_dir():
            raise NotADirectoryError(f"out='{folder}' is a file; name a folder")
        Path(folder).mkdir(parents=True, exist_ok=True)
        self._path = Path(folder) / FILE
        check_writable(self._path)
        wanted = json.loads(json.dumps(meanings, default=_named))
        known, old_goal = self._read()
        for name in wanted.keys() & known.keys():
            if wanted[name] != known[name]:
                raise ValueError(
                    f"'{self._path}' holds runs of a variant {name!r} that was "
                    f"{json.dumps(known[name])} and is now {json.dumps(wanted[name])}; "
                    "use another out= folder, or another name for the variant"
                )
        if old_goal not in (None, goal):
            raise ValueError(
                f"'{self._path}' holds runs with goal={old_goal!r}, not {goal!r}; use another "
                "out= folder"
            )
        if wanted.keys() - known.keys():
            self._append({"goal": goal, "variants": wanted})

    def add(self, run: Run) -> None:
        """Keep a finished run."""
        self.runs[run.variant, run.rate, run.seed] = run
        record = asdict(run)
        for metric in ("validation", "test"):  # JSON has no NaN
            record[metric] = record[metric] if math.isfinite(record[metric]) else None
        self._append({"run": record})

    def _append(self, record: dict[str, Any]) -> None:
        if self._path is None:
            return
        line = json.dumps(record, allow_nan=False) + "\n"
        with self._path.open("ab") as stream:
            stream.write(line.encode())
            stream.flush()
            os.fsync(stream.fileno())

    def _read(self) -> tuple[dict[str, Any], str | None]:
        """Take over the runs of the file; returns its variants and goal."""
        assert self._path is not None
        data = self._path.read_bytes() if self._path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        variants: dict[str, Any] = {}
        goal = None
        for number, line in enumerate(whole.splitlines() or data.splitlines(), 1):
            try:
                record = json.loads(line)
                if "variants" in record:
                    variants |= record["variants"]
                    goal = record["goal"]
                else:
                    fields = record["run"]
                    for metric in ("validation", "test"):
                        fields[metric] = math.nan if fields[metric] is None else fields[metric]
                    run = Run(**fields)
                    self.runs[run.variant, run.rate, run.seed] = run
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(
                    f"line {number} of '{self._path}' is not a run of a comparison "
                    f"({type(error).__name__}: {error}); delete the line, or use "
                    "another out= folder"
                ) from error
        if len(whole) < len(data):
            os.truncate(self._path, len(whole))
        return variants, goal


def _named(value: object) -> str:
    """A name for an option that JSON cannot hold, the same in every session."""
    return getattr(value, "__qualname__", None) or str(value)
