"""sm100's variant `cutlass` in the emulator. Nothing here ran on hardware."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cutlass_kernels import Dense, Example
from emulated_calls import MODES, PRELUDE, REFUSED, run as run_calls
from gnaforge.build.kernels import find_libraries
from gnaforge.build_tools.emulator import Counters, Options
from gnaforge.errors import BuildError
from gnaforge.families.sm100_cutlass_forward import FAMILY
from gnaforge.runtime.config import KernelConfig
from gnaforge.runtime.problem import Problem
from gnaforge.runtime.reference import attention, error_bound
from gnaforge.verification.counters import WorkCounters
from gnaforge.verification.emulated_kernel import EmulatedKernel
from gnaforge.verification.kinds import POISONS
from gnaforge.verification.problems import for_kernel
from gnaforge.verification.process import Worker
from gnaforge.verification.runner import Settings, Verifier
from gnaforge.verification.schedules import Schedule
from sm100_problems import random_problem
from test_sm90 import LAYOUTS, NONFINITE

# Whole tiles; short ones, of which MMAs read padding; an odd Q box, whose halves share tokens; head dims with padding.
KEYS = (
    "gna_forward-sm100-r3-bf16-d128-q4x8x8-kv2x8x8-cutlass",
    "gna_forward-sm100-r3-bf16-d72v40-q3x5x9-kv2x6x8-cutlass",
    "gna_forward-sm100-r2-fp16-d64-q12x20-kv8x14-cutlass",
    "gna_forward-sm100-r1-fp16-d128-q256-kv128-cutlass",  # as example 77's is
)
CONFIGS = [KernelConfig.parse(key) for key in KEYS]


@pytest.fixture(scope="module")
def libraries(session_cache: Path) -> dict[KernelConfig, Path]:
    try:
        return find_libraries(CONFIGS, emulated=True)
    except BuildError as error:
        if "no CUDA compiler" in str(error) or "CUTLASS sources are missing" in str(error):
            pytest.skip(str(error))
        raise


def run(code: str | list[str], mode: str = "random", device: str = "b200") -> str:
    """With what example 77 relies on."""
    return run_calls(code, mode, device, FAMILY.relaxed)


def prelude(libraries: dict[KernelConfig, Path], key: str) -> str:
    return PRELUDE.format(key=key, library=libraries[KernelConfig.parse(key)])


@pytest.mark.parametrize("mode", MODES)
def test_random_problems(libraries: dict[KernelConfig, Path], mode: str) -> None:
    """Other ones in each mode, 60 in all, in all layouts; each also with poison."""
    first = 1000 * list(MODES).index(mode)
    schedule = Schedule(mode, MODES[mode]).as_json()
    for config, library in libraries.items():
        with Worker() as worker:
            assert worker.open(600, library, config.key)["device"] == "emulator"
            for seed in range(first, first + 5):
                problem, layout = random_problem(config, seed)
                asked = {"problem": problem.as_json(), "layout": layout, "schedule": schedule}
                said = worker.request(900, do="verify", seed=seed, poison=[POISONS[seed % 2]], **asked)
                assert "errors" in said, f"{config.key} seed {seed}: {said}; {layout}; {problem}"


@pytest.mark.parametrize(
    ("key", "problem"),
    [
        # CTAs take many Q tiles; as folded heads and per batch entry.
        (KEYS[0], Problem((8, 8, 8), (2, 5, 4), (2, 1, 3), 1, (False, True, False), batch=2, heads=6, kv_heads=3)),
        (KEYS[1], Problem((6, 10, 9), (3, 3, 7), (1, 2, 1), batch=2, heads=6, kv_heads=2)),
        (KEYS[2], Problem((20, 41), (20, 41), heads=2)),  # dense
        # 18 slices in three launches: nine dilation groups, and the batch doesn't fold.
        (KEYS[1], Problem((5, 7, 8), 2, 1, (1, 3, 3), batch=2)),
    ],
)
def test_larger_problems(libraries: dict[KernelConfig, Path], key: str, problem: Problem) -> None:
    config = KernelConfig.parse(key)
    settings = Settings([Schedule("random", "random")], gaps=False, poison=False)
    with Verifier(config, libraries[config], settings) as verifier:
        found = verifier.verify(for_kernel(problem, config))
    assert not found.failed, found.message


class Control:
    """The forward kernel of ``blackwell`` (example 77) or ``hopper`` (example 88), unmodified, for dense attention
    beside ours."""

    def __init__(self, arch: str) -> None:
        self.example = Example(arch, "forward")
        self.module = self.example.module()

    def attend(self, problem: Dense, mode: str) -> tuple[torch.Tensor, torch.Tensor, Counters]:
        """Output and log-sum-exp, heads last."""
        o, lse, counters = self.example.attend(self.module, problem, Options(mode, MODES[mode]))
        return torch.from_numpy(o), torch.from_numpy(lse).transpose(1, 2), counters


@pytest.fixture(scope="module")
def control(libraries: dict[KernelConfig, Path]) -> Control:
    return Control("blackwell")


@pytest.fixture(scope="module")
def kernel(libraries: dict[KernelConfig, Path]) -> Callable[[int, str], EmulatedKernel]:
    """The kernel of that key among `KEYS`, to be called in that mode."""
    kernels = [EmulatedKernel(libraries[config]) for config in CONFIGS]

    def choose(index: int, mode: str) -> EmulatedKernel:
        kernels[index].schedule = Schedule(mode, MODES[mode])
        return kernels[index]

    return choose


@pytest.mark.survey  # as the next one: example 77 takes minutes to compile
@pytest.mark.parametrize("mode", MODES)
def test_dense_beside_example_77(control: Control, kernel: Callable[[int, str], EmulatedKernel], mode: str) -> None:
    """The same problem, within the same bound: tokens that fill no tile, two heads to a key head."""
    problem = Dense(1, 2, 1, 300, 300)
    q, k, v = map(torch.from_numpy, problem.inputs[:3])
    dense = Problem.of_tensors(q, k, v, 300)
    exact = attention(dense, q, k, v)
    limits = error_bound(dense, q, k, v, exact, rounds_probabilities=True)
    for results in (kernel(3, mode)(q, k, v, 300), control.attend(problem, mode)[:2]):
        for got, want, limit in zip(results, exact, limits, strict=True):
            assert ((got.double() - want).abs() <= limit).all()


def work(counters: Counters | WorkCounters) -> dict[str, int]:
    """What of a launch is compared: all warps' instructions; exponentials of threads; MMAs; bytes of loads by TMA."""
    opcodes = counters.opcodes

    def of(prefix: str) -> int:
        return sum(count for opcode, count in opcodes.items() if opcode.startswith(prefix))

    # What a wait takes depends on the schedule.
    waits = of("mbarrier.try_wait")
    return {
        "instructions": counters.instructions - waits,
        "MMAs": of("tcgen05.mma") + of("wgmma.mma_async"),
        "exp2": 32 * of("ex2."),
        "bytes": counters.async_load_bytes,
    }


