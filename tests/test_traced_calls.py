"""Calls that can't work: refused in the same words, whether they run or torch only looks at them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import gnaforge
import pytest
import torch
from gnaforge.runtime.errors import NoKernelError
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode


@pytest.fixture(autouse=True)
def operators(kernel_set: None) -> Any:
    """The operators, with a kernel loaded for whatever is called here without Python around it."""
    for x in (X, HALF, X[:, :, 0], X[:, :, None]):
        gnaforge.neighborhood_attention(x, x, x, 1)
    return torch.ops.gnaforge


Call = Callable[..., Any]


class Calling(torch.nn.Module):
    """A model that torch.export takes."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.call = call

    def forward(self, *tensors: torch.Tensor) -> Any:
        return self.call(*tensors)


def run_eagerly(call: Call, *tensors: torch.Tensor) -> Any:
    return call(*tensors)


def run_fake(call: Call, *tensors: torch.Tensor) -> Any:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        return call(*map(mode.from_tensor, tensors))


def run_meta(call: Call, *tensors: torch.Tensor) -> Any:
    return call(*(tensor.to("meta") for tensor in tensors))


def run_compiled(call: Call, *tensors: torch.Tensor) -> Any:
    torch._dynamo.reset()
    return torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=True)(*tensors)


def run_exported(call: Call, *tensors: torch.Tensor) -> Any:
    dynamic = tuple(dict.fromkeys(range(tensor.dim() - 1), torch.export.Dim.AUTO) for tensor in tensors)
    return torch.export.export(Calling(call), tensors, dynamic_shapes=(dynamic,)).module()(*tensors)


WAYS = [run_fake, run_meta, run_compiled, run_exported]


def refusal(way: Callable[..., Any], call: Call, *tensors: torch.Tensor) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(Exception) as caught:
            way(call, *tensors)
    return str(caught.value).replace("\\'", "'")  # torch.compile cites ours


def attend(**arguments: Any) -> Call:
    return lambda q, k, v: gnaforge.na2d(q, k, v, **{"kernel_size": 3, **arguments})


