"""Packages that are installed: lower bounds free of known holes, and pins whose digests CI compares."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TESTS = Path(__file__).parent
# The first releases without holes that were published for older ones.
FREE_OF_HOLES = {
    "filelock": (3, 20, 3),  # CVE-2025-68146, CVE-2026-22701
    "jinja2": (3, 1, 6),  # CVE-2025-27516
    "pydantic": (2, 4),  # CVE-2024-3772
    "pytest": (9, 0, 3),  # CVE-2025-71176
    "pyyaml": (5, 4),  # CVE-2020-14343
    "setuptools": (78, 1, 1),  # CVE-2025-47273
    "torch": (2, 6),  # CVE-2025-32434
}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(file: str) -> dict[str, str]:
    lines = (TESTS / file).read_text().splitlines()
    found = (re.match(r"([A-Za-z0-9_.-]+)==([^ ;\\]+)", line) for line in lines)
    return {normal(match[1]): match[2] for match in found if match}


@pytest.mark.skipif(not (ROOT / "pyproject.toml").is_file(), reason="needs the checkout")
def test_lower_bounds_are_free_of_known_holes() -> None:
    bounds = dict(re.findall(r'"([A-Za-z0-9_-]+)>=([\d.]+)', (ROOT / "pyproject.toml").read_text()))
    for name, least in FREE_OF_HOLES.items():
        assert tuple(map(int, bounds[name].split("."))) >= least, name


# Imports of tests that are skipped without them, and what brings them.
BRINGS = {"auditwheel": "auditwheel", "clang_format": "clang-format", "cutlass_library": "nvidia-cutlass"}
BRINGS |= {"diffusers": "diffusers", "kernels": "kernels"}
UNPACKAGED = {"natten"}  # has to be built for the torch that is installed; see README.md


@pytest.mark.skipif(not (ROOT / "pyproject.toml").is_file(), reason="needs the checkout")
def test_one_extra_is_all_that_the_tests_need() -> None:
    """CI and the README install `test` alone: nothing else may be missing, or many tests are skipped."""
    text = (ROOT / "pyproject.toml").read_text()
    extras = {name: set(re.findall(r'"([A-Za-z0-9_.-]+(?:\[cuda\])?)', body)) for name, body in EXTRA.findall(text)}
    needed = {name for path in TESTS.glob("*.py") for name in re.findall(r'importorskip\("(\w+)"', path.read_text())}
    assert needed - UNPACKAGED == BRINGS.keys()
    assert "gnaforge[cuda]" in extras["test"]
    assert set(BRINGS.values()) | {"nvidia-cuda-nvcc"} <= extras["test"] | extras["cuda"]
    command = next(line for line in (ROOT / "README.md").read_text().splitlines() if line.endswith("pytest -n 2"))
    assert "-c tests/constraints.txt -e '.[test]'" in command
    locked = pins("requirements.txt").keys()
    own = {normal(name) for name in extras["test"] | extras["cuda"]} - {"gnaforge-cuda-", "gnaforge[cuda]"}
    assert own <= locked


EXTRA = re.compile(r"^(test|cuda) = \[\n(.*?)^\]", re.MULTILINE | re.DOTALL)


def test_every_pin_has_digests_and_both_files_agree() -> None:
    constraints, hashed = pins("constraints.txt"), pins("requirements.txt")
    assert constraints.keys() - hashed.keys() == {"torch", "natten"}  # as the file says
    assert {name: constraints[name] for name in hashed} == hashed
    blocks = re.split(r"^(?=[A-Za-z0-9])", (TESTS / "requirements.txt").read_text(), flags=re.MULTILINE)[1:]
    assert len(blocks) == len(hashed) and all("--hash=sha256:" in block for block in blocks)
    assert pins("natten.txt") == {"natten": constraints["natten"]}
    assert "--hash=sha256:" in (TESTS / "natten.txt").read_text()
