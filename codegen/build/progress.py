"""Tells whoever listens of a long build, and shows on stderr that a program waits for a compiler."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from ..build_tools.text import count_of

_SILENT = 1.0  # seconds


@dataclass(frozen=True)
class Compilation:
    """The progress of the compilation of kernels.

    Attributes:
        done, total: finished kernels, and all that have to be compiled.
        finished: the key of the kernel that has just been compiled, or failed; empty at the beginning.
        good: whether it compiled.
        seconds: that it took.
        running: gives the keys of the kernels that are compiled when it is called.
    """

    done: int
    total: int
    finished: str
    good: bool
    seconds: float
    running: Callable[[], list[str]]

    def line(self) -> str:
        """The kernel that has just finished, for people."""
        what = "compiled" if self.good else "FAILED to compile"
        return f"{what} {self.finished} in {self.seconds:.1f} s ({self.done} of {self.total})"

    def running_text(self) -> str:
        """The kernels under way, for people."""
        keys = self.running()
        more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
        return f"compiling {keys[0]}{more}" if keys else "linking"


@dataclass(frozen=True)
class Listener:
    """Who hears of a long build: of its begin, of each kernel that is finished, and lines for the user."""

    progress: Callable[[Compilation], None] = field(default=lambda now: None)
    note: Callable[[str], None] = field(default=lambda line: None)


@contextmanager
def show_compilation(keys: Sequence[str], *, transient: bool = False, quiet: bool = False) -> Iterator[Listener]:
    """Shows that kernels are being compiled, if it takes over a second. The build has to be given the listener.

    On a terminal that is a line with what is compiled and the seconds, removed at the end; elsewhere it is one line,
    and one more for each of several kernels as it is finished, or with ``transient`` none, because whoever calls says
    what was done. With ``quiet`` it shows nothing.
    """
    live = sys.stderr.isatty()
    if quiet or (transient and not live):
        yield Listener()
        return
    begun, over = threading.Event(), threading.Event()
    now: list[Compilation] = []

    def say(text: str) -> None:
        print(f"{_ERASE if live else ''}gnaforge: {text}", file=sys.stderr, flush=True)

    def progress(state: Compilation) -> None:
        now[:] = [state]
        begun.set()
        if state.finished and state.total > 1 and not live:
            say(state.line())

    def show() -> None:
        begun.wait()
        begin = time.monotonic()
        if over.wait(_SILENT):
            return
        if not live:
            say(f"compiling {keys[0] if len(keys) == 1 else count_of(now[0].total, 'kernel')} ...")
            return
        while not over.wait(0.2):
            number = f" ({now[0].done} of {now[0].total} done)" if now[0].total > 1 else ""
            seconds = time.monotonic() - begin + _SILENT
            sys.stderr.write(f"{_ERASE}gnaforge: {now[0].running_text()}{number} ... {seconds:.0f} s")
            sys.stderr.flush()
        sys.stderr.write(_ERASE)
        sys.stderr.flush()

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield Listener(progress, say)
    finally:
        over.set()
        begun.set()
        thread.join()


_ERASE = "\r\033[K"
