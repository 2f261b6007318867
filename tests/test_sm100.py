"""sm100's own family in the emulator. Nothing here ran on hardware.

Loads and stores of tensor memory count as complete only where they are waited for.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from emulated_calls import MODES, PRELUDE, REFUSED, run
from gnaforge.build.kernels import build_kernels, find_libraries
from gnaforge.errors import BuildError
from gnaforge.families.sm100_forward import FAMILY
from gnaforge.gna.counts import count_problem
from gnaforge.runtime.config import KernelConfig
from gnaforge.runtime.problem import Problem
from gnaforge.runtime.request import heads_misfit
from gnaforge.verification.problems import for_kernel, random_problem_for
from gnaforge.verification.runner import ProblemResult, Settings, Verifier
from gnaforge.verification.schedules import Schedule
from sm100_kernels import APART, CONFIGS, COPIED, FOLDED, KEYS, LINE, PACKED, PLANE, SHARED, WIDE
from sm100_problems import random_problem
from test_sm90 import LAYOUTS, NONFINITE
from test_sm90_bands import CASES, random_problems

SCHEDULES = [Schedule(mode, order) for mode, order in MODES.items()]


@pytest.fixture(scope="module")
def libraries(session_cache: Path) -> dict[str, Path]:
    try:
        return {config.key: path for config, path in find_libraries(CONFIGS, emulated=True).items()}
    except BuildError as error:
        if "no CUDA compiler" in str(error):
            pytest.skip(str(error))
        raise


def verify(library: Path, key: str, *problems: Problem, schedules: list[Schedule] = SCHEDULES) -> list[ProblemResult]:
    """All problems are right under the schedules, poisoned and with gaps, in as many KV tiles as the model says."""
    config = KernelConfig.parse(key)
    with Verifier(config, library, Settings(schedules)) as verifier:
        found = [verifier.verify(for_kernel(problem, config)) for problem in problems]
    for result in found:
        assert not result.failed, f"{key}: {result.problem}: {result.message}"
        assert result.model is not None
    return found


def prelude(libraries: dict[str, Path], key: str) -> str:
    return PRELUDE.format(key=key, library=libraries[key])


@pytest.mark.parametrize("key", KEYS)
def test_random_problems(libraries: dict[str, Path], key: str) -> None:
    """In all layouts, each also poisoned: every kernel's under one schedule, of which there are three."""
    config = KernelConfig.parse(key)
    mode = list(MODES)[KEYS.index(key) % 3]
    with Verifier(config, libraries[key], Settings([Schedule(mode, MODES[mode])])) as verifier:
        for seed in range(4):
            problem, _ = random_problem(config, seed)
            found = verifier.verify(problem)
            assert not found.failed, f"{key} seed {seed}: {problem}: {found.message}"


@pytest.mark.parametrize("key", [PACKED, SHARED])
def test_random_problems_have_heads_for_whole_tiles(key: str) -> None:
    config = KernelConfig.parse(key)
    drawn = [random_problem_for(config, seed) for seed in range(60)]
    drawn += [random_problem(config, seed)[0] for seed in range(60)] + random_problems(key, 0, 60)
    assert not [misfit for problem in drawn if (misfit := heads_misfit(problem, config))]


@pytest.mark.survey
@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("mode", MODES)
def test_many_random_problems(libraries: dict[str, Path], key: str, mode: str) -> None:
    """Of all kernels and schedules 408, half of them with settings of every kind."""
    config = KernelConfig.parse(key)
    first = 100 + 1000 * list(MODES).index(mode)
    plain = [random_problem(config, seed)[0] for seed in range(first, first + 17)]
    settings = random_problems(key, first, 17)
    verify(libraries[key], key, *plain, *settings, schedules=[Schedule(mode, MODES[mode])])


OF_RANK = {1: LINE, 2: PLANE, 3: APART}
IN_CI = list(CASES)[::2]


