"""Calls that torch differentiates, maps, casts or traces: right, or refused in our own words."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import gnaforge
import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

pytestmark = pytest.mark.usefixtures("kernel_set")

Q, K, V = (torch.randn(2, 9, 8, 2, 16) for _ in range(3))
PLAIN = [3, 3, 1, 1, 1, 1, 0, 0]
NO_TANGENTS = "gnaforge: neighborhood attention has no forward-mode derivatives"


def attend(q: torch.Tensor, k: torch.Tensor = K, v: torch.Tensor = V, **arguments: Any) -> torch.Tensor:
    return gnaforge.na2d(q, k, v, 3, **arguments)  # type: ignore[no-any-return]


@pytest.fixture(autouse=True)
def loaded(kernel_set: None) -> Iterator[None]:
    attend(Q)
    attend(*(x.bfloat16() for x in (Q, K, V)))
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of what it deprecates
        yield


def make_dual(call: Callable[..., Any]) -> Any:
    """The tangent of a call of a dual tensor."""
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(call(forward_ad.make_dual(Q, Q))).tangent


def compile_eager(call: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(call, backend="eager")


class Attending(torch.nn.Module):
    def forward(self, q: torch.Tensor) -> torch.Tensor:
        return attend(q, q, q)


def export(*inputs: torch.Tensor) -> Callable[..., Any]:
    return torch.export.export(Attending(), inputs).module()  # type: ignore[no-any-return]


def sum_of(call: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *tensors: call(*tensors).sum()


WITH_GRADIENTS = Q.clone().requires_grad_()
FORWARD_MODE: dict[str, Callable[[], Any]] = {
    "jvp": lambda: jvp(attend, (Q,), (Q,)),
    "jvp of key and value": lambda: jvp(lambda k, v: attend(Q, k, v), (K, V), (K, V)),
    "jvp of lse": lambda: jvp(lambda q: attend(q, return_lse=True)[1], (Q,), (Q,)),
    "jvp without gradients": lambda: torch.no_grad()(jvp)(attend, (Q,), (Q,)),
    "jvp of jvp": lambda: jvp(lambda q: jvp(attend, (q,), (Q,))[1], (Q,), (Q,)),
    "jvp of vmap": lambda: jvp(vmap(lambda q: attend(q, K, V)), (Q[None],), (Q[None],)),
    "vmap of jvp": lambda: vmap(lambda q: jvp(attend, (q,), (q,)))(Q[None]),
    "jacfwd": lambda: jacfwd(attend)(Q),
    "linearize": lambda: linearize(attend, Q),
    "dual tensors": lambda: make_dual(attend),
    "dual tensors beside gradients": lambda: make_dual(lambda q: attend(q, WITH_GRADIENTS)),
    "dual tensors of the operator": lambda: make_dual(lambda q: torch.ops.gnaforge.forward(q, K, V, PLAIN)[0]),
    "dual tensors through a pinned kernel": lambda: make_dual(lambda q: attend(q, q_tile_shape=(8, 8))),
    "compiled jvp": lambda: compile_eager(lambda: jvp(attend, (Q,), (Q,)))(),
    "jvp of compiled": lambda: jvp(compile_eager(attend), (Q,), (Q,)),
    "jvp of inductor": lambda: jvp(torch.compile(attend), (Q,), (Q,)),
    "dual tensors of compiled": lambda: make_dual(compile_eager(attend)),
    "jvp of exported": lambda: jvp(export(Q), (Q,), (Q,)),
    "jvp of a module": lambda: jvp(gnaforge.NeighborhoodAttention2D(16, 2, 3), (Q[..., 0, :],), (Q[..., 0, :],)),
}


@pytest.mark.parametrize("name", FORWARD_MODE)
def test_forward_mode_is_refused(name: str) -> None:
    with pytest.raises(NotImplementedError) as caught:
        FORWARD_MODE[name]()
    assert str(caught.value).startswith(NO_TANGENTS) and "scaled_dot_product_attention" in str(caught.value)


def test_calls_beside_forward_mode_run() -> None:
    """Of tensors without a tangent, and where it is off."""
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(Q, Q)
        assert torch.equal(attend(Q), attend(forward_ad.unpack_dual(dual).primal))
    got, tangent = jvp(lambda x: attend(Q) * x, (K,), (K,))
    torch.testing.assert_close(got, attend(Q) * K)
    torch.testing.assert_close(tangent, attend(Q) * K)


MODULE = gnaforge.NeighborhoodAttention2D(32, 2, 3)
PARAMETERS = dict(MODULE.named_parameters())


def backward(call: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor = Q) -> torch.Tensor:
    """The gradient that a backward pass leaves."""
    leaf = x.clone().requires_grad_()
    call(leaf).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


def trace(q: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        traced = torch.jit.trace(attend, (Q, K, V))
    return traced(q, K, V)  # type: ignore[no-any-return]


OF_QUERY: dict[str, Callable[[], torch.Tensor]] = {
    "backward": lambda: backward(attend),
    "grad": lambda: grad(sum_of(attend))(Q),
    "vjp": lambda: vjp(attend, Q)[1](torch.ones_like(Q))[0],
    "jacrev": lambda: jacrev(sum_of(attend))(Q),
    "vmap of grad": lambda: vmap(grad(sum_of(attend)))(Q[:, None], K[:, None], V[:, None])[:, 0],
    "gradients through vmap": lambda: backward(lambda q: vmap(attend, (0, None, None))(q[None], K, V)),
    "grad of compiled": lambda: grad(sum_of(compile_eager(attend)))(Q),
    "compiled grad": lambda: compile_eager(grad(sum_of(attend)))(Q),
    "backward of compiled": lambda: backward(torch.compile(attend, backend="aot_eager")),
    "backward of the operator": lambda: backward(lambda q: torch.ops.gnaforge.forward(q, K, V, PLAIN)[0]),
    "backward of a trace without gradients": lambda: backward(trace),
}


@pytest.mark.parametrize("name", OF_QUERY)
def test_every_way_gives_the_same_gradient(name: str) -> None:
    leaf = Q.clone().requires_grad_()
    torch.testing.assert_close(OF_QUERY[name](), torch.autograd.grad(attend(leaf).sum(), leaf)[0], rtol=1e-6, atol=1e-6)


def test_gradients_of_other_arguments() -> None:
    def self_attention(x: torch.Tensor) -> torch.Tensor:
        return attend(x, x, x)

    torch.testing.assert_close(backward(export(Q)), backward(self_attention))
    torch.testing.assert_close(vmap(grad(sum_of(self_attention)))(Q[:, None])[:, 0], backward(self_attention))
    by_grad = grad(lambda p: functional_call(MODULE, p, (Q.flatten(3),)).sum())(PARAMETERS)
    by_autograd = torch.autograd.grad(MODULE(Q.flatten(3)).sum(), list(PARAMETERS.values()))
    for found, want in zip(by_grad.values(), by_autograd, strict=True):
        torch.testing.assert_close(found, want)


def test_gradients_outside_of_gradients() -> None:
    """Of what the inner transformation doesn't differentiate."""

    def outer(q: torch.Tensor) -> torch.Tensor:
        return grad(lambda factor: attend(q).square().sum() * factor)(torch.ones(()))

    torch.testing.assert_close(grad(outer)(Q), grad(lambda q: attend(q).square().sum())(Q))

    def both(q: torch.Tensor) -> torch.Tensor:
        return vjp(lambda k: attend(q, k).square().sum(), K)[0]  # differentiated inside by K, outside by Q

    torch.testing.assert_close(grad(both)(Q), grad(lambda q: attend(q).square().sum())(Q))


