"""Gradients of joint attention, of image and text tokens, against those of SDPA with the whole mask in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import gnaforge
import pytest
import torch
from gnaforge.runtime.problem import Problem
from test_joint import INT, attend_whole, packed, whole_mask

pytestmark = pytest.mark.usefixtures("kernel_set")


def gradients_of(
    call: Callable[..., Any], tensors: Sequence[torch.Tensor], weights: Sequence[torch.Tensor | None]
) -> tuple[torch.Tensor, ...]:
    """Of a sum of results with weights; of some of them None."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    pairs = [(result, w) for result, w in zip(call(*leaves), weights, strict=True) if w is not None]
    found = torch.autograd.grad([result for result, _ in pairs], leaves, [w.to(result.dtype) for result, w in pairs])
    assert [x.dtype for x in found] == [x.dtype for x in tensors]
    return found


def require_close(found: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor], tolerance: float = 3e-5) -> None:
    for i, (got, want) in enumerate(zip(found, wanted, strict=True)):
        scale = float(want.abs().max()) + 1
        difference = (got.double() - want.double()).abs().max()
        assert difference <= tolerance * scale, (i, float(difference), scale)


def run_packed(problem: Problem, prefix: int, suffix: int, lengths: Any = None, **more: Any) -> Callable[..., Any]:
    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        pattern = {name: getattr(problem, name) for name in ("stride", "dilation", "edge", "sink")}
        pattern |= {"is_causal": problem.causal, "kernel_size": problem.window, "scale": problem.scale}
        text = {"grid": problem.tokens, "prefix": prefix, "suffix": suffix, "lengths": lengths}
        return gnaforge.joint_attention(q, k, v, return_lse=True, **pattern, **text, **more)

    return call


CASES = {
    "text first": (Problem((6, 7), (3, 4), (2, 1), heads=4, kv_heads=2, head_dim=24, batch=2), 5, 0, [[5, 0]] * 2),
    "text last, padded": (Problem((3, 4, 5), (3, 2, 3), heads=2, kv_heads=2, head_dim=16, batch=3), 0, 9, None),
    "both sides, padded": (Problem((40,), (7,), (3,), edge=("wrap",), heads=2, kv_heads=1, batch=2), 3, 40, None),
    "no text": (Problem((6, 7), (3, 3), 1, (2, 1), heads=2, kv_heads=2), 0, 0, [[0, 0]]),
    "negative scale": (Problem((6, 7), 3, heads=2, kv_heads=2, scale=-0.3, value_head_dim=8), 70, 2, [[70, 2]]),
}


@pytest.mark.parametrize("name", CASES)
def test_packed(name: str) -> None:
    """Also each kind of result and each input alone."""
    problem, prefix, suffix, counts = CASES[name]
    rng = Random(name)
    lengths = None
    if counts is None:
        counts = [[rng.randint(0, prefix), rng.randint(0, suffix)] for _ in range(problem.batch)]
        counts[0] = [0, suffix]
        sides = [torch.tensor([pair[i] for pair in counts], dtype=INT) for i in (0, 1)]
        lengths = tuple(sides) if prefix and suffix else sides[0] if prefix else sides[1]
    tokens = prefix + problem.token_count + suffix
    dims = (problem.heads, problem.head_dim), (problem.kv_heads, problem.head_dim)
    dims += ((problem.kv_heads, problem.value_head_dim),)
    tensors = [torch.randn(problem.batch, tokens, *sizes) for sizes in dims]
    mask = whole_mask(problem, prefix, suffix, counts)
    ours = run_packed(problem, prefix, suffix, lengths)

    def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        return attend_whole(q.double(), k.double(), v.double(), mask, problem.scale)

    shape = (problem.batch, tokens, problem.heads, problem.value_head_dim)
    weights = torch.randn(shape), torch.randn(shape[:-1])
    found = gradients_of(ours, tensors, weights)
    require_close(found, gradients_of(exact, tensors, weights))
    for kept in ((weights[0], None), (None, weights[1])):
        if kept[0] is None:
            pairs = tensors[:2]  # what values give the log-sum-exp
            own, other = (gradients_of(lambda q, k, of=of: of(q, k, tensors[2]), pairs, kept) for of in (ours, exact))
        else:
            own, other = gradients_of(ours, tensors, kept), gradients_of(exact, tensors, kept)
        require_close(own, other)
    for gradient in found[1:]:
        for entry, (first, last) in enumerate(counts):
            hidden = torch.cat([gradient[entry, first:prefix], gradient[entry, tokens - suffix + last :]])
            assert not hidden.any()
    for alone in range(3):
        leaves = [x.clone().requires_grad_(i == alone) for i, x in enumerate(tensors)]
        torch.autograd.backward(ours(*leaves), weights)
        assert torch.equal(leaves[alone].grad, found[alone])
        assert all(leaf.grad is None for i, leaf in enumerate(leaves) if i != alone)
    assert all(map(torch.equal, found, gradients_of(ours, tensors, weights)))


