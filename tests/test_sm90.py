"""The sm90 kernels in the emulator, and the checks that their build makes. Nothing here ran on hardware."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from emulated_calls import MODES
from gnaforge.build import kernels as building
from gnaforge.build.identity import include_dir
from gnaforge.build.kernels import build_kernels, find_libraries
from gnaforge.build_tools import includes
from gnaforge.build_tools.sass import HGMMA_REGISTERS, HGMMA_SHARED, MUFU, Sass, read_cubin
from gnaforge.errors import BuildError
from gnaforge.families.sm90_forward import check_machine_code
from gnaforge.runtime.config import KernelConfig
from gnaforge.runtime.problem import Problem
from gnaforge.verification.problems import for_kernel
from gnaforge.verification.runner import Settings, Verifier
from gnaforge.verification.schedules import Schedule
from sm90_kernels import CONFIGS, KEYS


@pytest.fixture(scope="module")
def libraries(session_cache: Path) -> dict[KernelConfig, Path]:
    try:
        return find_libraries(CONFIGS, emulated=True)
    except BuildError as error:
        if "no CUDA compiler" in str(error):
            pytest.skip(str(error))
        raise


def environment(mode: str = "random", seed: int = 0) -> dict[str, str]:
    settings = {"MEMORY": "mapped", "TIMING": mode, "ORDER": MODES[mode], "SEED": str(seed)}
    settings["PROCESSORS"] = "3"  # so that CTAs take several Q tiles
    return {f"GNAFORGE_EMULATOR_{name}": value for name, value in settings.items()}


def run(code: str | list[str], mode: str = "random") -> str:
    """Runs Python in a process of its own; it must succeed. Returns what it printed."""
    arguments = ["-c", code] if isinstance(code, str) else code
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=here,
        env={**os.environ, **environment(mode), "PYTHONPATH": path},
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("mode", MODES)
def test_hardware_suite_in_the_emulator(libraries: dict[KernelConfig, Path], mode: str, tmp_path: Path) -> None:
    """What `tests/gpu` does on hardware, with fewer problems: other ones in each mode. The emulator
    says itself what hangs, so the time limits may suit a machine that does much else besides."""
    first = 100 * list(MODES).index(mode) + 1
    limits = ["--problems=48", "--seconds=1500", "--job-seconds=600", f"--first-seed={first}"]
    schedule = [f"--timing={mode}", f"--order={MODES[mode]}"]
    # Only once what the mode changes nothing in.
    only = [] if mode == "random" else ["--only=first runs", "--only=random problems"]
    arguments = [*limits, *schedule, *only, *(f"--library={path}" for path in libraries.values())]
    run(["gpu/run.py", *arguments, f"--out={tmp_path / 'suite.json'}"])
    found = json.loads((tmp_path / "suite.json").read_text())
    sections = found["sections"]
    assert found["failures"] == []
    assert sections["first runs"]["passed"] == 12 and sections["random problems"]["passed"] == 48
    if mode == "random":
        assert sections["operators"]["passed"] == 5 and sections["large tensors"]["passed"] == 13


PRELUDE = """
import sys, torch, gnaforge
from gnaforge.runtime.config import KernelConfig
from gnaforge.runtime.problem import Problem
from gnaforge.verification.problems import for_kernel
from gnaforge.verification.runner import Settings, Verifier
from gnaforge.verification.schedules import Schedule
config = KernelConfig.parse(sys.argv[1] if len(sys.argv) > 1 else "{key}")
gnaforge.load_library("{library}")
torch.manual_seed(0)
def attend(q, k, v, *pattern):
    return gnaforge.neighborhood_attention(q, k, v, *pattern, return_lse=True, kernel=config)
"""


def prelude(libraries: dict[KernelConfig, Path], key: str) -> str:
    return PRELUDE.format(key=key, library=libraries[KernelConfig.parse(key)])


@pytest.mark.parametrize(
    ("key", "problem"),
    [
        # CTAs take many Q tiles; as folded heads and per batch entry.
        (KEYS[0], Problem((9, 9, 10), (5, 4, 9), (2, 1, 3), 1, (False, True, False), batch=3, heads=4, kv_heads=2)),
        (KEYS[3], Problem((7, 9, 16), (3, 3, 7), (1, 2, 1), (1, 2, 1), batch=2, heads=6, kv_heads=3)),
        (KEYS[9], Problem(580, 150, 5, causal=True, batch=2, heads=4, kv_heads=1)),
        (KEYS[4], Problem((20, 18), (20, 18), heads=5)),  # dense
    ],
)
def test_larger_problems(libraries: dict[KernelConfig, Path], key: str, problem: Problem) -> None:
    config = KernelConfig.parse(key)
    settings = Settings([Schedule("random", "random")], gaps=False, poison=False)
    with Verifier(config, libraries[config], settings) as verifier:
        found = verifier.verify(for_kernel(problem, config))
    assert not found.failed, found.message


def test_missing_synchronisation_is_noticed(libraries: dict[KernelConfig, Path]) -> None:
    """A few mutants of a kernel: fences, waits and arrivals that its rules need. All: test_emulator_survey.py."""
    said = run(["kernel_mutants.py", str(libraries[CONFIGS[0]]), KEYS[0], "11"], "eager")
    assert re.match(r"\d+ mutants reached, 0 not; wrong by rule ([3-9]), of these noticed \1;", said), said


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ("attend(*[x[..., :64]] * 3, 3)", "head_dim is 64, this kernel takes 128"),
        ("attend(*[x[..., :128]] * 3, 3, 1, 1, False, -1.0)", "scale is -1, this kernel takes positive ones"),
    ],
)
def test_refusals_say_why(libraries: dict[KernelConfig, Path], call: str, reason: str) -> None:
    code = f"""