X = torch.randn(2, 9, 8, 4, 16)
HALF = X.bfloat16()
PLAIN = [3, 3, 1, 1, 1, 1, 0, 0]
LONG = [*PLAIN, 0, 0, 0, 0, 9, 8, 0, 0, 0, 0, 0, 0]
BAD = {
    "kernel_size 500 times dilation 1 exceeds the 9 tokens along dim 0": (attend(kernel_size=500), X, X, X),
    "kernel_size 5 times dilation 2 exceeds the 8 tokens along dim 1": (
        attend(kernel_size=(3, 5), dilation=2),
        X,
        X,
        X,
    ),
    "kernel_size is 0 along dim 0": (attend(kernel_size=0), X, X, X),
    "kernel_size is -3 along dim 1": (attend(kernel_size=(3, -3)), X, X, X),
    "stride is 4 along dim 0; it must be 1 to kernel_size (3)": (attend(stride=4), X, X, X),
    "stride is 0 along dim 1": (attend(stride=(1, 0)), X, X, X),
    "dilation is 0 along dim 0": (attend(dilation=0), X, X, X),
    "kernel_size along dim 0 is beyond 64 bits": (attend(kernel_size=2**70), X, X, X),
    "scale is nan; it must be finite": (attend(scale=float("nan")), X, X, X),
    "key has shape [1, 9, 8, 4, 16], query has [2, 9, 8, 4, 16]": (attend(), X, X[:1], X),
    "value has shape [2, 9, 7, 4, 16], query has [2, 9, 8, 4, 16]": (attend(), X, X, X[:, :, :7]),
    "query must be [batch, 2 token dims, heads, head_dim], got shape [9, 8, 4, 16]": (attend(), X[0], X[0], X[0]),
    "key must be [batch, 2 token dims, heads, head_dim], got shape [2, 9, 8, 64]": (attend(), X, X.flatten(3), X),
    "key has head_dim 8, query has 16": (attend(), X, X[..., :8], X),
    "4 query heads can't be shared among 3 key/value heads": (attend(), X, X[..., :3, :], X[..., :3, :]),
    "4 query heads can't be shared among 8 key/value heads": (attend(), X, *[torch.cat([X, X], 3)] * 2),
    "key has 4 heads, value has 2": (attend(), X, X, X[..., :2, :]),
    "query must be float32, bfloat16 or float16, got float64": (attend(), *[X.double()] * 3),
    "query must be float32, bfloat16 or float16, got int64": (attend(), *[X.long()] * 3),
    "query must be float32, bfloat16 or float16, got complex64": (attend(), *[X + 0j] * 3),
    "query is float32, value is bfloat16; cast them to one, or call under torch.autocast": (attend(), X, X, HALF),
    "query is bfloat16, key is float32; cast them to one": (attend(), HALF, X, X),
    "head_dim: 12 is no such number: cpu kernels take multiples of 8 up to 256": (attend(), *[X[..., :12]] * 3),
    "head_dim: 264 is too large; cpu kernels take": (
        attend(),
        *[torch.randn(1, 9, 8, 1, 264)] * 3,
    ),
    # the operator's own arguments
    "got 7 numbers": (lambda q, k, v: torch.ops.gnaforge.forward(q, k, v, [3] * 7), X, X, X),
    "edge is 3 along dim 0": (lambda q, k, v: torch.ops.gnaforge.forward(q, k, v, [*PLAIN, 3, *LONG[9:]]), X, X, X),
    "is_causal is 3 along dim 1": (
        lambda q, k, v: torch.ops.gnaforge.forward(q, k, v, [*PLAIN[:7], 3]),
        *[X] * 3,
    ),
    "of the grid along dim 0, which the key tensor lacks: it has": (
        lambda q, k, v: torch.ops.gnaforge.forward(q, k, v, LONG),
        X,
        *[X[:, :5]] * 2,
    ),
    "additional_keys and additional_values come together": (
        lambda q, k, v: gnaforge.na2d(q, k, v, 3, additional_keys=q[:, 0]),
        *[X] * 3,
    ),
    "additional_lengths come with additional_keys and additional_values": (
        lambda q, k, v: gnaforge.na2d(q, k, v, 3, additional_lengths=q[:, 0, 0, 0, 0].int()),
        *[X] * 3,
    ),
    "additional_keys has shape [2, 9, 8, 4, 16]; beside query and key it must be [2, tokens, 4, 16]": (
        lambda q, k, v: gnaforge.na2d(q, k, v, 3, additional_keys=k, additional_values=v),
        *[X] * 3,
    ),
    "query is float32, additional_values is bfloat16; cast them to one": (
        lambda q, k, v: gnaforge.na2d(q, k, v, 3, additional_keys=k[:, 0], additional_values=v[:, 0].bfloat16()),
        *[X] * 3,
    ),
    "additional_lengths has shape [1]; beside query it must be [2]": (
        lambda q, k, v: gnaforge.na2d(
            *(q, k, v, 3),
            additional_keys=k[:, 0],
            additional_values=v[:, 0],
            additional_lengths=q[:1, 0, 0, 0, 0].int(),
        ),
        *[X] * 3,
    ),
    "out has shape [2, 9, 8, 4, 8]; beside query and value it must be [2, 9, 8, 4, 16]": (
        lambda q, k, v: gnaforge.na2d(q, k, v, 3, out=torch.empty_like(v[..., :8])),
        *[X] * 3,
    ),
    "out_lse has shape [2, 9, 8, 4, 16]; beside query it must be [2, 9, 8, 4]": (
        lambda q, k, v: gnaforge.na2d(q, k, v, 3, out_lse=torch.empty_like(v)),
        *[X] * 3,
    ),
    "out is bfloat16; it must be float32 as query": (
        lambda q, k, v: gnaforge.na2d(q, k, v, 3, out=torch.empty_like(v).bfloat16()),
        *[X] * 3,
    ),
    "out_lse is bfloat16; it must be float32": (
        lambda q, k, v: gnaforge.na2d(q, k, v, 3, out_lse=v[..., 0].bfloat16()),
        *[X] * 3,
    ),
    "out has a last stride of 2; its channels must be contiguous": (
        lambda q, k, v: gnaforge.na2d(q, k, v, 3, out=v.repeat(1, 1, 1, 1, 2)[..., ::2]),
        *[X] * 3,
    ),
    "text_q has shape [2, 8, 2, 16]; beside text_k it must be [2, 8, 4, 16]": (
        lambda q, k, v: torch.ops.gnaforge.joint_apart(q, k, v, PLAIN, None, "", "", q[:, 0, :, :2], k[:, 0], v[:, 0]),
        *[X] * 3,
    ),
    "text_v has shape [2, 8, 4, 8]; beside text_k it must be [2, 8, 4, 16]": (
        lambda q, k, v: gnaforge.joint_attention(q, k, v, q[:, 0], k[:, 0], v[:, 0, :, :, :8], kernel_size=3),
        *[X] * 3,
    ),
    "query is float32, text_k is bfloat16; cast them to one": (
        lambda q, k, v: gnaforge.joint_attention(q, k, v, q[:, 0], k[:, 0].bfloat16(), v[:, 0], kernel_size=3),
        *[X] * 3,
    ),
    "text_q is bfloat16, key is float32; cast them to one": (
        lambda q, k, v: gnaforge.joint_attention(q, k, v, q[:, 0].bfloat16(), k[:, 0], v[:, 0], kernel_size=3),
        *[X] * 3,
    ),
    "text_lengths must be int32, got float32": (
        lambda q, k, v: gnaforge.joint_attention(
            *(q, k, v, q[:, 0], k[:, 0], v[:, 0]), kernel_size=3, text_lengths=q[:, 0, 0, 0, 0]
        ),
        *[X] * 3,
    ),
    "q has 72 tokens, and a prefix of 8, 63 of the grid 9x7 and a suffix of 0 make others": (
        lambda q, k, v: gnaforge.joint_attention(
            *(x.flatten(1, 2) for x in (q, k, v)), kernel_size=3, grid=(9, 7), prefix=8
        ),
        *[X] * 3,
    ),
    "lengths of the suffix has shape [1]; beside query it must be [2]": (
        lambda q, k, v: gnaforge.joint_attention(
            *(x.flatten(1, 2) for x in (q, k, v)),
            kernel_size=3,
            grid=(8, 8),
            suffix=8,
            lengths=q[:1, 0, 0, 0, 0].int(),
        ),
        *[X] * 3,
    ),
    "additional_lengths must be int32, got float32": (
        lambda q, k, v: torch.ops.gnaforge.forward(q, k, v, PLAIN, None, "", q[:, 0], v[:, 0], v[:, 0, 0, 0, 0]),
        *[X] * 3,
    ),
    "additional_values has shape [2, 8, 4, 8]; beside additional_keys it must be [2, 8, 4, 16]": (
        lambda q, k, v: torch.ops.gnaforge.forward(q, k, v, PLAIN, None, "", q[:, 0], v[:, 0, :, :, :8]),
        *[X] * 3,
    ),
    "kernel: gna_forward-cpu-r2-fp32-d8-q9x9-kv8x8: head_dim is 8, not 16": (
        attend(kernel="gna_forward-cpu-r2-fp32-d8-q9x9-kv8x8"),
        *[X] * 3,
    ),
}
NEEDS_A_DEVICE = {text for text in BAD if "cpu kernels" in text or "feature" in text or "kernel:" in text}