def run_apart(*tensors: torch.Tensor) -> Any:
    lengths = torch.tensor([4, 7], dtype=INT)
    return gnaforge.joint_attention(*tensors, text_lengths=lengths, kernel_size=(3, 5), return_lse=True)


def exact_apart(*tensors: torch.Tensor) -> Any:
    wide = [tensor.double() for tensor in tensors]
    whole = [torch.cat([image.flatten(1, 2), text], 1) for image, text in zip(wide[:3], wide[3:], strict=True)]
    out, lse = attend_whole(*whole, whole_mask(Problem((6, 5), (3, 5)), 0, 7, [[0, 4], [0, 7]]))
    return out[:, :30].unflatten(1, (6, 5)), out[:, 30:], lse[:, :30].unflatten(1, (6, 5)), lse[:, 30:]


def apart(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    image, text = torch.randn(3, 2, 6, 5, 4, 16), torch.randn(3, 2, 7, 4, 16)
    return [x.to(dtype) for x in (*image, *text)]


def test_apart() -> None:
    """Whatever of the four results counts. Text whose output nobody uses is still what the image sees, and the other
    way round."""
    tensors = apart()
    weights = [torch.randn(2, 6, 5, 4, 16), torch.randn(2, 7, 4, 16), torch.randn(2, 6, 5, 4), torch.randn(2, 7, 4)]
    for chosen in range(1, 16):
        kept = [w if chosen >> i & 1 else None for i, w in enumerate(weights)]
        exact = [torch.zeros_like(x) for x in tensors]
        leaves = [x.clone().requires_grad_() for x in tensors]
        pairs = [(r, w) for r, w in zip(exact_apart(*leaves), kept, strict=True) if w is not None]
        sums = sum((r * w).sum() for r, w in pairs)
        given = torch.autograd.grad(sums, leaves, allow_unused=True)
        exact = [zero if g is None else g for zero, g in zip(exact, given, strict=True)]
        require_close(gradients_of(run_apart, tensors, kept), exact)


def test_gradients_of_some_inputs() -> None:
    tensors = apart()
    weights = [torch.randn(2, 6, 5, 4, 16), torch.randn(2, 7, 4, 16), torch.randn(2, 6, 5, 4), torch.randn(2, 7, 4)]
    whole = gradients_of(run_apart, tensors, weights)
    for chosen in ((0,), (3,), (1,), (5,), (0, 3), (1, 4), (0, 4), (2, 3)):
        leaves = [x.clone().requires_grad_(i in chosen) for i, x in enumerate(tensors)]
        torch.autograd.backward(run_apart(*leaves), weights)
        for i, leaf in enumerate(leaves):
            assert torch.equal(leaf.grad, whole[i]) if i in chosen else leaf.grad is None


def test_in_float16() -> None:
    """Sums of rows' gradients are rounded twice or thrice."""
    problem = Problem((48,), 5, heads=2, kv_heads=2, head_dim=32)
    tensors = packed(1, 12 + 48, 2, 32, torch.float16)
    mask = whole_mask(problem, 12, 0, [[12, 0]])
    weights = torch.randn(1, 60, 2, 32).half(), torch.randn(1, 60, 2)
    found = gradients_of(run_packed(problem, 12, 0), tensors, weights)
    exact = gradients_of(
        lambda *x: attend_whole(*(t.double() for t in x), mask), [x.double() for x in tensors], weights
    )
    require_close(found, exact, 1e-3)


def test_heads_with_windows_of_their_own() -> None:
    """Two of which share keys."""
    windows = [(3, 3), (5, 3), (5, 3), (2, 6)]
    q, k, v = (torch.randn(2, 10 + 42, heads, 16) for heads in (4, 2, 2))

    def ours(*tensors: torch.Tensor) -> Any:
        return gnaforge.joint_attention(*tensors, grid=(7, 6), prefix=10, kernel_size=windows, return_lse=True)

    def exact(*tensors: torch.Tensor) -> Any:
        masks = [whole_mask(Problem((7, 6), window), 10, 0, [[10, 0]] * 2) for window in windows]
        return attend_whole(*(x.double() for x in tensors), torch.cat(masks, 1))

    weights = torch.randn(q.shape), torch.randn(q.shape[:-1])
    require_close(gradients_of(ours, (q, k, v), weights), gradients_of(exact, (q, k, v), weights))


def test_gradients_with_strides() -> None:
    """Expanded, permuted: what `sum` and a head-first consumer give."""
    tensors = apart()
    for weights in (
        [torch.ones(()).expand(2, 6, 5, 4, 16), torch.ones(()).expand(2, 7, 4, 16), None, None],
        [torch.randn(2, 4, 6, 5, 16).permute(0, 2, 3, 1, 4), torch.randn(16, 2, 7, 4).permute(1, 2, 3, 0), None, None],
    ):
        flat = [w if w is None else w.contiguous() for w in weights]
        assert all(map(torch.equal, gradients_of(run_apart, tensors, weights), gradients_of(run_apart, tensors, flat)))


def test_compiled_mapped_and_cast() -> None:
    problem = Problem((6, 7), (3, 4), heads=2, kv_heads=2, head_dim=16, batch=2)
    tensors = packed(2, 5 + 42, 2, 16)
    weights = torch.randn(2, 47, 2, 16), torch.randn(2, 47, 2)
    ours = run_packed(problem, 5, 0)
    found = gradients_of(ours, tensors, weights)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    require_close(gradients_of(compiled, tensors, weights), found, 1e-6)
    mapped = gradients_of(torch.vmap(ours), [x[None] for x in tensors], [w[None] for w in weights])
    require_close([gradient[0] for gradient in mapped], found, 1e-6)
    torch._dynamo.reset()
    tensors = apart()
    weights = [torch.randn(2, 6, 5, 4, 16), torch.randn(2, 7, 4, 16), None, None]
    found = gradients_of(run_apart, tensors, weights)
    compiled = torch.compile(run_apart, fullgraph=True, backend="aot_eager")
    require_close(gradients_of(compiled, tensors, weights), found, 1e-6)
    problem = Problem((42,), 5, heads=2, kv_heads=2, head_dim=16)
    tensors = packed(1, 5 + 42, 2, 16)
    ours = run_packed(problem, 5, 0)
    with torch.autocast("cpu", torch.float16):
        leaves = [x.clone().requires_grad_() for x in tensors]
        out, lse = ours(*leaves)
    assert out.dtype == torch.float16
    weights = torch.randn(out.shape), torch.randn(lse.shape)
    torch.autograd.backward((out, lse), (weights[0].half(), weights[1]))
    require_close([leaf.grad for leaf in leaves], gradients_of(ours, tensors, weights), 3e-3)


def test_second_derivatives_are_refused() -> None:
    leaf = torch.randn(1, 5 + 12, 2, 16, requires_grad=True)
    out = gnaforge.joint_attention(leaf, leaf, leaf, grid=(12,), prefix=5, kernel_size=3)
    (found,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="gnaforge: neighborhood attention has no second derivatives"):
        found.sum().backward()


def test_nothing_to_differentiate() -> None:
    for shape in ((0, 17, 2, 16), (2, 17, 0, 16)):
        leaf = torch.empty(shape, requires_grad=True)
        gnaforge.joint_attention(leaf, leaf, leaf, grid=(12,), prefix=5, kernel_size=3).sum().backward()
        assert leaf.grad is not None and leaf.grad.shape == shape


def test_operators_keep_torchs_rules() -> None:
    """Fakes and the operators themselves agree, gradients included."""
    tensors = [x.requires_grad_() for x in apart()]
    pattern = [3, 5, 1, 1, 1, 1, 0, 0]
    lengths = torch.tensor([4, 7], dtype=INT)
    call = (*tensors[:3], pattern, None, "", "", *tensors[3:], lengths)
    torch.library.opcheck(torch.ops.gnaforge.joint_apart.default, call)
    out, lse, text_out, text_lse = (x.detach() for x in torch.ops.gnaforge.joint_apart(*call))
    q, k, v, *text = (x.detach() for x in tensors)
    rows = (out, lse, out, None), (text_out, text_lse, text_out, None)
    for wanted in (0b111111, 0b000110, 0b001000):
        backward = (q, k, v, pattern, None, wanted, *rows[0], *text, lengths, *rows[1])
        torch.library.opcheck(torch.ops.gnaforge.joint_backward.default, backward)
