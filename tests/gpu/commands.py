"""Commands of the machine with the GPU: the driver's, compute-sanitizer. Standard library only."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import IO, Any


def output_of(command: Sequence[str], seconds: float, environment: Mapping[str, str]) -> str:
    """All that a command prints within its time, after which it ends with the processes that it has started."""
    running = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, **environment},
        start_new_session=True,
    )
    try:
        return running.communicate(timeout=seconds)[0].decode(errors="replace")
    except subprocess.TimeoutExpired:
        os.killpg(running.pid, signal.SIGKILL)
    try:
        printed = running.communicate(timeout=10)[0]
    except subprocess.TimeoutExpired as error:  # a process that left the group holds the pipe
        printed = error.stdout or b""
    return printed.decode(errors="replace") + "\ntimed out"


def sanitizer_output(
    tool: str, check: str, command: Sequence[str], seconds: float, environment: Mapping[str, str]
) -> tuple[list[str], str]:
    """The words of compute-sanitizer about our kernels in a command: its summary, and everything."""
    text = output_of([tool, "--tool", check, "--kernel-regex", "kns=gna_", *command], seconds, environment)
    return [line.strip() for line in text.splitlines() if "SUMMARY" in line or "timed out" in line], text


def driver(*more: str) -> str:
    """The GPU's name and the driver's version by nvidia-smi, and ``more`` of what it can be asked; empty without it."""
    try:
        query = ["nvidia-smi", f"--query-gpu={','.join(('name', 'driver_version', *more))}", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


class Watch:
    """Clock, power and temperature by nvidia-smi, ten times a second while the block runs; ``medians`` afterwards."""

    _ASKED = ("clocks.sm", "power.draw", "temperature.gpu")

    def __init__(self) -> None:
        self.medians: dict[str, float] = {}
        self._said: IO[bytes] | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Watch:
        query = ["nvidia-smi", f"--query-gpu={','.join(self._ASKED)}", "--format=csv,noheader,nounits", "-lms", "100"]
        self._said = tempfile.TemporaryFile()
        with contextlib.suppress(OSError):
            self._process = subprocess.Popen(query, stdout=self._said, stderr=subprocess.DEVNULL)
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        assert self._said is not None
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._said.seek(0)
        rows: list[list[float]] = []
        for line in self._said.read().decode(errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                rows.append([float(part) for part in line.split(",")])
        self._said.close()
        whole = [row for row in rows if len(row) == len(self._ASKED)]
        if whole:
            self.medians = {
                name: statistics.median(values)
                for name, values in zip(self._ASKED, zip(*whole, strict=True), strict=True)
            }


def versions() -> dict[str, Any]:
    """Of Python and the tools that are found on the path."""
    tools = [name for name in ("nvidia-smi", "nvcc", "compute-sanitizer", "ncu") if shutil.which(name)]
    return {"python": sys.version.split()[0], "tools": tools}
