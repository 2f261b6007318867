"""The sm90 kernels on CUTLASS's example 88 in the emulator. Nothing here ran on hardware."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from cutlass_kernels import Dense
from emulated_calls import PRELUDE, REFUSED, run as run_for
from gnaforge.build.kernels import find_libraries
from gnaforge.build_tools.sass import HGMMA_REGISTERS, HGMMA_SHARED, LOCAL_STORE, MUFU, Sass
from gnaforge.errors import BuildError
from gnaforge.families import faults_of
from gnaforge.families.sm90_cutlass_forward import check_machine_code
from gnaforge.runtime.config import KernelConfig
from gnaforge.runtime.problem import Problem
from gnaforge.runtime.reference import attention, error_bound
from gnaforge.verification.emulated_kernel import EmulatedKernel
from gnaforge.verification.kinds import POISONS
from gnaforge.verification.problems import for_kernel
from gnaforge.verification.process import Worker
from gnaforge.verification.runner import Settings, Verifier
from gnaforge.verification.schedules import Schedule
from sm100_problems import random_problem
from test_sm90 import LAYOUTS, MODES, NONFINITE
from test_sm100_cutlass import Control, per_tile

# Whole tiles, as example 88's are and not; an odd Q box, whose halves share tokens, short tiles, and head dims with
# padding; the largest head dim.
KEYS = (
    "gna_forward-sm90-r1-fp16-d128-q128-kv128-cutlass",
    "gna_forward-sm90-r3-bf16-d128-q2x8x8-kv2x8x8-cutlass",
    "gna_forward-sm90-r3-fp16-d72v40-q3x5x7-kv2x6x8-cutlass",
    "gna_forward-sm90-r2-bf16-d256-q8x16-kv8x8-cutlass",
)
# Of all ranks, from the smallest head dim to the largest, and from the narrowest KV tile to the widest.
MORE_KEYS = (
    *KEYS,
    "gna_forward-sm90-r2-fp16-d32-q8x12-kv6x16-cutlass",
    "gna_forward-sm90-r3-bf16-d64-q7x6x3-kv2x8x12-cutlass",
    "gna_forward-sm90-r3-bf16-d128-q7x6x3-kv2x4x22-cutlass",
    "gna_forward-sm90-r3-bf16-d192v96-q2x8x8-kv2x8x6-cutlass",
    "gna_forward-sm90-r1-bf16-d8v256-q33-kv16-cutlass",
    "gna_forward-sm90-r2-fp16-d64-q9x14-kv8x20-cutlass",
)


def libraries_of(keys: tuple[str, ...]) -> dict[KernelConfig, Path]:
    try:
        return find_libraries([KernelConfig.parse(key) for key in keys], emulated=True)
    except BuildError as error:
        if "no CUDA compiler" in str(error) or "CUTLASS sources are missing" in str(error):
            pytest.skip(str(error))
        raise


@pytest.fixture(scope="module")
def libraries(session_cache: Path) -> dict[KernelConfig, Path]:
    return libraries_of(KEYS)


def run(libraries: dict[KernelConfig, Path], key: str, code: str, device: str = "h100") -> str:
    """Runs Python with the kernel of ``key`` in a process of its own."""
    library = libraries[KernelConfig.parse(key)]
    return run_for(PRELUDE.format(key=key, library=library) + code, device=device)


def check_random_problems(libraries: dict[KernelConfig, Path], mode: str, first: int, count: int) -> None:
    """In all layouts; each problem also with poison."""
    schedule = Schedule(mode, MODES[mode]).as_json()
    for config, library in libraries.items():
        with Worker() as worker:
            assert worker.open(600, library, config.key)["device"] == "emulator"
            for seed in range(first, first + count):
                problem, layout = random_problem(config, seed)
                asked = {"problem": problem.as_json(), "layout": layout, "schedule": schedule}
                said = worker.request(900, do="verify", seed=seed, poison=[POISONS[seed % 2]], **asked)
                assert "errors" in said, f"{config.key} seed {seed}: {said}; {layout}; {problem}"


@pytest.mark.parametrize("mode", MODES)
def test_random_problems(libraries: dict[KernelConfig, Path], mode: str) -> None:
    """Other ones in each mode."""
    check_random_problems(libraries, mode, 1000 * list(MODES).index(mode), 3)


@pytest.mark.survey
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("key", MORE_KEYS)
def test_many_random_problems(session_cache: Path, key: str, mode: str) -> None:
    """Of all kernels 300, the same in each mode."""
    check_random_problems(libraries_of((key,)), mode, 5000, 30)


@pytest.mark.parametrize(
    ("key", "problem"),
    [
        # CTAs take many Q tiles; as folded heads, and with maps per batch entry.
        (KEYS[1], Problem((6, 9, 10), (5, 4, 9), (2, 1, 3), 1, (False, True, False), batch=2, heads=4, kv_heads=2)),
        (KEYS[2], Problem((5, 9, 12), (3, 3, 7), (1, 2, 1), (1, 2, 1), batch=2, heads=4, kv_heads=2)),
        (KEYS[0], Problem(700, 300, 5, causal=True, batch=2, heads=2, kv_heads=1)),
        (KEYS[3], Problem((20, 18), (20, 18), heads=2)),  # dense
    ],
)
def test_larger_problems(libraries: dict[KernelConfig, Path], key: str, problem: Problem) -> None:
    config = KernelConfig.parse(key)
    settings = Settings([Schedule("random", "random")], gaps=False, poison=False)
    with Verifier(config, libraries[config], settings) as verifier:
        found = verifier.verify(for_kernel(problem, config))
    assert not found.failed, found.message
    assert found.counters is not None and found.model is not None
    assert found.counters.tiles == found.model["visited"] > 0
    assert found.counters.interior_tiles == found.model["interior"]


@pytest.fixture(scope="module")
def control(libraries: dict[KernelConfig, Path]) -> Control:
    return Control("hopper")


@pytest.fixture(scope="module")
def kernel(libraries: dict[KernelConfig, Path]) -> Iterator[Callable[[int, str], EmulatedKernel]]:
    """The kernel of that key among `KEYS`, to be called in that mode."""
    kernels = [EmulatedKernel(libraries[KernelConfig.parse(key)]) for key in KEYS]

    def choose(index: int, mode: str) -> EmulatedKernel:
        kernels[index].schedule = Schedule(mode, MODES[mode])
        return kernels[index]

    yield choose
    for own in kernels:
        own.close()


@pytest.mark.survey  # as the next one: example 88 takes minutes to compile
@pytest.mark.parametrize("mode", MODES)
def test_dense_beside_example_88(control: Control, kernel: Callable[[int, str], EmulatedKernel], mode: str) -> None:
    """The same problem, within the same bound, and as far off: it is the same mainloop."""
    problem = Dense(1, 2, 2, 256, 256)
    q, k, v = map(torch.from_numpy, problem.inputs[:3])
    dense = Problem.of_tensors(q, k, v, 256)
    exact = attention(dense, q, k, v)
    limits = error_bound(dense, q, k, v, exact, rounds_probabilities=True)
    ours, theirs = kernel(0, mode)(q, k, v, 256), control.attend(problem, mode)[:2]
    for results in (ours, theirs):
        for got, want, limit in zip(results, exact, limits, strict=True):
            assert ((got.double() - want).abs() <= limit).all()
    assert torch.equal(ours[0], theirs[0])


@pytest.mark.survey
def test_interior_tiles_cost_what_example_88s_do(
    control: Control, kernel: Callable[[int, str], EmulatedKernel]
) -> None:
    """Within 5 %: of two Q tiles and more, launches that differ in interior tiles alone. `pytest -s` prints a table."""
    runs = [control.attend(Dense(1, 1, 1, 256, keys), "eager")[2] for keys in (384, 128)]
    theirs = per_tile(*runs, 4)
    table = {"example 88": theirs}
    for index, tokens, blocks in ((0, (512,), ((512,), (256,))), (1, (8, 8, 8), ((8, 8, 8), (4, 8, 8)))):
        own = kernel(index, "eager")
        x = torch.randn(1, *tokens, 1, 128).to(torch.float16 if own.config.dtype == "fp16" else torch.bfloat16)
        counted = []
        for block in blocks:
            own(x, x, x, block, block)
            assert own.counters is not None and own.counters.shell_tiles == 0
            counted.append(own.counters)
        more = counted[0].interior_tiles - counted[1].interior_tiles
        table[own.config.key] = per_tile(*counted, more)
    for name, row in table.items():
        print(f"\n{name}: " + ", ".join(f"{count:,.1f} {what}" for what, count in row.items()), end="")
        for what, count in row.items():
            assert count == pytest.approx(theirs[what], rel=0.05), (name, what)
    assert theirs["exp2"] >= 128 * 128 and theirs["bytes"] == 2 * 128 * 128 * 2


def test_every_element_is_written(libraries: dict[KernelConfig, Path]) -> None:
    """Fresh memory holds NaN; tiles cross every border."""
    code = """