def test_second_derivatives_are_refused() -> None:
    with pytest.raises(RuntimeError, match="gnaforge: neighborhood attention has no second derivatives"):
        grad(lambda q: grad(sum_of(attend))(q).sum())(Q)
    with pytest.raises((RuntimeError, NotImplementedError), match="gnaforge: neighborhood attention has no"):
        hessian(sum_of(attend))(Q)


def test_forward_of_what_wants_gradients_is_right() -> None:
    want = attend(Q)
    assert torch.equal(attend(WITH_GRADIENTS), want) and attend(WITH_GRADIENTS).requires_grad
    assert torch.equal(vjp(attend, Q)[0], want)
    with torch.no_grad():
        assert not attend(WITH_GRADIENTS).requires_grad
    with torch.inference_mode():
        assert torch.equal(attend(Q.clone(), K.clone(), V.clone()), want)


# torch.jit


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("training", [True, False])
def test_a_module_with_parameters_is_traced_and_passes_torchs_check(rank: int, training: bool) -> None:
    module = getattr(gnaforge, f"NeighborhoodAttention{rank}D")(16, 2, 3).train(training)
    x = torch.randn(1, *[5, 6, 4][:rank], 16)
    traced = torch.jit.trace(module, x)
    torch.testing.assert_close(traced(x), module(x))
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(
        torch.autograd.grad(traced(leaf).sum(), leaf), torch.autograd.grad(module(leaf).sum(), leaf)
    )


# vmap

BIG = [torch.stack([x, 2 * x, 3 * x]) for x in (Q, K, V)]


def one_by_one(*tensors: torch.Tensor, **arguments: Any) -> torch.Tensor:
    return torch.stack([attend(*entries, **arguments) for entries in zip(*tensors, strict=True)])