@pytest.mark.parametrize("text", BAD)
def test_bad_calls_are_refused_in_the_same_words_everywhere(text: str) -> None:
    call, *tensors = BAD[text]
    eager = refusal(run_eagerly, call, *tensors)
    assert text in eager
    for way in WAYS:
        if way is run_meta and text in NEEDS_A_DEVICE:
            continue  # kernels for meta tensors are nobody's
        assert text in refusal(way, call, *tensors), way.__name__


DEVICES = {
    "key is on meta": ("cpu", "meta", "cpu"),
    "value is on meta": ("cpu", "cpu", "meta"),
    "query is on meta, key is on cpu": ("meta", "cpu", "cpu"),
}


@pytest.mark.parametrize("text", DEVICES)
def test_devices_that_differ_are_refused_everywhere(text: str) -> None:
    tensors = [X.to(device) for device in DEVICES[text]]
    words = f"query, key and value must be on one device: query is on {DEVICES[text][0]}, "
    for way in (run_eagerly, *(way for way in WAYS if way is not run_meta)):
        said = refusal(way, attend(), *tensors)
        assert words in said and text in said, way.__name__


ABSENT = [
    ("cuda:0", "cuda:0", "cpu"),
    ("cpu", "cuda:0", "cpu"),
    ("cuda:1", "cuda:0", "cuda:1"),
    ("cpu", "xpu:0", "cpu"),
]


