"""Child processes whose output is read, safe beside threads that fork."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

# Held while this process has both ends of a child's pipes. A fork then would keep the writing end open in the forked
# process, and whoever reads to the pipe's end would wait for it: for ever, if it waits for the reader's lock.
_starting = threading.RLock()
# Options that compilers take from here are in no digest: they would change objects that keep their names.
_UNSEEN = ("CPATH", "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")


_outer: tuple[threading.RLock, ...] = ()
_held: tuple[threading.RLock, ...] = ()  # of `_outer`, those that a fork under way has taken


def take_before_fork(lock: threading.RLock) -> None:
    """Names a lock whose holders may start children: a fork takes it before this module's own, as they do."""
    global _outer
    if lock not in _outer:
        _outer = (*_outer, lock)


def _before_fork() -> None:
    global _held
    _held = _outer
    for lock in _held:
        lock.acquire()
    _starting.acquire()


def _after_fork() -> None:
    _starting.release()
    for lock in reversed(_held):
        lock.release()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)


def start(
    command: Sequence[str],
    *,
    variables: Mapping[str, str] | None = None,
    stderr: int = subprocess.STDOUT,
    folder: Path | None = None,
) -> subprocess.Popen[str]:
    """Starts ``command`` in ``folder`` with its output as text on the pipe ``stdout``, its errors too.

    It gets this process's environment with ``variables``, without options for compilers, and speaks English, since
    errors are found by their words.

    Raises:
        OSError: it can't be started.
    """
    environment = {name: value for name, value in os.environ.items() if name not in _UNSEEN}
    environment |= {"LC_ALL": "C.UTF-8", **(variables or {})}
    with _starting:
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=stderr, text=True, errors="replace", env=environment, cwd=folder
        )


def output_of(command: Sequence[str]) -> str:
    """What ``command`` prints, without its errors.

    Raises:
        OSError: it can't be started.
        subprocess.CalledProcessError: it failed.
    """
    with start(command, stderr=subprocess.DEVNULL) as process:
        printed, _ = process.communicate()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, printed)
    return printed
