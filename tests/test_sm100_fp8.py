"""Inputs in e4m3: sm100's kernels in the emulator, the operators above them, and who refuses. Nothing here ran on
hardware."""

from __future__ import annotations

from pathlib import Path

import gnaforge
import pytest
import torch
from emulated_calls import MODES, PRELUDE, run
from gnaforge.build.kernels import build_kernels, find_libraries
from gnaforge.errors import BuildError
from gnaforge.families import require_config
from gnaforge.runtime import ops
from gnaforge.runtime.config import KernelConfig
from gnaforge.runtime.problem import Problem, ProblemError
from gnaforge.verification.problems import for_kernel, random_problem_for
from gnaforge.verification.runner import Settings, Verifier
from gnaforge.verification.schedules import Schedule
from sm100_problems import random_problem
from torch._subclasses.fake_tensor import FakeTensorMode

# Two halves of rows, of whole boxes; and of two heads each, with padding of the last word of columns, of channels and
# of rows of V. One half: Q copied to tensor memory, two chunks of channels, of which the last one is half empty.
FOLDED = "gna_forward-sm100-r3-e4m3-obf16-d128-q4x8x8-kv2x8x8"
LINE = "gna_forward-sm100-r1-e4m3-obf16-d80v48-q125h2-kv80"
COPIED = "gna_forward-sm100-r2-e4m3-ofp16-d208-q8x16-kv8x6"
KEYS = (FOLDED, LINE, COPIED)
CONFIGS = [KernelConfig.parse(key) for key in KEYS]


def skip_without_compiler(error: BuildError) -> None:
    if "no CUDA compiler" in str(error):
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def libraries(session_cache: Path) -> dict[str, Path]:
    try:
        return {config.key: path for config, path in find_libraries(CONFIGS, emulated=True).items()}
    except BuildError as error:
        skip_without_compiler(error)
        raise


def verify(library: Path, key: str, seeds: range, mode: str) -> dict[str, float]:
    """Random problems, half of them with settings of every kind, with descales for some tensors: within the bound of
    `reference.error_bound`, poisoned, with NaN in gaps. Returns the largest shares of it, by result."""
    config = KernelConfig.parse(key)
    shares: dict[str, float] = {}
    with Verifier(config, library, Settings([Schedule(mode, MODES[mode])])) as verifier:
        for seed in seeds:
            problem = random_problem(config, seed)[0] if seed % 2 else random_problem_for(config, seed, 300)
            found = verifier.verify(problem)
            assert not found.failed, f"{key} seed {seed}: {problem}: {found.message}"
            for name, error in found.errors.items():
                shares[name] = max(shares.get(name, 0.0), error["share"])
    return shares


@pytest.mark.parametrize("key", KEYS)
def test_random_problems(libraries: dict[str, Path], key: str) -> None:
    verify(libraries[key], key, range(3), list(MODES)[KEYS.index(key)])


@pytest.mark.survey
@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("mode", MODES)
def test_many_random_problems(libraries: dict[str, Path], key: str, mode: str) -> None:
    first = 100 + 1000 * list(MODES).index(mode)
    shares = verify(libraries[key], key, range(first, first + 35), mode)
    print(f"\n{key}, {mode}: at most {', '.join(f'{share:.0%} of the bound of {x}' for x, share in shares.items())}")


def test_shifts_large_scores_and_extra_keys(libraries: dict[str, Path]) -> None:
    """Scores of 2^13 and 2^23 in powers of two, where shifts are taken off scores and not off exponents; and pieces of
    extra keys whose last tiles are not full."""
    config = KernelConfig.parse(LINE)
    with Verifier(config, libraries[LINE], Settings([Schedule("lazy", MODES["lazy"])])) as verifier:
        for scale in (0.11, 60.0, 60_000.0):
            problem = Problem(300, 90, heads=2, kv_heads=1, batch=2, scale=scale, extra_tokens=(33, 170))
            found = verifier.verify(for_kernel(problem, config))
            assert not found.failed, f"{scale}: {found.message}"


@pytest.mark.survey
def test_missing_synchronisation_is_noticed(libraries: dict[str, Path]) -> None:
    assert "mutants reached" in run(["kernel_mutants.py", str(libraries[COPIED]), COPIED, "5"], "eager")


