"""The sm90 kernels in the emulator, and the checks that their build makes. Nothing here ran on hardware."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from gnaforge import build as building
from gnaforge.build import build_kernels, include_dir
from gnaforge.build_tools import includes
from gnaforge.build_tools.cuda_compiler import kernel_facts
from gnaforge.build_tools.sass import MUFU, Sass, read_cubin
from gnaforge.emulated import emulated_libraries
from gnaforge.errors import BuildError
from gnaforge.runtime.config import KernelConfig

KEYS = (
    "gna_forward-sm90-r3-bf16-d128-q8x4x4-kv6x4x4",
    "gna_forward-sm90-r3-bf16-d128-q2x8x8-kv1x6x24",
    "gna_forward-sm90-r3-bf16-d8-q3x5x4-kv4x4x6",
    "gna_forward-sm90-r3-bf16-d72-q2x4x8-kv2x4x8",
    "gna_forward-sm90-r2-bf16-d128-q8x16-kv8x16",
    "gna_forward-sm90-r2-fp16-d128-q9x14-kv8x20",
    "gna_forward-sm90-r2-bf16-d64-q12x16-kv8x16",
    "gna_forward-sm90-r2-bf16-d72-q8x8-kv7x16",
    "gna_forward-sm90-r2-bf16-d96v40-q8x16-kv4x20",
    "gna_forward-sm90-r1-bf16-d128-q128-kv128",
    "gna_forward-sm90-r1-fp16-d256-q128-kv64",
    "gna_forward-sm90-r1-bf16-d32v200-q100-kv48",
)
CONFIGS = [KernelConfig.parse(key) for key in KEYS]
MODES = {"eager": "round-robin", "lazy": "depth-first", "random": "random"}


@pytest.fixture(scope="module")
def libraries(session_cache: Path) -> dict[KernelConfig, Path]:
    try:
        return emulated_libraries(CONFIGS)
    except BuildError as error:
        if "no CUDA compiler" in str(error):
            pytest.skip(str(error))
        raise


def environment(mode: str = "random", seed: int = 0) -> dict[str, str]:
    settings = {"MEMORY": "mapped", "TIMING": mode, "ORDER": MODES[mode], "SEED": str(seed)}
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
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("mode", MODES)
def test_random_problems(libraries: dict[KernelConfig, Path], mode: str) -> None:
    first = 1000 * list(MODES).index(mode)
    arguments = [f"{config.key}={path}" for config, path in libraries.items()]
    said = run(["sm90_problems.py", str(first), "9", *arguments], mode)
    assert said.startswith("108 problems, 0 wrong"), said


PRELUDE = """
import sys, torch, gnaforge, oracle
from sm90_problems import shares
from gnaforge.runtime.config import KernelConfig
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
        # More Q tiles than the 132 processors have room for, so CTAs take several; as folded heads and per batch entry.
        (KEYS[0], "(9, 9, 10), (5, 4, 9), (2, 1, 3), (1, 1, 1), (False, True, False), 3, 4, 2, 128, 128"),
        (KEYS[3], "(7, 9, 16), (3, 3, 7), (1, 2, 1), (1, 2, 1), (False,) * 3, 2, 12, 3, 72, 72"),
        (KEYS[9], "(580,), (150,), (5,), (1,), (True,), 4, 8, 1, 128, 128"),
        (KEYS[4], "(20, 18), (20, 18), (1, 1), (1, 1), (False,) * 2, 1, 23, 23, 128, 128"),  # dense
    ],
)
def test_larger_problems(libraries: dict[KernelConfig, Path], key: str, problem: str) -> None:
    said = run(f"{prelude(libraries, key)}\nprint(max(shares(oracle.Problem({problem}), config, 0)))")
    assert float(said) <= 1


def test_missing_synchronisation_is_noticed(libraries: dict[KernelConfig, Path]) -> None:
    """A few mutants of a kernel: fences, waits and arrivals that its rules need. All: test_emulator_survey.py."""
    said = run(["sm90_mutants.py", str(libraries[CONFIGS[0]]), KEYS[0], "11"], "eager")
    assert re.match(r"\d+ mutants reached, 0 not; wrong by rule ([3-9]), of these noticed \1;", said), said


def test_every_element_is_written(libraries: dict[KernelConfig, Path]) -> None:
    """Fresh memory holds NaN; tiles cross every border."""
    code = """
torch.use_deterministic_algorithms(True)
torch.utils.deterministic.fill_uninitialized_memory = True
assert torch.empty(4).isnan().all()
q, k, v = (torch.randn(2, 13, 19, 3, 128).half() for _ in range(3))
out, lse = attend(q, k, v, (5, 6), (2, 1), (1, 3))
assert out.isfinite().all() and lse.isfinite().all()
"""
    run(prelude(libraries, KEYS[5]) + code)


