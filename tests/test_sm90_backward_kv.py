"""The sm90 kernels of K's and V's gradients in the emulator, and the checks that their build makes. Nothing here ran on
hardware."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from gnaforge.build.kernels import build_kernels, find_libraries
from gnaforge.build_tools.cuda import find_nvcc
from gnaforge.errors import BuildError
from gnaforge.families.sm90_backward_kv import FAMILY
from gnaforge.runtime.config import KernelConfig
from gnaforge.runtime.problem import Problem
from gnaforge.verification.problems import for_kernel, random_problem_for, shrink
from gnaforge.verification.runner import Settings, Verifier
from sm90_backward_kernels import KV_CONFIGS as CONFIGS, KV_KEYS as KEYS, Q_CONFIGS
from sm90_boundary import compile_kernel
from test_sm90 import run
from test_sm90_backward import SCHEDULES, replace_once, require_right, survivors_of


@pytest.fixture(scope="module")
def libraries(session_cache: Path) -> dict[KernelConfig, Path]:
    try:
        return find_libraries(CONFIGS, emulated=True)
    except BuildError as error:
        if "no CUDA compiler" in str(error):
            pytest.skip(str(error))
        raise


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_random_problems(libraries: dict[KernelConfig, Path], config: KernelConfig) -> None:
    """All settings that the family has; in all layouts, poisoned, with the same bits under all schedules."""
    problems = [shrink(random_problem_for(config, seed, 300), config, 120) for seed in range(6)]
    require_right(config, libraries[config], problems, Settings(SCHEDULES))


@pytest.mark.survey
def test_four_hundred_random_problems(libraries: dict[KernelConfig, Path]) -> None:
    for config in CONFIGS:
        problems = [shrink(random_problem_for(config, seed), config) for seed in range(100, 145)]
        require_right(config, libraries[config], problems, Settings(SCHEDULES))


@pytest.mark.parametrize(
    ("key", "problem"),
    [
        # CTAs take many KV tiles; as folded heads and per batch entry.
        (KEYS[0], Problem((9, 9, 10), (5, 4, 9), (2, 1, 3), 1, (False, True, False), batch=3, heads=4, kv_heads=2)),
        (KEYS[1], Problem((7, 9, 16), (3, 3, 7), (1, 2, 1), (1, 2, 1), batch=2, heads=6, kv_heads=3)),
        (KEYS[8], Problem(580, 150, 5, causal=True, batch=2, heads=4, kv_heads=1)),
        (KEYS[4], Problem((20, 18), (20, 18), heads=5)),  # dense
        (KEYS[6], Problem((23, 20), (5, 4), dilation=(4, 3), heads=2)),  # more dilation groups than a launch holds
        (KEYS[3], Problem((8, 40), (4, 38), edge=("shift", "wrap"), heads=2)),  # interior tiles on both sides of a seam
        (KEYS[5], Problem((19, 30), (7, 30), causal=(False, "block"), stride=(1, 5), sink=(3, 0), heads=2)),
        # Extra keys: parts of the queries and of several tiles, batch entries apart, and launches apart with dilation.
        (KEYS[0], Problem((9, 9, 17), (5, 4, 9), batch=2, heads=4, kv_heads=2, extra_tokens=(200, 40))),
        (
            KEYS[1],
            Problem((5, 9, 8), (3, 4, 3), 1, (1, 2, 1), (True, False, False), batch=2, heads=2, extra_tokens=(99,)),
        ),
        (KEYS[5], Problem((40, 30), (5, 4), heads=2, kv_heads=1, extra_tokens=(70,))),
        # A cache: the grid's first keys apart, in KV tiles with others, and in whole ones.
        (
            KEYS[8],
            Problem(
                60, 100, 20, causal="block", sink=150, grid=900, q_offset=700, kv_tokens=310, kv_offset=600, kv_sink=150
            ),
        ),
    ],
)
def test_larger_problems(libraries: dict[KernelConfig, Path], key: str, problem: Problem) -> None:
    config = KernelConfig.parse(key)
    settings = Settings([SCHEDULES[2]], gaps=False, poison=False)
    require_right(config, libraries[config], [for_kernel(problem, config)], settings)


@pytest.mark.parametrize(
    ("key", "problem"),
    [
        (KEYS[8], Problem(64, 16, grid=640, q_offset=128, kv_tokens=640, batch=2, heads=2)),  # whole KV tiles
        (KEYS[4], Problem((3, 9), (2, 3), dilation=(8, 1), grid=(64, 9), kv_tokens=(64, 9))),  # whole dilation groups
        (KEYS[2], Problem((2, 9, 9), (3, 3, 3), 1, 1, True, grid=(9, 9, 9), q_offset=(4, 0, 0), kv_tokens=(9, 9, 9))),
    ],
)
def test_keys_that_no_query_sees_have_gradients_of_zero(
    libraries: dict[KernelConfig, Path], key: str, problem: Problem
) -> None:
    """They are written as any other element is: what is not, verification finds."""
    config = KernelConfig.parse(key)
    require_right(config, libraries[config], [for_kernel(problem, config)], Settings(SCHEDULES))


GRIDS = """
import hashlib, os, torch
os.environ["GNAFORGE_EMULATOR_PROCESSORS"] = "{processors}"
from pathlib import Path
from gnaforge.runtime.problem import Problem
from gnaforge.verification.contract import Kernel
from gnaforge.verification.problems import for_kernel
kernel = Kernel(Path("{library}"), "{key}")
problem = for_kernel(Problem((32, 34), (9, 7), (1, 2), heads=2, kv_heads=1, extra_tokens=(140,)), kernel.config)
tensors = kernel.op.random_inputs(problem)
names = "k", "v", "extra_k", "extra_v"
grads = {{f"grad_{{name}}": torch.full_like(tensors[name], torch.nan) for name in names}}
kernel.call(problem, tensors | grads)
print([hashlib.sha256(x.view(torch.int16).numpy().tobytes()).hexdigest() for x in grads.values()])
"""


@pytest.mark.parametrize("key", [KEYS[3], KEYS[5]])
def test_any_number_of_thread_blocks_gives_the_same_bits(libraries: dict[KernelConfig, Path], key: str) -> None:
    library = libraries[KernelConfig.parse(key)]
    found = {
        run(GRIDS.format(library=library, key=key, processors=processors), mode)
        for mode, processors in (("eager", 1), ("lazy", 3), ("random", 64))
    }
    assert len(found) == 1


BOTH = """
import gnaforge, torch
from gnaforge.runtime.arguments import plain_pattern
from gnaforge.runtime.config import KernelConfig
from gnaforge.runtime.op_table import OPS
from gnaforge.runtime.problem import Problem
from gnaforge.verification.problems import for_kernel
keys, libraries = {keys}, {libraries}
for library in libraries:
    gnaforge.load_library(library)
