"""Calls with extra keys, with results in the caller's tensors, and joint attention: right, and as torch's own operators
are, whether they run, are traced, compiled, exported, cast, mapped or differentiated."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import gnaforge
import pytest
import torch
from gnaforge.runtime.problem import Problem
from gnaforge.runtime.reference import ExtraKeys, attention
from torch.func import jvp, vmap

pytestmark = pytest.mark.usefixtures("kernel_set")

INT = torch.int32
Q, K, V = (torch.randn(2, 9, 8, heads, 16) for heads in (4, 2, 2))
EXTRA_K, EXTRA_V = torch.randn(2, 7, 2, 16), torch.randn(2, 7, 2, 16)
LENGTHS = torch.tensor([3, 7], dtype=INT)
PLAIN = [3, 5, 1, 1, 1, 1, 0, 0]
NO_TANGENTS = "gnaforge: neighborhood attention has no forward-mode derivatives"

Call = Callable[..., Any]


def with_keys(q: Any, k: Any, v: Any, extra_k: Any, extra_v: Any, lengths: Any = None, **arguments: Any) -> Any:
    return gnaforge.na2d(
        *(q, k, v, (3, 5)),
        additional_keys=extra_k,
        additional_values=extra_v,
        additional_lengths=lengths,
        **arguments,
    )


def packed(q: Any, k: Any, v: Any, lengths: Any = None, **arguments: Any) -> Any:
    """Of image tensors whose first row of tokens is the text."""
    size = {"grid": (q.shape[1] - 1, q.shape[2]), "prefix": q.shape[2]}
    flat = (x.flatten(1, 2) for x in (q, k, v))
    return gnaforge.joint_attention(*flat, **size, kernel_size=(3, 5), lengths=lengths, **arguments)


def apart(q: Any, k: Any, v: Any, lengths: Any = None, **arguments: Any) -> Any:
    """The same of tensors apart; the image's result."""
    image, text = ((x[:, 1:] for x in (q, k, v)), (x[:, 0] for x in (q, k, v)))
    return gnaforge.joint_attention(*image, *text, kernel_size=(3, 5), text_lengths=lengths, **arguments)[0]


def keyed(q: Any, k: Any, v: Any, lengths: Any = None, **arguments: Any) -> Any:
    """Extra keys of the shape that the others' text has."""
    return with_keys(q, k, v, k[:, 0], v[:, 0], lengths, **arguments)


CALLS: list[Call] = [keyed, packed, apart]
NAMES = ["extra keys", "packed", "apart"]
each_call = pytest.mark.parametrize("call", CALLS, ids=NAMES)


@pytest.fixture(autouse=True)
def loaded(kernel_set: None) -> Iterator[None]:
    for dtype in (torch.float32, torch.bfloat16):
        tensors = [x.to(dtype) for x in (Q, K, V)]
        for call in CALLS:
            call(*tensors, LENGTHS)
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of what it deprecates
        yield


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize(
    "lengths", [None, LENGTHS, torch.tensor([0, 99], dtype=INT), torch.tensor([2, 9, 5, 9], dtype=INT)[::2]]
)
def test_additional_keys(rank: int, lengths: torch.Tensor | None) -> None:
    """Of NATTEN's names; they may be views, and lengths too."""
    tokens = (9, 8, 7)[:rank]
    q, k, v = (torch.randn(2, *tokens, heads, 16) for heads in (4, 2, 2))
    extra = torch.randn(2, 7, 2, 2, 16)
    extra_k, extra_v = extra.unbind(2)
    further = {"additional_keys": extra_k, "additional_values": extra_v, "additional_lengths": lengths}
    found = gnaforge.neighborhood_attention(q, k, v, 3, 2, **further, return_lse=True)
    problem = Problem.of_tensors(q, k, v, 3, 2, extra_tokens=(7,))
    exact = attention(problem, q, k, v, ExtraKeys(extra_k, extra_v, lengths))
    for got, want in zip(found, exact, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=2e-5)
    own = getattr(gnaforge, f"na{rank}d")(q, k, v, 3, 2, 1, False, None, extra_k, extra_v, additional_lengths=lengths)
    assert torch.equal(own, found[0])


def test_no_additional_keys_are_none() -> None:
    want = gnaforge.na2d(Q, K, V, (3, 5))
    torch.testing.assert_close(with_keys(Q, K, V, EXTRA_K[:, :0], EXTRA_V[:, :0]), want)
    torch.testing.assert_close(with_keys(Q, K, V, EXTRA_K, EXTRA_V, 0 * LENGTHS), want)


