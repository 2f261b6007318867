"""Packed samples with extra keys of their own, and results of packed samples in the caller's tensors."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from random import Random
from typing import Any

import gnaforge
import oracle
import pytest
import torch
import torch._dynamo.testing
from own_patterns import own_arguments, random_pattern
from test_joint_backward import gradients_of, require_close
from test_varlen import OPERATORS

pytestmark = pytest.mark.usefixtures("kernel_set")

LAYOUTS = [(6, 7), (6, 7), (3, 9), (0, 4), (8, 3), (8, 3)]
TOKENS = sum(map(prod, LAYOUTS))
Q, K, V = torch.randn(TOKENS, 4, 16), torch.randn(TOKENS, 2, 16), torch.randn(TOKENS, 2, 24)
EXTRA_K, EXTRA_V = torch.randn(6, 5, 2, 16), torch.randn(6, 5, 2, 24)
LENGTHS = torch.tensor([5, 0, 3, 2, 9, -1], dtype=torch.int32)


def attend(q: Any, k: Any, v: Any, more_k: Any, more_v: Any, lengths: Any = LENGTHS, **further: Any) -> Any:
    extra = {"additional_keys": more_k, "additional_values": more_v, "additional_lengths": lengths}
    return gnaforge.na2d_varlen(q, k, v, LAYOUTS, (3, 3), **extra, **{"return_lse": True, **further})


def exact(problems: list[Any], lengths: Any, *tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp in float64, sample by sample."""
    *packed, extra_k, extra_v = tensors
    outs, sums = [], []
    pieces = [x.split([prod(problem.tokens) for problem in problems]) for x in packed]
    for i, problem in enumerate(problems):
        if not problem.token_count:
            continue
        rows = slice(i, i + 1)
        piece = extra_k[rows], extra_v[rows], None if lengths is None else lengths[rows]
        parts = (part[i].unflatten(0, problem.tokens)[None] for part in pieces)
        out, lse = oracle.reference(problem, *parts, piece)
        outs.append(out[0].flatten(0, -3))
        sums.append(lse[0].flatten(0, -2))
    return torch.cat(outs), torch.cat(sums)


def test_random_samples_and_their_gradients() -> None:
    """All ranks and settings; lengths from none to more than there are; neighbours with one layout are a batch."""
    rng = Random(0)
    for seed in range(16):
        rank = rng.randint(1, 3)
        layouts = [tuple(rng.randint(1, 7) for _ in range(rank)) for _ in range(rng.randint(1, 3))]
        layouts = [layout for layout in layouts for _ in range(rng.randint(1, 2))]
        own = {layout: random_pattern(rng, layout, plain=seed % 3 == 0) for layout in layouts}
        problems = [own[layout] for layout in layouts]
        torch.manual_seed(seed)
        samples, keys = len(layouts), rng.randint(1, 70)
        given = [torch.randn(sum(map(prod, layouts)), heads, 16) for heads in (4, 2, 2)]
        given += [torch.randn(samples, keys, 2, 16) for _ in range(2)]
        lengths = torch.tensor([rng.randint(-1, keys + 2) for _ in layouts], dtype=torch.int32) if seed % 4 else None

        def ours(*x: Any, layouts: Any = layouts, problems: Any = problems, lengths: Any = lengths) -> Any:
            extra = {"additional_keys": x[3], "additional_values": x[4], "additional_lengths": lengths}
            patterns = own_arguments(problems)
            return OPERATORS[len(layouts[0])](*x[:3], layouts, **patterns, **extra, return_lse=True)

        def wanted(*x: Any, problems: Any = problems, lengths: Any = lengths) -> Any:
            return exact(problems, lengths, *x)

        require_close(ours(*given), wanted(*given))
        weights = torch.randn(given[0].shape), torch.randn(given[0].shape[:-1])
        found = gradients_of(ours, given, weights)
        require_close(found, gradients_of(wanted, given, weights))
        for alone in (0, 1, 3, 4):
            leaves = [x.clone().requires_grad_(i == alone) for i, x in enumerate(given)]
            torch.autograd.backward(ours(*leaves), weights)
            assert torch.equal(leaves[alone].grad, found[alone])


