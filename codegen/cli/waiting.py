"""Says on stderr what a command does, if it takes longer than a user waits without asking."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from .tables import say

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn

T = TypeVar("T")

PATIENCE, PATIENCE_ELSEWHERE = 1.0, 5.0
"""Seconds without a word, on a terminal and where nobody may be looking."""


@contextmanager
def waiting(what: str, total: int | None = None) -> Iterator[Wait]:
    """Shows that ``what`` is under way if it takes long: on a terminal with the seconds, and removed at the end;
    elsewhere as one line.

    Args:
        what: begins in lower case, for example ``fitting tiles``.
        total: the steps it takes, if they can be counted; on a terminal with how long the rest takes.
    """
    wait = Wait(what, total)
    timer = threading.Timer(PATIENCE if sys.stderr.isatty() else PATIENCE_ELSEWHERE, wait.show)
    timer.daemon = True
    timer.start()
    try:
        yield wait
    finally:
        timer.cancel()
        wait.end()


def steps(what: str, items: Sequence[T]) -> Iterable[T]:
    """The items one by one, `waiting` meanwhile."""
    with waiting(what, len(items)) as wait:
        for item in items:
            yield item
            wait.advance()


class Wait:
    """One thing that a command waits for; made by `waiting`."""

    def __init__(self, what: str, total: int | None) -> None:
        self._what, self._total = what, total
        self._done = 0
        self._lock = threading.Lock()
        self._ended = False
        self._progress: Progress | None = None

    def advance(self) -> None:
        """After each step."""
        with self._lock:
            self._done += 1
            if self._progress is not None:
                self._progress.update(self._progress.task_ids[0], completed=self._done)

    def show(self) -> None:
        """Begins to show it."""
        with self._lock:
            if self._ended:
                return
            if not sys.stderr.isatty():
                say(f"gnaforge: {self._what} ...", file=sys.stderr)
                return
            from rich.console import Console
            from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

            counted: list[ProgressColumn] = [
                TextColumn("{task.completed} of {task.total}"),
                TimeRemainingColumn(),
            ]
            columns: list[ProgressColumn] = [SpinnerColumn(), TextColumn(self._what, markup=False), TimeElapsedColumn()]
            columns += counted if self._total else []
            progress = Progress(*columns, console=Console(stderr=True), transient=True)
            progress.add_task(self._what, total=self._total, completed=self._done)
            progress.start()
            self._progress = progress

    def end(self) -> None:
        """Shows it no more."""
        with self._lock:
            self._ended = True
            if self._progress is not None:
                self._progress.stop()
