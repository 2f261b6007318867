"""The operators against brute force in float64, and how they behave: layouts, errors, torch.compile, gradients."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path
from random import Random

import gnaforge
import oracle
import pytest
import torch
from gnaforge.build.kernels import build_kernels
from gnaforge.runtime import natten_arguments, ops
from gnaforge.runtime.config import KernelConfig
from gnaforge.runtime.problem import Problem
from gnaforge.runtime.reference import attention, error_bound, mask_rows
from kernel_set import CONFIGS, cpu_config
from nonfinite import check_reach

pytestmark = pytest.mark.usefixtures("kernel_set")


def check(problem: oracle.Problem, dtype: str, seed: int, kernel: object = None) -> None:
    """Output and LSE within the derived bound of the brute force."""
    q, k, v = oracle.inputs(problem, seed, dtype)
    out, lse = gnaforge.neighborhood_attention(q, k, v, **problem.arguments(), return_lse=True, kernel=kernel)
    exact = oracle.reference(problem, q, k, v)
    bounds = error_bound(problem, q, k, v, exact)
    assert out.dtype == q.dtype and lse.dtype == torch.float32
    for name, got, want, bound in zip(("out", "lse"), (out, lse), exact, bounds, strict=True):
        assert got.shape == want.shape
        share = ((got - want).abs() / bound).max().item()
        assert share <= 1, f"{name} is {share:.2f} times its bound off: {problem}, {dtype}, seed {seed}"


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_random_problems(config: gnaforge.KernelConfig) -> None:
    rng = Random(config.key)
    for seed in range(40):
        check(oracle.random_problem(rng, rank=config.rank, max_tokens=300), config.dtype, seed, config)


@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_lower_instruction_sets(isa: str) -> None:
    """The choice is made once per process, so this runs the random problems in another one."""
    code = (
        "import oracle, test_ops\nfrom random import Random\n"
        "for config in test_ops.CONFIGS:\n"
        "    rng = Random(config.key)\n"
        "    for seed in range(10):\n"
        "        problem = oracle.random_problem(rng, rank=config.rank, max_tokens=200)\n"
        "        test_ops.check(problem, config.dtype, seed, config)\n"
    )
    here = str(Path(__file__).parent)
    environment = {**os.environ, "GNAFORGE_CPU_ISA": isa, "PYTHONPATH": here}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


@pytest.mark.parametrize("seed", range(30))
def test_the_package_reference_is_the_oracle(seed: int) -> None:
    problem = oracle.random_problem(Random(seed), max_tokens=200)
    q, k, v = oracle.inputs(problem, seed)
    ours = attention(problem, q, k, v)
    for got, want in zip(ours, oracle.reference(problem, q, k, v), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    rows = mask_rows(problem, 0, problem.token_count)
    assert (rows.numpy() == oracle.mask(problem)).all()


def test_a_wrong_result_would_be_noticed() -> None:
    """The bound is tight enough to see one key too many or too few."""
    problem = Problem(64, 9, head_dim=32)
    q, k, v = oracle.inputs(problem, 0, "bf16")
    out = gnaforge.na1d(q, k, v, 8)
    exact = oracle.reference(problem, q, k, v)
    bound, _ = error_bound(problem, q, k, v, exact)
    assert ((out - exact[0]).abs() / bound).max() > 20


def test_automatic_choice_takes_the_least_work() -> None:
    q = torch.randn(1, 48, 1, 8)
    wide = gnaforge.na1d(q, q, q, 48, kernel=cpu_config(1, "fp32", (64,), (64,)))
    torch.testing.assert_close(gnaforge.na1d(q, q, q, 48), wide)


@pytest.mark.parametrize("layout", ["packed qkv", "heads first", "sliced tokens", "expanded heads", "offset"])
def test_strided_inputs_need_no_copy(layout: str) -> None:
    shape = (2, 12, 10, 3, 16)
    if layout == "packed qkv":
        q, k, v = torch.randn(2, 12, 10, 3, 3, 16).unbind(3)
    elif layout == "heads first":
        q, k, v = (torch.randn(2, 3, 12, 10, 16).permute(0, 2, 3, 1, 4) for _ in range(3))
    elif layout == "sliced tokens":
        q, k, v = (torch.randn(2, 24, 30, 3, 16)[:, ::2, 5:25:2] for _ in range(3))
    elif layout == "expanded heads":
        q = torch.randn(shape)
        k, v = (torch.randn(2, 12, 10, 1, 16).expand(shape) for _ in range(2))
    else:
        q, k, v = (torch.randn(2 * 12 * 10 * 3 * 16 + 3)[3:].view(shape) for _ in range(3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = gnaforge.na2d(q, k, v, (5, 4))
    assert out.is_contiguous()
    torch.testing.assert_close(out, gnaforge.na2d(*(x.contiguous() for x in (q, k, v)), (5, 4)), rtol=0, atol=0)


def test_inputs_with_strided_channels_are_copied_with_one_note(python) -> None:
    done = python(
        "import torch, gnaforge\n"
        "x = torch.randn(1, 6, 6, 8, 2).transpose(-1, -2)\n"
        "for _ in range(3): out = gnaforge.na2d(x, x, x, 3)\n"
        "y = x.contiguous()\n"
        "print(torch.equal(out, gnaforge.na2d(y, y, y, 3)))\n"
    )
    assert done.stdout == "True\n", done.stderr
    assert done.stderr.count("the last dimension of query is not contiguous") == 1


def test_masked_and_foreign_values_have_no_effect() -> None:
    """NaN in heads and keys that a query doesn't see, and in keys' K within visited tiles."""
    q, k, v = (torch.randn(2, 20, 20, 4, 24) for _ in range(3))
    clean = gnaforge.na2d(q, k, v, 5)
    k2, v2 = k.clone(), v.clone()
    k2[1], v2[1] = float("nan"), float("nan")
    k2[0, :, :, 1], v2[0, :, :, 1] = float("nan"), float("nan")
    k2[0, 19, 19], v2[0, 19, 19] = float("nan"), float("nan")
    poisoned = gnaforge.na2d(q, k2, v2, 5)
    keep = torch.ones(2, 20, 20, 4, dtype=torch.bool)
    keep[1] = keep[0, :, :, 1] = False
    keep[0, 17:, 17:] = False  # their windows reach the corner
    assert torch.equal(poisoned[keep], clean[keep])
    assert poisoned[0, 17:, 17:, 0].isnan().all()


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (cpu_config(1, "bf16", (16,), (16,)), Problem(60, 9, 3, 2, True, dtype="bf16", heads=2)),
        (cpu_config(2, "fp32", (8, 8), (8, 8)), Problem((20, 11), (4, 5), (2, 1), (2, 1), heads=2)),
    ],
    ids=str,
)
def test_values_that_are_not_finite_reach_the_queries_that_see_them(config: KernelConfig, problem: Problem) -> None:
    def attend(*arguments: object) -> tuple[torch.Tensor, torch.Tensor]:
        return gnaforge.neighborhood_attention(*arguments, return_lse=True, kernel=config)

    build_kernels([config])
    check_reach(attend, config, problem)


def test_large_scores_stay_finite() -> None:
    q, k, v = (100 * torch.randn(1, 64, 2, 64) for _ in range(3))
    out, lse = gnaforge.na1d(q, k, v, 33, return_lse=True)
    exact, exact_lse = attention(Problem.of_tensors(q, k, v, 33), q, k, v)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=0)
    assert out.isfinite().all() and (out - exact).abs().max() < 1


@pytest.mark.parametrize("shape", [(0, 8, 8, 2, 16), (1, 8, 8, 0, 16)])
def test_empty_tensors(shape: tuple[int, ...]) -> None:
    x = torch.empty(shape)
    out, lse = gnaforge.na2d(x, x, x, 3, return_lse=True)
    assert out.shape == shape and lse.shape == shape[:-1]


def test_scalars_and_tuples_mean_the_same() -> None:
    x = torch.randn(1, 9, 9, 9, 2, 8)
    one = gnaforge.na3d(x, x, x, 3, 2, 2, True)
    assert torch.equal(one, gnaforge.na3d(x, x, x, (3, 3, 3), (2, 2, 2), [2, 2, 2], (True,) * 3))
    assert torch.equal(one, gnaforge.neighborhood_attention(x, x, x, 3, stride=2, dilation=2, is_causal=True))


X = torch.randn(1, 8, 8, 4, 16)


@pytest.mark.parametrize(
    ("arguments", "keywords", "error", "expected"),
    [
        ((X, X, X, 9), {}, ValueError, "kernel_size 9 times dilation 1 exceeds the 8 tokens along dim 0"),
        (
            (X, X, X, (3, 5), 1, (1, 2)),
            {},
            ValueError,
            "kernel_size 5 times dilation 2 exceeds the 8 tokens along dim 1",
        ),
        ((X, X, X, 0), {}, ValueError, "kernel_size is 0 along dim 0; it must be at least 1"),
        ((X, X, X, 3, 4), {}, ValueError, "stride is 4 along dim 0; it must be 1 to kernel_size (3)"),
        ((X, X, X, 3, 1, 0), {}, ValueError, "dilation is 0 along dim 0; it must be at least 1"),
        ((X, X, X, (3, 3, 3)), {}, ValueError, "kernel_size: (3, 3, 3) has 3 entries for 2 dimensions"),
        ((X, X, X, 3.5), {}, TypeError, "kernel_size must be int or a sequence of 2, got 3.5"),
        ((X, X, X, 3), {"is_causal": 1}, TypeError, "is_causal must be bool"),
        ((X, X[:, :4], X, 3), {}, ValueError, "key has shape [1, 4, 8, 4, 16], query has [1, 8, 8, 4, 16]"),
        ((X, X[..., :8], X, 3), {}, ValueError, "key has head_dim 8, query has 16"),
        ((X, X, X[..., :2, :], 3), {}, ValueError, "key has 4 heads, value has 2"),
        ((X, X[..., :3, :], X[..., :3, :], 3), {}, ValueError, "4 query heads can't be shared among 3"),
        ((X, X.half(), X, 3), {}, ValueError, "query, key and value must have one dtype"),
        ((X.double(),) * 3 + (3,), {}, ValueError, "query must be float32, bfloat16 or float16"),
        ((X[0], X[0], X[0], 3), {}, ValueError, "query must be [batch, 2 token dims, heads, head_dim]"),
        (
            (X[..., :12],) * 3 + (3,),
            {},
            ValueError,
            "head_dim: 12 is no such number: cpu kernels take multiples of 8 up to 256",
        ),
        ((X, X, X, 3), {"kernel": "nonsense"}, ValueError, "'nonsense' is no kernel key; a key looks like"),
        ((X, X, X, 3), {"additional_keys": X}, ValueError, "additional_keys and additional_values come together"),
        ((X, X, X, 3), {"windows": 3}, TypeError, "unexpected keyword argument 'windows'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_calls(arguments: tuple, keywords: dict, error: type[Exception], expected: str) -> None:
    with pytest.raises(error) as caught:
        gnaforge.na2d(*arguments, **keywords)
    assert expected in str(caught.value)


def test_a_missing_kernel_lists_candidates_and_the_command_that_builds_one(python, own_cache) -> None:
    done = python("import torch, gnaforge\nx = torch.randn(1, 8, 8, 1, 16)\ngnaforge.na2d(x, x, x, 3)")
    assert "NoKernelError: gnaforge: no kernel fits this problem: rank 2, fp32, head_dim 16" in done.stderr
    assert "build one with: gnaforge build gna_forward-cpu-r2-fp32-dany-q8x8-kv8x8" in done.stderr
    from gnaforge.cli.options import plan_of

    assert plan_of("gna_forward-cpu-r2-fp32-dany-q8x8-kv8x8", None).configs[0].rank == 2


def test_tile_arguments_select_a_kernel() -> None:
    assert torch.equal(
        gnaforge.na2d(X, X, X, 3, q_tile_shape=(1, 16), kv_tile_shape=(5, 7)),
        gnaforge.na2d(X, X, X, 3, kernel=cpu_config(2, "fp32", (1, 16), (5, 7))),
    )
    expected = r"(?s)with q_tile_shape \(2, 2\).*q1x16-kv5x7.*build gna.*-q2x2-kv8x8"
    with pytest.raises(gnaforge.NoKernelError, match=expected):
        gnaforge.na2d(X, X, X, 3, q_tile_shape=(2, 2))


def test_tile_arguments_select_a_kernel_in_graphs_of_any_sizes() -> None:
    """A graph is one kernel's, so head dims become numbers in it, where torch doesn't know the sizes."""

    def call(q: torch.Tensor) -> torch.Tensor:
        return gnaforge.na2d(q, q, q, 3, q_tile_shape=(1, 16), kv_tile_shape=(5, 7))  # type: ignore[no-any-return]

    torch._dynamo.reset()
    compiled = torch.compile(call, dynamic=True, fullgraph=True, backend="aot_eager")
    for extent, head_dim in ((8, 16), (11, 16), (9, 24)):
        x = torch.randn(1, extent, 9, 2, head_dim)
        assert torch.equal(compiled(x), call(x))


def test_nattens_tuning_arguments_are_ignored_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(natten_arguments, "_noted", False)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(2):
            out = gnaforge.na2d(X, X, X, 3, backend="hopper-fna", kernel_schedule="pp", run_persistent_kernel=True)
    assert len(seen) == 1 and "ignores NATTEN's tuning arguments (backend, kernel_schedule" in str(seen[0].message)
    assert seen[0].filename == __file__
    assert torch.equal(out, gnaforge.na2d(X, X, X, 3))


def test_registry_is_a_read_only_mapping() -> None:
    gnaforge.na2d(X, X, X, 3)
    config = cpu_config(2, "fp32", (8, 8), (8, 8))
    kernel = gnaforge.registry[config]
    assert kernel is gnaforge.registry[config.key]
    assert kernel.config == config and kernel.device == "cpu" and not kernel.emulated
    assert config in gnaforge.registry and sorted(gnaforge.registry) == [k.config for k in gnaforge.kernels()]
    assert torch.equal(kernel(X, X, X, 3), gnaforge.na2d(X, X, X, 3, kernel=config))
    with pytest.raises(TypeError):
        gnaforge.registry[config] = kernel  # type: ignore[index]


def test_gradients_leave_the_result_as_it_is() -> None:
    x = X.clone().requires_grad_()
    out = gnaforge.na2d(x, x, x, 3)
    assert torch.equal(out, gnaforge.na2d(X, X, X, 3)) and out.requires_grad
    with torch.no_grad():
        assert not gnaforge.na2d(x, x, x, 3).requires_grad


def test_fullgraph_compile_over_many_resolutions() -> None:
    graphs = 0

    def count(graph, example_inputs):
        nonlocal graphs
        graphs += 1
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(lambda x: gnaforge.na2d(x, x, x, (5, 3), 2) * 2, fullgraph=True, backend=count)
    for side in range(8, 18):
        x = torch.randn(1, side, side + 3, 2, 16)
        torch.testing.assert_close(compiled(x), gnaforge.na2d(x, x, x, (5, 3), 2) * 2)
    assert graphs <= 2


def test_a_key_is_parsed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parsing takes longer than all the rest of a call; a bad key is refused each time."""
    key, parsed, parse = CONFIGS[9].key, [], gnaforge.KernelConfig.parse

    def counting(text: str) -> gnaforge.KernelConfig:
        parsed.append(text)
        return parse(text)

    gnaforge.na2d(X, X, X, 3, kernel=key)  # which may load it, and parse for that
    monkeypatch.setattr(gnaforge.KernelConfig, "parse", counting)
    ops._parse_key.cache_clear()
    for _ in range(3):
        gnaforge.na2d(X, X, X, 3, kernel=key)
        with pytest.raises(ValueError, match="is no kernel key"):
            gnaforge.na2d(X, X, X, 3, kernel="no key")
    assert parsed == [key, *["no key"] * 3]


