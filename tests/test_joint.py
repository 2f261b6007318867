"""`joint_attention` in the token layouts of the models that people run, against SDPA with the whole mask in float64."""

from __future__ import annotations

import ctypes as c
import warnings
from collections.abc import Callable
from itertools import permutations
from random import Random
from typing import Any

import gnaforge
import pytest
import torch
from gnaforge.build.kernels import find_libraries
from gnaforge.runtime.op_table import FORWARD
from gnaforge.runtime.problem import Problem
from gnaforge.runtime.reference import mask_rows
from gnaforge.verification.contract import Kernel, token_dims, view_of
from gnaforge.verification.problems import random_problem, with_settings
from kernel_set import cpu_config

pytestmark = pytest.mark.usefixtures("kernel_set")

INT = torch.int32


def whole_mask(problem: Problem, prefix: int, suffix: int, lengths: list[list[int]]) -> torch.Tensor:
    """[batch, 1, tokens, tokens] of a packed sequence; lengths are those of prefix and suffix, by batch entry."""
    image = problem.token_count
    mask = torch.ones(len(lengths), 1, *[prefix + image + suffix] * 2, dtype=torch.bool)
    mask[:, :, prefix : prefix + image, prefix : prefix + image] = mask_rows(problem, 0, image)
    for entry, (first, last) in enumerate(lengths):
        mask[entry, :, :, first:prefix] = False
        mask[entry, :, :, prefix + image + last :] = False
    return mask


