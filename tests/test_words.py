"""Words are for people: no part of the runtime decides by what an error says."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from gnaforge.build_tools.text import listed

ROOT = Path(__file__).parents[1] / "codegen"
# What a call may run; the benchmark's contenders have names of two words.
FILES = [path for path in sorted((ROOT / "runtime").glob("*.py")) if path.name != "bench.py"]
FILES += [ROOT / "registration.py", ROOT / "api.py"]

SEARCHES = {
    *("startswith", "endswith", "find", "rfind", "index", "count", "split", "rsplit", "partition", "rpartition"),
    *("removeprefix", "removesuffix", "replace", "match", "search", "fullmatch", "findall"),
}


def texts(node: ast.AST, constants: dict[str, str]) -> Iterator[str]:
    """Strings in an expression, also those that a module's constants stand for."""
    for child in ast.walk(node):
        if isinstance(child, ast.Constant) and isinstance(child.value, str):
            yield child.value
        elif isinstance(child, ast.Name) and child.id in constants:
            yield constants[child.id]


def decisions_by_words(source: str) -> list[int]:
    """Lines that compare with prose, or search for it: a text with two words, or of an error that was caught."""
    tree = ast.parse(source)
    constants = {
        target.id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    caught = {node.name for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler) and node.name}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            parts: list[ast.AST] = [node.left, *node.comparators]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in SEARCHES:
            parts = [node.func.value, *node.args]
        else:
            continue
        prose = any(" " in text.strip() or text.endswith(": ") for part in parts for text in texts(part, constants))
        of_error = any(
            isinstance(child, ast.Call)
            and isinstance(child.func, ast.Name)
            and child.func.id in ("str", "repr")
            and any(isinstance(name, ast.Name) and name.id in caught for name in ast.walk(child))
            for part in parts
            for child in ast.walk(part)
        )
        if prose or of_error:
            found.append(node.lineno)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_nothing_is_decided_by_words(path: Path) -> None:
    assert decisions_by_words(path.read_text()) == []


@pytest.mark.parametrize(
    "line",
    [
        'if message.startswith("gnaforge: bad input: "): pass',
        'PREFIX = "gnaforge: no kernel"\nif not message.startswith(PREFIX): pass',
        'if "is loaded" not in result: pass',
        'result = result.partition("\\nregister it ")[0]',
        "try:\n    pass\nexcept RuntimeError as error:\n    if str(error).startswith(PREFIX): pass",
        'try:\n    pass\nexcept RuntimeError as error:\n    if "kernel" in str(error): pass',
    ],
)
def test_such_decisions_would_be_noticed(line: str) -> None:
    assert decisions_by_words(line)


COUNTED = "kernel|artifact|problem|shape|folder|run|job|element|config|key token|query token|tile|head"
COUNTED_IN = ("cli", "bench", "build", "wheel", "verification", "families", "doctor.py", "plan.py", "gna/plot.py")


NO_NUMBERS = re.compile(r"(self|op|arch|family|isa|config\.dtype|found\.arch)|(extents|_box|rate|printable)\(.*")
NEVER_ONE = re.compile(r"_DRAWS|share\.numel\(\)|int\(outside.*|counts\.visited.*|launch\[.*|one\.\w+|.*\['steps'\]")


def test_no_text_has_one_kernels() -> None:
    """Texts for people take numbers of things from `count_of`."""
    paths = [ROOT / name for name in COUNTED_IN]
    files = [file for path in paths for file in (path.rglob("*.py") if path.is_dir() else (path,))]
    plural = re.compile(rf" (?:[a-z-]+ )?(?:{COUNTED})s\b")
    found = []
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            values = node.values if isinstance(node, ast.JoinedStr) else []
            for number, text in pairwise(values):
                if isinstance(number, ast.FormattedValue) and isinstance(text, ast.Constant):
                    counted = ast.unparse(number.value)
                    exempt = NO_NUMBERS.fullmatch(counted) or NEVER_ONE.fullmatch(counted)
                    if plural.match(text.value) and not exempt:
                        found.append(f"{file.name}:{node.lineno}: {counted}{text.value}")
    assert not found


def test_things_are_listed_as_in_a_sentence() -> None:
    """And by `listed`: joined with "and" alone, three of them read badly."""
    assert [listed("abc"[:count]) for count in (1, 2, 3)] == ["a", "a and b", "a, b and c"]
    joined = re.compile(r"""(["']) and \1\.join\(""")
    names = ("families", "cli", "wheel", "build", "page", "spec", "plan.py", "registration.py")
    paths = [ROOT / name for name in names]
    files = [file for path in paths for file in (path.rglob("*.py") if path.is_dir() else (path,))]
    assert [file.name for file in files if joined.search(file.read_text())] == []
