"""A kernel serves a call, or not, and why: one answer, whoever asks."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gnaforge
import pytest
import torch
from gnaforge.build.cached import may_serve
from gnaforge.runtime import bench
from gnaforge.runtime.config import KernelConfig
from gnaforge.runtime.list_requests import request_of_lengths
from gnaforge.runtime.problem import Problem
from gnaforge.runtime.request import Request, mismatch, refusal, request_of
from gnaforge.runtime.table import LoadedKernel

CONFIG = KernelConfig.parse("gna_forward-sm90-r2-bf16-d64v32-q8x16-kv8x16")
ANY = KernelConfig.parse("gna_forward-cpu-r2-bf16-dany-q8x8-kv8x8")
PROBLEM = Problem((30, 40), 7, heads=4, head_dim=64, value_head_dim=32)
REQUEST = Request.of_problem("gna_forward", PROBLEM, "cuda")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, ""),
        ({"op": "gna_backward_q"}, "op is gna_forward, not gna_backward_q"),
        ({"rank": 3}, "rank is 2, not 3"),
        ({"dtype": "fp16"}, "dtype is bf16, not fp16"),
        ({"head_dim": 72}, "head_dim is 64, not 72"),
        ({"value_head_dim": 64}, "value_head_dim is 32, not 64"),
        ({"device": "cpu"}, "takes cuda tensors"),
        ({"q_tile": (8, 16)}, ""),
        ({"q_tile": (8, 8)}, r"q_tile is (8, 16), not (8, 8)"),
        ({"kv_tile": (4, 16)}, r"kv_tile is (8, 16), not (4, 16)"),
        ({"key": CONFIG.key, "rank": 1}, ""),
        ({"key": ANY.key}, f"{ANY.key} is asked for"),
        ({"problem": replace(PROBLEM, edge=("cut", "shift"))}, "doesn't have the feature edge"),
        ({"problem": replace(PROBLEM, extra_tokens=(77,))}, "doesn't have the feature extra_keys"),
        ({"problem": None}, ""),
    ],
)
def test_why_a_kernel_does_not_serve_a_request(changes: dict[str, Any], reason: str) -> None:
    assert refusal(CONFIG, "cuda", replace(REQUEST, **changes)) == reason


def test_tiles_of_several_heads() -> None:
    """Numbers of heads are known where torch traces with sizes of tokens that aren't numbers."""
    packed = KernelConfig.parse("gna_forward-sm100-r2-bf16-d64v32-q8x4h4-kv8x16")
    for heads, kv_heads, reason in (
        (8, 2, ""),
        (16, 2, ""),
        (4, 2, "2 query heads share keys"),
        (4, 4, "no query heads"),
    ):
        request = Request.of_problem("gna_forward", replace(PROBLEM, heads=heads, kv_heads=kv_heads), "cuda")
        for known in (request, replace(request, problem=None)):
            found = refusal(packed, "cuda", known, features=("extra_keys",))
            assert found.startswith(reason) and bool(found) == bool(reason), (heads, kv_heads, found)
    assert refusal(packed, "cuda", replace(request, problem=None, heads_per_kv=0)) == ""
    query, key = torch.zeros(1, 7, 6, 8), torch.zeros(1, 7, 2, 8)
    ends = torch.tensor([0, 3, 7])
    for varlen in ((key,), (key, ends, ends)):
        assert request_of_lengths(query, key, "", *varlen).heads_per_kv == 3
    query, key = torch.zeros(1, 3, 5, 6, 8), torch.zeros(1, 3, 5, 2, 8)
    assert request_of(query, key, key, (3, 5, 1, 1, 1, 1, 0, 0)).heads_per_kv == 3


def test_features_and_emulated_kernels() -> None:
    wide = replace(REQUEST, problem=replace(PROBLEM, edge=("cut", "cut"), sink=(0, 3)))
    assert refusal(CONFIG, "cuda", wide, features=("edge",)) == "doesn't have the feature sink"
    assert refusal(CONFIG, "cuda", wide, features=("sink", "edge")) == ""
    on_cpu = replace(REQUEST, device="cpu")
    assert refusal(CONFIG, "cpu", on_cpu, emulated=True) == "emulated, runs only when named"
    assert refusal(CONFIG, "cpu", replace(on_cpu, key=CONFIG.key), emulated=True) == ""