def test_facts_of_a_gpu_build(session_cache: Path) -> None:
    try:
        ((config, artifact),) = build_kernels(CONFIGS[2:])[0].items()
    except BuildError as error:
        skip_without_compiler(error)
        raise
    assert artifact.record["registers"] == 128 and artifact.record["spill_bytes"] == 0, config
    assert artifact.record["code"]["mufu_under_product"] >= 16


# Exact results of a call with descales; and calls in every form, of which windows per head are lists.
CALLS = """
from functools import partial
from gnaforge.runtime.problem import Problem
from gnaforge.runtime.reference import ExtraKeys, attention, dequantise, error_bound

q = torch.randn(2, 9, 10, 4, 208).to(torch.float8_e4m3fn)
k, v = (torch.randn(2, 9, 10, 2, 208).to(torch.float8_e4m3fn) for _ in range(2))
text_k, text_v = (torch.randn(2, 33, 2, 208).to(torch.float8_e4m3fn) for _ in range(2))
dq, dk, dv = (torch.rand(heads) + 0.5 for heads in (4, 2, 2))
one, four = torch.ones(()), partial(gnaforge.na2d, kernel=config, out_dtype=torch.float16)
na = partial(four, return_lse=True)

def check(found, dq, dk, dv, window, head=slice(None), extra=()):
    scales = {"descale_q": dq.expand(2, 4), "descale_k": dk.expand(2, 2), "descale_v": dv.expand(2, 2)}
    given = {"q": q, "k": k, "v": v, **dict(zip(("extra_k", "extra_v"), extra))}
    exact = dequantise({**given, **scales})
    tensors, pieces = [exact[x] for x in "qkv"], [ExtraKeys(exact["extra_k"], exact["extra_v"])] if extra else []
    counts = [33] if extra else []
    problem = Problem.of_tensors(q, k, v, window, out_dtype="fp16", extra_tokens=counts)
    wanted = attention(problem, *tensors, *pieces)
    bounds = error_bound(problem, *tensors, wanted, *pieces, rounds_probabilities=True)
    assert found[0].dtype == torch.float16 and found[1].dtype == torch.float32
    for one, exactly, bound in zip(found, wanted, bounds):
        assert ((one.double() - exactly).abs() <= bound)[:, :, :, head].all()

scaled = {"descale_q": dq, "descale_k": dk, "descale_v": dv}
check(na(q, k, v, (5, 4), **scaled), dq, dk, dv, (5, 4))
check(na(q, k, v, (5, 4), descale_q=0.5, descale_v=2), one / 2, one, one * 2, (5, 4))
check(na(q, k, v, (5, 4)), one, one, one, (5, 4))
check(na(q, k, v, (5, 4), additional_keys=text_k, additional_values=text_v, **scaled), dq, dk, dv, (5, 4),
      extra=(text_k, text_v))
windows = [(5, 4), (5, 4), (3, 3), (9, 10)]
for head, window in enumerate(windows):
    check(na(q, k, v, windows, **scaled), dq, dk, dv, window, head)
out = torch.empty(2, 9, 10, 4, 208, dtype=torch.float16)
assert four(q, k, v, (5, 4), out=out, **scaled) is out
assert torch.equal(out, four(q, k, v, (5, 4), **scaled))
compiled = torch.compile(lambda q, k, v: four(q, k, v, (5, 4), **scaled), fullgraph=True, backend="aot_eager")
assert torch.equal(out, compiled(q, k, v))
with torch.autocast("cpu", dtype=torch.bfloat16):
    assert torch.equal(out, four(q, k, v, (5, 4), **scaled))
# One key: its value. Equal scores: the mean. Probabilities are 2^8 then, which no rounding changes.
values = v.repeat_interleave(2, dim=3).double()
assert ((four(q, k, v, 1, descale_v=0.25) - values / 4).abs() <= values.abs() / 4 * (2**-11 + 1e-5)).all()
mean = values.mean((1, 2), keepdim=True)
assert ((four(torch.zeros_like(q), k, v, (9, 10)) - mean).abs() <= mean.abs() * 2**-11 + 1e-6).all()
# One key has a probability of nearly 1, 89 have 2^-10 of it each, which is no number of e4m3; all values are 1.
far, alike, ones = torch.zeros(q.shape), torch.zeros(k.shape), torch.ones(v.shape)
far[..., 0], alike[:, 4, 4, :, 0] = 1, 7
found = four(*(x.to(torch.float8_e4m3fn) for x in (far, alike, ones)), (9, 10), scale=1.0)
assert ((found - 1).abs() < 0.01).all(), found.min()
"""