x = torch.randn(1, 8, 8, 2, 136).bfloat16()
try:
    {call}
except Exception as error:
    print(error)
"""
    said = run(prelude(libraries, KEYS[4]) + code)
    assert reason in said


LAYOUTS = """
from pathlib import Path
from gnaforge.verification.contract import Kernel, Refused
from gnaforge.verification.operators import OPERATOR_JOBS
from gnaforge.verification.problems import for_kernel
from gnaforge.runtime.problem import Problem
kernel = Kernel(Path("{library}"), config.key)
print(OPERATOR_JOBS["layouts"](Path("{library}"), kernel)["calls"])
# Without the core, which copies what the kernel says that it doesn't take:
rank = config.rank
tokens = 9 if rank > 1 else 70
problem = for_kernel(Problem((tokens,) * rank, 3, batch=2, heads=2), config)
dims = config.head_dim, config.head_dim, config.value_head_dim or config.head_dim
dtype = dict(bf16=torch.bfloat16, fp16=torch.float16)[config.dtype]
q, k, v = (torch.randn(2, *(tokens,) * rank, 2, d).to(dtype) for d in dims)
def call(q, k, v):
    tensors = dict(q=q, k=k, v=v, out=torch.empty(*q.shape[:-1], dims[2], dtype=dtype), lse=torch.empty(q.shape[:-1]))
    try:
        kernel.call(problem, tensors)
    except Refused as error:
        return str(error)
    return tensors["out"], tensors["lse"]
one = k[:1].expand_as(k)  # batch entries need no copy
assert all(map(torch.equal, call(q, one, v), call(q, one.contiguous(), v)))
for query, said in (
    (q.new_zeros(q.numel() + 1)[1:].view_as(q), "query is not aligned to 16 bytes"),
    (q.new_zeros(*q.shape[:-1], dims[0] + 2)[..., : dims[0]], "must be a positive multiple of 8"),
    (q[..., :1, :].expand_as(q), "query has stride 0 along its heads"),
    (q[:, :1].expand_as(q), "query has stride 0 along its first token dim"),
):
    assert said in call(query, k, v), (said, call(query, k, v))
"""


@pytest.mark.parametrize("key", [KEYS[0], KEYS[3], KEYS[9]])
def test_any_layout_is_taken(libraries: dict[KernelConfig, Path], key: str) -> None:
    """With folded heads, with maps per batch entry, and of one dimension; the kernel itself says what it can't read."""
    code = LAYOUTS.format(library=libraries[KernelConfig.parse(key)])
    assert int(run(prelude(libraries, key) + code)) == 8


NONFINITE = """
from gnaforge.runtime.problem import Problem
from nonfinite import check_reach
problems = {
    1: Problem(300, 9, 3, 2, True, heads=2),
    2: Problem((30, 21), (4, 5), (2, 1), (2, 1)),
    3: Problem((9, 12, 13), (2, 3, 4), (1, 2, 1)),
}
check_reach(attend, config, problems[config.rank])
"""


@pytest.mark.parametrize("key", [KEYS[0], KEYS[7], KEYS[11]])
def test_values_that_are_not_finite_reach_no_further_than_is_said(
    libraries: dict[KernelConfig, Path], key: str
) -> None:
    """In V, to all queries of Q tiles that visit a KV tile with the token; in K, to those that see it."""
    run(prelude(libraries, key) + NONFINITE)


def test_an_emulated_kernel_is_only_taken_by_name(libraries: dict[KernelConfig, Path], no_kernels: Path) -> None:
    code = """
assert gnaforge.registry[config].emulated
x = torch.randn(1, 8, 8, 2, 128).bfloat16()
try:
    gnaforge.na2d(x, x, x, 3)
except gnaforge.NoKernelError as error:
    print(error)
"""
    assert "emulated, runs only when named" in run(prelude(libraries, KEYS[4]) + code)


@pytest.fixture
def gpu_build(libraries: dict[KernelConfig, Path]) -> Callable[..., dict[str, object]]:
    """Builds the sm90 kernel of a key for a GPU, and returns its record."""

    def make(key: str) -> dict[str, object]:
        config = KernelConfig.parse(key)
        artifacts, _ = build_kernels([config])
        return artifacts[config].record

    return make