BAD = {
    "additional_keys must be a torch.Tensor, got list": (TypeError, {"additional_keys": [1], "additional_values": V}),
    "additional_lengths must be a torch.Tensor, got 3": (
        TypeError,
        {"additional_keys": EXTRA_K, "additional_values": EXTRA_V, "additional_lengths": 3},
    ),
    "additional_keys and additional_values come together": (ValueError, {"additional_values": EXTRA_V}),
    "additional_lengths come with additional_keys": (ValueError, {"additional_lengths": LENGTHS}),
    "additional_keys has shape [2, 7, 4, 16]; beside query and key it must be [2, tokens, 2, 16]": (
        ValueError,
        {"additional_keys": EXTRA_K.repeat(1, 1, 2, 1), "additional_values": EXTRA_V},
    ),
    "additional_values has shape [2, 6, 2, 16]; beside additional_keys it must be [2, 7, 2, 16]": (
        ValueError,
        {"additional_keys": EXTRA_K, "additional_values": EXTRA_V[:, :6]},
    ),
    "additional_lengths must be int32, got int64": (
        ValueError,
        {"additional_keys": EXTRA_K, "additional_values": EXTRA_V, "additional_lengths": LENGTHS.long()},
    ),
    "query is on cpu, additional_keys is on meta": (
        ValueError,
        {"additional_keys": EXTRA_K.to("meta"), "additional_values": EXTRA_V},
    ),
    "out must be a torch.Tensor, got True": (TypeError, {"out": True}),
    "out has shape [2, 9, 8, 2, 16]; beside query and value it must be [2, 9, 8, 4, 16]": (ValueError, {"out": V}),
    "out is float16; it must be float32 as query": (ValueError, {"out": Q.half()}),
    "out is on meta": (ValueError, {"out": Q.to("meta")}),
    "out has a last stride of 2; its channels must be contiguous": (
        ValueError,
        {"out": Q.repeat(1, 1, 1, 1, 2)[..., ::2]},
    ),
    "out has a stride of 0, so its elements overlap": (ValueError, {"out": Q[:1].expand(2, -1, -1, -1, -1)}),
    "out_lse has shape [2, 9, 8, 4, 16]; beside query it must be [2, 9, 8, 4]": (ValueError, {"out_lse": Q}),
    "out_lse is float16; it must be float32": (ValueError, {"out_lse": Q[..., 0].half()}),
}


@pytest.mark.parametrize("text", BAD)
def test_bad_calls(text: str) -> None:
    error, arguments = BAD[text]
    with pytest.raises(error) as caught:
        gnaforge.na2d(Q, K, V, (3, 5), **arguments)
    assert text in str(caught.value) and "\n" not in str(caught.value)


# results in the caller's tensors


@pytest.mark.parametrize(
    "extra", [{}, {"additional_keys": EXTRA_K, "additional_values": EXTRA_V}], ids=["", "extra keys"]
)
def test_results_are_written_into_slices(extra: dict[str, Any]) -> None:
    want, want_lse = gnaforge.na2d(Q, K, V, (3, 5), return_lse=True, **extra)
    memory, sums = torch.full((3, 12, 8, 6, 40), 7.0), torch.full((2, 4, 9, 8), 7.0)
    out, lse = memory[::2, 2:11, :, 1:5, 8:24], sums.permute(0, 2, 3, 1)
    got = gnaforge.na2d(Q, K, V, (3, 5), return_lse=True, out=out, out_lse=lse, **extra)
    assert got[0] is out and got[1] is lse and torch.equal(out, want) and torch.equal(lse, want_lse)
    out.fill_(7.0)
    assert (memory == 7.0).all()  # nothing beside was touched
    sums.fill_(7.0)
    only = gnaforge.neighborhood_attention(Q, K, V, (3, 5), out_lse=lse, **extra)
    assert torch.equal(only, want) and torch.equal(lse, want_lse)
    assert gnaforge.na2d(Q, K, V, (3, 5), out=out, **extra) is out and torch.equal(out, want)