torch.use_deterministic_algorithms(True)
torch.utils.deterministic.fill_uninitialized_memory = True
assert torch.empty(4).isnan().all()
q, k = (torch.randn(1, 4, 7, 11, 2, 72).half() for _ in range(2))
v = torch.randn(1, 4, 7, 11, 2, 40).half()
out, lse = attend(q, k, v, (3, 5, 6), (1, 2, 1))
assert out.isfinite().all() and lse.isfinite().all()
assert attend(q[:0], k[:0], v[:0], (3, 5, 6))[0].shape == (0, 4, 7, 11, 2, 40)
"""
    run(libraries, KEYS[2], code)


def test_any_layout_is_taken(libraries: dict[KernelConfig, Path]) -> None:
    """With maps per batch entry; the kernel itself says what it can't read."""
    assert int(run(libraries, KEYS[2], LAYOUTS.format(library=libraries[KernelConfig.parse(KEYS[2])]))) == 8


@pytest.mark.parametrize("key", [KEYS[0], KEYS[2]])
def test_values_that_are_not_finite_reach_no_further_than_is_said(
    libraries: dict[KernelConfig, Path], key: str
) -> None:
    """In V, to all queries of Q tiles that visit a KV tile with the token; in K, to those that see it."""
    run(libraries, key, NONFINITE)


