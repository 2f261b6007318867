"""Builds say what they do while they run: piped, on a terminal, and in a process that registers kernels."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from gnaforge.build_tools.compile import Progress, Step, run_steps
from gnaforge.cli import READER_GONE
from kernel_set import cpu_config

KEYS = [config.key for config in sorted(cpu_config(1, "fp32", (8,), (kv,)) for kv in (8, 16, 24))]
SPEC = """\
spec_version: 1
library: three
arch: cpu
kernels:
  - {rank: 1, head_dim: any, dtype: fp32, tiles: [{q: 8, kv: 8}, {q: 8, kv: 16}, {q: 8, kv: 24}]}
"""
MAIN = "from gnaforge.cli import main; main()"
REGISTER = "import gnaforge; gnaforge.register('three.yaml')"


@pytest.fixture
def environment(fake_cxx, no_kernels: Path, tmp_path: Path) -> Callable[..., dict[str, str]]:
    """An empty cache, three.yaml, and a compiler that takes some seconds for each kernel."""
    (tmp_path / "three.yaml").write_text(SPEC)
    return lambda seconds: {**os.environ, "CXX": f"'{fake_cxx(seconds)}'", "COLUMNS": "80", "TERM": "xterm"}


def on_terminal(command: list[str], environment: dict[str, str], folder: Path) -> str:
    """The output of a command whose stderr is a terminal."""
    own, its = pty.openpty()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=its, env=environment, cwd=folder) as process:
        os.close(its)
        said = b""
        try:
            while chunk := os.read(own, 65536):
                said += chunk
        except OSError:  # the other end is closed
            pass
    os.close(own)
    assert process.returncode == 0, said
    return said.decode()


@pytest.mark.parametrize(
    "arguments", [("build", "three.yaml"), ("build", "three.yaml", "--shard", "1/1")], ids=" ".join
)
def test_piped_there_is_a_line_for_each_kernel(environment, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    """It comes when the kernel is finished: the compiler takes over a second for the next."""
    command = [sys.executable, "-c", MAIN, *arguments, "--jobs", "1"]
    lines, compiled = [], tmp_path / "fake compiler" / "compiled"
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment(1.2), cwd=tmp_path
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            lines.append((line, len(compiled.read_text().splitlines())))
    assert process.returncode == 0
    found = [re.fullmatch(r"compiled (\S+) in 1\.\d s \((\d) of 3\)\n", line) for line, _ in lines]
    assert [(match[1], match[2]) for match in found if match] == list(zip(KEYS, "123", strict=True)), lines
    assert lines[0][1] <= 2 and len(lines) == 3


def test_a_build_whose_reader_has_gone_ends_with_its_compilers(environment, tmp_path: Path, no_kernels: Path) -> None:
    """As with ``2>&1 | head -1``."""
    command = [sys.executable, "-c", MAIN, "build", "three.yaml", "--jobs", "1"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment(2.71828), cwd=tmp_path
    )
    assert process.stdout is not None and process.stdout.readline().startswith(f"compiled {KEYS[0]} in ")
    process.stdout.close()
    assert process.wait(60) == READER_GONE
    assert "sleep 2.71828" not in subprocess.run(["ps", "-ww", "-eo", "args"], capture_output=True, text=True).stdout
    assert not list(no_kernels.glob(".build-*")) and not list(no_kernels.glob(f"{KEYS[2]}-*"))


def test_on_a_terminal_the_bar_names_what_is_compiled(environment, tmp_path: Path) -> None:
    command = [sys.executable, "-c", MAIN, "build", "three.yaml", "--jobs", "1"]
    said = on_terminal(command, environment(1.0), tmp_path)
    places = [said.find(f"compiling {key}") for key in KEYS]
    assert -1 not in places and places == sorted(places), said
    assert "0/3" in said and "2/3" in said and "compiled " not in said
    again = on_terminal([*command, "-o", "again"], environment(1.0), tmp_path)
    assert again == ""  # all of it is in the cache


def test_a_process_that_registers_kernels_says_as_much(environment, tmp_path: Path) -> None:
    command = [sys.executable, "-c", REGISTER]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(0.8), cwd=tmp_path, check=True)
    lines = done.stderr.splitlines()
    assert "gnaforge: compiling 3 kernels ..." in lines
    assert sorted(line.split()[2] for line in lines if line.startswith("gnaforge: compiled ")) == sorted(KEYS)
    assert lines[-1].endswith("(3 of 3)") and len(lines) == 4
    again = subprocess.run(command, capture_output=True, text=True, env=environment(0.8), cwd=tmp_path, check=True)
    assert again.stderr == ""


def test_on_a_terminal_registering_names_what_is_compiled(environment, tmp_path: Path) -> None:
    said = on_terminal([sys.executable, "-c", REGISTER], environment(1.5), tmp_path)
    assert any(f"gnaforge: compiling {key}" in said for key in KEYS) and " of 3 done) ... " in said
    assert said.endswith("\r\033[K")


def test_steps_that_fail_and_what_runs(tmp_path: Path) -> None:
    (tmp_path / "in").touch()
    script = "test $1 != b || exit 1; sleep 0.3; touch $1"
    steps = [Step(name, ("in",), ("sh", "-c", script, "sh", name)) for name in "abc"]
    seen: list[Progress] = []
    running: list[list[str]] = []

    def progress(now: Progress) -> None:
        seen.append(now)
        running.append(now.running())

    failures = run_steps(tmp_path, steps, 1, progress)
    assert [failure.step.output for failure in failures] == ["b"]
    assert [(now.finished, now.good) for now in seen] == [("", True), ("a", True), ("b", False), ("c", True)]
    assert [now.seconds >= 0.3 for now in seen] == [False, True, False, True]
    assert running[0] == running[-1] == [] and all(len(names) <= 1 for names in running)
