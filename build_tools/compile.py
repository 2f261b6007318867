"""Runs compilations through ninja: in parallel, with progress, and with the first error found for the user."""

from __future__ import annotations

import os
import re
import shlex
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import ninja

from .errors import BuildError
from .process import start

_STATUS = re.compile(r"^@(\d+)@(\d+)@")
_ERROR_LINE = re.compile(r"\berror\b|undefined reference|No such file|No space left|cannot execute", re.IGNORECASE)
_DONE = ".done"  # has an empty file for each step that ended well
_KILLED = re.compile(r"\bKilled\b|signal 9|out of memory", re.IGNORECASE)

Progress = Callable[[int, int], None]
"""Called with finished and total steps."""


@dataclass(frozen=True)
class Step:
    """One command: makes ``output`` from ``inputs``, all of them paths below the folder that ninja runs in."""

    output: str
    inputs: tuple[str, ...]
    command: tuple[str, ...]

    @property
    def log(self) -> str:
        """Where what the command prints goes."""
        return self.output + ".log"


@dataclass(frozen=True)
class Failure:
    """A step that failed: what it printed, and the first line of that which names the cause."""

    step: Step
    text: str

    @property
    def cause(self) -> str:
        """The first line that names an error, else the last line printed."""
        lines = self.text.strip().splitlines() or ["it printed nothing"]
        return next((line for line in lines if _ERROR_LINE.search(line)), lines[-1]).strip()


def _escape(text: str) -> str:
    return text.replace("$", "$$").replace("\n", "$\n")


def _ninja_file(steps: Sequence[Step]) -> str:
    lines = ["ninja_required_version = 1.10", "rule run", "  command = $run", "  description = $out"]
    for number, step in enumerate(steps):
        inputs = " ".join(step.inputs)
        run = f"{shlex.join(step.command)} > {shlex.quote(step.log)} 2>&1 && : > {_DONE}/{number}"
        lines += [f"build {step.output}: run {inputs}", f"  run = {_escape(run)}"]
    return "\n".join(lines) + "\n"


def find_ninja() -> str:
    """Where ninja is.

    Raises:
        BuildError: nowhere.
    """
    executable = shutil.which("ninja", path=ninja.BIN_DIR) or shutil.which("ninja")
    if executable is None:
        raise BuildError("ninja is missing: pip install ninja")
    return executable


def _ninja(folder: Path, jobs: int, progress: Progress) -> str:
    """Runs ninja; returns what it and the shell said themselves."""
    command = [find_ninja(), "-C", os.fspath(folder), "-k", "0", "-j", str(jobs)]
    said = []
    with start(command, variables={"NINJA_STATUS": "@%f@%t@"}) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if match := _STATUS.match(line):
                    progress(int(match[1]), int(match[2]))
                else:
                    said.append(line)
        except BaseException:
            process.terminate()  # ninja then ends its compilers, which would go on for nobody
            raise
    return "".join(said)


def _failures(folder: Path, steps: Sequence[Step], said: str) -> list[Failure]:
    """Steps that did not end well though those before them did. An output proves nothing: it may be half of one."""
    done = [(folder / _DONE / str(number)).exists() for number in range(len(steps))]
    undone = {step.output for step, ended in zip(steps, done, strict=True) if not ended}
    failed = []
    for step in steps:
        if step.output in undone and not undone.intersection(step.inputs):
            log = folder / step.log
            text = log.read_text(errors="replace") if log.exists() else ""
            failed.append(Failure(step, _full_disk(folder) + (text if text.strip() else said)))
    return failed


def _full_disk(folder: Path) -> str:
    """A line that says so, if the disk is full: then even a compiler's complaint may be lost."""
    return f"No space left on the disk of {folder.parent}\n" if shutil.disk_usage(folder).free < 2**20 else ""


def run_steps(
    folder: Path, steps: Sequence[Step], jobs: int, progress: Progress, note: Callable[[str], None]
) -> list[Failure]:
    """Runs all steps that can run; a failed one doesn't stop the others.

    A step killed for lack of memory runs once more, alone, after the rest.

    Args:
        folder: where ninja runs; holds the inputs.
        steps: what to run; a step's inputs may be other steps' outputs.
        jobs: commands at once.
        progress: called after each step.
        note: called with a line for the user.

    Returns:
        The steps that failed.
    """
    (folder / _DONE).mkdir()
    (folder / "build.ninja").write_text(_ninja_file(steps))
    failures = _failures(folder, steps, _ninja(folder, jobs, progress))
    if jobs > 1 and any(_KILLED.search(failure.text) for failure in failures):
        note("a compiler was killed, probably for lack of memory: trying again, one at a time")
        failures = _failures(folder, steps, _ninja(folder, 1, progress))
    return failures


def step_seconds(folder: Path) -> dict[str, float]:
    """How long each step took, by its output, from ninja's log."""
    seconds = {}
    log = folder / ".ninja_log"
    for line in log.read_text().splitlines()[1:] if log.exists() else ():
        start, end, _, output, *_ = line.split("\t")
        seconds[output] = (int(end) - int(start)) / 1000
    return seconds