def per_tile(more: Counters | WorkCounters, less: Counters | WorkCounters, tiles: int) -> dict[str, float]:
    """What a KV tile takes, of launches that differ in so many interior tiles and nothing else."""
    return {name: (count - work(less)[name]) / tiles for name, count in work(more).items()}


@pytest.mark.survey
def test_interior_tiles_cost_what_example_77s_do(
    control: Control, kernel: Callable[[int, str], EmulatedKernel]
) -> None:
    """Within 5 %: two Q tiles that each see two KV tiles, and four. `pytest -s` prints the table of the README."""
    runs = [control.attend(Dense(1, 1, 1, 512, keys), "eager")[2] for keys in (512, 256)]
    theirs = per_tile(*runs, 4)
    table = {"example 77": theirs}
    for index, tokens, blocks in ((3, (512,), ((512,), (256,))), (0, (8, 8, 8), ((8, 8, 8), (4, 8, 8)))):
        own = kernel(index, "eager")
        x = torch.randn(1, *tokens, 1, 128).to(torch.float16 if own.config.dtype == "fp16" else torch.bfloat16)
        counted = []
        for block in blocks:
            own(x, x, x, block, block)
            assert own.counters is not None and own.counters.shell_tiles == 0
            counted.append(own.counters)
        assert counted[0].interior_tiles - counted[1].interior_tiles == 4
        table[own.config.key] = per_tile(*counted, 4)
    for name, row in table.items():
        print(f"\n{name}: " + ", ".join(f"{count:,.1f} {what}" for what, count in row.items()), end="")
        for what, count in row.items():
            assert count == pytest.approx(theirs[what], rel=0.05), (name, what)
    # Two halves of 128 rows by 128 keys; K and V of 128 keys.
    assert theirs["exp2"] >= 2 * 128 * 128 and theirs["bytes"] == 2 * 128 * 128 * 2


@pytest.mark.parametrize(("key", "interior"), [(KEYS[0], True), (KEYS[1], False)])  # padding is masked everywhere
def test_tiles_are_those_of_the_simulators_model(libraries: dict[KernelConfig, Path], key: str, interior: bool) -> None:
    config = KernelConfig.parse(key)
    settings = Settings([Schedule("eager", "round-robin")], gaps=False, poison=False)
    with Verifier(config, libraries[config], settings) as verifier:
        for pattern in (((9, 9, 10), (7, 8, 9), (1, 1, 1)), ((8, 16, 8), (4, 8, 8), (4, 8, 8))):
            problem = Problem(*pattern, 1, (False, True, False), heads=2, kv_heads=1)
            found = verifier.verify(for_kernel(problem, config))
            assert not found.failed, found.message
            assert found.counters is not None and found.model is not None
            assert found.counters.tiles == found.model["visited"] > 0
            assert found.counters.interior_tiles == found.model["interior"]
        assert interior == any(found.model["interior"] for found in verifier.result.problems if found.model)


