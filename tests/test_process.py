"""Processes that are started while another thread forks."""

from __future__ import annotations

import faulthandler
import os
import signal
import subprocess
import threading

import pytest
from gnaforge.build_tools.process import output_of, start
from gnaforge.runtime.core import process_lock


def test_a_fork_keeps_no_pipe_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits until the pipes of a process that is being started have one end here: else their reader would wait for
    the forked process."""
    pipes_exist, forks = threading.Event(), threading.Event()
    execute = subprocess.Popen._execute_child

    def slowly(self: subprocess.Popen[str], *arguments: object) -> None:
        pipes_exist.set()
        forks.wait(0.3)  # never set: time for the fork to happen, if it doesn't wait
        execute(self, *arguments)

    monkeypatch.setattr(subprocess.Popen, "_execute_child", slowly)
    printed: list[str] = []
    thread = threading.Thread(target=lambda: printed.append(output_of(["echo", "done"])), daemon=True)
    thread.start()
    pipes_exist.wait()
    child = os.fork()
    if child == 0:
        signal.pause()
    try:
        thread.join(20)
        assert printed == ["done\n"]
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_fork_takes_locks_in_the_order_of_who_builds_the_core() -> None:
    """Loading the core holds the process's lock while it starts a compiler."""
    loading = threading.Event()

    def load() -> None:
        with process_lock():
            loading.set()
            threading.Event().wait(0.3)  # never set: time for the fork
            output_of(["true"])

    thread = threading.Thread(target=load, daemon=True)
    faulthandler.dump_traceback_later(60, exit=True)
    thread.start()
    loading.wait()
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    faulthandler.cancel_dump_traceback_later()
    thread.join(20)
    assert not thread.is_alive()


def test_output_and_errors() -> None:
    both = ["sh", "-c", "echo out; echo err >&2; exit $0", "0"]
    assert output_of(both) == "out\n"
    with start(both) as process:
        assert process.stdout is not None and sorted(process.stdout) == ["err\n", "out\n"]
    with pytest.raises(subprocess.CalledProcessError):
        output_of([*both[:-1], "3"])
    with pytest.raises(FileNotFoundError):
        output_of(["/nonexistent/program"])