def test_kernels_that_take_any_head_dim() -> None:
    for head_dim, value_head_dim in ((64, 32), (8, 8), (72, 256)):
        request = replace(REQUEST, device="cpu", head_dim=head_dim, value_head_dim=value_head_dim)
        assert refusal(ANY, "cpu", request) == "" and may_serve(ANY, request)
    assert mismatch(ANY, head_dim=8, value_head_dim=None) == mismatch(CONFIG, rank=None, dtype="bf16") == ""
    assert not may_serve(ANY, replace(REQUEST, device="cpu", dtype="fp16"))
    lean = replace(CONFIG, arch="sm120")  # an arch that this version doesn't know
    assert not may_serve(lean, REQUEST)


def test_an_output_of_another_type_is_not_what_a_call_asks_for() -> None:
    config = KernelConfig.parse("gna_forward-sm90-r2-bf16-ofp32-d64v32-q8x16-kv8x16-lean")
    assert refusal(config, "cuda", REQUEST) == "output_dtype is fp32, not bf16"


def test_the_kernel_that_is_timed_is_one_that_dispatch_could_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not an emulated one, which takes CPU tensors as well, nor one for other head dims of V."""
    best = KernelConfig.parse("gna_forward-sm90-r2-bf16-d64-q8x8-kv4x8")
    facts = {"origin": "", "threads": 0, "shared_memory": 0, "device": "cpu"}
    other = KernelConfig.parse("gna_forward-cpu-r2-bf16-dany-q16x16-kv16x16")
    loaded = {
        best: LoadedKernel(best, emulated=True, **facts),
        other: LoadedKernel(other, emulated=False, **facts),
    }
    monkeypatch.setattr(bench, "registry", loaded)
    problem = replace(PROBLEM, value_head_dim=64)
    assert bench.computed_pairs(problem, best) < bench.computed_pairs(problem, other)
    assert bench.choose_kernel(problem, "cpu") == other
    monkeypatch.setattr(bench, "registry", {best: loaded[best]})
    assert bench.choose_kernel(problem, "cpu") is None


def test_requests_of_calls() -> None:
    q, k = torch.empty(2, 9, 4, 16).bfloat16(), torch.empty(2, 9, 2, 16).bfloat16()
    found = request_of(q, k, k[..., :8], [3, 2, 1, 1], "key")
    assert found.problem == Problem(9, 3, 2, causal=True, heads=4, kv_heads=2, head_dim=16, value_head_dim=8, batch=2)
    assert (found.op, found.rank, found.dtype, found.head_dim, found.value_head_dim) == (
        "gna_forward",
        1,
        "bf16",
        16,
        8,
    )
    assert (found.device, found.key) == ("cpu", "key")
    assert request_of(q[:0], k[:0], k[:0], [3, 1, 1, 0]).problem is None  # nothing to compute
    assert str(found) == "rank 1, bf16, head_dim 16 (value 8), on cpu"


def test_a_call_with_tiles_asks_for_its_head_dims(toy: Callable[..., Path], python: Callable[..., Any]) -> None:
    """A kernel whose tiles are the right ones, but which has other head dims of V, is none."""
    library = toy("value_dims", TOY_KEY='"gna_forward-cpu-r1-fp32-d8v16-q8-kv8"')
    done = python(
        "import torch, gnaforge\n"
        "gnaforge.register(policy='never')\n"
        f"gnaforge.load_library({str(library)!r})\n"
        "x = torch.randn(1, 20, 1, 8)\n"
        "try:\n"
        "    gnaforge.na1d(x, x, x, 3, q_tile_shape=(8,))\n"
        "except gnaforge.NoKernelError as error:\n"
        "    print(error)\n",
        GNAFORGE_CACHE_DIR="/nonexistent",
    )
    assert "no kernel with q_tile_shape (8,)" in done.stdout and "there are: none" in done.stdout, done.stderr


@pytest.mark.parametrize("dims", [(36, 36), (36, 7), (8, 7), (20, 40)])
def test_the_padding_that_is_advised_computes_the_same(kernel_set, dims: tuple[int, int]) -> None:
    from gnaforge.families.cpu_forward import FAMILY

    d, dv = dims
    advice = FAMILY.facts.why_never(Request("gna_forward", 1, "fp32", d, dv, "cpu"))
    channels = [int(number) for number in re.findall(r"to (\d+) channels", advice)]
    padded, padded_v = (channels * 2)[:2] if d % 8 and dv % 8 else (*channels, dv)[:2] if d % 8 else (d, *channels)
    q, k, v = (torch.randn(1, 12, 2, n) for n in (d, d, dv))
    pad = torch.nn.functional.pad
    out = gnaforge.na1d(
        *(pad(x, (0, padded - d)) for x in (q, k)), pad(v, (0, padded_v - dv)), 12, scale=d**-0.5
    )[..., :dv]  # fmt: skip
    exact = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    assert torch.allclose(out, exact, atol=1e-5)