def test_samples_are_those_of_calls_apart() -> None:
    """To the bit, by one kernel, whatever the strides; what nobody sees has gradients of zero."""
    key = "gna_forward-cpu-r2-fp32-dany-q1x16-kv5x7"
    wide = torch.randn(6, 2, 9, 2, 40).transpose(1, 3)[..., 0, :, :]  # strided tokens, one row's after another's
    more_k, more_v = wide.transpose(1, 2)[:, :5, :, :16], wide.transpose(1, 2)[:, :5, :, 16:]
    more_k = more_k.expand(6, more_k.shape[1], 2, 16)
    more_v = more_v.expand(6, more_v.shape[1], 2, 24)
    for lengths in (LENGTHS, torch.stack([LENGTHS] * 3, 1)[:, 1], None):
        out, lse = attend(Q, K, V, more_k, more_v, lengths, kernel=key)
        at = 0
        for i, layout in enumerate(LAYOUTS):
            own, at = slice(at, at + prod(layout)), at + prod(layout)
            if not prod(layout):
                continue
            rows = slice(i, i + 1)
            extra = {"additional_keys": more_k[rows], "additional_values": more_v[rows]}
            extra["additional_lengths"] = None if lengths is None else lengths[rows]
            parts = (x[own].unflatten(0, layout)[None] for x in (Q, K, V))
            want = gnaforge.na2d(*parts, (3, 3), **extra, return_lse=True, kernel=key)
            assert torch.equal(out[own], want[0][0].flatten(0, 1)) and torch.equal(lse[own], want[1][0].flatten(0, 1))
    gradients = gradients_of(lambda *x: attend(*x)[:1], [Q, K, V, EXTRA_K, EXTRA_V], [torch.randn(TOKENS, 4, 24)])
    for gradient in gradients[3:]:
        assert [int(row.any(-1).any(-1).sum()) for row in gradient] == [5, 0, 3, 0, 5, 0]


BAD: dict[str, tuple[type[Exception], dict[str, Any]]] = {
    "additional_keys has shape [2, 5, 2, 16]; beside layouts and key it must be [6, tokens, 2, 16]": (
        ValueError,
        {"additional_keys": EXTRA_K[:2], "additional_values": EXTRA_V[:2]},
    ),
    "additional_values has shape [6, 4, 2, 24]; beside additional_keys it must be [6, 5, 2, 24]": (
        ValueError,
        {"additional_keys": EXTRA_K, "additional_values": EXTRA_V[:, :4]},
    ),
    "additional_keys and additional_values come together": (ValueError, {"additional_keys": EXTRA_K}),
    "additional_lengths come with additional_keys and additional_values": (ValueError, {"additional_lengths": LENGTHS}),
    "additional_lengths has shape [1]; beside layouts it must be [6]": (
        ValueError,
        {"additional_keys": EXTRA_K, "additional_values": EXTRA_V, "additional_lengths": LENGTHS[:1]},
    ),
    "additional_lengths must be int32, got int64": (
        ValueError,
        {"additional_keys": EXTRA_K, "additional_values": EXTRA_V, "additional_lengths": LENGTHS.long()},
    ),
    "additional_keys must be a torch.Tensor": (TypeError, {"additional_keys": 3}),
    "out has shape [3, 4, 24]; beside query and value it must be [159, 4, 24]": (
        ValueError,
        {"out": torch.empty(3, 4, 24)},
    ),
    "out_lse has shape [159, 4, 1]; beside query it must be [159, 4]": (
        ValueError,
        {"out_lse": torch.empty(TOKENS, 4, 1)},
    ),
    "out_lse is float64; it must be float32": (ValueError, {"out_lse": torch.empty(TOKENS, 4).double()}),
    "out must be a torch.Tensor": (TypeError, {"out": [1]}),
}


@pytest.mark.parametrize("text", BAD)
def test_what_is_refused(text: str) -> None:
    """In the same words where torch only traces."""
    kind, arguments = BAD[text]

    def call() -> Any:
        return gnaforge.na2d_varlen(Q, K, V, LAYOUTS, (3, 3), **arguments)

    with pytest.raises(kind) as failed:
        call()
    assert text in str(failed.value)
    torch._dynamo.reset()
    with pytest.raises(Exception) as failed:
        torch.compile(call, fullgraph=True, backend="aot_eager")()
    assert text in str(failed.value)


def test_two_graphs_do_for_ten_batches_of_layouts() -> None:
    def call(q: Any, more_k: Any, lengths: Any, layouts: Any) -> Any:
        extra = {"additional_keys": more_k, "additional_values": more_k, "additional_lengths": lengths}
        return gnaforge.na2d_varlen(q, q, q, layouts, (3, 3), **extra)

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    for i in range(10):
        layouts = [(4 + i, 5), (5, 3 + i), (6, 6)]
        given = torch.randn(sum(map(prod, layouts)), 2, 16), torch.randn(3, 2 + i, 2, 16), LENGTHS[:3]
        assert torch.equal(compiled(*given, layouts), call(*given, layouts))
    assert counter.frame_count == 2