def test_autograd_knows_that_results_were_written() -> None:
    """A tensor that a formula keeps for backward can't be overwritten unnoticed; and gradients are refused."""
    wanted = torch.ones_like(Q).requires_grad_()
    out = torch.zeros_like(Q)
    product = (wanted * out).sum()
    version = out._version
    gnaforge.na2d(Q, K, V, (3, 5), out=out)
    assert out._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    for arguments in ((wanted, K, V), (Q, K.clone().requires_grad_(), V)):
        with pytest.raises(RuntimeError, match="out= and out_lse= don't support automatic differentiation"):
            gnaforge.na2d(*arguments, (3, 5), out=out)
        with torch.no_grad():
            assert torch.equal(gnaforge.na2d(*arguments, (3, 5), out=out), gnaforge.na2d(*arguments, (3, 5)))
    with pytest.raises(RuntimeError, match="don't support automatic differentiation"):
        gnaforge.na2d(Q, K, V, (3, 5), out=torch.zeros_like(Q).requires_grad_())


def test_results_under_transformations() -> None:
    out = torch.empty_like(Q)
    with pytest.raises(NotImplementedError, match=r"out= and out_lse= can't be given under torch.vmap"):
        vmap(lambda q: gnaforge.na2d(q, K, V, (3, 5), out=out))(Q[None])
    with pytest.raises(NotImplementedError, match=NO_TANGENTS):
        jvp(lambda q: gnaforge.na2d(q, K, V, (3, 5), out=out), (Q,), (Q,))
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(ValueError, match="out is float32; it must be bfloat16 as query"):
            gnaforge.na2d(Q, K, V, (3, 5), out=out)
        half = gnaforge.na2d(Q, K, V, (3, 5), out=out.bfloat16())
        assert torch.equal(half, gnaforge.na2d(Q, K, V, (3, 5)))
        assert gnaforge.na2d(Q, K, V, (3, 5), out_lse=torch.empty(Q.shape[:-1])).dtype == torch.bfloat16


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_calls_write_results(backend: str) -> None:
    def call(q: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        gnaforge.na2d(q, q, q, (3, 5), out=memory[:, 1:])
        return memory * 2

    compiled = torch.compile(call, backend=backend, fullgraph=True)
    memories = [torch.zeros(2, 10, 8, 4, 16) for _ in range(2)]
    assert torch.equal(call(Q, memories[0]), compiled(Q, memories[1])) and torch.equal(*memories)
    assert memories[0][:, 1:].abs().max() > 0 and not memories[0][:, 0].any()


def test_traced_and_exported_calls_write_results() -> None:
    class Writing(torch.nn.Module):
        def forward(self, q: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
            return gnaforge.na2d(q, q, q, (3, 5), out=out) + 1

    want = gnaforge.na2d(Q, Q, Q, (3, 5))
    for make in (torch.jit.trace, lambda *arguments: torch.export.export(*arguments).module()):
        run, out = make(Writing(), (Q, torch.zeros_like(Q))), torch.zeros_like(Q)
        assert torch.equal(run(Q, out), want + 1) and torch.equal(out, want)


@pytest.mark.parametrize("call", [packed, apart], ids=NAMES[1:])
def test_joint_attention_writes_results(call: Call) -> None:
    """As `na2d` does: into slices, from compiled and exported calls; derivatives and vmap are refused."""
    text = {} if call is packed else {"text_out": torch.zeros(2, 8, 4, 16)}
    shape = (2, 72, 4, 16) if call is packed else (2, 8, 8, 4, 16)
    memory = torch.full((2, 9, 100, 4, 20), 7.0)
    views = [memory[:, 3, 20:92, :, 2:18] if call is packed else memory[:, 1:, 5:13, :, 2:18] for _ in range(2)]
    want = call(Q, K, V, LENGTHS)
    got = call(Q, K, V, LENGTHS, out=views[0], **text)
    assert got is views[0] and got.shape == shape and torch.equal(got, want)
    got.fill_(7.0)
    assert (memory == 7.0).all()  # nothing beside was touched

    class Writing(torch.nn.Module):
        def forward(self, q: torch.Tensor, out: torch.Tensor, *further: torch.Tensor) -> torch.Tensor:
            return call(q, K, V, LENGTHS, out=out, **dict(zip(text, further, strict=True))) + 1

    tensors = (Q, torch.zeros(shape), *text.values())
    exported = torch.export.export(Writing(), tensors).module()
    for run in (
        torch.compile(Writing(), fullgraph=True, backend="aot_eager"),
        exported,
        torch.jit.trace(Writing(), tensors),
    ):
        tensors[1].zero_()
        assert torch.equal(run(*tensors), want + 1) and torch.equal(tensors[1], want)
    with pytest.raises(RuntimeError, match="out= and out_lse= don't support automatic differentiation"):
        call(Q.clone().requires_grad_(), K, V, out=tensors[1])
    with pytest.raises(NotImplementedError, match=r"can't be given under torch.vmap"):
        vmap(lambda q: call(q, K, V, out=tensors[1]))(Q[None])
    version = tensors[1]._version
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(call(Q, K, V, out=tensors[1].bfloat16()), call(Q, K, V))
    call(Q, K, V, out=tensors[1])
    assert tensors[1]._version > version


JOINT_RESULTS: dict[str, tuple[Call, dict[str, Any]]] = {
    "out has shape [2, 71, 4, 16]; beside query and value it must be [2, 72, 4, 16]": (
        packed,
        {"out": torch.empty(2, 71, 4, 16)},
    ),
    "out_lse has shape [2, 72]; beside query it must be [2, 72, 4]": (packed, {"out_lse": torch.empty(2, 72)}),
    "out is bfloat16; it must be float32 as query": (packed, {"out": torch.empty(2, 72, 4, 16).bfloat16()}),
    "out has a last stride of 288; its channels": (packed, {"out": torch.empty(2, 16, 4, 72).transpose(1, 3)}),
    "text_out has shape [2, 9, 4, 16]; beside query and value it must be [2, 8, 4, 16]": (
        apart,
        {"text_out": torch.empty(2, 9, 4, 16)},
    ),
    "text_out_lse is float16; it must be float32": (apart, {"text_out_lse": torch.empty(2, 8, 4).half()}),
    "grid is for packed tokens, which hold the text; leave out text_out": (packed, {"text_out": torch.empty(0)}),
}


@pytest.mark.parametrize("text", JOINT_RESULTS)
def test_bad_results_of_joint_attention(text: str) -> None:
    """Refused in one form of words, traced or run."""
    call, arguments = JOINT_RESULTS[text]
    with pytest.raises(ValueError) as caught:
        call(Q, K, V, **arguments)
    assert text in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(Exception) as traced:
        torch.compile(lambda *x: call(*x, **arguments), fullgraph=True, backend="aot_eager")(Q, K, V)
    assert text in str(traced.value)
    with pytest.raises(TypeError, match=r"out must be a torch.Tensor, got 3"):
        call(Q, K, V, out=3)


# torch's machinery, for all of them


@each_call
@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["", "lengths"])
def test_two_graphs_serve_ten_resolutions(call: Call, lengths: torch.Tensor | None) -> None:
    graphs = 0

    def count(graph: Any, example_inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph

    compiled = torch.compile(lambda *x: call(*x, lengths) * 2, fullgraph=True, backend=count)
    for side in range(8, 18):
        tensors = [torch.randn(2, side, side + 3, heads, 16) for heads in (4, 2, 2)]
        torch.testing.assert_close(compiled(*tensors), call(*tensors, lengths) * 2)
    assert graphs <= 2


def test_grids_that_are_numbers_of_a_compiled_call() -> None:
    graphs = 0

    def count(graph: Any, example_inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph

    def call(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
        return gnaforge.joint_attention(x, x, x, grid=(height, width), suffix=6, kernel_size=3)

    compiled = torch.compile(call, fullgraph=True, backend=count)
    for side in range(8, 18):
        x = torch.randn(1, side * (side + 2) + 6, 2, 16)
        torch.testing.assert_close(compiled(x, side, side + 2), call(x, side, side + 2))
    assert graphs <= 2


@each_call
def test_inductor_and_export(call: Call) -> None:
    class Calling(torch.nn.Module):
        def forward(self, *tensors: torch.Tensor) -> Any:
            return call(*tensors, return_lse=call is packed)

    tensors = (Q, K, V, LENGTHS)
    want = call(*tensors, return_lse=call is packed)
    compiled = torch.compile(Calling(), fullgraph=True)
    dims = tuple(
        {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO} if x.dim() > 1 else {0: torch.export.Dim.AUTO}
        for x in tensors
    )
    exported = torch.export.export(Calling(), tensors, dynamic_shapes=(dims,))
    for run in (compiled, exported.module(), exported.run_decompositions().module()):
        torch.testing.assert_close(run(*tensors), want)
    if call is not packed:
        small = [x[:1, :6] if x.dim() > 1 else x[:1] for x in tensors]
        torch.testing.assert_close(exported.module()(*small), call(*small))


@each_call
def test_traced_by_jit(call: Call) -> None:
    tensors = (Q, K, V, LENGTHS)
    traced = torch.jit.trace(lambda *x: call(*x), tensors)
    assert torch.equal(traced(*tensors), call(*tensors))


@each_call
@pytest.mark.parametrize("to", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(call: Call, to: torch.dtype) -> None:
    """All tensors but lengths are cast."""
    want = call(*(x.to(to) for x in (Q, K, V)), LENGTHS)
    mixed = Q, K.to(to), V
    with torch.autocast("cpu", to):
        compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
        for run in (call, compiled):
            got = run(*mixed, LENGTHS)
            assert got.dtype == to and torch.equal(got, want)


@each_call
def test_vmap(call: Call) -> None:
    stacks = [torch.stack([x, 2 * x, 3 * x]) for x in (Q, K, V)]
    want = torch.stack([call(*entries) for entries in zip(*stacks, strict=True)])
    assert torch.equal(vmap(call)(*stacks), want)
    lengths = torch.stack([LENGTHS, LENGTHS - 1, LENGTHS + 1])
    want = torch.stack([call(*entries) for entries in zip(*stacks, lengths, strict=True)])
    assert torch.equal(vmap(call)(*stacks, lengths), want)
    want = torch.stack([call(q, K, V, LENGTHS) for q in stacks[0]])
    assert torch.equal(vmap(lambda q: call(q, K, V, LENGTHS))(stacks[0]), want)
    moved = vmap(call, in_dims=(5, 1, 0, None), out_dims=1)(
        stacks[0].movedim(0, 5), stacks[1].movedim(0, 1), stacks[2], None
    )
    torch.testing.assert_close(
        moved.movedim(1, 0), torch.stack([call(*entries) for entries in zip(*stacks, strict=True)])
    )


@pytest.mark.parametrize("call", [packed, apart])
def test_tangents_of_joint_attention_are_refused(call: Call) -> None:
    with pytest.raises(NotImplementedError, match=NO_TANGENTS):
        jvp(lambda k: call(Q, k, V, LENGTHS), (K,), (K,))


TEXT = [x[:, 0] for x in (Q, K, V)]
OPERATORS: dict[str, tuple[str, tuple[Any, ...], dict[str, Any]]] = {
    "forward": ("forward", (Q, K, V, PLAIN, None, "", EXTRA_K, EXTRA_V, LENGTHS), {}),
    "forward_no_grad": ("forward_no_grad", (Q, K, V, PLAIN, None, "", EXTRA_K, EXTRA_V, LENGTHS), {}),
    "forward_out": (
        "forward_out",
        (Q, K, V, PLAIN),
        {"output": torch.empty_like(Q), "output_lse": torch.empty(Q.shape[:-1])},
    ),
    "forward_out into slices": (
        "forward_out",
        (Q, K, V, PLAIN, 0.5, "", EXTRA_K, EXTRA_V, LENGTHS),
        {"output": torch.empty(2, 9, 8, 4, 32)[..., 16:], "output_lse": torch.empty(2, 8, 9, 4).transpose(1, 2)},
    ),
    "joint": ("joint", (Q, K, V, PLAIN, None, "", "", *TEXT, LENGTHS, *TEXT), {}),
    "joint without text": ("joint", (Q, K, V, PLAIN), {}),
    "joint_apart": ("joint_apart", (Q, K, V, PLAIN, 0.5, "", "", *TEXT, LENGTHS), {}),
    "joint_out": (
        "joint_out",
        (Q, K, V, PLAIN, None, "", "", *TEXT, LENGTHS),
        {"output": torch.empty(2, 80, 4, 20)[..., 4:], "output_lse": torch.empty(2, 80, 4)},
    ),
    "joint_apart_out": (
        "joint_apart_out",
        (Q, K, V, PLAIN, 0.5, "", "", *TEXT, LENGTHS),
        {
            "output": torch.empty_like(Q),
            "output_lse": torch.empty(Q.shape[:-1]),
            "output_text": torch.empty_like(TEXT[0]),
            "output_text_lse": torch.empty(2, 4, 8).mT,
        },
    ),
}


@pytest.mark.parametrize("case", OPERATORS)
def test_opcheck(case: str) -> None:
    """All of its tests."""
    name, arguments, results = OPERATORS[case]
    operator = getattr(torch.ops.gnaforge, name).default
    assert set(torch.library.opcheck(operator, arguments, results).values()) == {"SUCCESS"}


@each_call
def test_meta_tensors(call: Call) -> None:
    got = call(*(x.to("meta") for x in (Q, K, V, LENGTHS)))
    want = call(Q, K, V, LENGTHS)
    assert got.shape == want.shape and got.dtype == want.dtype and got.stride() == want.stride()