def test_rows_without_weight(libraries: dict[KernelConfig, Path]) -> None:
    """Where all scores are -infinity the log-sum-exp is, and the mainloop's output 0."""
    code = """
q, k, v = (torch.randn(1, 300, 1, 128).half() for _ in range(3))
clean = attend(q, k, v, 200)
q[0, 17] = 1.0
k[:] = -torch.rand_like(k) - 1
k[..., 0] = float("-inf")
q[0, 18:, :, 0] = q[0, :17, :, 0] = 0.0  # times infinity: NaN
out, lse = attend(q, k, v, 200)
assert lse[0, 17] == float("-inf") and (out[0, 17] == 0).all()
assert lse[0, :17].isnan().all() and lse[0, 18:].isnan().all() and out[0, 18:].isnan().all()
"""
    run(libraries, KEYS[0], code)


@pytest.mark.parametrize(
    ("call", "device", "reason"),
    [
        ("attend(*[x[..., :64]] * 3, 3)", "h100", "head_dim is 64, this kernel takes 128"),
        ("attend(*[x[..., :128]] * 3, 3, 1, 1, False, -1.0)", "h100", "scale is -1, this kernel takes positive ones"),
        ("attend(*[x[..., :128]] * 3, 3)", "b200", "device 0 has compute capability 10.0, this kernel needs 9.0"),
    ],
)
def test_refusals_say_why(libraries: dict[KernelConfig, Path], call: str, device: str, reason: str) -> None:
    assert reason in run(libraries, KEYS[0], REFUSED.format(call=call), device)


def test_facts_of_a_build(libraries: dict[KernelConfig, Path]) -> None:
    for path in libraries.values():
        record = json.loads(path.with_name("record.json").read_text())
        assert record["registers"] == 168 and record["spill_bytes"] == 0
        assert record["code"]["products"] > 0 and record["shared_memory"] <= 227 * 1024


CONFIG = KernelConfig.parse(KEYS[0])


def test_checks_of_machine_code() -> None:
    """Code that lacks one thing at a time."""
    shared, registers, spill = (HGMMA_SHARED, 0), (HGMMA_REGISTERS, 0), (LOCAL_STORE, 0)
    computing, loading = ((count << 32 | 0x9C8, 0) for count in (240, 24))
    good = (shared, registers, computing, (MUFU, 0), loading)
    assert check_machine_code(CONFIG, Sass(good), 168) == {"products": 2, "mufu": 1}
    for code, launch, reason in (
        (good[1:], 168, r"no tensor core instruction \(HGMMA\) for Q K"),
        ((shared, *good[2:]), 168, r"no tensor core instruction \(HGMMA\) for P V"),
        (good, 160, "takes 160 registers a thread at its start, planned: 168"),
        (good[:4], 168, "no warps set 24 registers a thread, as planned for loading warps; set: 240"),
        ((shared, registers, loading), 168, "as planned for computing warps; set: 24"),
        ((*good, spill), 168, "1 accesses to local memory"),
        ((spill, *good), 168, "1 accesses to local memory"),
    ):
        with pytest.raises(BuildError, match=reason):
            check_machine_code(CONFIG, Sass(code), launch)


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("r1-bf16-d128-q129-kv128", "q_tile: holds 129 query tokens; sm90 cutlass takes at most 128"),
        ("r3-bf16-d128-q5x5x5-kv2x8x8", "q_tile: can't be cut into two boxes of at most 64 tokens: the best has 75"),
        ("r1-bf16-d64-q128-kv208", "kv_tile: holds 208 key tokens; sm90 cutlass takes at most 192"),
        ("r1-bf16-d128-q128-kv120", "kv_tile: holds 120 key tokens; sm90 cutlass needs a multiple of 16"),
        ("r1-bf16-d264-q128-kv16", "head_dim: 264 is too large; sm90 cutlass takes at most 256"),
        ("r1-bf16-d256-q128-kv112", "kv_tile: beside 128 query tokens needs 247,808 bytes of shared memory, of which"),
        ("r1-bf16-d192-q128-kv112", "kv_tile: beside 128 query tokens needs 180 accumulator registers a thread, of wh"),
        ("r1-fp32-d64-q128-kv64", "dtype: sm90 cutlass has no fp32 kernels; it has bf16, fp16"),
    ],
)
def test_limits(key: str, reason: str) -> None:
    found = faults_of(KernelConfig.parse(f"gna_forward-sm90-{key}-cutlass"))
    assert len(found) == 1 and ": ".join(found[0]).startswith(reason)