@pytest.mark.parametrize("devices", ABSENT, ids=" ".join)
def test_devices_that_are_not_here_are_told_apart_too(operators: Any, devices: tuple[str, ...]) -> None:
    """Fake tensors claim to be on them."""
    other = next(i for i in (1, 2) if devices[i] != devices[0])
    with FakeTensorMode() as mode:

        def pretend(shape: tuple[int, ...], device: str) -> torch.Tensor:
            return FakeTensor(mode, torch.empty(shape, device="meta"), torch.device(device))

        tensors = [pretend(X.shape, device) for device in devices]
        extra = [pretend((2, 8, 4, 16), devices[i]) for i in (0, other)]
        calls = {
            "na2d": lambda: gnaforge.na2d(*tensors, 3),
            "forward": lambda: operators.forward(*tensors, PLAIN),
            "forward_no_grad": lambda: operators.forward_no_grad(*tensors, PLAIN),
            "extra": lambda: operators.forward(*tensors[:1] * 3, PLAIN, None, "", *extra),
        }
        for name, call in calls.items():
            with pytest.raises(ValueError) as caught:
                call()
            wrong = "additional_values" if name == "extra" else ("query", "key", "value")[other]
            words = f"query is on {devices[0]}, {wrong} is on {devices[other]}"
            assert words in str(caught.value), name


@pytest.mark.skipif(torch.cuda.is_available(), reason="is for machines without a GPU")
def test_fake_tensors_of_a_gpu_that_is_not_here_say_so(operators: Any) -> None:
    """Which kernels it could run, nobody knows; forward and backward alike."""
    with FakeTensorMode() as mode:
        q = FakeTensor(mode, torch.empty(2, 8, 9, 4, 64, dtype=torch.bfloat16, device="meta"), torch.device("cuda"))
        lse = FakeTensor(mode, torch.empty(2, 8, 9, 4, device="meta"), torch.device("cuda"))
        for call in (
            lambda: operators.forward(q, q, q, PLAIN),
            lambda: operators.backward(q, lse, q, q, q, q, lse, PLAIN, None, 7),
        ):
            with pytest.raises(NoKernelError, match="torch finds no GPU on this machine"):
                call()


def test_a_graph_for_any_size_is_refused_by_the_core_when_it_runs() -> None:
    """What isn't known while torch traces is judged then, in the same words."""

    def call(q: torch.Tensor) -> Any:
        return gnaforge.na2d(q, q, q, 5)

    small = torch.randn(2, 4, 8, 4, 16)
    words = refusal(run_eagerly, call, small)
    torch._dynamo.reset()
    compiled = torch.compile(call, backend="eager", fullgraph=True, dynamic=True)
    dims = dict.fromkeys((0, 1, 2), torch.export.Dim.DYNAMIC)
    exported = torch.export.export(Calling(call), (X,), dynamic_shapes=((dims,),)).module()
    for run in (compiled, exported):
        assert torch.equal(run(X), call(X)) and torch.equal(run(X[:1, :6]), call(X[:1, :6]))
        assert words in refusal(lambda call, *tensors: call(*tensors), run, small)


def test_sizes_that_nobody_knows_are_left_to_the_run() -> None:
    """Of a graph whose batch and tokens depend on data; what is known beside them is judged all the same."""

    def call(q: torch.Tensor, keep: torch.Tensor, window: int = 3) -> torch.Tensor:
        rows = q[keep.nonzero().flatten()]
        return gnaforge.na2d(rows, rows, rows, window)

    keep = torch.tensor([True, False])
    exported = torch.export.export(Calling(call), (X, keep)).module()
    for mask in (keep, ~keep, keep | True):
        assert torch.equal(exported(X, mask), call(X, mask))
    words = "kernel_size 11 times dilation 1 exceeds the 9 tokens along dim 0"
    assert words in refusal(run_exported, lambda q, keep: call(q, keep, 11), X, keep)


def test_unknown_sizes_are_what_they_must_be_beside_the_known() -> None:
    from gnaforge.runtime.given import failure_of_call
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        assert mode.shape_env is not None
        any_size = mode.shape_env.create_unbacked_symint

        def failure(query: tuple[Any, ...], key: tuple[Any, ...], pattern: list[int] = PLAIN) -> str:
            found = failure_of_call([torch.empty(query), *[torch.empty(key)] * 2], pattern, choose=True)
            return "" if found is None else found.reason

        batch, heads, tokens = any_size(), any_size(), any_size()
        assert failure((batch, 9, 8, 4, 16), (batch, 9, 8, 2, 16)) == ""
        assert failure((batch, 9, 8, 4, 16), (5, 9, 8, 2, 16)) == ""
        assert failure((2, tokens, 8, heads, 16), (2, tokens, 8, 3, 16), [7, 7, 1, 1, 9, 1, 0, 0]) == ""
        assert "kernel_size 9 " in failure((2, tokens, 8, 4, 16), (2, tokens, 8, 4, 16), [9, 9, 1, 1, 1, 1, 0, 0])
        assert "4 query heads can't be shared among 3" in failure((batch, 9, 8, 4, 16), (batch, 9, 8, 3, 16))
        assert "key has head_dim 8" in failure((batch, 9, 8, 4, 16), (batch, 9, 8, 4, 8))
        assert failure((2, tokens, 8, 4, 16), (2, 5, 8, 4, 16), LONG) == ""  # only the run can tell