def test_torch_takes_extra_keys_as_any_call() -> None:
    """Differentiated when compiled; exported; under vmap and autocast; the operators keep torch's rules."""
    given = Q, K, V, EXTRA_K, EXTRA_V
    weights = torch.randn(TOKENS, 4, 24), torch.randn(TOKENS, 4)
    want, gradients = attend(*given), gradients_of(attend, given, weights)
    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    require_close(gradients_of(compiled, given, weights), gradients, 1e-6)

    class Module(torch.nn.Module):
        def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
            return attend(*tensors)[0]  # type: ignore[no-any-return]

    assert torch.equal(torch.export.export(Module(), given).module()(*given), want[0])
    stacks, pairs = [torch.stack([x, -x]) for x in given], [torch.stack([w, w]) for w in weights]
    of_each = zip(gradients, gradients_of(attend, [-x for x in given], weights), strict=True)
    mapped = torch.vmap(attend, in_dims=(0,) * 5)
    require_close(gradients_of(mapped, stacks, pairs), [torch.stack(pair) for pair in of_each], 1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        found = attend(Q, K, V, EXTRA_K.bfloat16(), EXTRA_V)[0]
    assert torch.equal(found, attend(*(x.bfloat16() for x in given))[0])
    leaves = [x[None].clone().requires_grad_() for x in given[:3]]
    packed = (2, [n for layout in LAYOUTS for n in layout], [3, 3, 1, 1, 1, 1, 0, 0], 0.5)
    extra = EXTRA_K.clone().requires_grad_(), EXTRA_V, LENGTHS
    torch.library.opcheck(torch.ops.gnaforge.forward_varlen.default, (*leaves, *packed, "", *extra))
    inputs = [x[None] for x in (*given[:3], *want)]
    for wanted in (31, 24, 1):
        call = (inputs[3], inputs[4], *inputs, *packed, wanted, "", "", *(x.detach() for x in extra))
        torch.library.opcheck(torch.ops.gnaforge.backward_varlen.default, call)


LINE = torch.randn(1, 10, 4, 16)
WRITERS: dict[str, tuple[Callable[..., Any], torch.Tensor]] = {
    "samples": (lambda q, **out: gnaforge.na2d_varlen(q, q, q, LAYOUTS, (3, 3), **out), torch.randn(TOKENS, 4, 16)),
    "samples with extra keys": (
        lambda q, **out: attend(q, q, q, EXTRA_K[:, :, [0, 1, 1, 0]], EXTRA_K[:, :, [1, 0, 1, 0]], **out),
        torch.randn(TOKENS, 4, 16),
    ),
    "dense": (lambda q, **out: gnaforge.attention(q, q, q, **out), LINE),
    "queries behind the last key": (
        lambda q, **out: gnaforge.attention(q, LINE[:, :4], LINE[:, :4], True, **out),
        LINE,
    ),
    "lengths": (lambda q, **out: gnaforge.attention(q, q, q, seqlens_Q=[4, 6], seqlens_KV=[10, 0], **out), LINE),
}


@pytest.mark.parametrize("name", WRITERS)
def test_results_are_written_into_the_callers_tensors(name: str) -> None:
    """Into slices, from compiled and exported calls; derivatives and vmap are refused, autograd hears of it."""
    call, q = WRITERS[name]
    want, sums = call(q, return_lse=True)[:2]
    memory = torch.full((*q.shape[:-2], 6, 40), 7.0)
    out, lse = memory[..., 1:5, 8:24], torch.empty(*reversed(q.shape[:-1])).permute(*reversed(range(q.dim() - 1)))
    got = call(q, out=out, out_lse=lse, return_lse=True)
    assert got[0] is out and got[1] is lse and torch.equal(out, want) and torch.equal(lse, sums)
    out.fill_(7.0)
    assert (memory == 7.0).all()  # nothing beside was touched
    lse.zero_()
    assert torch.equal(call(q, out_lse=lse, return_lse=True)[0], want) and torch.equal(lse, sums)
    lse.zero_()
    assert torch.equal(call(q, out_lse=lse, return_lse=False), want) and torch.equal(lse, sums)
    torch._dynamo.reset()

    class Writing(torch.nn.Module):
        def forward(self, q: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
            return call(q, out=out, return_lse=True)[0] + 1  # type: ignore[no-any-return]

    own = torch.zeros_like(q)
    version = own._version
    compiled = torch.compile(Writing(), fullgraph=True, backend="aot_eager")
    exported = torch.export.export(Writing(), (q, own)).module()
    traced = torch.jit.trace(Writing(), (q, own), check_trace=False)  # which compares constants as they are printed
    for run in (compiled, exported, traced):
        own.zero_()
        assert torch.equal(run(q, own), want + 1) and torch.equal(own, want)
    assert own._version > version
    with pytest.raises(RuntimeError, match="out= and out_lse= don't support automatic differentiation"):
        call(q.clone().requires_grad_(), out=own)
    with pytest.raises(NotImplementedError, match=r"can't be given under torch.vmap"):
        torch.vmap(lambda q: call(q, out=own))(q[None])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(call(q, out=own.bfloat16(), return_lse=True)[0], call(q, return_lse=True)[0])
