"""What a program that waits for a compiler shows on stderr: nothing for a second, then what it waits for."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ..build_tools.text import count_of

_SILENT = 1.0  # seconds


@contextmanager
def show_compilation(keys: Sequence[str], *, transient: bool = False, quiet: bool = False) -> Iterator[None]:
    """Shows that kernels are being compiled, if it takes over a second.

    On a terminal that is a line with the seconds, removed at the end; elsewhere it is one line, or with ``transient``
    none, because whoever calls says what was done. With ``quiet`` it shows nothing.
    """
    live = sys.stderr.isatty()
    what = keys[0] if len(keys) == 1 else count_of(len(keys), "kernel")
    if quiet or (transient and not live):
        yield
        return
    done = threading.Event()

    def show() -> None:
        begin = time.monotonic()
        if done.wait(_SILENT):
            return
        if not live:
            print(f"gnaforge: compiling {what} ...", file=sys.stderr, flush=True)
            return
        while not done.wait(0.2):
            sys.stderr.write(f"\rgnaforge: compiling {what} ... {time.monotonic() - begin:.0f} s")
            sys.stderr.flush()
        sys.stderr.write("\r\033[K")
        sys.stderr.flush()

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
