"""Gradients of calls that run as a list: heads and packed samples with patterns of their own, dense attention of packed
samples; and those of merged attentions. Against torch's of attention under a mask, in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod
from random import Random
from typing import Any

import gnaforge
import pytest
import torch
from gnaforge.runtime.problem import Problem
from own_patterns import own_arguments, random_pattern
from test_attention import LENGTHS, cumulative, exact, tensors
from test_backward import dense
from test_joint_backward import gradients_of, require_close
from test_varlen import OPERATORS

pytestmark = pytest.mark.usefixtures("kernel_set")

Call = Callable[..., Any]


def weights_of(out_shape: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(*out_shape), torch.randn(*out_shape[:-1])


def require_same_gradients(ours: Call, wanted: Call, given: Sequence[torch.Tensor], out_shape: Sequence[int]) -> None:
    """Of output and log-sum-exp together, each alone; all inputs, and each alone to the bit; twice the same."""
    weights = weights_of(out_shape)
    found = gradients_of(ours, given, weights)
    require_close(found, gradients_of(wanted, given, weights))
    assert all(map(torch.equal, found, gradients_of(ours, given, weights)))
    require_close(*(gradients_of(call, given, (weights[0], None)) for call in (ours, wanted)))
    first = given[:2]
    require_close(
        *(gradients_of(lambda q, k, of=of: of(q, k, given[2]), first, (None, weights[1])) for of in (ours, wanted))
    )
    for alone in range(3):
        leaves = [x.clone().requires_grad_(i == alone) for i, x in enumerate(given)]
        torch.autograd.backward(ours(*leaves), weights)
        assert torch.equal(leaves[alone].grad, found[alone])


def heads_apart(problems: Sequence[Problem], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    group, parts = q.shape[-2] // k.shape[-2], []
    for head, problem in enumerate(problems):
        own, shared = slice(head, head + 1), slice(head // group, head // group + 1)
        of_one = replace(problem, heads=1, kv_heads=1, batch=q.shape[0], head_dim=q.shape[-1])
        parts.append(dense(of_one, q[..., own, :].double(), k[..., shared, :].double(), v[..., shared, :].double()))
    return torch.cat([out for out, _ in parts], -2), torch.cat([lse for _, lse in parts], -1)


def test_heads_with_patterns_of_their_own() -> None:
    """All ranks and settings. Where a head of keys has queries of several patterns, its gradients are sums."""
    rng, split = Random(0), 0
    for seed in range(24):
        tokens = [rng.randint(1, 8) for _ in range(rng.randint(1, 3))]
        kv_heads, group = rng.choice((1, 2, 3)), rng.choice((1, 2, 4))
        heads: list[Any] = []
        while len(heads) < kv_heads * group:
            heads += [random_pattern(rng, tokens, plain=seed % 2 == 0)] * rng.randint(1, 5)
        heads = heads[: kv_heads * group]
        split += any(heads[i] != heads[i - 1] and i % group for i in range(1, len(heads)))
        torch.manual_seed(seed)
        given = [torch.randn(2, *tokens, n, 16) for n in (len(heads), kv_heads, kv_heads)]

        def ours(*inputs: torch.Tensor, heads: Any = heads) -> Any:
            return gnaforge.neighborhood_attention(*inputs, **own_arguments(heads), return_lse=True)

        def wanted(*inputs: torch.Tensor, heads: Any = heads) -> Any:
            return heads_apart(heads, *inputs)

        require_same_gradients(ours, wanted, given, given[0].shape)
    assert split > 5


def test_heads_with_additional_keys() -> None:
    """All heads see them, so their gradients are sums of all patterns'."""
    windows = [(3, 3), (5, 5), (5, 5), (9, 3)]
    q, k, v = (torch.randn(2, 9, 10, heads, 16) for heads in (4, 2, 2))
    extra_k, extra_v = torch.randn(2, 7, 2, 16), torch.randn(2, 7, 2, 16)

    def ours(q: Any, k: Any, v: Any, more_k: Any, more_v: Any) -> Any:
        return gnaforge.na2d(q, k, v, windows, 1, 1, False, None, more_k, more_v, return_lse=True)

    def apart(q: Any, k: Any, v: Any, more_k: Any, more_v: Any) -> Any:
        parts = []
        for head, window in enumerate(windows):
            own, shared = slice(head, head + 1), slice(head // 2, head // 2 + 1)
            pieces = q[..., own, :], *(x[..., shared, :] for x in (k, v))
            more = more_k[:, :, shared], more_v[:, :, shared]
            parts.append(gnaforge.na2d(*pieces, window, 1, 1, False, None, *more, return_lse=True))
        return torch.cat([out for out, _ in parts], -2), torch.cat([lse for _, lse in parts], -1)

    given = q, k, v, extra_k, extra_v
    weights = weights_of(q.shape)
    require_close(gradients_of(ours, given, weights), gradients_of(apart, given, weights))


def test_packed_samples_with_layouts_of_their_own() -> None:
    rng = Random(0)
    for seed in range(20):
        rank = rng.randint(1, 3)
        layouts = [tuple(rng.randint(1, 7) for _ in range(rank)) for _ in range(rng.randint(1, 4))]
        layouts = [layout for layout in layouts for _ in range(rng.randint(1, 2))]
        problems = [random_pattern(rng, layout, plain=seed % 3 == 0) for layout in layouts]
        torch.manual_seed(seed)
        counts = list(map(prod, layouts))
        given = [torch.randn(sum(counts), heads, 16) for heads in (4, 2, 2)]

        def ours(*inputs: torch.Tensor, layouts: Any = layouts, problems: Any = problems) -> Any:
            return OPERATORS[len(layouts[0])](*inputs, layouts, **own_arguments(problems), return_lse=True)

        def wanted(*inputs: torch.Tensor, layouts: Any = layouts, problems: Any = problems) -> Any:
            found, pieces = [], (x.double().split(list(map(prod, layouts))) for x in inputs)
            for *parts, problem in zip(*pieces, problems, strict=True):
                whole = replace(problem, heads=4, kv_heads=2, head_dim=16)
                out, lse = dense(whole, *(part.unflatten(0, problem.tokens)[None] for part in parts))
                found.append((out[0].flatten(0, -3), lse[0].flatten(0, -2)))
            return torch.cat([out for out, _ in found]), torch.cat([lse for _, lse in found])

        require_same_gradients(ours, wanted, given, given[0].shape)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(40, 40), (7, 30), (30, 7), (1, 9), (9, 1)])
