"""The plugin for these tests says which take long, and which lack a tool."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
SLOW = """
import subprocess, time
import pytest

@pytest.fixture(scope="session")
def compiled():
    subprocess.run(["{compiler}", "-std=c++17", "-O3", "-c", "big/kernel.cu", "-o", "x.o"], check=True)

def test_that_compiles(compiled):
    print("captured")

def test_that_computes():
    time.sleep(1.5)
"""


def run(folder: Path, code: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Runs pytest on one file with the plugin and nothing else of ours."""
    (folder / "test_it.py").write_text(code)
    command = [sys.executable, "-m", "pytest", "-p", "long_tests", "--rootdir", str(folder), *options, "test_it.py"]
    environment = {**os.environ, "PYTHONPATH": str(TESTS), "PYTEST_ADDOPTS": ""}
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)


@pytest.mark.parametrize("options", [(), ("-n", "1"), ("-s",)], ids=["captured", "xdist", "not captured"])
def test_what_takes_long_is_said(tmp_path: Path, options: tuple[str, ...]) -> None:
    compiler = tmp_path / "bin" / "g++"
    compiler.parent.mkdir()
    compiler.write_text("#!/bin/sh\nsleep 1.5\n")
    compiler.chmod(0o755)
    done = run(tmp_path, SLOW.format(compiler=compiler), "--long-after", "0.4", *options)
    assert done.returncode == 0, done.stdout
    lines = [line for line in done.stderr.splitlines() if "has taken" in line]
    assert len(lines) == 2, done.stderr
    assert lines[0].startswith("test_it.py::test_that_compiles has taken ")
    assert "it compiles g++ big/kernel.cu for " in lines[0]
    assert lines[1].startswith("test_it.py::test_that_computes") and lines[1].endswith("it compiles nothing by itself")
    quick = run(tmp_path, "def test_it(): pass\n", "--long-after", "0.4", *options)
    assert quick.returncode == 0 and "has taken" not in quick.stderr


@pytest.mark.parametrize("workers", [(), ("-n", "1")], ids=["alone", "xdist"])
def test_skips_for_want_of_a_tool_are_said_and_can_fail(tmp_path: Path, workers: tuple[str, ...]) -> None:
    code = "import pytest\ndef test_a(): pytest.skip({!r})\ndef test_b(): pass\n"
    missing = code.format("the CUTLASS sources are missing or not whole")
    done = run(tmp_path, missing, *workers)
    assert done.returncode == 0 and "1 test skipped for want of a tool; pip install" in done.stdout
    assert run(tmp_path, missing, "--need-tools", *workers).returncode == 1
    hardware = run(tmp_path, code.format("needs a GPU"), "--need-tools", *workers)
    assert hardware.returncode == 0 and "want of a tool" not in hardware.stdout