def test_facts_of_a_gpu_build(gpu_build: Callable[..., dict[str, object]]) -> None:
    record = gpu_build(KEYS[0])
    # 384 threads share 65,536 registers; Q and O of 128 rows, three stages of 96 columns; barriers; a table of masks,
    # 16 bytes for each place between keys along an axis.
    assert record["registers"] == 168 and record["spill_bytes"] == 0
    assert record["shared_memory"] == 2 * 128 * 256 + 3 * 2 * 96 * 256 + 512 + 16 * (7 + 5 + 5)


def test_a_wait_above_the_softmax_fails_the_build(
    libraries: dict[KernelConfig, Path], own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop without its rotation: ptxas does what the rotation is there to prevent, and the check sees it."""
    headers = tmp_path / "include"
    shutil.copytree(include_dir(), headers)
    consumer = headers / "gnaforge" / "sm90" / "forward" / "consumer.h"
    text = consumer.read_text()
    after = "      release_and_mask(facts);\n      softmax.step(scores, params.scale_log2, rescale);\n"
    assert text.count(after) == 1
    consumer.write_text(text.replace(after, after + "      ptx::wgmma_wait<0>();\n      ptx::hold(out);\n"))
    monkeypatch.setattr(building, "include_dirs", lambda _: (headers,))
    includes.forget_headers()
    try:
        with pytest.raises(BuildError, match="ptxas moved a wait above the softmax"):
            build_kernels([CONFIGS[4]])
    finally:
        includes.forget_headers()
    assert (own_cache / ".failed" / KEYS[4] / "kernel.cu").is_file()


EXP, OTHER = (0x7308, 0), (0x7221, 0)
WAIT = [(0x8000000079C5, pending << 8 | 0x10000) for pending in (0, 1)]
EXIT = (0x794D, 0)


def branch(over: int, predicate: int = 0) -> tuple[int, int]:
    """A branch over so many instructions, back if negative; always taken if the predicate is 7."""
    offset = 4 * over & (1 << 56) - 1
    return 0x947 | predicate << 12 | (offset & 0xFF) << 16 | (offset >> 8 & 0x3FFFFFFF) << 34, offset >> 38


def test_machine_code_is_read_in_order() -> None:
    code = Sass((EXP, WAIT[1], EXP, OTHER, EXP, WAIT[0], EXP, EXP, EXP, WAIT[1], EXP, WAIT[0]))
    assert code.count(0x308) == 7 and code.overlap(MUFU) == 2
    with pytest.raises(BuildError, match="no 64-bit ELF file"):
        read_cubin(b"text")


@pytest.mark.parametrize(
    ("code", "overlap"),
    [
        ((WAIT[1], branch(1), WAIT[0], EXP, EXP, WAIT[0]), 2),  # the wait is skipped
        ((WAIT[1], branch(1, 7), WAIT[0], EXP, EXP, WAIT[0]), 2),
        ((WAIT[1], branch(1), OTHER, WAIT[0], EXP, EXP), 0),  # it is not
        ((WAIT[1], branch(2), EXP, EXP, EXP, WAIT[0]), 2),  # ways meet: the one with fewer counts
        ((WAIT[1], branch(2), EXP, EXIT, EXP, EXP, WAIT[0]), 2),
        ((WAIT[1], EXP, branch(-2), EXP, WAIT[0]), 2),  # a loop counts once
        ((WAIT[1], EXP, branch(-2, 7), EXP, WAIT[0]), 1),  # nothing comes past it
        ((WAIT[1], branch(3, 7), EXP, EXP, EXP, WAIT[0]), 0),
        ((WAIT[1], branch(70), *[OTHER] * 69, WAIT[0], EXP, WAIT[0]), 1),  # farther than one byte tells
    ],
)
def test_machine_code_is_read_along_branches(code: tuple[tuple[int, int], ...], overlap: int) -> None:
    assert Sass(code).overlap(MUFU) == overlap


def test_registers_that_a_block_has_not_got() -> None:
    """Warps that ask for more registers than the block has given up or never had wait for ever, on hardware only."""
    config = KernelConfig.parse("gna_forward-sm90-r1-bf16-d64-q192-kv16")
    product = (HGMMA_SHARED, 0)
    up, down = ((registers << 32 | 0x9C8, 0) for registers in (160, 32))
    code = (up, product, (HGMMA_REGISTERS, 0), WAIT[1], *[EXP] * 8, WAIT[0], down)
    assert check_machine_code(config, Sass(code), 128)["mufu"] == 8
    with pytest.raises(BuildError, match=r"takes 120 .* 4 warpgroups ask for 32 and 3 x 160, 32 more than they have"):
        check_machine_code(config, Sass(code), 120)


def test_the_output_takes_the_place_of_q_when_nobody_reads_it(libraries: dict[KernelConfig, Path]) -> None:
    """PTX doesn't say that a warp waits for other warps' parts of a product, which the emulator lets it do: so by the
    text, of kernels of either layout, that a barrier lies between the last wait and the output."""
    for key in (KEYS[0], KEYS[10]):
        text = libraries[KernelConfig.parse(key)].read_bytes().decode("latin-1")
        text = text[text.rindex(".visible .entry") :]  # the PTX lies in the library as it is
        before = text[: text.index("stmatrix.sync")]
        assert "barrier.cta.sync" in before[before.rindex("wgmma.wait_group") :], key
