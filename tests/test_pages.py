"""The pages' commands and snippets, run as they stand. ``<!-- not run here: WHY -->`` before a block leaves it out."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from gnaforge.build_tools.cuda import find_nvcc
from gnaforge.errors import GnaforgeError

ROOT = Path(__file__).parents[1]
FOLDERS = ("codegen", "build_tools", "templates", "tests")
PAGES = sorted([*ROOT.glob("*.md"), *(path for name in FOLDERS for path in (ROOT / name).rglob("*.md"))])
LEFT_OUT = re.compile(r"<!-- not run here: .+ -->\n+$")


def blocks(page: Path) -> list[tuple[str, str]]:
    """The language and text of each block of a page that is to be run."""
    text = page.read_text()
    found = re.finditer(r"^( *)```(bash|python)\n(.*?)^\1```$", text, re.M | re.S)
    return [(block[2], block[3]) for block in found if not LEFT_OUT.search(text[: block.start()])]


RUN = [page for page in PAGES if blocks(page)]


def test_the_pages_that_are_run() -> None:
    names = {str(page.relative_to(ROOT)) for page in RUN}
    assert {"README.md", "codegen/README.md", "codegen/simulator/README.md", "codegen/verification/README.md"} <= names


@pytest.mark.parametrize("page", RUN, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_snippets(page: Path, tmp_path: Path) -> None:
    """In order, in one folder; a command's exit status is to be 0."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "GNAFORGE_JIT": "warn"}
    try:
        find_nvcc()
        has_nvcc = True
    except GnaforgeError:
        has_nvcc = False
    for language, text in blocks(page):
        if "sm90" in text and language == "bash" and not has_nvcc:
            continue
        command = ["bash", "-euc", text] if language == "bash" else [sys.executable, "-c", text]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, f"{text}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for text in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in text:
            continue
        name, _, anchor = text.partition("#")
        target = (page.parent / name) if name else page
        assert target.exists(), text
        if anchor:
            titles = re.findall(r"^#+ (.*)$", target.read_text(), re.M)
            assert anchor in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, text


def test_the_readme_is_read_in_a_minute() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
