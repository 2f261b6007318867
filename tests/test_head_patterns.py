"""Windows of their own for heads: one call, whose heads are those of calls apart."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import gnaforge
import numpy as np
import pytest
import torch
from own_patterns import exact_heads, own_arguments, random_pattern, require_close

pytestmark = pytest.mark.usefixtures("kernel_set")

Q, K = torch.randn(2, 9, 10, 4, 16), torch.randn(2, 9, 10, 2, 16)
WINDOWS = [(3, 3), (5, 5), (5, 5), (9, 3)]
ROWS = [[3, 3, 1, 1, 1, 1, 0, 0], [5, 5, 2, 1, 1, 1, 0, 1], [5, 5, 2, 1, 1, 1, 0, 1], [9, 3, 1, 1, 1, 1, 0, 0]]
FLAT = [number for row in ROWS for number in row]


def test_random_heads_agree_with_exact_attention() -> None:
    """All ranks and settings; groups of query heads that share keys are split wherever patterns change."""
    rng, split = Random(0), 0
    for seed in range(80):
        tokens = [rng.randint(1, 9) for _ in range(rng.randint(1, 3))]
        kv_heads, group = rng.choice((1, 2, 3)), rng.choice((1, 2, 4))
        heads: list[Any] = []
        while len(heads) < kv_heads * group:
            heads += [random_pattern(rng, tokens, plain=seed % 2 == 0)] * rng.randint(1, 5)
        heads = heads[: kv_heads * group]
        split += any(heads[i] != heads[i - 1] and i % group for i in range(1, len(heads)))
        torch.manual_seed(seed)
        q, k, v = (torch.randn(2, *tokens, n, 16) for n in (len(heads), kv_heads, kv_heads))
        got = gnaforge.neighborhood_attention(q, k, v, **own_arguments(heads), return_lse=True)
        require_close(got, exact_heads(heads, q, k, v), f"{seed}: {heads}")
    assert split > 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_heads_are_those_of_calls_apart(dtype: torch.dtype) -> None:
    """To the bit, by one kernel; whatever the tensors' strides are."""
    key = f"gna_forward-cpu-r2-{gnaforge.runtime.dtypes.dtype_name(dtype)}-dany-q1x16-kv5x7"
    whole = torch.randn(2, 9, 10, 3, 4, 16).to(dtype)  # as a projection of all three leaves them
    q, k, v = whole[..., 0, :, :], whole[..., 1, :2, :], whole[..., 2, :2, :]
    out, lse = gnaforge.na2d(q, k, v, WINDOWS, return_lse=True, kernel=key)
    assert out.is_contiguous() and lse.is_contiguous()
    for head, window in enumerate(WINDOWS):
        own, shared = slice(head, head + 1), slice(head // 2, head // 2 + 1)
        apart = gnaforge.na2d(q[..., own, :], k[..., shared, :], v[..., shared, :], window, return_lse=True, kernel=key)
        assert torch.equal(out[..., own, :], apart[0]) and torch.equal(lse[..., own], apart[1])


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor], ids=["lists", "arrays", "tensors"])
def test_what_may_stand_for_the_rows(kind: Callable[..., Any]) -> None:
    want = gnaforge.na2d(Q, K, K, WINDOWS, [(1, 1), (2, 1), (1, 2), (3, 3)])
    assert torch.equal(gnaforge.na2d(Q, K, K, kind(WINDOWS), kind([[1, 1], [2, 1], [1, 2], [3, 3]])), want)
    causal = [[False, True]] * 4
    assert torch.equal(
        gnaforge.na2d(Q, K, K, kind([(3, 5)] * 4), 1, 1, kind(causal)), gnaforge.na2d(Q, K, K, (3, 5), 1, 1, causal[0])
    )


def test_one_head_of_keys_that_is_expanded_serves_all() -> None:
    one = K[..., :1, :]
    many = one.expand(-1, -1, -1, 4, -1)
    assert torch.equal(gnaforge.na2d(Q, many, many, WINDOWS), gnaforge.na2d(Q, one, one, WINDOWS))


