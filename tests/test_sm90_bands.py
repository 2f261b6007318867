"""Edges, block-causal frames, sinks and ranges of sm90's first family, in the emulator. Nothing here ran on hardware.

Each problem is compared with exact attention under three schedules, with guard zones and gaps around tensors, and once
with NaN where it must not matter; KV tiles are counted beside the simulator's.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from gnaforge.build.kernels import find_libraries
from gnaforge.errors import BuildError
from gnaforge.runtime.config import KernelConfig
from gnaforge.runtime.problem import Problem
from gnaforge.verification.problems import for_kernel, random_problem, shrink, with_heads, with_settings
from gnaforge.verification.runner import ProblemResult, Settings, Verifier
from gnaforge.verification.schedules import Schedule
from sm90_kernels import KEYS

SCHEDULES = [Schedule("eager", "round-robin"), Schedule("lazy", "depth-first"), Schedule("random", "random")]
SETTINGS = ("edge", "block_causal", "sink", "range", "kv_sink")
MOST_TOKENS = {1: 500, 2: 900, 3: 1500}
RANK_1, RANK_2, RANK_3 = KEYS[9], KEYS[7], KEYS[2]
RANK_3_APART = KEYS[3]  # head dim 72: heads aren't folded, so each batch entry is a slice of its own


def verify(key: str, *problems: Problem, schedules: list[Schedule] = SCHEDULES) -> list[ProblemResult]:
    """All problems are right, or the test fails or is skipped."""
    config = KernelConfig.parse(key)
    try:
        library = find_libraries([config], emulated=True)[config]
    except BuildError as error:
        if "no CUDA compiler" in str(error):
            pytest.skip(str(error))
        raise
    with Verifier(config, library, Settings(schedules)) as verifier:
        found = [verifier.verify(for_kernel(problem, config)) for problem in problems]
    for result in found:
        assert not result.failed, f"{key}: {result.problem}: {result.message}"
    return found


def random_problems(key: str, first_seed: int, count: int) -> list[Problem]:
    """Of a kernel's rank, with settings of every kind, small enough for the emulator."""
    config = KernelConfig.parse(key)
    problems = []
    for seed in range(first_seed, first_seed + count):
        rng = Random(f"bands {key} {seed}")
        plain = with_heads(random_problem(rng, config.rank), config)
        problem = with_settings(plain, rng, MOST_TOKENS[config.rank], SETTINGS)
        problems.append(shrink(for_kernel(problem, config), config))
    return problems


@pytest.mark.parametrize("key", [RANK_1, RANK_2, RANK_3])
def test_random_problems_with_every_setting(session_cache: Path, key: str) -> None:
    problems = random_problems(key, 0, 16)
    assert {name for problem in problems for name in problem.features()} == set(SETTINGS)
    verify(key, *problems)


def survey(count: int, script: str = "sm90_survey.py") -> None:
    """Calls of a survey, in a process of its own."""
    command = [sys.executable, script, str(count)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, timeout=7200)
    if "no CUDA compiler" in done.stderr:
        pytest.skip("no CUDA compiler")
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)


def test_some_calls_that_mix_all_settings(session_cache: Path) -> None:
    survey(12)


@pytest.mark.survey
def test_many_calls_that_mix_all_settings(session_cache: Path) -> None:
    survey(400)


def whole(tokens: int, window: int, **settings: object) -> Problem:
    return Problem(tokens, window, heads=2, kv_heads=1, **settings)  # type: ignore[arg-type]


def part_of(grid: int, q_offset: int, kv_offset: int, kv_tokens: int) -> dict[str, int]:
    return {"grid": grid, "q_offset": q_offset, "kv_offset": kv_offset, "kv_tokens": kv_tokens}