pattern = (5, 7), (1, 2), (2, 1), (False, True)
problem = for_kernel(Problem((12, 14), *pattern, batch=2, heads=4, kv_heads=2), KernelConfig.parse(keys[1]))
inputs = OPS["gna_backward_kv"].random_inputs(problem)
given = [inputs[name] for name in ("grad_out", "grad_lse", "q", "k", "v", "out", "lse")]
found = torch.ops.gnaforge.backward(*given, plain_pattern(2, *pattern), None, 7, *keys)
for op, results in (("gna_backward_q", [("grad_q", 0)]), ("gna_backward_kv", [("grad_k", 1), ("grad_v", 2)])):
    exact = OPS[op].exact(problem, inputs)
    bounds = OPS[op].bound(problem, inputs, exact, rounds_probabilities=True)
    for name, index in results:
        assert ((found[index].double() - exact[name]).abs() <= bounds[name]).all(), name
"""


def test_both_kernels_of_a_call_share_delta(libraries: dict[KernelConfig, Path]) -> None:
    """That of dK and dV computes it and leaves it, that of dQ takes it, through the operator."""
    of_q, of_kv = Q_CONFIGS[2], CONFIGS[4]
    paths = [str(find_libraries([of_q], emulated=True)[of_q]), str(libraries[of_kv])]
    run(BOTH.format(keys=[of_q.key, of_kv.key], libraries=paths))


CONSUMER, PRODUCER = "sm90/backward/kv_consumer.h", "sm90/backward/kv_producer.h"
MUTANTS = {
    "dK without the scale": (CONSUMER, "key_gradient, params.scale, 1)", "key_gradient, 1.0f, 1)"),
    "dV with the scale": (
        CONSUMER,
        "value_gradient, 1.0f);\n        });",
        "value_gradient, params.scale);\n        });",
    ),
    "P in place of dS": (CONSUMER, "slopes(factors, of_values, at);\n      add_keys(key_g", "add_keys(key_g"),
    "Q in place of dO": (
        CONSUMER,
        "gradient, factors, shared + L::grad_out_offset + at.stage * L::grad_out_bytes",
        "gradient, factors, shared + L::q_offset + at.stage * L::q_bytes",
    ),
    "the head dim in place of the value head dim": (CONSUMER, "Mma, L::value_head_dim>", "Mma, L::head_dim>"),
    "statistics of another stage": (CONSUMER, "at.stage * L::statistics_bytes + 8", "L::statistics_bytes + 8"),
    "deltas in place of log-sum-exps": (CONSUMER, "(Deltas ? 4 * L::queries : 0)", "4 * L::queries"),
    "probabilities where a key isn't seen": (CONSUMER, "column & 1 ? x : 0.0f", "column & 1 ? x : 1.0f"),
    "the mask of the other row": (CONSUMER, "seen.word[row][0]", "seen.word[1 - row][0]"),
    "what the keys of other rows are seen by": (
        "sm90/backward/transposed_mask.h",
        "(first_row + lane / 4 + 8 * r) / KvTile",
        "(lane / 4 + 8 * r) / KvTile",
    ),
    "windows in place of transposed ones": ("gna/query_runs.h", "? transposed_window(", "? window("),
    "the same image of keys everywhere": (PRODUCER, "tiles.run() * L::run_bytes", "L::run_bytes"),
    "interior from the wrong end": (
        "gna/band_tiles.h",
        "all{last.begin, first.end};",
        "all{first.begin, last.end};",
    ),
    "one head of the group": (PRODUCER, "          ++head;\n", ""),
    "no statistics where there is no query": (
        "sm90/backward/statistics.h",
        "RowStatistics found{INFINITY, 0};",
        "RowStatistics found{-1e30f, 0};",
    ),
    "every tile of extra keys with the first one's sums": (
        "sm90/backward/transposed_tiles.h",
        "work.tiles.value + index;",
        "work.tiles.value + index % 2;",
    ),
    "extra keys of one part of the queries": (PRODUCER, "place.part * params.extra_work.steps", "0 * place.part"),
    "extra keys of all lengths": ("sm90/backward/sums.h", "key < length && part", "key < tokens && part"),
    "no sum with what is there": (CONSUMER, "if (!(params.accumulates & bit)) return", "return"),
    "no sum with gradients of extra keys": ("sm90/backward/sums.h", "if (params.accumulates >>", "if (0 >>"),
    "a tile's gradient on top of the one before": (
        CONSUMER,
        "for (float& x : value_gradient) x = 0;",
        "for (float& x : value_gradient) x = 1;",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_noticed(libraries: dict[KernelConfig, Path], headers: Path, name: str) -> None:
    file, old, new = MUTANTS[name]
    replace_once(headers / "gnaforge" / file, old, new)
    config = KernelConfig.parse("gna_backward_kv-sm90-r2-bf16-d72v8-q4x8-kv9x8")
    problem = Problem(
        (22, 19), (5, 17), (2, 1), edge=("shift", "wrap"), batch=2, heads=2, kv_heads=1, extra_tokens=(9, 130)
    )
    library = find_libraries([config], emulated=True)[config]
    with Verifier(config, library, Settings([SCHEDULES[0]], gaps=False, poison=False)) as verifier:
        found = verifier.verify(for_kernel(problem, config))
    assert found.failed in ("wrong", "emulator"), found.failed


def test_missing_synchronisation_is_noticed(libraries: dict[KernelConfig, Path]) -> None:
    """A few mutants of a kernel: fences, waits and arrivals that its rules need."""
    said = run(["kernel_mutants.py", str(libraries[CONFIGS[8]]), KEYS[8], "13"], "eager")
    assert re.match(r"\d+ mutants reached, \d+ not; wrong by rule ([3-9]), of these noticed \1;", said), said


@pytest.mark.survey
@pytest.mark.parametrize("key", [KEYS[0], KEYS[5], KEYS[8]])
def test_every_missing_synchronisation_is_noticed(libraries: dict[KernelConfig, Path], key: str) -> None:
    """But for a barrier that other warps' parts of a product need, which the emulator can't see: see below. And but for
    that of turns, on which nothing depends but time."""
    said = run(["kernel_mutants.py", str(libraries[KernelConfig.parse(key)]), key], "eager")
    wrong, survivors = survivors_of(said)
    assert wrong >= 35 and all("barrier.cta.sync" in line for line in survivors) and len(survivors) <= 2, said


def test_gradients_take_the_place_of_keys_when_nobody_reads_them(libraries: dict[KernelConfig, Path]) -> None:
    """PTX doesn't say that a warp waits for other warps' parts of a product, which the emulator lets it do: so by the
    text that a barrier lies between the last wait and the gradient."""
    for key in (KEYS[3], KEYS[5]):
        text = libraries[KernelConfig.parse(key)].read_bytes().decode("latin-1")  # the PTX lies there as it is
        text = text[: text.index("stmatrix.sync")]
        assert "barrier.cta.sync" in text[text.rindex("wgmma.wait_group") :], key


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"head_dim": 64}, "head_dim is 64, this kernel takes 72"),
        ({"scale": -1.0}, "scale is -1, this kernel takes positive ones"),
    ],
)
def test_refusals_say_why(libraries: dict[KernelConfig, Path], fields: dict[str, object], reason: str) -> None:
    config = CONFIGS[6]
    problem = replace(for_kernel(Problem((8, 8), 3), config), **fields)
    with Verifier(config, libraries[config], Settings(SCHEDULES[:1])) as verifier:
        found = verifier.verify(problem)
    assert found.failed == "refused" and reason in found.message, found.message


def test_a_wait_above_the_exponentials_fails_the_build(
    libraries: dict[KernelConfig, Path], headers: Path, own_cache: Path
) -> None:
    """The loop that waits for dP, too, before the exponentials, as ptxas would where nothing keeps it from that."""
    behind = "\n      ptx::hold(scores);\n      probabilities(rounded, scores, at);\n      // dV goes"
    replace_once(headers / "gnaforge" / CONSUMER, f"wgmma_wait<1>();{behind}", f"wgmma_wait<0>();{behind}")
    with pytest.raises(BuildError, match="ptxas moved a wait above the exponentials"):
        build_kernels([CONFIGS[3]])
    assert (own_cache / ".failed" / KEYS[3] / "kernel.cu").is_file()


def test_facts_of_a_gpu_build(libraries: dict[KernelConfig, Path]) -> None:
    artifacts, _ = build_kernels([CONFIGS[0]])
    record = artifacts[CONFIGS[0]].record
    # 384 threads share 65,536 registers; K and V of 128 rows; four stages of Q, dO and statistics of 64 queries;
    # barriers and facts; tables of masks and of what keys are seen by.
    assert record["registers"] == 168 and record["spill_bytes"] == 0
    control = 128 + 32 + 4 * 32 + 16 * (3 + 5 + 9) + 3 * 8 * (2 + 8 + 8)
    assert record["shared_memory"] == 2 * 128 * 256 + 4 * 64 * (2 * 256 + 8) + control
    assert record["code"]["mufu_under_product"] == 2 * 32  # of Q tiles with a mask, and of others


def outermost() -> list[KernelConfig]:
    """Kernels with the most queries beside 128 keys, or 64 of large heads; boxes of which few rows of a warp lie at the
    same coordinates, as that takes most registers."""
    found = []
    for dims in (
        (8, 8),
        (64, 64),
        (72, 72),
        (96, 96),
        (128, 128),
        (8, 128),
        (128, 8),
        (136, 136),
        (256, 256),
        (8, 256),
    ):
        keys = (7, 6, 3) if max(dims) <= 128 else (3, 3, 7)
        value = dims[1] if dims[0] != dims[1] else 0
        sizes = (
            KernelConfig("gna_backward_kv", "sm90", 3, "fp16", dims[0], (2, 4, n // 8), keys, value)
            for n in range(128, 0, -16)
        )
        found.append(next(config for config in sizes if not FAMILY.faults(config)))
    return found


@pytest.mark.parametrize("config", outermost(), ids=str)
def test_the_most_queries_that_fit_compile(config: KernelConfig, tmp_path: Path) -> None:
    """Without a spill, with exponentials that overlap."""
    try:
        find_nvcc(FAMILY.target.nvcc)
    except BuildError as error:
        pytest.skip(str(error))
    assert compile_kernel(config, tmp_path) == 168


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("r1-bf16-d256-q64-kv128", "above head dims of 128 there are at most 64 keys"),
        ("r1-bf16-d256-q96-kv64", "needs 265,776 bytes of shared memory"),
        ("r1-bf16-d128-q80-kv128", "needs 208 accumulator registers a thread, of which there are 192"),
        ("r1-bf16-d64-q24-kv128", "needs a multiple of 16"),
    ],
)
def test_tiles_that_do_not_fit_are_refused_by_name(key: str, reason: str) -> None:
    ((field, said),) = FAMILY.faults(KernelConfig.parse(f"gna_backward_kv-sm90-{key}"))
    assert field == "q_tile" and reason in said
