"""A process that runs kernels for this one, and may crash or hang."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import GnaforgeError

# Settings of the emulator that a verified kernel may run with; others switch checks off, or are asked for otherwise.
_KEPT = {f"GNAFORGE_EMULATOR_{name}" for name in ("DEVICE", "PROCESSORS", "COUNTERS", "KEEP")}
COMMAND = [sys.executable, "-m", "gnaforge.verification.worker"]
_START_SECONDS = 60.0  # it imports torch
_END_SECONDS = 10.0
_HANGS = "no result within {} s: the kernel or its host code hangs"


class HarnessError(GnaforgeError):
    """An error of the harness itself, of which nothing follows for a kernel. The message is a traceback."""

    exit_code = 70


class WorkerError(GnaforgeError):
    """The process that ran a kernel ended, or gave no answer in time. The message says how."""


class Worker:
    """A child process; see `worker`. Start a new one after a WorkerError.

    Args:
        core: the core extension for its operators, where there is no compile cache to take it from.
        log: takes what the process prints, after what is there; by default errors show its last lines.
        command: what serves the requests; by default `COMMAND`.
        settings: environment variables for it; of those of the emulator it gets no others, but few.
    """

    def __init__(
        self,
        core: Path | None = None,
        log: Path | None = None,
        command: Sequence[str] | None = None,
        **settings: str,
    ) -> None:
        self._said = tempfile.TemporaryFile() if log is None else log.open("a+b")  # noqa: SIM115  (as long as the process)
        kept = {k: v for k, v in os.environ.items() if not k.startswith("GNAFORGE_EMULATOR_") or k in _KEPT}
        # Its own process group: Ctrl-C reaches this process, which then ends the other.
        self._process = subprocess.Popen(
            [*(command or COMMAND), *([] if core is None else ["--core", str(core)])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            env={**kept, **settings},
            start_new_session=True,
        )
        self._buffer = b""

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process."""
        if self._process.poll() is None:
            self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # the driver may hold a process whose GPU hangs
            self._process.wait(timeout=_END_SECONDS)
        for stream in (self._process.stdin, self._process.stdout, self._said):
            if stream is not None:
                stream.close()

    def open(self, timeout: float, library: Path, key: str) -> dict[str, Any]:
        """Loads a kernel, before all other requests. Also waits for the process to start, ``timeout`` or not.

        Raises:
            WorkerError: as `request`.
        """
        late = "the process for the kernel did not start, or not load it, within {} s"
        return self.request(max(timeout, _START_SECONDS), late=late, do="open", library=str(library), key=key)

    def request(self, timeout: float, *, late: str = _HANGS, **what: Any) -> dict[str, Any]:
        """Asks and waits for the reply.

        Raises:
            HarnessError: the request or the process that answers it has a bug.
            WorkerError: none came within ``timeout`` seconds, which ``late`` words (``{}``: the seconds); or the
                process ended.
        """
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        try:
            stdin.write(json.dumps(what).encode() + b"\n")
            stdin.flush()
        except BrokenPipeError:
            raise WorkerError(self._describe_end()) from None
        while b"\n" not in self._buffer:
            if not select.select([stdout], [], [], timeout)[0]:
                self._process.kill()
                raise WorkerError(late.format(f"{timeout:g}"))
            read = os.read(stdout.fileno(), 1 << 16)
            if not read:
                raise WorkerError(self._describe_end())
            self._buffer += read
        line, _, self._buffer = self._buffer.partition(b"\n")
        reply = dict(json.loads(line))
        if "broken" in reply:
            said = "gnaforge's own checks broke, of which nothing follows for a kernel"
            raise HarnessError(f"{said}:\n{reply['broken']}")
        return reply

    def _describe_end(self) -> str:
        status = self._process.wait()
        how = f"with status {status}"
        if status < 0:
            how = f"by {signal.Signals(-status).name}"
        self._said.seek(0)
        last = self._said.read().decode(errors="replace").strip().splitlines()[-12:]
        return "\n  ".join([f"the process that ran the kernel was ended {how}", *last])