def test_extra_keys_go_with_the_heads() -> None:
    """All heads see those of the head of keys that they share."""
    extra, lengths = torch.randn(2, 7, 2, 16), torch.tensor([7, 0], dtype=torch.int32)
    operator = torch.ops.gnaforge.forward.default
    out, lse = operator(Q, K, K, FLAT, None, "", extra, extra, lengths)
    for head, pattern in enumerate(ROWS):
        own, shared = slice(head, head + 1), slice(head // 2, head // 2 + 1)
        keys, more = K[..., shared, :], extra[..., shared, :]
        apart = operator(Q[..., own, :], keys, keys, pattern, None, "", more, more, lengths)
        torch.testing.assert_close(out[..., own, :], apart[0], rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(lse[..., own], apart[1], rtol=2e-5, atol=2e-5)


BAD: dict[str, tuple[type[Exception], dict[str, Any]]] = {
    "kernel_size has 3 rows for 4 heads": (ValueError, {"kernel_size": WINDOWS[:3]}),
    "kernel_size must be [heads, 2] here: kernel_size: (3, 3, 3) has 3 entries": (
        ValueError,
        {"kernel_size": [*WINDOWS[:3], (3, 3, 3)]},
    ),
    "stride must be [heads, 2] here: stride must be int": (TypeError, {"stride": [(1, "x")] * 4}),
    "head 3: kernel_size 9 times dilation 2 exceeds the 9 tokens along dim 0": (
        ValueError,
        {"dilation": [(1, 1), (1, 1), (1, 1), (2, 1)]},
    ),
    "head 1: stride is 6 along dim 1; it must be 1 to kernel_size (5)": (
        ValueError,
        {"stride": [(1, 1), (1, 6), (1, 1), (1, 1)]},
    ),
    "is_causal must be [heads, 2] here: is_causal is 'no'": (ValueError, {"is_causal": [("no", True)] * 4}),
    "edge must be [heads, 2] here: edge is 'no'": (ValueError, {"edge": [("cut", "no")] * 4}),
    "stride along dim 1 is beyond 64 bits": (ValueError, {"stride": [(1, 1), (1, 2**70), (1, 1), (1, 1)]}),
}


@pytest.mark.parametrize("text", BAD)
def test_errors_name_the_head(text: str) -> None:
    kind, arguments = BAD[text]
    with pytest.raises(kind) as failed:
        gnaforge.na2d(Q, K, K, **{"kernel_size": WINDOWS, **arguments})
    assert text in str(failed.value)


def test_query_heads_must_share_keys_evenly() -> None:
    odd = torch.randn(2, 9, 10, 3, 16)
    with pytest.raises(ValueError, match="4 query heads can't be shared among 3 key/value heads"):
        gnaforge.na2d(Q, odd, odd, WINDOWS)


def test_nothing_to_compute_keeps_the_rules() -> None:
    empty_q, empty_k = Q[:0], K[:0]
    assert gnaforge.na2d(empty_q, empty_k, empty_k, WINDOWS).shape == (0, 9, 10, 4, 16)
    with pytest.raises(ValueError, match="head 3: kernel_size 90"):
        gnaforge.na2d(empty_q, empty_k, empty_k, [*WINDOWS[:3], (90, 3)])


def heads(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return gnaforge.na2d(q, k, k, WINDOWS, [(1, 1), (2, 1), (2, 1), (1, 1)])  # type: ignore[no-any-return]


def test_torch_takes_it_as_any_call() -> None:
    """Compiled without a break, also with sizes that aren't known; exported; under vmap and autocast."""
    want = heads(Q, K)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(heads, fullgraph=True, backend="aot_eager")(Q, K), want)
    assert torch.equal(torch.compile(heads, fullgraph=True, dynamic=True, backend="aot_eager")(Q, K), want)

    class Module(torch.nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            return heads(q, k)

    assert torch.equal(torch.export.export(Module(), (Q, K)).module()(Q, K), want)
    assert torch.equal(torch.vmap(heads)(Q[None], K[None])[0], want)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(heads(Q, K), heads(Q.bfloat16(), K.bfloat16()))
    for operator in (torch.ops.gnaforge.forward, torch.ops.gnaforge.forward_no_grad):
        found = torch.library.opcheck(operator.default, (Q, K, K, FLAT, 0.5, ""))
        assert set(found.values()) == {"SUCCESS"}


def test_what_is_traced_is_refused_in_the_words_of_a_call() -> None:
    torch._dynamo.reset()
    bad = [*WINDOWS[:3], (90, 3)]
    with pytest.raises(Exception, match="head 3: kernel_size 90 times dilation 1 exceeds the 9 tokens along dim 0"):
        torch.compile(lambda q, k: gnaforge.na2d(q, k, k, bad), fullgraph=True, backend="aot_eager")(Q, K)


def test_modules_have_windows_per_head() -> None:
    torch.manual_seed(0)
    given = {
        "kernel_size": torch.tensor(WINDOWS),
        "stride": [(1, 1), (2, 1), (2, 1), (1, 1)],
        "is_causal": [[False, "block"]] * 4,
        "edge": "cut",
        "sink": [(0, 0), (0, 0), (0, 1), (0, 0)],
    }
    module = gnaforge.NeighborhoodAttention2D(64, 4, **given)
    assert module.kernel_size == tuple(map(tuple, WINDOWS)) and module.edge == "cut"
    assert f"kernel_size={module.kernel_size}" in repr(module)
    assert "sink=((0, 0), (0, 0), (0, 1), (0, 0))" in repr(module)
    x = torch.randn(2, 9, 10, 64)
    with torch.no_grad():
        tensors = module.qkv(x).view(2, 9, 10, 3, 4, 16).unbind(-3)
        want = gnaforge.na2d(*tensors, **given)
        torch.testing.assert_close(module(x), module.proj(want.flatten(-2)))
        torch._dynamo.reset()
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), module(x))
    plain = gnaforge.NeighborhoodAttention2D(64, 4, WINDOWS, edge=[("shift", "shift")] * 4, sink=[(0, 0)] * 4)
    assert "edge" not in repr(plain) and "sink" not in repr(plain)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"kernel_size": WINDOWS[:3]}, "kernel_size has 3 rows for 4 heads"),
        ({"kernel_size": [*WINDOWS[:3], (3, 3, 3)]}, "head 3: kernel_size"),
        ({"stride": [(1, 1)] * 3 + [(1, 99)]}, "head 3: stride: 99 is more than the window of dimension 1"),
        ({"edge": [("cut", "cut"), ("cut", "no"), ("cut", "cut"), ("cut", "cut")]}, "head 1: edge is 'no'"),
    ],
)
def test_modules_name_the_head(given: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        gnaforge.NeighborhoodAttention2D(64, 4, **{"kernel_size": WINDOWS, **given})