@pytest.mark.parametrize("way", ["eager", "aot_eager"])
def test_vmap_is_one_call(way: str) -> None:
    """No loop with a warning, as torch has for operators without a rule."""

    def run(call: Callable[..., Any], *tensors: torch.Tensor, **arguments: Any) -> Any:
        mapped = vmap(call, **arguments)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            torch._C._functorch._set_vmap_fallback_enabled(False)
            try:
                return (torch.compile(mapped, backend=way, fullgraph=True) if way != "eager" else mapped)(*tensors)
            finally:
                torch._C._functorch._set_vmap_fallback_enabled(True)

    want = one_by_one(*BIG)
    assert torch.equal(run(attend, *BIG), want)
    q, k, v = BIG
    moved = run(attend, q.movedim(0, 5), k.movedim(0, 1), v, in_dims=(5, 1, 0), out_dims=2)
    assert torch.equal(moved.movedim(2, 0), want)
    whole = one_by_one(Q.expand(3, *Q.shape), k, V.expand(3, *V.shape))
    assert torch.equal(run(attend, Q, k, V, in_dims=(None, 0, None)), whole)
    assert torch.equal(run(vmap(attend), *(x[None] for x in BIG))[0], want)
    out, lse = run(lambda *tensors: attend(*tensors, return_lse=True), *BIG)
    assert torch.equal(out, want) and lse.shape == (3, 2, 9, 8, 2)
    scores = [attend(*entries, return_lse=True)[1] for entries in zip(*BIG, strict=True)]
    assert torch.equal(lse, torch.stack(scores))


def test_vmap_keeps_the_rules() -> None:
    with pytest.raises(ValueError, match="kernel_size 10 times dilation 1 exceeds the 9 tokens along dim 0"):
        vmap(lambda q: gnaforge.na2d(q, q, q, 10))(BIG[0])


# autocast


CASTS = {
    "fp32 Q and K from a norm": (torch.float32, torch.float32, torch.bfloat16),
    "all fp32": (torch.float32,) * 3,
    "all cast already": (torch.bfloat16,) * 3,
    "fp16 beside": (torch.float16, torch.float32, torch.bfloat16),
}


@pytest.mark.parametrize("to", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASTS)
def test_autocast_is_that_of_sdpa(case: str, to: torch.dtype) -> None:
    tensors = [x.to(dtype) for x, dtype in zip((Q, K, V), CASTS[case], strict=True)]
    dense = [x.flatten(1, 2).transpose(1, 2) for x in tensors]
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", to):
        compiled(*tensors)  # loads all kernels that fit: a call takes the best of those that are loaded
    want = attend(*(x.to(to) for x in tensors))
    with torch.autocast("cpu", to):
        torchs = torch.nn.functional.scaled_dot_product_attention(*dense).dtype
        for call in (attend, compiled, lambda *x: torch.ops.gnaforge.forward(*x, PLAIN)[0]):
            got = call(*tensors)
            assert got.dtype == torchs == to and torch.equal(got, want)
        torch.testing.assert_close(attend(*tensors, q_tile_shape=(8, 8)), want)
        assert attend(tensors[0].clone().requires_grad_(), *tensors[1:]).requires_grad
        assert torch.equal(vmap(attend)(*(x[None] for x in tensors))[0], want)


def test_autocast_leaves_alone_what_torchs_does() -> None:
    """float64, other devices' autocast, and lengths of extra keys."""
    doubles = [x.double() for x in (Q, K, V)]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.nn.functional.scaled_dot_product_attention(*doubles).dtype == torch.float64
        with pytest.raises(ValueError, match="query must be float32, bfloat16 or float16, got float64"):
            attend(*doubles)
        with torch.autocast("cpu", enabled=False):
            assert attend(Q).dtype == torch.float32
        extra = torch.randn(2, 5, 2, 16), torch.randn(2, 5, 2, 16)
        lengths = torch.tensor([1, 5], dtype=torch.int32)
        out, _ = torch.ops.gnaforge.forward(Q, K, V, PLAIN, None, "", *extra, lengths)
        assert out.dtype == torch.bfloat16
    with torch.autocast("cuda", torch.bfloat16):
        assert attend(Q).dtype == torch.float32


def test_autocast_inside_of_graphs() -> None:
    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return attend(q, k, v)

    class Module(torch.nn.Module):
        def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
            return call(*tensors)

    tensors = Q, K, V.bfloat16()
    want = call(*tensors)
    exported = torch.export.export(Module(), tensors)
    for run in (torch.compile(call, fullgraph=True), exported.module(), exported.run_decompositions().module()):
        got = run(*tensors)
        assert got.dtype == torch.bfloat16 and torch.equal(got, want)


def test_a_kernel_that_autocast_needs_is_the_one_that_is_looked_for(no_kernels, forked) -> None:
    done = forked(
        "import torch, gnaforge\n"
        "x = torch.randn(1, 9, 8, 1, 16)\n"
        "with torch.autocast('cpu', torch.bfloat16):\n"
        "    gnaforge.na2d(x, x, x, 3)\n"
    )
    assert 'gnaforge.register(rank=2, head_dim=16, dtype="bf16", arch="cpu"' in done.stderr
    assert "r2-bf16-dany" in done.stderr and "fp32" not in done.stderr


def test_mixed_types_outside_of_autocast_say_what_to_do() -> None:
    words = "query is float32, value is bfloat16; cast them to one, or call under torch.autocast, which does"
    with pytest.raises(ValueError, match=words):
        attend(Q, K, V.bfloat16())
