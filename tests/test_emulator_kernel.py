"""An attention kernel compiled by nvcc, run by the emulator under every schedule, and its mutants."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from emulator_ptx import SCHEDULES, bf16, from_bf16
from gnaforge.build_tools.cuda import find_nvcc
from gnaforge.build_tools.emulator import Counters, EmulationError, Module, Options, TensorMap, load, mutants
from gnaforge.build_tools.emulator.survey import record, survey
from gnaforge.errors import BuildError

SOURCE = Path(__file__).with_name("emulator_attention.cu")
SHARED_BYTES = 6 * 8192 + 1024
DIM = 64


@pytest.fixture(scope="module")
def ptx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """emulator_attention.cu as PTX."""
    try:
        nvcc = find_nvcc()
    except BuildError as error:
        pytest.skip(str(error))
    path = tmp_path_factory.mktemp("ptx") / "attention.ptx"
    command = [str(nvcc.path), "-ptx", "-arch=sm_90a", "-std=c++17", "-lineinfo", str(SOURCE), "-o", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return path


class Problem:
    """Random inputs, and exact attention in float64."""

    def __init__(self, heads: int, rows: int, keys: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.q, self.k, self.v = (bf16(rng.standard_normal((heads, n, DIM))) for n in (rows, keys, keys))
        q, k, v = (from_bf16(x).astype(np.float64) for x in (self.q, self.k, self.v))
        self.scale = DIM**-0.5
        scores = self.scale * q @ k.transpose(0, 2, 1)
        high = scores.max(axis=-1, keepdims=True)
        weights = np.exp(scores - high)
        total = weights.sum(axis=-1, keepdims=True)
        self.output, self.lse = weights / total @ v, (high + np.log(total))[..., 0]
        # Two roundings to bf16, of the weights and of the result, and fp32 in between.
        self.bound = 2.0**-8 * (weights / total @ np.abs(v) + np.abs(self.output)) + 1e-5

    def launch(self, module: Module, options: Options | None = None) -> tuple[np.ndarray, np.ndarray, Counters]:
        heads, rows, _ = self.q.shape
        output = np.full(self.q.shape, 0x7FC0, np.uint16)
        lse = np.full((heads, rows), np.nan, np.float32)
        maps = [TensorMap(x, (DIM, 64, 1), data_type="bf16", swizzle=128) for x in (self.q, self.k, self.v, output)]
        counters = module.launch(
            [-(-rows // 64), heads],
            [160],
            [*maps, lse, rows, self.k.shape[1], self.scale],
            shared_bytes=SHARED_BYTES,
            options=options,
        )
        return from_bf16(output), lse, counters

    def holds(self, output: np.ndarray, lse: np.ndarray) -> bool:
        close = np.abs(output - self.output) <= self.bound
        return bool(close.all() and (np.abs(lse - self.lse) < 1e-4).all())


@pytest.mark.parametrize("options", SCHEDULES, ids=lambda o: f"{o.timing}-{o.order}-{o.seed}")
def test_numerics(ptx: Path, options: Options) -> None:
    module = load(ptx)
    for heads, rows, keys in ((1, 64, 64), (2, 100, 200), (1, 65, 449)):
        problem = Problem(heads, rows, keys)
        output, lse, _ = problem.launch(module, options)
        assert problem.holds(output, lse), (heads, rows, keys)


def test_counters(ptx: Path) -> None:
    _, _, counters = Problem(2, 128, 256).launch(load(ptx))
    ctas, tiles = 4, 4
    assert counters.of("wgmma.mma_async") == ctas * tiles * 4 * (4 + 4)
    assert counters.mma_operations == ctas * tiles * 4 * 64 * 64 * 64
    assert counters.async_load_bytes == ctas * 8192 * (1 + 2 * tiles)
    assert counters.async_store_bytes == ctas * 8192
    assert counters.of("ex2") == ctas * 4 * tiles * (32 + 2)


def replace(old: str, new: str, nth: int = 0) -> Callable[[str], str]:
    """Replaces the nth match of a pattern; fails if there is none."""

    def apply(text: str) -> str:
        match = list(re.finditer(old, text))[nth]
        return text[: match.start()] + match.expand(new) + text[match.end() :]

    return apply


def noticed(problem: Problem, text: str) -> bool:
    """Whether one of a few schedules reports an error, or lets the kernel compute something wrong."""
    module = load(text)
    for options in [*SCHEDULES[:3], *(Options("random", "random", seed) for seed in range(8))]:
        try:
            output, lse, _ = problem.launch(module, options)
        except EmulationError:
            return True
        if not problem.holds(output, lse):
            return True
    return False


def test_every_synchronising_instruction_is_needed(ptx: Path) -> None:
    """Every mutant breaks its PTX rule, as recordings of the correct kernel have it, and every one is noticed."""
    problem = Problem(1, 64, 64 * 7 + 5)

    def run(module: Module, options: Options) -> bool:
        output, lse, _ = problem.launch(module, options)
        return problem.holds(output, lse)

    outcomes = survey(ptx.read_text(), run).outcomes
    assert len(outcomes) == len({(o.mutant.line, o.mutant.rule.change) for o in outcomes}) > 20
    assert [str(o.mutant) for o in outcomes if not o.verdict.wrong] == []
    assert [str(o.mutant) for o in outcomes if not o.noticed] == []


def test_a_harmless_mutant_is_told_from_a_wrong_one(ptx: Path) -> None:
    """Doubled, an instruction that orders something orders nothing any more: neither of the two is needed."""
    problem = Problem(1, 64, 64 * 3)

    def run(module: Module, options: Options) -> bool:
        output, lse, _ = problem.launch(module, options)
        return problem.holds(output, lse)

    doubled = {"fence.proxy.async", "bar.sync", "wgmma.wait_group", "wgmma.fence", "cp.async.bulk.wait_group"}
    text = ptx.read_text()
    for opcode in doubled:
        text = re.sub(rf"({re.escape(opcode)}[^;]*;)", r"\1 \1", text)
    evidence = record(text, run)
    verdicts: dict[str, set[bool]] = {}
    for mutant in mutants(text):
        opcode = mutant.instruction.split()[0].rstrip(";")
        name = next((name for name in doubled if opcode.startswith(name)), "other")
        # What is asked about an instruction that stands twice in a line is asked about the first.
        verdicts.setdefault(name, set()).add(evidence.verdict(mutant).wrong)
    assert verdicts.pop("other") == {True}
    assert all(verdict == {False} for verdict in verdicts.values()), verdicts


@pytest.mark.parametrize(("fence", "wrong"), [("fence.proxy.async;", False), ("fence.proxy.async.global;", True)])
def test_initialisations_may_be_ordered_by_a_fence_of_proxies(ptx: Path, fence: str, wrong: bool) -> None:
    problem = Problem(1, 64, 64 * 3)

    def run(module: Module, options: Options) -> bool:
        output, lse, _ = problem.launch(module, options)
        return problem.holds(output, lse)

    text = re.sub(r"(fence\.mbarrier_init[^;]*;)", rf"\1 {fence}", ptx.read_text())
    evidence = record(text, run)
    (mutant,) = (mutant for mutant in mutants(text) if mutant.instruction.startswith("fence.mbarrier_init"))
    assert evidence.verdict(mutant).wrong == wrong


# What is left when nothing is taken out, but something is wrong.
WRONG = {
    "Q expects too many bytes": replace(r"(mbarrier\.arrive\.expect_tx[^;]*\], )(%r\d+);", r"\1 16384;", 0),
    "K and V expect too few bytes": replace(r"(mbarrier\.arrive\.expect_tx[^;]*\], )(%r\d+);", r"\1 8192;", 1),
    "consumers release twice": replace(r"(mbarrier\.arrive\.shared::cta\.b64 _, \[%r\d+\];)", r"\1 \1"),
    "consumers wait for the other parity": replace(r"(try_wait[^;]*\[%r\d+\]), %r\d+;", r"\1, 1;", 2),
    "a step of PV left out": replace(r"wgmma\.mma_async[^;]*;", "", 5),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_kernel_is_noticed(ptx: Path, name: str) -> None:
    assert noticed(Problem(1, 64, 64 * 7 + 5), WRONG[name](ptx.read_text()))


def test_a_swapped_phase_says_who_waits_for_what(ptx: Path) -> None:
    """The producer waits for the parity that a fresh barrier doesn't have: everybody stands still."""
    text = replace(r"(mbarrier\.try_wait\.parity\.shared::cta\.b64 \w+, \[%r\d+\]), %r\d+;", r"\1, 0;", 0)(
        ptx.read_text()
    )
    with pytest.raises(EmulationError, match="deadlock") as caught:
        Problem(1, 64, 320).launch(load(text))
    message = str(caught.value)
    assert re.search(
        r"warp 4: ptx:\d+: mbarrier\.try_wait.*\(emulator_attention\.cu:\d+, called at emulator_attention\.cu:\d+"
        r"[^)]*\): waits for the end of a phase of parity",
        message,
    )
    assert re.search(r"warps 0 1 2 3: ptx:\d+: mbarrier\.try_wait", message)
    assert "1 of 1 arrivals and 0 bytes pending" in message