def test_dense_attention(queries: int, keys: int, is_causal: bool) -> None:
    """Keys behind the last query of a causal call get zeros; queries behind the last key see all."""
    given = tensors(2, queries, keys)

    def ours(*inputs: torch.Tensor) -> Any:
        if is_causal and queries > keys:  # a list, of one batch entry
            pairs = [gnaforge.attention(*(x[i : i + 1] for x in inputs), True, return_lse=True) for i in range(2)]
            return tuple(torch.cat(parts) for parts in zip(*pairs, strict=True))
        return gnaforge.attention(*inputs, is_causal, return_lse=True)

    require_same_gradients(ours, lambda *x: exact(*x, is_causal), given, (2, queries, 4, 24))


@pytest.mark.parametrize("is_causal", [False, True])
def test_dense_attention_of_packed_samples(is_causal: bool) -> None:
    """There are samples without queries, without keys, and with more of either."""
    given = tensors(1, sum(LENGTHS[0]), sum(LENGTHS[1]))

    def ours(*inputs: torch.Tensor) -> Any:
        out, lse = gnaforge.attention(*inputs, is_causal, None, *LENGTHS, return_lse=True)
        return out, torch.where(lse.isneginf(), 0, lse)

    def wanted(*inputs: torch.Tensor) -> Any:
        parts = zip(*(x.double().split(n, 1) for x, n in zip(inputs, (*LENGTHS, LENGTHS[1]), strict=True)), strict=True)
        found = []
        for q, k, v in parts:
            if k.shape[1] == 0:
                out = q.new_zeros((*q.shape[:-1], 24))
                found.append((out, out[..., 0]))
            elif q.shape[1]:
                found.append(exact(q, k, v, is_causal))
        return torch.cat([out for out, _ in found], 1), torch.cat([lse for _, lse in found], 1)

    require_same_gradients(ours, wanted, given, (1, sum(LENGTHS[0]), 4, 24))


@pytest.mark.parametrize("splits", [2, 5])
def test_merged_attentions(splits: int) -> None:
    """Through outputs and log-sum-exps, as if it were one softmax."""
    given = tensors(2, 9, 40)

    def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        parts = [
            gnaforge.attention(q, own, values, return_lse=True)
            for own, values in zip(k.tensor_split(splits, 1), v.tensor_split(splits, 1), strict=True)
        ]
        return gnaforge.merge_attentions(*map(list, zip(*parts, strict=True)))

    require_same_gradients(ours, exact, given, (2, 9, 4, 24))


