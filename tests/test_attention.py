"""Dense attention and merged attentions, against torch's own, and against NATTEN's where that runs."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from itertools import product
from typing import Any

import gnaforge
import pytest
import torch
import torch._dynamo.testing

pytestmark = pytest.mark.usefixtures("kernel_set")

LENGTHS = [5, 0, 7, 3, 4, 4], [8, 3, 2, 0, 4, 4]  # of queries and keys


def tensors(batch: int, queries: int, keys: int, heads: int = 4, kv_heads: int = 2) -> list[torch.Tensor]:
    shapes = (queries, heads, 16), (keys, kv_heads, 16), (keys, kv_heads, 24)
    return [torch.randn(batch, *shape) for shape in shapes]


def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, is_causal: bool = False) -> tuple[torch.Tensor, ...]:
    """In float64, with a mask that is aligned at the top left."""
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    if is_causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).tril() == 0, -torch.inf)
    weights = scores.softmax(-1) if k.shape[1] else scores
    return torch.einsum("bhqk,bkhd->bqhd", weights, v), scores.logsumexp(-1).transpose(1, 2)


def require_close(got: tuple[torch.Tensor, ...], want: tuple[torch.Tensor, ...]) -> None:
    for found, expected in zip(got, want, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(70, 70), (1, 1), (7, 90), (90, 7), (1, 9), (9, 1), (5, 0)])
def test_dense(queries: int, keys: int, is_causal: bool) -> None:
    """Any numbers of queries and keys. torch's own has the same mask."""
    q, k, v = tensors(2, queries, keys)
    got = gnaforge.attention(q, k, v, is_causal, return_lse=True)
    require_close(got, exact(q, k, v, is_causal))
    if keys:
        theirs = torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v)), is_causal=is_causal, enable_gqa=True
        )
        torch.testing.assert_close(got[0], theirs.transpose(1, 2), rtol=2e-5, atol=2e-5)


def packed(is_causal: bool) -> tuple[list[torch.Tensor], tuple[torch.Tensor, ...]]:
    """Tensors of samples of LENGTHS, and exact results."""
    q, k, v = tensors(1, sum(LENGTHS[0]), sum(LENGTHS[1]))
    parts = zip(q.split(LENGTHS[0], 1), k.split(LENGTHS[1], 1), v.split(LENGTHS[1], 1), strict=True)
    out, lse = zip(*(exact(*part, is_causal) for part in parts), strict=True)
    return [q, k, v], (torch.cat(out, 1), torch.cat(lse, 1))