@pytest.mark.parametrize(
    "case", [*IN_CI, *(pytest.param(x, marks=pytest.mark.survey) for x in CASES if x not in IN_CI)]
)
def test_cases_of_settings(libraries: dict[str, Path], case: str) -> None:
    """Those of sm90's kernels."""
    key, problem = CASES[case]
    own = OF_RANK[KernelConfig.parse(key).rank]
    verify(libraries[own], own, problem, schedules=SCHEDULES[-1:])


@pytest.mark.parametrize(
    ("key", "problem"),
    [
        (FOLDED, Problem((9, 6, 11), (5, 5, 7), (1, 2, 1), batch=2, heads=2, kv_heads=1, extra_tokens=(200, 40))),
        # 18 slices: nine dilation groups, and the batch doesn't fold.
        (APART, Problem((5, 7, 8), 2, 1, (1, 3, 3), batch=2, extra_tokens=(99,))),
        (PLANE, Problem((12, 9), (5, 4), edge=("cut", "wrap"), batch=2, heads=2, extra_tokens=(1, 250))),
        (WIDE, Problem(200, 50, 3, 2, batch=3, heads=2, kv_heads=1, extra_tokens=(48, 100))),
        (PACKED, Problem((5, 7, 9), 3, 1, (1, 1, 2), batch=2, heads=8, kv_heads=2, extra_tokens=(99,))),
    ],
)
def test_windows_and_extra_keys(libraries: dict[str, Path], key: str, problem: Problem) -> None:
    (found,) = verify(libraries[key], key, problem)
    assert found.identical


