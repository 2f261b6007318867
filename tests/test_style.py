"""The format of C++ and CUDA sources, and docstrings."""

from __future__ import annotations

import ast
import re
import subprocess
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("build_tools", "templates", "tests")
SOURCES = sorted(path for name in FOLDERS for path in (ROOT / name).rglob("*") if path.suffix in (".h", ".cpp", ".cu"))


def test_clang_format_changes_nothing() -> None:
    """With the version that constraints.txt names; others differ in details."""
    constraints = (ROOT / "tests" / "constraints.txt").read_text().splitlines()
    (pinned,) = (line.removeprefix("clang-format==") for line in constraints if line.startswith("clang-format=="))
    clang_format = pytest.importorskip("clang_format")
    if metadata.version("clang-format") != pinned:
        pytest.skip(f"needs version {pinned} of clang-format")
    command = [clang_format.get_executable("clang-format"), "--dry-run", "--Werror", *map(str, SOURCES)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:5000]


def test_lines_have_120_columns_at_most() -> None:
    """clang-format leaves comments and long literals as they are."""
    long = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in SOURCES
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if len(line) > 120
    ]
    assert not long


def test_modules_and_classes_say_what_they_are() -> None:
    """Their docstrings are sentences or noun phrases, no questions: `Counts of a launch`, not `What a launch did`."""
    question = re.compile(r"(What|Which|Where|Whether|When|How|Why)\b")
    asking = [
        f"{path.relative_to(ROOT)}: {docstring.splitlines()[0]}"
        for folder in ("build_tools", "codegen", "tests")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Module | ast.ClassDef) and question.match(docstring := ast.get_docstring(node) or "")
    ]
    assert not asking, "\n".join(asking)