REFUSALS = """
def said(call):
    try:
        call()
        print("nothing")
    except Exception as error:
        print(f"{type(error).__name__}: {error}".splitlines()[0])

wide = [x.bfloat16() for x in (q, k, v)]
rows = [x.flatten(1, 2) for x in (q, k, v)]
said(lambda: na(q, k, v, 3, descale_q=dk))
said(lambda: na(q, k, v, 3, descale_q=-1.0))
for number in (float("nan"), 0, 1e39, 1e-39):
    said(lambda: na(q, k, v, 3, descale_v=number))
said(lambda: na(q, k, v, 3, descale_k=dk.to("meta")))
said(lambda: na(q, k, v, 3, descale_q=dq.double()))
said(lambda: na(q, k, v, 3, descale_q="1"))
said(lambda: gnaforge.na2d(q, k, v, 3, out_dtype=torch.float32))
said(lambda: gnaforge.na2d(q, k, v, 3, out=wide[0].float()))
said(lambda: gnaforge.na2d(*wide, 3, descale_q=1.0))
said(lambda: gnaforge.na2d(q, wide[1], v, 3, descale_q=1.0))
said(lambda: gnaforge.na2d(q, k, v, 3, kernel=config))
said(lambda: gnaforge.na2d(q, k, v, 3))
said(lambda: gnaforge.joint_attention(*rows, grid=(9, 10), prefix=0, kernel_size=3))
said(lambda: gnaforge.na2d_varlen(*(x[0] for x in rows), [(9, 10)], kernel_size=3))
said(lambda: na(q, k, v, 3, descale_q=dq.clone().requires_grad_()))
said(lambda: torch.vmap(lambda q: na(q, k, v, 3)[0])(q[None]))
tiles = {"backward_q_tile_shape": (4, 4), "backward_kv_tile_shape": (4, 4)}
said(lambda: gnaforge.na2d(*(x.requires_grad_() for x in wide), 3, out_dtype=torch.float16, **tiles))
said(lambda: na(q, k, v, 3, out=out.clone().requires_grad_()))
said(lambda: torch.jit.trace(lambda q: na(q, k, v, 3), q))
with torch.autocast("cpu", dtype=torch.bfloat16):
    said(lambda: gnaforge.na2d(q.clone().requires_grad_(), k, v, 3, **tiles))
    said(lambda: gnaforge.joint_attention(*rows, grid=(9, 10), prefix=0, kernel_size=3))
"""


