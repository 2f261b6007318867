"""Child processes whose output is read, safe beside threads that fork."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Mapping, Sequence

# Held while this process has both ends of a child's pipes. A fork then would keep the writing end open in the forked
# process, and whoever reads to the pipe's end would wait for it: for ever, if it waits for the reader's lock.
_starting = threading.RLock()
os.register_at_fork(before=_starting.acquire, after_in_parent=_starting.release, after_in_child=_starting.release)


def start(
    command: Sequence[str], environment: Mapping[str, str] | None = None, stderr: int = subprocess.STDOUT
) -> subprocess.Popen[str]:
    """Starts ``command`` with its output as text on the pipe ``stdout``, its errors too.

    Raises:
        OSError: it can't be started.
    """
    with _starting:
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=stderr, text=True, errors="replace", env=environment
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
