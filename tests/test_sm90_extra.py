"""sm90's first family with extra keys and lists of calls, in the emulator."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from gnaforge.build.kernels import find_libraries
from gnaforge.errors import BuildError
from gnaforge.runtime.config import KernelConfig
from gnaforge.runtime.problem import Problem
from gnaforge.verification.problems import for_kernel
from gnaforge.verification.runner import Settings, Verifier
from gnaforge.verification.schedules import Schedule
from sm90_kernels import KEYS

# Rank 3 with folded heads and with maps per batch entry, rank 2 with padded channels, rank 1 with unequal head dims.
FOLDED, APART, PLANE, LINE = KEYS[0], KEYS[3], KEYS[7], KEYS[11]
CONFIGS = [KernelConfig.parse(key) for key in (FOLDED, APART, PLANE, LINE)]
ORDERS = {"eager": "round-robin", "lazy": "depth-first", "random": "random"}


@pytest.fixture(scope="module")
def libraries(session_cache: Path) -> dict[str, Path]:
    try:
        return {config.key: path for config, path in find_libraries(CONFIGS, emulated=True).items()}
    except BuildError as error:
        if "no CUDA compiler" in str(error):
            pytest.skip(str(error))
        raise


def check(library: Path, key: str, name: str, mode: str) -> subprocess.CompletedProcess[str]:
    """A check of `sm90_calls`, in a process of its own."""
    settings = {"MEMORY": "mapped", "TIMING": mode, "ORDER": ORDERS[mode], "PROCESSORS": "3"}
    environment = {**os.environ, **{f"GNAFORGE_EMULATOR_{name}": value for name, value in settings.items()}}
    here = Path(__file__).parent
    command = [sys.executable, "sm90_calls.py", str(library), key, name]
    return subprocess.run(command, capture_output=True, text=True, cwd=here, env=environment, timeout=1800)


@pytest.mark.parametrize(
    ("key", "problem"),
    [
        (FOLDED, Problem((9, 6, 11), (5, 5, 7), (1, 2, 1), batch=2, heads=2, kv_heads=1, extra_tokens=(200, 40))),
        (
            APART,
            Problem((5, 9, 8), (3, 4, 3), 1, (1, 2, 1), (True, False, False), batch=2, heads=2, extra_tokens=(99,)),
        ),
        (PLANE, Problem((20, 18), (9, 7), (2, 1), 1, (False, True), batch=2, heads=4, kv_heads=2, extra_tokens=(300,))),
        (PLANE, Problem((12, 9), (5, 4), edge=("cut", "wrap"), batch=2, heads=2, extra_tokens=(1, 250))),
        (LINE, Problem(200, 50, 3, 2, batch=3, heads=2, kv_heads=1, extra_tokens=(48, 100))),
    ],
)
def test_windows_and_extra_keys(libraries: dict[str, Path], key: str, problem: Problem) -> None:
    """Under three schedules, poisoned; as many KV tiles with and without a mask as the model has."""
    config = KernelConfig.parse(key)
    settings = Settings([Schedule(mode, order) for mode, order in ORDERS.items()])
    with Verifier(config, libraries[key], settings) as verifier:
        found = verifier.verify(for_kernel(problem, config))
    assert not found.failed, found.message
    assert found.model is not None and found.identical


@pytest.mark.parametrize("name", ["lengths", "layouts", "second_piece_alone", "work", "windows_per_head", "samples"])
@pytest.mark.parametrize(("key", "mode"), [(APART, "eager"), (LINE, "lazy"), (PLANE, "random")])
def test_calls(libraries: dict[str, Path], key: str, mode: str, name: str) -> None:
    done = check(libraries[key], key, name, mode)
    assert done.returncode == 0, done.stderr


def test_parts_of_a_joint_sequence_are_one_launch(libraries: dict[str, Path]) -> None:
    done = check(libraries[LINE], LINE, "joint", "random")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["layouts", "windows_per_head"])
def test_calls_with_folded_heads(libraries: dict[str, Path], name: str) -> None:
    done = check(libraries[FOLDED], FOLDED, name, "random")
    assert done.returncode == 0, done.stderr