@pytest.mark.parametrize("key", [KEYS[4], KEYS[7]])
def test_foreign_and_masked_values_have_no_effect(libraries: dict[KernelConfig, Path], key: str) -> None:
    """NaN in other heads and batch entries, and in K of masked tokens; large V in masked tokens of visited boxes."""
    code = """
q, k, v = (torch.randn(2, 20, 20, 3, config.head_dim).bfloat16() for _ in range(3))
clean = attend(q, k, v, 5)
k2, v2 = k.clone(), v.clone()
for x in (k2, v2):
    x[1], x[0, :, :, 0], x[0, :, :, 2] = (float("nan"),) * 3
k2[0, 12, 12], v2[0, 12, 12] = float("nan"), 3e38
poisoned = attend(q, k2, v2, 5)
sees = torch.zeros(20, 20, dtype=torch.bool)
sees[10:15, 10:15] = True
for got, want in zip(poisoned, clean):
    assert torch.equal(got[0, :, :, 1][~sees], want[0, :, :, 1][~sees])
assert poisoned[0][0, :, :, 1][sees].isnan().all()
"""
    run(prelude(libraries, key) + code)


@pytest.mark.parametrize("key", [KEYS[0], KEYS[3]])
def test_layouts_need_no_copy(libraries: dict[KernelConfig, Path], key: str) -> None:
    """Packed QKV, heads first, and slices give the very result of contiguous tensors. Batch of 3, rank 3."""
    code = """
def compare(q, k, v):
    want = attend(q.contiguous(), k.contiguous(), v.contiguous(), (3, 5, 4))
    for got, exact in zip(attend(q, k, v, (3, 5, 4)), want):
        assert torch.equal(got, exact)
d = config.head_dim
compare(*torch.randn(3, 4, 7, 9, 3, 2, d).bfloat16().unbind(4))
compare(*(torch.randn(3, 2, 4, 7, 9, d).bfloat16().permute(0, 2, 3, 4, 1, 5) for _ in range(3)))
compare(*(torch.randn(3, 8, 9, 20, 2, d + 8).bfloat16()[:, ::2, 2:, 1:19:2, :, :d] for _ in range(3)))
"""
    run(prelude(libraries, key) + code)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ("attend(x[..., 4:132], x[..., :128], x[..., :128], 3)", "query is not aligned to 16 bytes"),
        (
            "attend(*[torch.randn(1, 8, 8, 2, 130).bfloat16()[..., :128]] * 3, 3)",
            "query has stride 130 along its heads, must be a positive multiple of 8",
        ),
        ("attend(*[x[..., :1, :128].expand(1, 8, 8, 2, 128)] * 3, 3)", "query has stride 0 along its heads"),
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
    # 384 threads share 65,536 registers; Q and O of 128 rows, three stages of 96 columns; barriers.
    assert record["registers"] == 168 and record["spill_bytes"] == 0
    assert record["shared_memory"] == 2 * 128 * 256 + 3 * 2 * 96 * 256 + 512


def test_a_wait_above_the_softmax_fails_the_build(
    libraries: dict[KernelConfig, Path], own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop without its rotation: ptxas does what the rotation is there to prevent, and the check sees it."""
    headers = tmp_path / "include"
    shutil.copytree(include_dir(), headers)
    consumer = headers / "gnaforge" / "sm90" / "consumer.h"
    text = consumer.read_text()
    after = "      release_and_mask(j >= interior);\n      softmax.step(scores, params.scale_log2);\n"
    assert text.count(after) == 1
    consumer.write_text(text.replace(after, after + "      wgmma_wait<0>();\n      hold(out);\n"))
    monkeypatch.setattr(building, "include_dir", lambda: headers)
    includes.forget_headers()
    try:
        with pytest.raises(BuildError, match="ptxas moved a wait above the softmax"):
            build_kernels([CONFIGS[4]])
    finally:
        includes.forget_headers()
    assert (own_cache / ".failed" / KEYS[4] / "kernel.cu").is_file()


LOG = """ptxas info    : Function properties for kernel
    {stack} bytes stack frame, {spill} bytes spill stores, {spill} bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers
"""


def test_reports_of_ptxas() -> None:
    facts = kernel_facts(LOG.format(stack=0, spill=0))
    assert (facts.registers, facts.spill_bytes) == (168, 0)
    with pytest.raises(BuildError, match="spills registers: 8 bytes of stores and 8 of loads"):
        kernel_facts(LOG.format(stack=8, spill=8))
    warning = "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized\n"
    with pytest.raises(BuildError, match=r"serialised the kernel's matrix products: .*C7510"):
        kernel_facts(warning + LOG.format(stack=0, spill=0))
    with pytest.raises(BuildError, match="reported on 0 kernels"):
        kernel_facts("")


def test_machine_code_is_read_in_order() -> None:
    wait = [(0x8000000079C5, pending << 8 | 0x10000) for pending in (0, 1)]
    exp, other = (0x7308, 0), (0x7221, 0)
    code = Sass((exp, wait[1], exp, other, exp, wait[0], exp, exp, exp, wait[1], exp, wait[0]))
    assert code.count(0x308) == 7 and code.overlapped(MUFU) == 2
    with pytest.raises(BuildError, match="no 64-bit ELF file"):
        read_cubin(b"text")
