"""CONTRIBUTING.md's lists of files, held against the repository and the toy family."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOY = ROOT / "tests/toy_family"
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", TEXT, re.M | re.S))
CODE = {
    str(path.relative_to(ROOT)): path.read_text()
    for folder in ("codegen", "templates", "build_tools")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".py", ".h", ".cpp", ".j2") and "emulator" not in path.parts
}

# What a file has that names one thing of the kind.
NAMED = {
    "A target": r"\b100f\b|\bb200\b",
    "An op": r"backward_kv\b|BACKWARD_KV\b",
    "An element type": r"\bfp16\b|FP16\b|\bfloat16\b|::Half\b",
    "An argument of calls": r"\bkv_sink\b|KV_SINK\b",
}
EXAMPLES = {"codegen/bench/tools.py"}  # a spec


def paths_of(title: str) -> list[str]:
    """The paths that a section's list names; ``<...>`` in them stands for any name."""
    items = re.findall(r"^- .*\n(?:  .*\n)*", SECTIONS[title], re.M)
    return [path for item in items for path in re.findall(r"`([\w.<>]+/[\w.<>/]*)`", item)]


def pattern_of(path: str) -> re.Pattern[str]:
    """Fits the files that a path of a list stands for; all below it, where it is a folder."""
    names = re.sub(r"<\w+>", "[^/]+", re.escape(path).replace("\\<", "<").replace("\\>", ">"))
    return re.compile(names + (".*" if path.endswith("/") else ""))


@pytest.mark.parametrize("title", SECTIONS)
def test_what_a_list_names_exists(title: str) -> None:
    assert paths_of(title)
    for path in paths_of(title):
        assert list(ROOT.glob(re.sub(r"<\w+>", "*", path).rstrip("/"))), path


def test_the_toy_family_has_the_files_of_the_list_and_no_others() -> None:
    files = {str(path.relative_to(TOY)) for path in TOY.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    # Where the package keeps things, and where a family outside of it does.
    moved = {"codegen/families/": "", "templates/include/gnaforge/": "include/", "templates/": ""}
    own = [
        next(place + path[len(package) :] for package, place in moved.items() if path.startswith(package))
        for path in paths_of("A kernel family")
    ]
    assert own == ["<name>.py", "<name>/kernel.cu.j2", "<name>/kernel.cpp.j2", "include/<folder>/"]
    kinds = [pattern_of(path) for path in own if not path.endswith(".cu.j2")]  # that is a GPU's
    assert all(sum(bool(kind.fullmatch(file)) for file in files) == 1 for kind in kinds)
    assert len(files) == len(kinds)


def test_no_other_code_names_a_family_or_a_gpu_target() -> None:
    """So that none is forgotten where a new one comes. Docstrings may."""
    found = {
        name: words
        for name, text in CODE.items()
        if name.endswith(".py") and not name.startswith("codegen/families/")
        if (words := re.findall(r'"(?:sm\d+|\w+(?<!gna)_forward)"', re.sub(r'""".*?"""', "", text, flags=re.S)))
    }
    assert found.keys() == {"codegen/simulator/natten.py"}, found  # the tiles of NATTEN's kernels, by arch


@pytest.mark.parametrize("title", NAMED)
def test_no_file_outside_of_a_list_names_such_a_thing(title: str) -> None:
    patterns = [pattern_of(path) for path in paths_of(title)]
    named = {name for name, text in CODE.items() if re.search(NAMED[title], text)} - EXAMPLES
    assert named
    assert {name for name in named if not any(pattern.fullmatch(name) for pattern in patterns)} == set()