@pytest.mark.parametrize(
    ("key", "problem"),
    [
        (FOLDED, Problem((9, 12, 11), (4, 5, 7), (1, 2, 1), heads=4, kv_heads=2)),
        (PLANE, Problem((30, 9), (10, 4), edge=("cut", "wrap"), batch=2, extra_tokens=(100,))),
        (LINE, Problem(500, 100)),
        (LINE, Problem(300, 200, sink=5, causal=True)),
        (COPIED, Problem((25, 20), (6, 9), dilation=(2, 1), causal=(True, False))),
        (PACKED, Problem((5, 7, 9), 3, batch=2, heads=4, kv_heads=2)),
    ],
)
def test_columns_that_nobody_sees_are_not_computed(libraries: dict[str, Path], key: str, problem: Problem) -> None:
    """Products take as many columns as the simulator counts."""
    (found,) = verify(libraries[key], key, problem, schedules=SCHEDULES[:1])
    config = KernelConfig.parse(key)
    counts = count_problem(
        found.problem, config.q_tile, config.kv_tile, short=FAMILY.padding.short_tiles(config.kv_tile)
    )
    columns = counts.visited * config.kv_columns - counts.spared
    rows = FAMILY.padding.padded_rows(config.q_rows) * problem.batch * problem.heads // config.q_tile_heads
    channels = sum(-(-n // 16) * 16 for n in (config.head_dim, config.value_head_dim or config.head_dim))
    assert (counts.spared > 0) is not any(dim.sink for dim in problem.dimensions)
    assert found.counters is not None
    assert found.counters.mma_operations == 2 * rows * columns * channels


@pytest.mark.parametrize(
    ("key", "name", "mode"),
    [
        (LINE, "lengths", "lazy"),
        (COPIED, "lengths", "random"),
        (PLANE, "layouts", "random"),
        (APART, "second_piece_alone", "eager"),
        (PLANE, "work", "eager"),
        (COPIED, "windows_per_head", "lazy"),
        (APART, "samples", "random"),
        (LINE, "joint", "random"),
        (PACKED, "windows_per_head", "random"),
        (SHARED, "joint", "lazy"),
        (SHARED, "work", "eager"),
    ],
)
def test_calls(libraries: dict[str, Path], key: str, name: str, mode: str) -> None:
    """Checks of `sm90_calls`: extra keys, and lists of calls."""
    run(["sm90_calls.py", str(libraries[key]), key, name], mode)


@pytest.mark.parametrize(("key", "every"), [(COPIED, 29), (LINE, 19)])
def test_missing_synchronisation_is_noticed(libraries: dict[str, Path], key: str, every: int) -> None:
    """A few mutants of a kernel of one half, and of one of two whose probabilities lie apart: waits and arrivals that
    its rules need."""
    said = run(["kernel_mutants.py", str(libraries[key]), key, str(every)], "eager")
    assert re.match(r"\d+ mutants reached", said), said


def test_every_element_is_written(libraries: dict[str, Path]) -> None:
    """Fresh memory holds NaN; tiles cross every border."""
    code = """
torch.use_deterministic_algorithms(True)
torch.utils.deterministic.fill_uninitialized_memory = True
assert torch.empty(4).isnan().all()
q, k = (torch.randn(1, 4, 7, 11, 2, 72).bfloat16() for _ in range(2))
v = torch.randn(1, 4, 7, 11, 2, 40).bfloat16()
out, lse = attend(q, k, v, (3, 5, 6), (1, 2, 1))
assert out.isfinite().all() and lse.isfinite().all()
"""
    run(prelude(libraries, APART) + code)


@pytest.mark.parametrize("key", [APART, WIDE])
def test_any_layout_is_taken(libraries: dict[str, Path], key: str) -> None:
    """With maps per batch entry, and of one dimension; the kernel itself says what it can't read."""
    code = LAYOUTS.format(library=libraries[key])
    assert int(run(prelude(libraries, key) + code)) == 8


@pytest.mark.parametrize("key", [APART, COPIED])
def test_values_that_are_not_finite_reach_no_further_than_is_said(libraries: dict[str, Path], key: str) -> None:
    """In V, to all queries of Q tiles that visit a KV tile with the token; in K, to those that see it, also where FMAs
    compute a probability."""
    run(prelude(libraries, key) + NONFINITE)


@pytest.mark.parametrize(
    ("call", "device", "reason"),
    [
        ("attend(*[x[..., :64].bfloat16()] * 3, 3)", "b200", "head_dim is 64, this kernel takes 256"),
        (
            "attend(*[x.new_zeros(1, 9, 1, 256).bfloat16()] * 3, 3, 1, 1, False, -1.0)",
            "b200",
            "takes positive ones",
        ),
        (
            "attend(*[x.new_zeros(1, 9, 1, 256).bfloat16()] * 3, 3)",
            "h100",
            "device 0 has compute capability 9.0, this kernel needs 10.0 or 10.3",
        ),
    ],
)
def test_refusals_say_why(libraries: dict[str, Path], call: str, device: str, reason: str) -> None:
    assert reason in run(prelude(libraries, WIDE) + REFUSED.format(call=call), device=device)


def test_heads_that_make_no_whole_tiles_are_refused(libraries: dict[str, Path]) -> None:
    code = """
q, k = torch.randn(1, 9, 3, 192).half(), torch.randn(1, 9, 1, 192).half()
v = torch.randn(1, 9, 1, 72).half()
try:
    attend(q, k, v, 3)
except Exception as error:
    print(error)
"""
    assert "3 query heads share keys, a multiple of 2 must" in run(prelude(libraries, SHARED) + code)


def test_facts_of_a_gpu_build(session_cache: Path) -> None:
    """No kernel spills; the last word's exponentials come after the others are announced."""
    try:
        artifacts, _ = build_kernels(CONFIGS)
    except BuildError as error:
        if "no CUDA compiler" in str(error):
            pytest.skip(str(error))
        raise
    for config, artifact in artifacts.items():
        record = artifact.record
        assert record["registers"] == 128 and record["spill_bytes"] == 0, config
        last = (config.kv_columns - 1) % 32 + 1
        assert record["code"]["mufu_under_product"] >= min(last, 20 * ((config.kv_columns - 1) // 32)), config
        assert record["shared_memory"] <= 227 * 1024