def test_verify_on_the_command_line(libraries: dict[KernelConfig, Path], cli: Callable[..., Any]) -> None:
    """It knows the device, and what this variant relies on."""
    done = cli("verify", KEYS[3], "--tokens", "300", "--window", "200", "--timing", "lazy", "--order", "round-robin")
    assert done.returncode == 0 and not done.stderr, done.stdout + done.stderr
    assert f"{KEYS[3]}: good, in the emulator" in done.stdout and "warp instructions: - per interior" in done.stdout
    assert f"{2 * 2 * 256 * 128 * 128:.4g} FLOP of MMAs" in done.stdout  # both products of a KV tile


def test_every_element_is_written(libraries: dict[KernelConfig, Path]) -> None:
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
    run(prelude(libraries, KEYS[1]) + code)


@pytest.mark.parametrize("key", [KEYS[0], KEYS[1]])
def test_foreign_and_masked_values_have_no_effect(libraries: dict[KernelConfig, Path], key: str) -> None:
    """NaN in other heads and batch entries, and in K of masked tokens; large V in masked tokens of visited boxes."""
    code = """
dims = config.head_dim, config.head_dim, config.value_head_dim or config.head_dim
q, k, v = (torch.randn(2, 4, 9, 10, 3, dim).bfloat16() for dim in dims)
clean = attend(q, k, v, (3, 5, 4))
k2, v2 = k.clone(), v.clone()
for x in (k2, v2):
    x[1], x[0, ..., 0, :], x[0, ..., 2, :] = (float("nan"),) * 3
k2[0, 1, 1, 5], v2[0, 1, 1, 5] = float("nan"), 3e38
poisoned = attend(q, k2, v2, (3, 5, 4))
sees = torch.zeros(4, 9, 10, dtype=torch.bool)
sees[:, :4, 4:8] = True
for got, want in zip(poisoned, clean):
    assert torch.equal(got[0, ..., 1, :][~sees] if got.dim() == 6 else got[0, ..., 1][~sees],
                       want[0, ..., 1, :][~sees] if want.dim() == 6 else want[0, ..., 1][~sees])
assert poisoned[0][0, ..., 1, :][sees].isnan().all()
"""
    run(prelude(libraries, key) + code)


@pytest.mark.parametrize("key", [KEYS[0], KEYS[1]])
def test_layouts_need_no_copy(libraries: dict[KernelConfig, Path], key: str) -> None:
    """Heads first, and slices give the very result of contiguous tensors. Batch of 2, rank 3."""
    code = """
def compare(q, k, v):
    want = attend(q.contiguous(), k.contiguous(), v.contiguous(), (3, 5, 4))
    for got, exact in zip(attend(q, k, v, (3, 5, 4)), want):
        assert torch.equal(got, exact)
dims = config.head_dim, config.head_dim, config.value_head_dim or config.head_dim
compare(*(torch.randn(2, 2, 4, 7, 9, d).bfloat16().permute(0, 2, 3, 4, 1, 5) for d in dims))
compare(*(torch.randn(2, 8, 9, 20, 2, d + 8).bfloat16()[:, ::2, 2:, 1:19:2, :, :d] for d in dims))
"""
    run(prelude(libraries, key) + code)


@pytest.mark.parametrize("key", [KEYS[1], KEYS[3]])
def test_any_layout_is_taken(libraries: dict[KernelConfig, Path], key: str) -> None:
    """With maps per batch entry, and of one dimension; the kernel itself says what it can't read."""
    code = LAYOUTS.format(library=libraries[KernelConfig.parse(key)])
    assert int(run(prelude(libraries, key) + code)) == 8


@pytest.mark.parametrize("key", [KEYS[1]])
def test_values_that_are_not_finite_reach_no_further_than_is_said(
    libraries: dict[KernelConfig, Path], key: str
) -> None:
    """In V, to all queries of Q tiles that visit a KV tile with the token; in K, to those that see it."""
    run(prelude(libraries, key) + NONFINITE)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ("attend(*[x[..., :64]] * 3, 3)", "head_dim is 64, this kernel takes 128"),
        ("attend(*[x[..., :128]] * 3, 3, 1, 1, False, -1.0)", "scale is -1, this kernel takes positive ones"),
    ],
)
def test_refusals_say_why(libraries: dict[KernelConfig, Path], call: str, reason: str) -> None:
    assert reason in run(prelude(libraries, KEYS[3]) + REFUSED.format(call=call))


def test_other_devices_are_refused(libraries: dict[KernelConfig, Path]) -> None:
    said = run(prelude(libraries, KEYS[3]) + REFUSED.format(call="attend(*[x[..., :128]] * 3, 3)"), device="h100")
    assert "device 0 has compute capability 9.0, this kernel needs 10.0 or 10.3" in said


def test_facts_of_a_build(libraries: dict[KernelConfig, Path]) -> None:
    for config, path in libraries.items():
        record = json.loads(path.with_name("record.json").read_text())
        channels = 64 if config.head_dim == 64 else 128
        assert record["registers"] == 128 and record["spill_bytes"] <= 256
        # Q, three stages of K or V, output; barriers and what masks remember
        assert record["shared_memory"] == 2 * channels * (256 + 3 * 128 + 256) + 2048