def test_what_is_right_passes_everywhere() -> None:
    """So that no way refuses everything."""
    want = gnaforge.na2d(X, X, X, (3, 5), 2, is_causal=(True, False), scale=0.5)
    call = attend(kernel_size=(3, 5), stride=2, is_causal=(True, False), scale=0.5)
    for way in WAYS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            got = way(call, X, X, X)
        assert got.shape == want.shape and got.dtype == want.dtype and got.stride() == want.stride()
        if way not in (run_fake, run_meta):
            torch.testing.assert_close(got, want)
    empty = X[:0]
    for way in WAYS[:3]:
        assert way(attend(), empty, empty, empty).shape == empty.shape


OPCHECKED = {
    "plain": (X, X, X, PLAIN),
    "grouped heads, other value channels": (X, X[..., :2, :], X[..., :2, :8], [3, 5, 1, 1, 2, 1, 1, 0]),
    "strided": (X.transpose(1, 2), X.flip(1).transpose(1, 2), X.transpose(1, 2), PLAIN),
    "empty": (X[:0], X[:0], X[:0], PLAIN),
    "bf16": (HALF, HALF, HALF, PLAIN),
    "3 dimensions": (*[X[:, :, None]] * 3, [3, 1, 3, *[1] * 6, 0, 0, 0]),
    "extra keys": (X, X, X, PLAIN, 0.5, "", X[:, 0], X[:, 1], torch.tensor([3, 0], dtype=torch.int32)),
}


@pytest.mark.parametrize("name", ["forward", "forward_no_grad"])
@pytest.mark.parametrize("case", OPCHECKED)
def test_opcheck(operators: Any, name: str, case: str) -> None:
    """All of its tests."""
    operator = getattr(operators, name).default
    assert set(torch.library.opcheck(operator, OPCHECKED[case]).values()) == {"SUCCESS"}


def test_opcheck_with_gradients(operators: Any) -> None:
    arguments = (X.clone().requires_grad_(), X, X.clone().requires_grad_(), PLAIN, 0.5, "")
    assert set(torch.library.opcheck(operators.forward.default, arguments).values()) == {"SUCCESS"}


@pytest.mark.parametrize("wanted", [1, 4, 6, 7])
def test_opcheck_of_backward(operators: Any, wanted: int) -> None:
    x = X.detach()
    out, lse = operators.forward_no_grad(x, x, x, PLAIN)
    for grad_lse in (None, torch.randn_like(lse)):
        arguments = (torch.randn_like(out), grad_lse, x, x, x, out, lse, PLAIN, None, wanted)
        assert set(torch.library.opcheck(operators.backward.default, arguments).values()) == {"SUCCESS"}


@pytest.mark.parametrize("shape", [(0, 9, 8, 4, 16), (2, 9, 8, 0, 16), (0, 9, 8, 0, 16), (2, 9, 0, 4, 16)])
def test_nothing_to_compute_is_no_reason_to_take_everything(shape: tuple[int, ...]) -> None:
    """Tensors without elements keep the rules that others keep; and those that do pass."""
    empty = torch.empty(shape)
    bad = {
        "kernel_size is 0 along dim 1": {"kernel_size": (3, 0)},
        "kernel_size 500 times dilation 1 exceeds the 9 tokens": {"kernel_size": (500, 3)},
        "stride is 4 along dim 0; it must be 1 to kernel_size (3)": {"stride": 4},
        "kernel_size 3 times dilation 9 exceeds the 9 tokens along dim 0": {"dilation": (9, 1)},
        "scale is inf; it must be finite": {"scale": float("inf")},
    }
    for way in (run_eagerly, run_fake, run_meta, run_compiled):
        for text, arguments in bad.items():
            assert text in refusal(way, attend(**arguments), empty, empty, empty), way.__name__
        assert "key has head_dim 8" in refusal(way, attend(), empty, empty[..., :8], empty)
        assert "value is bfloat16" in refusal(way, attend(), empty, empty, empty.bfloat16())
        out, lse = way(attend(return_lse=True), empty, empty, empty)
        assert out.shape == shape and lse.shape == shape[:-1] and lse.dtype == torch.float32
