"""Packed samples of different layouts: one call, whose samples are those of calls apart."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from random import Random
from typing import Any

import gnaforge
import numpy as np
import oracle
import pytest
import torch
import torch._dynamo.testing
from own_patterns import own_arguments, random_pattern, require_close

pytestmark = pytest.mark.usefixtures("kernel_set")

LAYOUTS = [(6, 7), (6, 7), (3, 9), (0, 4), (8, 3)]
TOKENS = sum(map(prod, LAYOUTS))
Q, K, V = torch.randn(TOKENS, 4, 16), torch.randn(TOKENS, 2, 16), torch.randn(TOKENS, 2, 24)
OPERATORS = {1: gnaforge.na1d_varlen, 2: gnaforge.na2d_varlen, 3: gnaforge.na3d_varlen}


def pieces(packed: torch.Tensor, layouts: list[Any]) -> list[torch.Tensor]:
    """The samples, each with a batch of 1; empty ones left out."""
    parts = packed.split([prod(layout) for layout in layouts])
    return [part.unflatten(0, layout)[None] for part, layout in zip(parts, layouts, strict=True) if len(part)]


def apart(layouts: list[Any], windows: list[Any], **arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """A call for each sample of the tensors above."""
    results = [
        gnaforge.neighborhood_attention(*tensors, window, return_lse=True, **arguments)
        for *tensors, window in zip(*(pieces(x, layouts) for x in (Q, K, V)), windows, strict=True)
    ]
    out, lse = zip(*results, strict=True)
    rank = len(layouts[0])
    return torch.cat([x[0].flatten(0, rank - 1) for x in out]), torch.cat([x[0].flatten(0, rank - 1) for x in lse])


def test_random_samples_agree_with_exact_attention() -> None:
    rng, own = Random(0), 0
    for seed in range(60):
        rank = rng.randint(1, 3)
        layouts = [tuple(rng.randint(1, 8) for _ in range(rank)) for _ in range(rng.randint(1, 4))]
        layouts = [layout for layout in layouts for _ in range(rng.randint(1, 2))]
        common = random_pattern(rng, [min(column) for column in zip(*layouts, strict=True)], plain=seed % 3 == 0)
        problems = [random_pattern(rng, layout, plain=seed % 3 == 0) for layout in layouts]
        arguments: dict[str, Any] = own_arguments(problems)
        if common.edge == ("shift",) * rank and seed % 2 == 0:
            problems = [common] * len(layouts)
            arguments = {name: values[0] for name, values in own_arguments(problems).items()}
        else:
            own += 1
        torch.manual_seed(seed)
        q, k, v = (torch.randn(sum(map(prod, layouts)), heads, 16) for heads in (4, 2, 2))
        got = OPERATORS[rank](q, k, v, layouts, **arguments, return_lse=True)
        exact = []
        for *tensors, problem in zip(*(pieces(x, layouts) for x in (q, k, v)), problems, strict=True):
            fields = {name: getattr(problem, name) for name in ("stride", "dilation", "causal", "edge", "sink")}
            whole = gnaforge.runtime.problem.Problem(
                tuple(tensors[0].shape[1:-2]), problem.window, **fields, head_dim=16
            )
            exact.append([x[0].flatten(0, rank - 1) for x in oracle.reference(whole, *tensors)])
        require_close(got, [torch.cat(column) for column in zip(*exact, strict=True)], f"{seed}: {layouts} {arguments}")
    assert 10 < own < 50


def test_samples_are_those_of_calls_apart() -> None:
    """To the bit, by one kernel; a sample may have no tokens; neighbours with one layout are a batch."""
    key = "gna_forward-cpu-r2-fp32-dany-q1x16-kv5x7"
    got = gnaforge.na2d_varlen(Q, K, V, LAYOUTS, 3, return_lse=True, kernel=key)
    for found, want in zip(got, apart(LAYOUTS, [3] * 4, kernel=key), strict=True):
        assert torch.equal(found, want)
    windows = [(3, 5), (3, 3), (3, 9), (1, 1), (8, 2)]
    want = apart(LAYOUTS, [*windows[:3], windows[4]], stride=(1, 2), kernel=key)
    got = gnaforge.na2d_varlen(Q, K, V, LAYOUTS, windows, (1, 2), return_lse=True, kernel=key)
    # The empty sample's window may be anything that its stride allows.
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor], ids=["lists", "arrays", "tensors"])
def test_layouts_may_be_of_these_kinds(kind: Callable[..., Any]) -> None:
    want = gnaforge.na2d_varlen(Q, K, V, LAYOUTS, (3, 3))
    assert torch.equal(gnaforge.na2d_varlen(Q, K, V, kind(LAYOUTS), kind([(3, 3)] * 5)), want)
    line = [5, 9, TOKENS - 14]
    want = gnaforge.na1d_varlen(Q, K, V, [(n,) for n in line], 3)
    assert torch.equal(gnaforge.na1d_varlen(Q, K, V, kind(line), 3), want)


def test_strided_tensors_are_read_as_they_lie() -> None:
    whole = torch.randn(TOKENS, 3, 2, 16)
    q, k, v = whole.unbind(1)
    want = gnaforge.na2d_varlen(q.contiguous(), k.contiguous(), v.contiguous(), LAYOUTS, 3)
    assert torch.equal(gnaforge.na2d_varlen(q, k, v, LAYOUTS, 3), want)


BAD: dict[str, tuple[type[Exception], dict[str, Any]]] = {
    "layouts have 9 tokens, and query, key and value have 135": (ValueError, {"layouts": [(3, 3)]}),
    "layouts[1] is (2, 3, 4); it must have 2 extents": (ValueError, {"layouts": [(5, 27), (2, 3, 4)]}),
    "layouts[0] must be int": (TypeError, {"layouts": [(5.0, 27)]}),
    "layouts must be a sequence of 2 extents for each sample": (TypeError, {"layouts": 135}),
    "layout of sample 0 is [-5, 27]": (ValueError, {"layouts": [(-5, 27)]}),
    "layouts have more than 2^63 tokens": (ValueError, {"layouts": [(2**62, 4)]}),
    "sample 2: kernel_size 5 times dilation 1 exceeds the 3 tokens along dim 0": (ValueError, {"kernel_size": 5}),
    "sample 4: stride is 2 along dim 1; it must be 1 to kernel_size (1)": (
        ValueError,
        {"kernel_size": [(2, 2), (2, 2), (2, 2), (2, 2), (2, 1)], "stride": 2},
    ),
    "kernel_size has 2 rows for 5 samples": (ValueError, {"kernel_size": [(3, 3)] * 2}),
    "kernel_size must be [samples, 2] here": (ValueError, {"kernel_size": [(3, 3, 3)] * 5}),
    "query must be [tokens, heads, head_dim], got (1, 135, 4, 16)": (ValueError, {"query": Q[None]}),
    "key has shape [134, 2, 16], query has [135, 4, 16]; they must have as many tokens": (ValueError, {"key": K[1:]}),
    "value has shape [134, 2, 24], query has [135, 4, 16]; they must": (ValueError, {"value": V[1:]}),
    "value must be a torch.Tensor": (TypeError, {"value": None}),
    "query, key and value must have one dtype": (ValueError, {"key": K.bfloat16()}),
    "unexpected keyword argument 'windows'": (TypeError, {"windows": 3}),
}


@pytest.mark.parametrize("text", BAD)
def test_errors_name_the_sample(text: str) -> None:
    kind, arguments = BAD[text]
    given = {"query": Q, "key": K, "value": V, "layouts": LAYOUTS, "kernel_size": 3, **arguments}
    with pytest.raises(kind) as failed:
        gnaforge.na2d_varlen(**given)
    assert text in str(failed.value)


def test_no_samples_and_no_tokens() -> None:
    for layouts in ([], [(0, 5), (3, 0)]):
        out, lse = gnaforge.na2d_varlen(Q[:0], K[:0], V[:0], layouts, 3, return_lse=True)
        assert out.shape == (0, 4, 24) and lse.shape == (0, 4)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layouts: Any) -> torch.Tensor:
    return gnaforge.na2d_varlen(q, k, v, layouts, (3, 3))  # type: ignore[no-any-return]


def test_two_graphs_do_for_ten_batches_of_layouts() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attend, fullgraph=True, backend=counter)
    for i in range(10):
        layouts = [(4 + i, 5), (5, 3 + i), (6, 6)]
        x = torch.randn(sum(map(prod, layouts)), 2, 16)
        assert torch.equal(compiled(x, x, x, layouts), attend(x, x, x, layouts))
    assert counter.frame_count == 2


def test_torch_takes_it_as_any_call() -> None:
    """Compiled by inductor; exported; under vmap and autocast; tangents are refused."""
    torch._dynamo.reset()
    want = attend(Q, K, V, LAYOUTS)
    assert torch.equal(torch.compile(attend, fullgraph=True)(Q, K, V, LAYOUTS), want)

    class Module(torch.nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return attend(q, k, v, LAYOUTS)

    assert torch.equal(torch.export.export(Module(), (Q, K, V)).module()(Q, K, V), want)
    both = torch.vmap(lambda q, k, v: attend(q, k, v, LAYOUTS), in_dims=(0, None, None))(torch.stack([Q, -Q]), K, V)
    assert torch.equal(both[0], want) and torch.equal(both[1], attend(-Q, K, V, LAYOUTS))
    with torch.autocast("cpu", torch.bfloat16):
        found = attend(Q, K.bfloat16(), V, LAYOUTS)
    assert torch.equal(found, attend(Q.bfloat16(), K.bfloat16(), V.bfloat16(), LAYOUTS))
    flat = [extent for layout in LAYOUTS for extent in layout]
    batch = torch.randn(2, TOKENS, 4, 16), torch.randn(2, TOKENS, 2, 16), torch.randn(2, TOKENS, 2, 16)
    for arguments in ((Q[None], K[None], V[None]), batch):
        call = (*arguments, 2, flat, [3, 3, 1, 1, 1, 1, 0, 0], 0.5, "")
        assert set(torch.library.opcheck(torch.ops.gnaforge.forward_varlen.default, call).values()) == {"SUCCESS"}
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda q: attend(q, K, V, LAYOUTS), (Q,), (Q,))


def test_what_is_traced_is_refused_in_the_words_of_a_call() -> None:
    torch._dynamo.reset()
    for layouts, text in (([(3, 3)], "layouts have 9 tokens"), ([(5, 1), (26, 5)], "sample 0: kernel_size 3")):
        with pytest.raises(Exception, match=text):
            torch.compile(attend, fullgraph=True, backend="aot_eager")(Q, K, V, layouts)


def test_a_kernel_that_is_missing_is_made(python: Callable[..., Any], no_kernels: Any) -> None:
    done = python(
        "import torch, gnaforge\n"
        "x = torch.randn(12, 2, 8)\n"
        "print(gnaforge.na1d_varlen(x, x, x, [5, 7], [[5], [3]], edge=[['cut'], ['wrap']]).shape)\n",
        GNAFORGE_JIT="warn",
    )
    assert done.stdout == "torch.Size([12, 2, 8])\n" and "compiled gna_forward-cpu-r1-fp32" in done.stderr, done.stderr
