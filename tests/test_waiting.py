"""The line that says what a command waits for."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from gnaforge.cli import waiting as module
from gnaforge.cli.waiting import steps, waiting

CODE = """
import time
from gnaforge.cli.waiting import steps
for item in steps("fitting [bold]tiles[/]", range(3)):
    time.sleep(0.7)
"""


def test_where_nobody_looks_it_is_one_line(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE_ELSEWHERE", 0.05)
    shown = threading.Event()
    say = module.say
    monkeypatch.setattr(module, "say", lambda *parts, **how: (say(*parts, **how), shown.set()))
    with waiting("fitting tiles", 3):
        assert shown.wait(60)
    assert capfd.readouterr().err == "gnaforge: fitting tiles ...\n"
    assert list(steps("nothing", [1, 2])) == [1, 2]
    time.sleep(0.2)
    assert capfd.readouterr().err == ""


def test_on_a_terminal_it_counts_and_is_removed() -> None:
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    with subprocess.Popen([sys.executable, "-c", CODE], stderr=theirs, env=environment) as child:
        os.close(theirs)
        text = b""
        while True:
            try:
                piece = os.read(ours, 4096)
            except OSError:  # Linux's end of file
                break
            if not piece:
                break
            text += piece
        assert child.wait() == 0
    os.close(ours)
    assert b"fitting [bold]tiles[/]" in text and b"2 of 3" in text
    assert text.endswith(b"\x1b[2K")


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (
            "build.core import core_files; list(core_files())",
            "its torch extension, once for this torch: a few seconds ...",
        ),
        (
            "build_tools.emulator.library import engine_path; engine_path()",
            "the emulator, once for this compiler: about a minute on two cores ...",
        ),
    ],
)
def test_what_is_built_once_says_for_how_long(python, tmp_path: Path, call: str, told: str) -> None:
    """Told before the compiler begins, which here gives up at once."""
    compiler = tmp_path / "quitter"
    compiler.write_text('#!/bin/sh\ncase " $* " in *" -o "*) exit 1;; esac\nexec c++ "$@"\n')
    compiler.chmod(0o755)
    done = python(f"from gnaforge.{call}", CXX=str(compiler), GNAFORGE_CACHE_DIR=str(tmp_path / "cache"))
    assert f"gnaforge: building {told}\n" in done.stderr and "BuildError: " in done.stderr, done.stderr
