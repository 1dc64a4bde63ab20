"""Progress of long work: silence, a bar, or a callable of the user's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Tick = Callable[[int, int, str], None]
Progress = bool | Tick | None


@contextmanager
def ticking(progress: Progress, label: str, total: int) -> Iterator[Tick]:
    """A callable ``(done, total, name)`` that shows progress while the context lasts.

    Args:
        progress: None or False for silence; True for a bar on standard error, gone when the work
            is; or a callable, which is handed through.
        label: What is being done, in a word or two.
        total: Number of things to do.

    Raises:
        TypeError: If ``progress`` is something else.
    """
    if progress is None or progress is False:
        yield lambda done, total, name: None
    elif progress is True:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(label, total=total)
            yield lambda done, total, name: bar.update(task, completed=done)
    elif callable(progress):
        yield progress
    else:
        raise TypeError(f"progress must be None, a bool or a callable, got {progress!r}")