def test_calls(libraries: dict[str, Path]) -> None:
    """Of each head, of each tensor, as numbers and not at all; traced, as lists, into the caller's tensors."""
    said = run(PRELUDE.format(key=COPIED, library=libraries[COPIED]) + CALLS + REFUSALS).splitlines()
    wanted = [
        "ValueError: descale_q must be a number or float32 [4], one for each head, got float32 of shape [2]",
        "ValueError: descale_q is -1.0; it must be positive and finite",
        *(
            f"ValueError: descale_v is {x}; it must be positive and finite, in float32"
            for x in ("nan", 0.0, 1e39, 1e-39)
        ),
        "ValueError: descale_k is on meta and query on cpu; both must be on one device",
        "ValueError: descale_q must be a number or float32 [4], one for each head, got float64 of shape [4]",
        "TypeError: descale_q must be a number, got '1'",
        "ValueError: out_dtype is float32; of float8_e4m3fn it must be bfloat16 or float16",
        "ValueError: out is float32; of float8_e4m3fn it must be bfloat16 or float16",
        "ValueError: descales and out_dtype go with query in float8_e4m3fn; it is bfloat16",
        "ValueError: key must be float8_e4m3fn where there are descales or an out_dtype, got bfloat16",
        "out is bf16, this kernel takes fp16",
        "InputError: dtype: cpu kernels take fp32, bf16, fp16, not e4m3; convert the tensors",
        "ValueError: query must be float32, bfloat16 or float16, got float8_e4m3fn",
        "ValueError: query must be float32, bfloat16 or float16, got float8_e4m3fn",
        "NotImplementedError: gnaforge: float8_e4m3fn has no backward pass; call it under torch.no_grad()",
        "NotImplementedError: gnaforge: float8_e4m3fn isn't taken under torch.vmap; make its dimension a batch's",
        "ValueError: descales and out_dtype go with query in float8_e4m3fn; it is bfloat16",
        "NotImplementedError: gnaforge: float8_e4m3fn has no backward pass; call it under torch.no_grad()",
        "NotImplementedError: gnaforge: torch.jit traces no calls in float8_e4m3fn; torch.compile does",
        "NotImplementedError: gnaforge: float8_e4m3fn has no backward pass; call it under torch.no_grad()",
        "ValueError: query must be float32, bfloat16 or float16, got float8_e4m3fn",
    ]
    assert len(said) == len(wanted)
    for line, words in zip(said, wanted, strict=True):
        assert words in line


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("gna_forward-sm90-r1-e4m3-obf16-d64-q64-kv64", "dtype: sm90 has no e4m3 kernels; it has bf16, fp16"),
        ("gna_forward-cpu-r1-e4m3-obf16-dany-q8-kv8", "dtype: cpu has no e4m3 kernels; it has fp32, bf16, fp16"),
        ("gna_forward-sm100-r1-e4m3-obf16-d64-q256-kv128-cutlass", "dtype: sm100 cutlass has no e4m3 kernels"),
        ("gna_backward_q-sm90-r1-e4m3-obf16-d64-q64-kv64", "has no e4m3 kernels; it has bf16, fp16"),
        ("gna_forward-sm100-r1-e4m3-obf16-d72-q256-kv128", "head_dim: 72 must be a multiple of 16"),
        ("gna_forward-sm100-r1-e4m3-ofp32-d64-q256-kv128", "out_dtype: sm100 kernels of e4m3 write bf16, fp16, not"),
        ("gna_forward-sm100-r1-e4m3-d64-q256-kv128", "is not canonical; write"),
    ],
)
def test_who_has_no_such_kernels_says_so(key: str, reason: str) -> None:
    with pytest.raises(gnaforge.InputError, match=reason):
        require_config(key)


def test_calls_that_torch_only_traces() -> None:
    """With descales and without them; where nothing runs, no kernel is needed."""
    for given in ({}, {"descale_q": 2.0, "out_dtype": torch.float16}):
        with FakeTensorMode():
            x = torch.empty(1, 64, 2, 64, dtype=torch.float8_e4m3fn)
            out = gnaforge.na1d(x, x, x, 9, **given)  # type: ignore[arg-type]
        assert (out.shape, out.dtype) == (x.shape, given.get("out_dtype", torch.bfloat16))


def test_tiles_are_asked_for_with_the_outputs_type(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the call names it or brings the tensor to write to."""
    monkeypatch.setattr(ops, "_key_with_tiles", lambda *_, out_dtype: out_dtype)
    x = torch.zeros(1, 8, 1, 16).to(torch.float8_e4m3fn)
    out = torch.zeros(1, 8, 1, 16, dtype=torch.float16)
    found = [ops.kernel_key(1, x, x, None, (8,), (8,), *given) for given in ((), (out,), (None, torch.float16))]
    assert found == ["", "fp16", "fp16"]


def test_problems_say_the_outputs_type() -> None:
    problem = Problem(64, 9, dtype="e4m3", out_dtype="fp16")
    assert (Problem.from_json(problem.as_json()), problem.output_dtype) == (problem, "fp16")
    assert Problem(64, 9, dtype="e4m3").output_dtype == "bf16" and Problem(64, 9, dtype="fp16").output_dtype == "fp16"
    with pytest.raises(ProblemError, match="out_dtype: 'fp32' is no type of outputs of e4m3; allowed: bf16, fp16"):
        Problem(64, 9, dtype="e4m3", out_dtype="fp32")


def test_simulation_and_fits_take_the_type() -> None:
    """Half the bytes of bf16, and twice the rate of products."""
    wide, narrow = (gnaforge.simulate((64, 64), 21, dtype=dtype, arch="sm100") for dtype in ("bf16", "e4m3"))
    assert 0 < narrow.time.seconds < wide.time.seconds