def cumulative(lengths: list[int], dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


@pytest.mark.parametrize("is_causal", [False, True])
def test_packed_samples(is_causal: bool) -> None:
    """By lengths and by cumulative ones, which are tensors or sequences; a sample without keys gets zeros."""
    inputs, want = packed(is_causal)
    require_close(got := gnaforge.attention(*inputs, is_causal, None, *LENGTHS, return_lse=True), want)
    assert got[1].isneginf().sum() == 3 * 4
    ends = [cumulative(lengths) for lengths in LENGTHS]
    wide = [torch.stack([end.long()] * 2, 1)[:, 0] for end in ends]  # whose numbers don't lie side by side
    ways: list[dict[str, Any]] = [
        {"seqlens_Q": torch.tensor(LENGTHS[0]), "seqlens_KV": torch.tensor(LENGTHS[1], dtype=torch.int32)},
        {"cumulative_seqlen_Q": ends[0], "cumulative_seqlen_KV": ends[1], "max_seqlen_Q": 7, "max_seqlen_KV": 8},
        {"cumulative_seqlen_Q": wide[0], "cumulative_seqlen_KV": wide[1]},
        {"cumulative_seqlen_Q": ends[0].tolist(), "cumulative_seqlen_KV": ends[1].tolist()},
    ]
    for way in ways:
        found = gnaforge.attention(*inputs, is_causal=is_causal, **way, return_lse=True)
        assert torch.equal(found[0], got[0]) and torch.equal(found[1], got[1])


def test_many_samples_of_one_length_are_a_batch() -> None:
    q, k, v = tensors(6, 9, 9)
    together = gnaforge.attention(*(x.flatten(0, 1)[None] for x in (q, k, v)), True, None, [9] * 6, [9] * 6)
    assert torch.equal(together.unflatten(1, (6, 9))[0], gnaforge.attention(q, k, v, True))


Q, K, V = tensors(1, 10, 10)
BAD: dict[str, tuple[type[Exception], dict[str, Any]]] = {
    "seqlens_Q and seqlens_KV come together; seqlens_KV is missing": (ValueError, {"seqlens_Q": [10]}),
    "cumulative_seqlen_Q and cumulative_seqlen_KV come together": (ValueError, {"cumulative_seqlen_KV": [0, 10]}),
    "give lengths or cumulative lengths, not both": (ValueError, {"seqlens_Q": [10], "cumulative_seqlen_KV": [0, 10]}),
    "cumulative_seqlen_Q ends with 9, and there are 10 tokens": (
        ValueError,
        {"cumulative_seqlen_Q": [0, 9], "cumulative_seqlen_KV": [0, 10]},
    ),
    "cumulative_seqlen_KV must begin with 0": (
        ValueError,
        {"cumulative_seqlen_Q": [0, 10], "cumulative_seqlen_KV": [1, 10]},
    ),
    "cumulative_seqlen_Q goes from 9 down to 8 at entry 2": (
        ValueError,
        {"cumulative_seqlen_Q": [0, 9, 8, 10], "cumulative_seqlen_KV": [0, 10]},
    ),
    "cumulative_seqlen_Q is of 2 samples, cumulative_seqlen_KV of 1": (
        ValueError,
        {"cumulative_seqlen_Q": [0, 9, 10], "cumulative_seqlen_KV": [0, 10]},
    ),
    "seqlens_Q add up to 9, and query has 10 tokens": (ValueError, {"seqlens_Q": [4, 5], "seqlens_KV": [10]}),
    "seqlens_KV add up to 11, and key has 10 tokens": (
        ValueError,
        {"seqlens_Q": [10], "seqlens_KV": torch.tensor([11], dtype=torch.int32)},
    ),
    "seqlens_KV[1] is -1; it must be at least 0": (ValueError, {"seqlens_Q": [10], "seqlens_KV": [11, -1]}),
    "seqlens_Q is of 2 samples, seqlens_KV of 1": (ValueError, {"seqlens_Q": [4, 6], "seqlens_KV": [10]}),
    "seqlens_Q add up to 0, and query has 10 tokens": (ValueError, {"seqlens_Q": [], "seqlens_KV": [10]}),
    "seqlens_Q has a number beyond 64 bits": (ValueError, {"seqlens_Q": [2**63], "seqlens_KV": [10]}),
    "cumulative_seqlen_Q must begin with 0": (ValueError, {"cumulative_seqlen_Q": [], "cumulative_seqlen_KV": [0]}),
    "seqlens_Q must be a vector of int32 or int64, got (1,) of float32": (
        ValueError,
        {"seqlens_Q": torch.ones(1), "seqlens_KV": [10]},
    ),
    "seqlens_Q must be a tensor or a sequence of integers": (TypeError, {"seqlens_Q": 10, "seqlens_KV": 10}),
    "seqlens_KV must be int": (TypeError, {"seqlens_Q": [10], "seqlens_KV": [10.0]}),
    "packed samples are one batch entry, and query has 2": (
        ValueError,
        {"query": Q.expand(2, -1, -1, -1), "seqlens_Q": [10], "seqlens_KV": [10]},
    ),
    "query must be [batch, tokens, heads, head_dim], got (10, 4, 16)": (ValueError, {"query": Q[0]}),
    "is_causal must be bool, got (True,)": (TypeError, {"is_causal": (True,)}),
    "query, key and value must have one dtype": (ValueError, {"key": K.bfloat16()}),
    "value has shape [1, 9, 2, 24], query has [1, 10, 4, 16]": (ValueError, {"value": V[:, 1:]}),
    "4 query heads can't be shared among 3": (ValueError, {"key": K[:, :, [0, 1, 1]], "value": V[:, :, [0, 1, 1]]}),
    "unexpected keyword argument 'windows'": (TypeError, {"windows": 3}),
}


@pytest.mark.parametrize("text", BAD)
def test_errors(text: str) -> None:
    kind, arguments = BAD[text]
    with pytest.raises(kind) as failed:
        gnaforge.attention(**{"query": Q, "key": K, "value": V, **arguments})
    assert text in str(failed.value)
    if text.startswith("seqlens"):
        assert "cumulative" not in str(failed.value)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *ends: torch.Tensor) -> torch.Tensor:
    lengths = {"cumulative_seqlen_Q": ends[0], "cumulative_seqlen_KV": ends[1]} if ends else {}
    return gnaforge.attention(q, k, v, True, **lengths)  # type: ignore[no-any-return]


