"""A progress bar on stderr, for work that takes longer than a second and only where somebody watches."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

Report = Callable[[int, int, str], None]
"""Called with how much is done, how much there is in all (0 if unknown), and what is going on."""

PATIENCE_SECONDS = 1.0


def byte_report(report: Report | None, what: str) -> Callable[[int, int], None] | None:
    """The same for work that reports only bytes done and bytes in all."""
    return None if report is None else lambda done, total: report(done, total, what)


class _Bar:
    """Shows itself when the first report later than a second comes in."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def report(self, done: int, total: int, what: str) -> None:
        if self._bar is None and time.monotonic() - self._start >= PATIENCE_SECONDS:
            self._show()
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, total=total or None, description=what)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _show(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            console=Console(file=sys.stderr),
            transient=True,
        )
        self._task = self._bar.add_task("", total=None)
        self._bar.start()


@contextmanager
def progress_bar() -> Iterator[Report | None]:
    """A function to report progress to (done, total, what is going on), or None where stderr is not a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    bar = _Bar()
    try:
        yield bar.report
    finally:
        bar.close()