CASES = {
    "a window cut at both ends": (RANK_1, whole(300, 420, edge="cut")),
    "both seams seen by one Q tile": (RANK_1, whole(300, 290, edge="wrap")),
    "a seam beside whole tiles": (RANK_1, whole(700, 401, edge="wrap")),
    "wraps, with dilation": (RANK_1, whole(462, 101, stride=7, dilation=3, edge="wrap")),
    # Whole tiles below the split and above it: the upper run is turned.
    "a sink of whole tiles": (RANK_1, whole(900, 500, sink=260)),
    "a sink beside the diagonal": (RANK_1, whole(400, 90, causal=True, sink=33)),
    "frames": (RANK_1, whole(420, 90, stride=30, causal="block")),
    "a cache that is still filling, with a sink": (
        RANK_1,
        whole(60, 400, stride=30, causal="block", sink=30, grid=360, q_offset=120, kv_tokens=180),
    ),
    "a rolling cache": (
        RANK_1,
        whole(60, 150, stride=30, causal="block", sink=30, **part_of(900, 600, 480, 210), kv_sink=30),
    ),
    "first keys alone": (RANK_1, whole(40, 30, grid=200, q_offset=0, kv_offset=90, kv_sink=60, kv_tokens=80)),
    "keys from before the seam": (RANK_1, whole(100, 41, edge="wrap", grid=400, kv_offset=-25, kv_tokens=150)),
    "keys from behind the seam": (
        RANK_1,
        whole(150, 41, edge="wrap", grid=400, q_offset=250, kv_offset=220, kv_tokens=210),
    ),
    "dilated, wrapping, from before the seam": (
        RANK_1,
        whole(90, 21, dilation=4, edge="wrap", grid=360, q_offset=0, kv_offset=-43, kv_tokens=177),
    ),
    "groups without a query": (RANK_1, whole(2, 5, dilation=7, grid=80, q_offset=17, kv_tokens=80)),
    "more queries than keys, all of which they see": (
        RANK_2,
        Problem((23, 9), (10, 5), grid=(10, 20), q_offset=(0, 6), kv_tokens=(10, 20), batch=2),
    ),
    "an image's window and text": (RANK_2, Problem((40, 11), (7, 11), grid=(40, 11), edge=("wrap", "shift"), heads=3)),
    "edges of two kinds with dilation": (
        RANK_2,
        Problem((21, 18), (9, 4), (2, 1), (1, 3), edge=("cut", "wrap"), batch=2, heads=2),
    ),
    "frames of a video with a sink, cut and wrapping": (
        RANK_3,
        Problem((12, 9, 10), (8, 5, 3), (4, 1, 2), causal=("block", False, False), edge=("shift", "cut", "wrap"),
                sink=(2, 1, 0), heads=2),
    ),
    "a chunk of queries of a dilated grid": (
        RANK_3,
        Problem((5, 6, 7), (3, 4, 3), 1, (2, 1, 3), grid=(11, 9, 20), q_offset=(3, 2, 5), kv_tokens=(11, 9, 20)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_cases(session_cache: Path, case: str) -> None:
    key, problem = CASES[case]
    verify(key, problem)


def test_sides_of_a_seam_and_a_sink_are_masked_apart(session_cache: Path) -> None:
    """The cases are what they are called: tiles with and without a mask on both sides."""
    for case, interior in (("a seam beside whole tiles", True), ("a sink of whole tiles", True), ("frames", False)):
        (found,) = verify(*CASES[case], schedules=SCHEDULES[:1])
        assert found.counters is not None and found.counters.shell_tiles > 0
        assert (found.counters.interior_tiles > 0) == interior, case


@pytest.mark.parametrize(
    ("problem", "launches"),
    [
        (Problem((4, 5, 6), 3, batch=5), 1),  # as many slices as a launch takes: the batch entries
        (Problem((4, 5, 6), 3, batch=6), 2),
        (Problem((4, 5, 7), 2, dilation=(1, 1, 2), batch=2), 1),  # and groups
        # Eight groups, of two kinds along each axis.
        (Problem((5, 7, 9), 2, dilation=2), 2),
        # Nine groups of queries that lie differently along either axis, seven different ones together.
        (
            Problem(
                (5, 4, 4), (3, 1, 1), dilation=(1, 3, 4), grid=(5, 23, 41), q_offset=(0, 7, 10), kv_tokens=(5, 23, 41)
            ),
            3,
        ),
    ],
)
def test_launches(session_cache: Path, problem: Problem, launches: int) -> None:
    (found,) = verify(RANK_3_APART, problem, schedules=SCHEDULES[:1])
    assert found.counters is not None and found.counters.launches == launches


def test_a_plain_call_takes_the_same_steps_with_all_that_says_nothing(session_cache: Path) -> None:
    """A cut that nothing is cut by, a sink that is seen anyway: tiles and masks are a plain call's."""
    plain = Problem((24, 24), (24, 9), heads=2)
    key = KEYS[4]
    found = verify(key, plain, replace(plain, grid=(24, 24), kv_tokens=(24, 24)), schedules=SCHEDULES[:1])
    first, second = (result.counters for result in found)
    assert first is not None and second is not None
    assert first.instructions == second.instructions and first.tiles == second.tiles