def test_compile_with_inductor_tiles_and_gradients() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: gnaforge.na2d(x, x, x, 3, q_tile_shape=(8, 8), return_lse=True), fullgraph=True)
    for got, want in zip(compiled(X), gnaforge.na2d(X, X, X, 3, return_lse=True), strict=True):
        torch.testing.assert_close(got, want)
    pinned = torch.compile(lambda x: gnaforge.na2d(x, x, x, 3, kernel=CONFIGS[9].key), fullgraph=True, backend="eager")
    assert torch.equal(pinned(X), gnaforge.na2d(X, X, X, 3, kernel=CONFIGS[9].key))
    x = X.clone().requires_grad_()
    out, _ = compiled(x)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(gradient, torch.autograd.grad(gnaforge.na2d(x, x, x, 3).sum(), x)[0])


def test_a_fresh_process_compiles_first(python) -> None:
    """Nothing is loaded when torch.compile traces: the core and the kernels must come then."""
    done = python(
        "import torch, gnaforge\n"
        "f = torch.compile(lambda x: gnaforge.na1d(x, x, x, 3), fullgraph=True, backend='eager')\n"
        "x = torch.randn(1, 16, 1, 8)\n"
        "print(torch.equal(f(x), gnaforge.na1d(x, x, x, 3)))\n"
    )
    assert done.stdout == "True\n", done.stderr


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_modules_take_nattens_parameters(rank: int) -> None:
    torch.manual_seed(0)
    module = getattr(gnaforge, f"NeighborhoodAttention{rank}D")(
        embed_dim=32, num_heads=4, kernel_size=3, dilation=2, is_causal=True
    )
    assert {name: tuple(p.shape) for name, p in module.state_dict().items()} == {
        "qkv.weight": (96, 32),
        "qkv.bias": (96,),
        "proj.weight": (32, 32),
        "proj.bias": (32,),
    }
    x = torch.randn(2, *[7] * rank, 32)
    with torch.no_grad():
        out = module(x)
        q, k, v = module.qkv(x).view(2, *[7] * rank, 3, 4, 8).unbind(-3)
        exact, _ = attention(Problem.of_tensors(q, k, v, 3, 1, 2, True), q, k, v)
        torch.testing.assert_close(out, module.proj(exact.float().flatten(-2)), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=rf"takes \[batch, {rank} token dims, 32\]"):
        module(x[..., :16])
    with pytest.raises(ValueError, match=r"num_heads \(5\) must divide embed_dim \(32\)"):
        type(module)(32, 5, 3)


def test_threads_call_at_once() -> None:
    from concurrent.futures import ThreadPoolExecutor

    inputs = [torch.randn(1, 10 + i, 10, 2, 16) for i in range(8)]
    expected = [gnaforge.na2d(x, x, x, 3) for x in inputs]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            for got, want in zip(pool.map(lambda x: gnaforge.na2d(x, x, x, 3), inputs), expected, strict=True):
                assert torch.equal(got, want)