def test_torch_takes_it_as_any_call() -> None:
    """Compiled without a break, one graph for any lengths; exported; under vmap and autocast."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend=counter)
    for lengths in ([4, 6], [1, 9], [3, 7]):
        ends = cumulative(lengths), cumulative(lengths[::-1])
        assert torch.equal(compiled(Q, K, V, *ends), attend(Q, K, V, *ends))
    assert counter.frame_count == 1
    for queries, keys in ((10, 10), (4, 10), (10, 4)):
        few = Q[:, :queries], K[:, :keys], V[:, :keys]
        assert torch.equal(torch.compile(attend, fullgraph=True)(*few), attend(*few))
    ends = cumulative([4, 6]), cumulative([4, 6])

    class Module(torch.nn.Module):
        def forward(self, *arguments: torch.Tensor) -> torch.Tensor:
            return attend(*arguments)

    whole = (Q, K, V, *ends)
    assert torch.equal(torch.export.export(Module(), whole).module()(*whole), attend(*whole))
    assert torch.equal(torch.vmap(attend, in_dims=(0, None, None, None, None))(Q[None], *whole[1:])[0], attend(*whole))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attend(*whole), attend(Q.bfloat16(), K.bfloat16(), V.bfloat16(), *ends))
    operator = torch.ops.gnaforge.attention_varlen.default
    assert set(torch.library.opcheck(operator, (*whole, True, 0.5, "")).values()) == {"SUCCESS"}


@pytest.mark.parametrize("splits", [2, 3, 5])
def test_merged_attentions_are_attention_to_all_keys(splits: int) -> None:
    q, k, v = tensors(2, 9, 40)
    parts = [
        gnaforge.attention(q, own, values, return_lse=True)
        for own, values in zip(k.tensor_split(splits, 1), v.tensor_split(splits, 1), strict=True)
    ]
    require_close(gnaforge.merge_attentions(*map(list, zip(*parts, strict=True))), exact(q, k, v))


def test_merging_is_stable_and_skips_what_saw_no_key() -> None:
    out = torch.randn(3, 1, 4, 2, 8)
    lse = torch.randn(3, 1, 4, 2) + torch.tensor([3e4, -3e4, 3e4])[:, None, None, None]
    lse[0, :, 0] = lse[1, :, 0] = lse[:, :, 1] = -torch.inf
    out[0, :, 0], out[1, :, 1] = torch.nan, torch.inf  # as results of nothing may be
    merged, whole = gnaforge.merge_attentions(list(out.bfloat16()), list(lse))
    assert merged.dtype == torch.bfloat16 and whole.dtype == torch.float32
    assert torch.equal(merged[:, 0], out[2, :, 0].bfloat16()) and torch.equal(whole[:, 0], lse[2, :, 0])
    assert not merged[:, 1].any() and whole[:, 1].isneginf().all()
    weights = lse[:, :, 2:].double().softmax(0)[..., None]
    torch.testing.assert_close(
        merged[:, 2:].double(), (weights * out[:, :, 2:].bfloat16()).sum(0), rtol=1e-2, atol=1e-2
    )
    torch.testing.assert_close(whole[:, 2:].double(), lse[:, :, 2:].double().logsumexp(0))


def test_merging_has_the_derivatives_of_what_it_computes() -> None:
    """Also beside a log-sum-exp of -infinity, of one and of all."""
    torch.manual_seed(0)
    outputs = [torch.randn(1, 3, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    logs = [torch.randn(1, 3, 2, dtype=torch.float64) for _ in range(3)]
    for log in logs:
        log[:, 1] = -torch.inf
    logs[0][:, 0] = -torch.inf
    logs = [log.requires_grad_() for log in logs]

    def plain(outputs: Any, logs: Any) -> torch.Tensor:
        stacked, weights = torch.stack(outputs), torch.stack(logs).softmax(0)
        return ((weights[..., None] * stacked).sum(0) * seed).sum() + torch.stack(logs).logsumexp(0).sin().sum()

    seed = torch.randn(1, 3, 2, 4)
    merged, whole = gnaforge.merge_attentions(outputs, logs)
    found = torch.autograd.grad((merged * seed).sum() + whole.where(whole.isfinite(), 0).sin().sum(), [*outputs, *logs])
    some = [[x[:, [0, 2]] for x in given] for given in (outputs, logs)]
    seed = seed[:, [0, 2]]
    want = torch.autograd.grad(plain(*some), [*outputs, *logs])
    for got, expected in zip(found, want, strict=True):
        assert got.isfinite().all()
        torch.testing.assert_close(got[:, [0, 2]], expected[:, [0, 2]], rtol=1e-4, atol=1e-5)
        assert not got[:, 1].any()


BAD_MERGES: dict[str, tuple[type[Exception], Any]] = {
    "takes two or more outputs, and as many lse_tensors; got 1 and 1": (ValueError, ([Q], [Q[..., 0]])),
    "got 2 and 1": (ValueError, ([Q, Q], [Q[..., 0]])),
    "outputs[1] is (1, 10, 2, 16)": (ValueError, ([Q, K], [Q[..., 0]] * 2)),
    "lse_tensors[1] has shape (1, 10, 2); it must be (1, 10, 4)": (ValueError, ([Q, Q], [Q[..., 0], K[..., 0]])),
    "lse_tensors[0] must be a torch.Tensor": (TypeError, ([Q, Q], [None, Q[..., 0]])),
}


@pytest.mark.parametrize("text", BAD_MERGES)
def test_errors_of_merging(text: str) -> None:
    kind, arguments = BAD_MERGES[text]
    with pytest.raises(kind) as failed:
        gnaforge.merge_attentions(*arguments)
    assert text in str(failed.value)


def test_a_kernel_that_is_missing_is_made(python: Callable[..., Any], no_kernels: Any) -> None:
    done = python(
        "import torch, gnaforge\n"
        "q, k = torch.randn(1, 12, 2, 8), torch.randn(1, 9, 2, 8)\n"
        "print(gnaforge.attention(q, k, k, False, None, [5, 7], [3, 6]).shape)\n",
        GNAFORGE_JIT="warn",
    )
    assert done.stdout == "torch.Size([1, 12, 2, 8])\n", done.stderr
    assert "compiled gna_forward-cpu-r1-fp32" in done.stderr


# NATTEN itself


@pytest.fixture
def natten() -> Any:
    return pytest.importorskip("natten")


@pytest.mark.natten
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_natten_agrees(natten: Any) -> None:
    """Dense attention by its flex backend, which runs on a CPU, is not causal and takes no packed samples; and how it
    merges."""
    for queries, keys in product((1, 9), (1, 30)):
        q, k, v = (torch.randn(2, n, heads, 16) for n, heads in ((queries, 4), (keys, 2), (keys, 2)))
        with torch.compiler.set_stance("force_eager"):
            theirs = natten.attention(q, k, v, backend="flex-fmha", return_lse=True)
        ours = gnaforge.attention(q, k, v, backend="cutlass-fmha", return_lse=True)
        for found, want in zip(ours, theirs, strict=True):
            torch.testing.assert_close(found, want, rtol=2e-5, atol=2e-5)
    outputs, logs = [torch.randn(2, 9, 4, 16) for _ in range(3)], [torch.randn(2, 9, 4) for _ in range(3)]
    theirs = natten.merge_attentions(outputs, logs, torch_compile=False, use_autograd_fix=False)
    for found, want in zip(gnaforge.merge_attentions(outputs, logs), theirs, strict=True):
        torch.testing.assert_close(found, want, rtol=2e-5, atol=2e-5)


def test_a_warning_offers_only_what_the_call_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gnaforge.runtime.natten_arguments._noted", False)
    with pytest.warns(UserWarning, match=r"ignores NATTEN's tuning arguments \(backward_q_tile_size\)") as seen:
        gnaforge.attention(Q, K, V, backward_q_tile_size=64)
    assert "or with its tiles. This" in str(seen[0].message)


@pytest.mark.natten
@pytest.mark.filterwarnings("ignore:gnaforge ignores NATTEN's tuning arguments")
def test_arguments_have_nattens_names_and_places(natten: Any) -> None:
    for name, count in (("attention", 14), ("merge_attentions", 4)):
        theirs, ours = (list(signature(getattr(module, name)).parameters) for module in (natten, gnaforge))
        assert ours[:count] == theirs[:count]
        if name == "attention":
            tuning = dict.fromkeys(theirs[count:], None)
            tuning["return_lse"] = True
            assert torch.equal(gnaforge.attention(Q, K, V, **tuning)[0], gnaforge.attention(Q, K, V))
        else:
            assert len(theirs) == count