def attend_whole(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact attention of packed tokens under a mask, and its log-sum-exp, in float64."""
    group = q.shape[2] // k.shape[2]
    queries, keys, values = (x.transpose(1, 2).double() for x in (q, k, v))
    keys, values = (x.repeat_interleave(group, 1) for x in (keys, values))
    out = torch.nn.functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale)
    scores = (queries @ keys.mT * (q.shape[-1] ** -0.5 if scale is None else scale)).masked_fill(~mask, -torch.inf)
    return out.transpose(1, 2), scores.logsumexp(-1).transpose(1, 2)


def packed(batch: int, tokens: int, heads: int, head_dim: int, dtype: torch.dtype = torch.float32) -> Any:
    return torch.randn(batch, tokens, 3, heads, head_dim).to(dtype).unbind(2)


def close(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype = torch.float32) -> None:
    tolerance = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_flux_single_blocks(dtype: torch.dtype) -> None:
    """Packed, text first: 512 tokens beside 64x64 there, 24 heads of 128."""
    q, k, v = packed(1, 20 + 8 * 10, 24, 128, dtype)
    out = gnaforge.joint_attention(q, k, v, grid=(8, 10), prefix=20, kernel_size=(5, 4), stride=(2, 1))
    mask = whole_mask(Problem((8, 10), (5, 4), (2, 1)), 20, 0, [[20, 0]])
    assert out.is_contiguous() and out.dtype == dtype
    close(out, attend_whole(q, k, v, mask)[0], dtype)


@pytest.mark.parametrize("text_first", [True, False], ids=["FLUX", "SD3"])
def test_double_blocks_of_mmdit(text_first: bool) -> None:
    """Tensors apart. FLUX concatenates text and image, SD3 image and text: the same calls, of other packed orders."""
    image = [torch.randn(2, 6, 9, 24, 64) for _ in range(3)]
    text = [torch.randn(2, 13, 24, 64) for _ in range(3)]
    out, text_out, lse, text_lse = gnaforge.joint_attention(*image, *text, kernel_size=(3, 5), return_lse=True)
    assert out.shape == (2, 6, 9, 24, 64) and text_out.shape == (2, 13, 24, 64)
    assert lse.shape == out.shape[:-1] and text_lse.shape == text_out.shape[:-1]
    parts = [[x, y.flatten(1, 2)] if text_first else [y.flatten(1, 2), x] for x, y in zip(text, image, strict=True)]
    prefix, suffix = (13, 0) if text_first else (0, 13)
    mask = whole_mask(Problem((6, 9), (3, 5)), prefix, suffix, [[prefix, suffix]] * 2)
    exact = attend_whole(*(torch.cat(pair, 1) for pair in parts), mask)
    for found, want in zip(((out, text_out), (lse, text_lse)), exact, strict=True):
        flat = [found[1], found[0].flatten(1, 2)] if text_first else [found[0].flatten(1, 2), found[1]]
        close(torch.cat(flat, 1), want)
    assert torch.equal(gnaforge.joint_attention(*image, *text, kernel_size=(3, 5))[1], text_out)


def test_hunyuan_video() -> None:
    """Packed, text last and padded: 256 tokens beside 30x48x80 there, 24 heads of 128."""
    q, k, v = packed(3, 3 * 4 * 6 + 20, 24, 128, torch.bfloat16)
    lengths = torch.tensor([20, 7, 0], dtype=INT)
    pattern = {"kernel_size": (2, 3, 4), "stride": (1, 3, 2)}
    out = gnaforge.joint_attention(q, k, v, grid=(3, 4, 6), suffix=20, lengths=lengths, **pattern)
    mask = whole_mask(Problem((3, 4, 6), (2, 3, 4), (1, 3, 2)), 0, 20, [[0, n] for n in lengths.tolist()])
    close(out, attend_whole(q, k, v, mask)[0], torch.bfloat16)


def test_hunyuan_video_double_blocks() -> None:
    """Apart and padded; padding has no effect."""
    image = [torch.randn(2, 3, 4, 5, 6, 32) for _ in range(3)]
    text = [torch.randn(2, 11, 6, 32) for _ in range(3)]
    lengths = torch.tensor([4, 11], dtype=INT)
    out, text_out = gnaforge.joint_attention(*image, *text, text_lengths=lengths, kernel_size=(3, 3, 2))
    short = [x[:1] for x in image], [x[:1, :4] for x in text]
    want, text_want = gnaforge.joint_attention(*short[0], *short[1], kernel_size=(3, 3, 2))
    close(out[:1], want.double())
    close(text_out[:1, :4], text_want.double())
    text[1][0, 4:], text[2][0, 4:] = 100.0, -1000.0
    again = gnaforge.joint_attention(*image, *text, text_lengths=lengths, kernel_size=(3, 3, 2))
    assert torch.equal(again[0], out) and torch.equal(again[1], text_out)


def test_cogvideox() -> None:
    """Packed, text first, three dimensions: 226 tokens beside 13x30x45 there, heads of 64; two prompts at once."""
    q, k, v = packed(2, 22 + 3 * 5 * 6, 30, 64)
    out = gnaforge.joint_attention(q, k, v, grid=(3, 5, 6), prefix=22, kernel_size=(3, 3, 3))
    close(out, attend_whole(q, k, v, whole_mask(Problem((3, 5, 6), 3), 22, 0, [[22, 0]] * 2))[0])


def test_models_without_text_in_their_self_attention() -> None:
    """Wan, Cosmos, LTX-Video, HunyuanVideo 1.5's refiner: packed video tokens alone; Wan's and LTX's text comes by
    cross attention, which is a dense axis."""
    q, k, v = packed(1, 4 * 6 * 8, 4, 32)
    pattern = {"kernel_size": (4, 3, 4), "stride": (1, 1, 4), "dilation": (1, 2, 1)}
    out, lse = gnaforge.joint_attention(q, k, v, grid=(4, 6, 8), return_lse=True, **pattern)
    grids = (x.unflatten(1, (4, 6, 8)) for x in (q, k, v))
    want, want_lse = gnaforge.na3d(*grids, **pattern, return_lse=True)
    assert torch.equal(out, want.flatten(1, 3)) and torch.equal(lse, want_lse.flatten(1, 3))
    text_k, text_v = torch.randn(1, 12, 4, 32), torch.randn(1, 12, 4, 32)
    cross = gnaforge.na1d(q, text_k, text_v, kernel_size=12)
    close(cross, attend_whole(q, text_k, text_v, torch.ones(1, 1, 192, 12, dtype=torch.bool))[0])


@pytest.mark.parametrize("seed", range(24))
def test_random_problems(seed: int) -> None:
    """Every rank, text before, behind, on both sides or nowhere, grouped heads, other value channels, all settings of
    windows, lengths beyond the ends, strided views."""
    rng = Random(seed)
    torch.manual_seed(seed)
    problem = random_problem(rng, 1 + seed % 3, 90)
    if seed % 2:
        problem = with_settings(problem, rng, 90, ("edge", "block_causal", "sink"))
    batch, kv_heads, group = rng.choice([1, 2]), rng.choice([1, 2]), rng.choice([1, 3])
    prefix, suffix = rng.choice([(0, 0), (9, 0), (0, 70), (5, 17)])
    tokens = prefix + problem.token_count + suffix
    q = torch.randn(batch, tokens, kv_heads * group, 40)[..., :16]
    k = torch.randn(batch, kv_heads, tokens, 16).transpose(1, 2)
    v = torch.randn(batch, 2 * tokens, kv_heads, 24)[:, ::2]
    given: list[Any] = [None, None]
    valid = [[prefix, suffix] for _ in range(batch)]
    for side, count in enumerate((prefix, suffix)):
        if count and rng.random() < 0.7:
            numbers = [rng.choice([0, 1, count, count + 3, rng.randint(0, count)]) for _ in range(batch)]
            given[side] = torch.tensor(numbers, dtype=INT)
            for entry, number in zip(valid, numbers, strict=True):
                entry[side] = min(number, count)
    lengths: Any = given if prefix and suffix else next((x for x in given if x is not None), None)
    settings = {"edge": problem.edge, "sink": problem.sink} if seed % 2 else {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is copied
        out, lse = gnaforge.joint_attention(
            *(q, k, v),
            grid=problem.tokens,
            prefix=prefix,
            suffix=suffix,
            lengths=lengths,
            kernel_size=problem.window,
            stride=problem.stride,
            dilation=problem.dilation,
            is_causal=problem.causal,
            **settings,
            scale=0.3,
            return_lse=True,
        )
    mask = whole_mask(problem, prefix, suffix, valid)
    exact, exact_lse = attend_whole(q, k, v, mask, 0.3)
    close(out, exact)
    close(lse, exact_lse)


def test_heads_with_windows_of_their_own() -> None:
    """As sliding-tile attention has them: one call, equal to one for each head."""
    windows = [(3, 3), (3, 3), (6, 1), (1, 8)]
    lengths = torch.tensor([9, 4], dtype=INT)
    out, lse = gnaforge.joint_attention(Q, Q, Q, **{**PACKED, "kernel_size": windows}, lengths=lengths, return_lse=True)
    for head, window in enumerate(windows):
        one = Q[:, :, head : head + 1]
        mask = whole_mask(Problem((6, 8), window), 0, 9, [[0, n] for n in lengths.tolist()])
        exact = attend_whole(one, one, one, mask)
        close(out[:, :, head : head + 1], exact[0])
        close(lse[:, :, head : head + 1], exact[1])


def test_a_wrong_mask_would_be_noticed() -> None:
    """One text token more or less is far beyond the tolerance."""
    q, k, v = packed(1, 48 + 9, 2, 16)
    out = gnaforge.joint_attention(q, k, v, grid=(6, 8), suffix=9, lengths=torch.tensor([5], dtype=INT), kernel_size=3)
    for valid in (4, 6):
        other = attend_whole(q, k, v, whole_mask(Problem((6, 8), 3), 0, 9, [[0, valid]]))[0]
        assert (out - other).abs().amax((0, 2, 3)).min() > 2e-3


def test_image_tokens_apart_may_lie_anyhow(python: Callable[..., Any]) -> None:
    """Text rows read them as one dimension: where that can't be, they are copied, with one note."""
    done = python(
        "import torch, gnaforge\n"
        "x = [torch.randn(2, 6, 10, 2, 16)[:, :, ::2] for _ in range(3)]\n"
        "y = [torch.randn(2, 6, 7, 2, 16)[:, :, :5] for _ in range(3)]\n"
        "t = [torch.randn(2, 4, 2, 16) for _ in range(3)]\n"
        "for image in (x, y, y):\n"
        "    got = gnaforge.joint_attention(*image, *t, kernel_size=3)\n"
        "    want = gnaforge.joint_attention(*(i.contiguous() for i in image), *t, kernel_size=3)\n"
        "    print(all(torch.equal(a, b) for a, b in zip(got, want)))\n"
    )
    assert done.stdout == "True\n" * 3, done.stderr
    assert done.stderr.count("the tokens of key don't lie one distance apart") == 1


@pytest.mark.parametrize("tokens", [(5, 1, 6), (1, 5, 6), (5, 6, 1), (1, 1, 6), (5, 1, 1), (1, 1, 1), (5, 1), (1, 5)])
@pytest.mark.filterwarnings("ignore:gnaforge. the tokens of")
def test_image_tokens_apart_in_any_order_of_axes(tokens: tuple[int, ...]) -> None:
    """The stride of an axis of one token means nothing: taken at its word, it leads beyond the tensor."""
    text = [torch.randn(2, 4, 2, 16) for _ in range(3)]
    axes = range(1, len(tokens) + 1)
    for order in permutations(axes):
        back = [order.index(axis) + 1 for axis in axes]
        stored = [torch.randn(2, *(tokens[axis - 1] for axis in order), 2, 16) for _ in range(3)]
        image = [x.permute(0, *back, -2, -1) for x in stored]
        got = gnaforge.joint_attention(*image, *text, kernel_size=tokens)
        want = gnaforge.joint_attention(*(x.contiguous() for x in image), *text, kernel_size=tokens)
        for found, expected in zip(got, want, strict=True):
            torch.testing.assert_close(found, expected)


def test_empty_batches() -> None:
    q, k, v = packed(0, 48 + 9, 2, 16)
    out, lse = gnaforge.joint_attention(q, k, v, grid=(6, 8), suffix=9, kernel_size=3, return_lse=True)
    assert out.shape == (0, 57, 2, 16) and lse.shape == (0, 57, 2)
    with pytest.raises(ValueError, match="kernel_size 9 times dilation 1 exceeds the 6 tokens along dim 0"):
        gnaforge.joint_attention(q, k, v, grid=(6, 8), suffix=9, kernel_size=(9, 3))


Q = torch.randn(2, 57, 4, 16)
IMAGE, TEXT = torch.randn(2, 6, 8, 4, 16), torch.randn(2, 9, 4, 16)
PACKED = {"grid": (6, 8), "suffix": 9, "kernel_size": 3}
PAIR = (torch.ones(2, dtype=INT),) * 2
BAD: list[tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
    ((Q, Q, None), PACKED, TypeError, "v must be a torch.Tensor, got None"),
    ((Q, Q, Q), {**PACKED, "grid": (6, 9)}, ValueError, "q has 57 tokens, and a prefix of 0, 54 of the grid 6x9"),
    ((Q, Q, Q[:, :50]), PACKED, ValueError, "v has 50 tokens, and a prefix of 0, 48 of the grid 6x8 and a suffix of 9"),
    ((Q, Q[0], Q), PACKED, ValueError, "k must be [batch, tokens, heads, head_dim], got (57, 4, 16)"),
    ((Q, Q, Q), {**PACKED, "grid": 48}, TypeError, "grid must be a sequence of 1 to 3 whole numbers, got 48"),
    ((Q, Q, Q), {**PACKED, "grid": (6, 8.0)}, TypeError, "grid along dim 1 must be a whole number, got 8.0"),
    ((Q, Q, Q), {**PACKED, "grid": (6, 0)}, ValueError, "grid along dim 1 is 0; it must be at least 1"),
    ((Q, Q, Q), {**PACKED, "grid": (6, 2, 2, 2)}, ValueError, "grid has 4 entries; it must have 1 to 3"),
    ((Q, Q, Q), {**PACKED, "suffix": -1}, ValueError, "suffix is -1; it must be at least 0"),
    ((Q, Q, Q), {**PACKED, "prefix": True}, TypeError, "prefix must be a whole number, got True"),
    ((Q, Q, Q), {**PACKED, "kernel_size": (3, 9)}, ValueError, "kernel_size 9 times dilation 1 exceeds the 8 tokens"),
    ((Q, Q, Q), {**PACKED, "kernel_size": (3, 3, 3)}, ValueError, "kernel_size: (3, 3, 3) has 3 entries for 2 dim"),
    ((Q, Q[..., :3, :], Q[..., :3, :]), PACKED, ValueError, "4 query heads can't be shared among 3 key/value heads"),
    ((Q, Q, Q), {**PACKED, "lengths": [3, 4, 5]}, TypeError, "lengths must be a tensor, or a pair"),
    ((Q, Q, Q), {**PACKED, "lengths": PAIR}, ValueError, "lengths[0] are those of the prefix, which has no tokens"),
    ((Q, Q, Q), {**PACKED, "lengths": torch.ones(2)}, ValueError, "lengths of the suffix must be int32, got float32"),
    (
        (Q, Q, Q),
        {**PACKED, "prefix": 4, "suffix": 5, "lengths": PAIR[0]},
        ValueError,
        "it is on both sides of the image: give a pair of them",
    ),
    (
        (Q, Q, Q),
        {"grid": (57,), "kernel_size": 3, "lengths": PAIR[0]},
        ValueError,
        "lengths are those of text, and there is none",
    ),
    ((Q, Q, Q, TEXT), PACKED, ValueError, "grid is for packed tokens, which hold the text; leave out text_q"),
    ((IMAGE, IMAGE, IMAGE), {"kernel_size": 3}, TypeError, "text_q must be a torch.Tensor, got None"),
    ((IMAGE,) * 3 + (TEXT, TEXT, None), {"kernel_size": 3}, TypeError, "text_v must be a torch.Tensor, got None"),
    ((IMAGE,) * 3 + (TEXT,) * 3, {"kernel_size": 3, "suffix": 9}, ValueError, "suffix is for packed tokens; give"),
    ((IMAGE,) * 3 + (TEXT,) * 3, {"kernel_size": 3, "lengths": PAIR}, ValueError, "lengths is for packed tokens; give"),
    (
        (IMAGE,) * 3 + (TEXT[:, :8], TEXT, TEXT),
        {"kernel_size": 3},
        ValueError,
        "text_q has shape [2, 8, 4, 16]; beside",
    ),
    ((IMAGE,) * 3 + (TEXT, TEXT[..., :8], TEXT), {"kernel_size": 3}, ValueError, "text_k has shape [2, 9, 4, 8]; besi"),
    ((IMAGE[:, :0],) * 3 + (TEXT,) * 3, {"kernel_size": 3}, ValueError, "query has shape [2, 0, 8, 4, 16]; an image"),
    ((IMAGE[0, 0],) * 3 + (TEXT,) * 3, {"kernel_size": 3}, ValueError, "q must be [batch, 1 to 3 token dims, heads,"),
    ((Q, Q, Q), {**PACKED, "kernel": "nonsense"}, ValueError, "'nonsense' is no kernel key"),
]


@pytest.mark.parametrize(("tensors", "arguments", "error", "text"), BAD, ids=[case[3][:50] for case in BAD])
def test_bad_calls(tensors: tuple[Any, ...], arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error) as caught:
        gnaforge.joint_attention(*tensors, **arguments)
    assert text in str(caught.value) and "\n" not in str(caught.value)


def test_pinned_kernels() -> None:
    want = gnaforge.joint_attention(Q, Q, Q, **PACKED)
    kernels = cpu_config(2, "fp32", (8, 8), (8, 8)), cpu_config(1, "fp32", (24,), (40,))
    got = gnaforge.joint_attention(Q, Q, Q, **PACKED, kernel=kernels[0], text_kernel=kernels[1].key)
    torch.testing.assert_close(got, want)
    with pytest.raises(gnaforge.NoKernelError, match=r"^text rows: .*-q8x8-kv8x8 was asked for and can't run"):
        gnaforge.joint_attention(Q, Q, Q, **PACKED, text_kernel=kernels[0])
    with pytest.raises(gnaforge.NoKernelError, match=r"^image rows: .*-q24-kv40 was asked for and can't run"):
        gnaforge.joint_attention(Q, Q, Q, **PACKED, kernel=kernels[1])


@pytest.mark.parametrize(("rank", "part"), [(1, "image rows"), (2, "text rows")])
def test_the_rows_that_lack_a_kernel_are_named(forked, own_cache, session_cache, rank: int, part: str) -> None:
    """A process whose table has kernels of the other rank alone."""
    (library,) = find_libraries([cpu_config(rank, "fp32", *[(8,) * rank if rank > 1 else (64,)] * 2)]).values()
    done = forked(
        f"import torch, gnaforge\ngnaforge.load_library({str(library)!r})\n"
        "x = torch.randn(1, 57, 2, 16)\n"
        "gnaforge.joint_attention(x, x, x, grid=(6, 8), suffix=9, kernel_size=3)\n"
    )
    assert f"NoKernelError: {part}: gnaforge: no kernel fits this problem: rank {3 - rank}, fp32" in done.stderr


def test_missing_kernels_are_made(forked, own_cache) -> None:
    done = forked(
        "import torch, gnaforge\n"
        "gnaforge.register(policy='always')\n"
        "x = torch.randn(1, 57, 2, 16)\n"
        "print(gnaforge.joint_attention(x, x, x, grid=(6, 8), suffix=9, kernel_size=3).shape)\n"
        "print(sorted(kernel.config.rank for kernel in gnaforge.kernels()))\n"
    )
    assert done.stdout == "torch.Size([1, 57, 2, 16])\n[1, 2]\n", done.stderr


def test_text_rows_go_first_and_image_rows_beside_them(forked, own_cache, compile_library) -> None:
    """What a kernel is told: each call's rank, extra keys and flags, in the order of launches."""
    features = (1 << 3) | (1 << 5)  # ranges and extra keys
    statement = (
        'std::printf("rank %d, extra %d and %d, flags %u\\n", args->problem->rank, '
        "int(args->problem->extra_tokens[0]), int(args->problem->extra_tokens[1]), args->flags); std::fflush(stdout)"
    )
    key = "gna_forward-cpu-r2-fp32-dany-q8x8-kv8x8"
    library = compile_library(
        "toy_library.cpp", "noting", f"-DTOY_FEATURES={features}", f"-DTOY_STATEMENT={statement}", f'-DTOY_KEY="{key}"'
    )
    done = forked(
        f"import torch, gnaforge\ngnaforge.load_library({str(library)!r})\n"
        "x = torch.randn(1, 59, 2, 8)\n"
        "out = gnaforge.joint_attention(x, x, x, grid=(6, 8), suffix=9, prefix=2, kernel_size=3)\n"
        "print(out.unique().tolist(), flush=True)\n"  # between what the kernels write
        "y, t = torch.randn(1, 6, 8, 2, 8), torch.randn(1, 9, 2, 8)\n"
        "gnaforge.joint_attention(y, y, y, t, t, t, kernel_size=3)\n"
        "gnaforge.joint_attention(y.flatten(1, 2), *[y.flatten(1, 2)] * 2, grid=(6, 8), kernel_size=3)\n"
    )
    assert done.stdout.splitlines() == [
        "rank 1, extra 2 and 9, flags 1",
        "rank 1, extra 2 and 9, flags 3",
        "rank 2, extra 2 and 9, flags 3",
        "[1.0]",
        "rank 1, extra 9 and 0, flags 1",
        "rank 2, extra 9 and 0, flags 3",
        "rank 2, extra 0 and 0, flags 1",
    ], done.stderr


def test_text_rows_are_a_small_part_of_the_work() -> None:
    """Counted by the kernels, of HunyuanVideo at 720p: 256 text tokens beside 115,200 of the video."""
    tokens, window = (30, 48, 80), (18, 24, 24)
    heads = {"heads": 24, "head_dim": 128, "dtype": "bf16"}
    image = Problem(tokens, window, extra_tokens=(256,), **heads)
    text = Problem(256, 115200, kv_tokens=115200, grid=115200, extra_tokens=(256,), **heads)
    work = {}
    for name, problem, config in (
        ("image", image, cpu_config(3, "bf16", (4, 4, 4), (4, 4, 4))),
        ("text", text, cpu_config(1, "bf16", (64,), (64,))),
    ):
        kernel = Kernel(find_libraries([config])[config], config.key)
        roles = [role for role in (*FORWARD.reads(problem), *FORWARD.outputs) if not role.optional]
        meta = {
            role.name: torch.empty(role.shape(problem), dtype=role.dtype(problem).torch, device="meta")
            for role in roles
        }
        views = {role.name: view_of(meta[role.name], token_dims(role, problem.rank)) for role in roles}
        call = kernel.prepare(problem, views)
        work[name] = call._entry.visited_work(c.byref(call.args))
    assert 0.01 < work["text"] / (work["text"] + work["image"]) < 0.05


@pytest.mark.parametrize("stride", [1, (16, 8, 8)])
def test_text_rows_leave_little_of_an_h100_idle(stride: Any) -> None:
    """By the time model, of the same call: nothing runs beside them, and they have fewer Q tiles than there are
    multiprocessors."""
    heads = {"heads": 24, "head_dim": 128, "arch": "sm90"}
    image = gnaforge.simulate((30, 48, 80), (18, 24, 24), stride, extra_tokens=256, **heads)
    text = gnaforge.simulate(256, 115200, kv_tokens=115200, grid=115200, extra_tokens=256, **heads)
    assert text.counts.q_tiles * 24 == 96 and 0.7 < text.time.waves < 0.75
    idle = (1 - text.time.waves) * text.time.seconds
    assert 0.009 < idle / (text.time.seconds + image.time.seconds) < 0.016