def test_merging_a_window_and_text() -> None:
    """NATTEN's way to additional keys has the gradients of ours."""
    q, k, v = (torch.randn(2, 9, 8, heads, 16) for heads in (4, 2, 2))
    text_k, text_v = torch.randn(2, 7, 2, 16), torch.randn(2, 7, 2, 16)

    def merged(q: Any, k: Any, v: Any, more_k: Any, more_v: Any) -> Any:
        out, lse = gnaforge.na2d(q, k, v, (5, 3), return_lse=True)
        text, text_lse = gnaforge.attention(q.flatten(1, 2), more_k, more_v, return_lse=True)
        return gnaforge.merge_attentions([out.flatten(1, 2), text], [lse.flatten(1, 2), text_lse])

    def at_once(q: Any, k: Any, v: Any, more_k: Any, more_v: Any) -> Any:
        out, lse = gnaforge.na2d(q, k, v, (5, 3), additional_keys=more_k, additional_values=more_v, return_lse=True)
        return out.flatten(1, 2), lse.flatten(1, 2)

    given, weights = (q, k, v, text_k, text_v), weights_of((2, 72, 4, 16))
    require_close(gradients_of(merged, given, weights), gradients_of(at_once, given, weights))


WINDOWS = [(3, 3), (5, 3), (5, 3), (2, 6)]
LAYOUTS = [(6, 7), (3, 9), (0, 4), (8, 3)]
TOKENS = sum(map(prod, LAYOUTS))
ENDS = cumulative([4, 6]), cumulative([7, 3])
TRACED: dict[str, tuple[Call, list[torch.Tensor]]] = {
    "heads": (
        lambda q, k, v: gnaforge.na2d(q, k, v, WINDOWS, return_lse=True),
        [torch.randn(2, 7, 6, heads, 16) for heads in (4, 2, 2)],
    ),
    "samples": (
        lambda q, k, v: gnaforge.na2d_varlen(q, k, v, LAYOUTS, (3, 3), return_lse=True),
        [torch.randn(TOKENS, heads, 16) for heads in (4, 2, 2)],
    ),
    "lengths": (
        lambda q, k, v: gnaforge.attention(
            q, k, v, True, cumulative_seqlen_Q=ENDS[0], cumulative_seqlen_KV=ENDS[1], return_lse=True
        ),
        [torch.randn(1, 10, heads, 16) for heads in (4, 2, 2)],
    ),
}


@pytest.mark.parametrize("name", TRACED)
def test_compiled_mapped_and_cast(name: str) -> None:
    call, given = TRACED[name]
    weights = weights_of(given[0].shape)
    found = gradients_of(call, given, weights)
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    require_close(gradients_of(compiled, given, weights), found, 1e-6)
    stacks, pairs = [torch.stack([x, -x]) for x in given], [torch.stack([w, w]) for w in weights]
    of_each = zip(found, gradients_of(call, [-x for x in given], weights), strict=True)
    require_close(gradients_of(torch.vmap(call), stacks, pairs), [torch.stack(pair) for pair in of_each], 1e-6)
    leaf = given[0].clone().requires_grad_()
    (first,) = torch.autograd.grad(call(leaf, *given[1:])[0].sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="gnaforge: neighborhood attention has no second derivatives"):
        first.sum().backward()


def test_operators_keep_torchs_rules() -> None:
    """Fakes and the backward operators agree."""
    for name, given, further in (
        ("forward_varlen", TRACED["samples"][1], (2, [n for own in LAYOUTS for n in own], [3, 3, 1, 1, 1, 1, 0, 0])),
        ("attention_varlen", TRACED["lengths"][1], (*ENDS, True)),
    ):
        q, k, v = (x if x.dim() == 4 else x[None] for x in given)
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        torch.library.opcheck(getattr(torch.ops.gnaforge, name).default, (*leaves, *further, 0.5, ""))
        out, lse = getattr(torch.ops.gnaforge, name)(q, k, v, *further, 0.5, "")
        backward = "backward_varlen" if name == "forward_varlen" else "attention_backward_varlen"
        for wanted in (7, 6, 1):
            call = (out, lse, q, k, v, out, lse, *further, 0.5, wanted)
            torch.library.opcheck(getattr(torch.ops.gnaforge, backward).default, call)
