"""Runs compilations through ninja: in parallel, with progress, and with the first error found for the user."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import ninja

from .errors import BuildError
from .process import start

_STATUS = "@ended@"  # before the output of a step that has ended
_ERROR_LINE = re.compile(r"\berror\b|undefined reference|No such file|No space left|cannot execute", re.IGNORECASE)
_BEGUN, _DONE = ".begun", ".done"  # have an empty file for each step that began, and that ended well
_KILLED = re.compile(r"\bKilled\b|signal 9|out of memory", re.IGNORECASE)


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


@dataclass(frozen=True)
class Progress:
    """The progress of a run of steps.

    Attributes:
        finished: the output of the step that has just ended; empty when the run begins.
        good: whether it ended well.
        seconds: that it took.
        running: gives the outputs of the steps that are under way when it is called.
    """

    finished: str
    good: bool
    seconds: float
    running: Callable[[], list[str]]


class _Watch:
    """Follows steps while ninja runs them in ``folder``."""

    def __init__(self, folder: Path, steps: Sequence[Step]) -> None:
        self._folder = folder
        self._numbers = {step.output: number for number, step in enumerate(steps)}
        self._ended: set[str] = set()

    def begin(self) -> Progress:
        self._ended.clear()
        return Progress("", True, 0.0, self.running)

    def end(self, output: str) -> Progress:
        self._ended.add(output)
        number = str(self._numbers[output])
        begun = self._folder / _BEGUN / number
        seconds = time.time() - begun.stat().st_mtime if begun.exists() else 0.0
        return Progress(output, (self._folder / _DONE / number).exists(), max(0.0, seconds), self.running)

    def running(self) -> list[str]:
        begun = self._folder / _BEGUN
        return [x for x, number in self._numbers.items() if x not in self._ended and (begun / str(number)).exists()]


def _escape(text: str) -> str:
    return text.replace("$", "$$").replace("\n", "$\n")


def _ninja_file(steps: Sequence[Step]) -> str:
    lines = ["ninja_required_version = 1.10", "rule run", "  command = $run", "  description = $out"]
    for number, step in enumerate(steps):
        inputs = " ".join(step.inputs)
        command = f"{shlex.join(step.command)} > {shlex.quote(step.log)} 2>&1"
        run = f": > {_BEGUN}/{number} && {command} && : > {_DONE}/{number}"
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


def _ninja(folder: Path, jobs: int, progress: Callable[[Progress], None], watch: _Watch) -> str:
    """Runs ninja; returns what it and the shell said themselves."""
    command = [find_ninja(), "-C", os.fspath(folder), "-k", "0", "-j", str(jobs)]
    said = []
    with start(command, variables={"NINJA_STATUS": _STATUS}) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if line.startswith(_STATUS):
                    progress(watch.end(line.removeprefix(_STATUS).rstrip("\n")))
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
    folder: Path,
    steps: Sequence[Step],
    jobs: int,
    progress: Callable[[Progress], None] = lambda _: None,
    note: Callable[[str], None] = lambda _: None,
) -> list[Failure]:
    """Runs all steps that can run; a failed one doesn't stop the others.

    A step killed for lack of memory runs once more, alone, after the rest.

    Args:
        folder: where ninja runs; holds the inputs.
        steps: what to run; a step's inputs may be other steps' outputs.
        jobs: commands at once.
        progress: called at the beginning and after each step.
        note: called with a line for the user.

    Returns:
        The steps that failed.
    """
    for name in (_BEGUN, _DONE):
        (folder / name).mkdir()
    watch = _Watch(folder, steps)
    progress(watch.begin())
    (folder / "build.ninja").write_text(_ninja_file(steps))
    failures = _failures(folder, steps, _ninja(folder, jobs, progress, watch))
    if jobs > 1 and any(_KILLED.search(failure.text) for failure in failures):
        note("a compiler was killed, probably for lack of memory: trying again, one at a time")
        for path in (folder / _BEGUN).iterdir():
            path.unlink()
        progress(watch.begin())
        failures = _failures(folder, steps, _ninja(folder, 1, progress, watch))
    return failures


def step_seconds(folder: Path) -> dict[str, float]:
    """How long each step took, by its output, from ninja's log."""
    seconds = {}
    log = folder / ".ninja_log"
    for line in log.read_text().splitlines()[1:] if log.exists() else ():
        start, end, _, output, *_ = line.split("\t")
        seconds[output] = (int(end) - int(start)) / 1000
    return seconds
