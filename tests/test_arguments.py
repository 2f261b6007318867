"""Arguments of calls and modules: what stands for a number, and one clear line for what doesn't."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gnaforge
import numpy as np
import pytest
import torch
from kernel_set import cpu_config

pytestmark = pytest.mark.usefixtures("kernel_set")

X = torch.randn(1, 8, 8, 4, 16)


class Index:
    """An integer of somebody's own."""

    def __repr__(self) -> str:
        return "Index"

    def __index__(self) -> int:
        return 3


@pytest.mark.parametrize("three", [np.int64(3), np.int32(3), np.uint8(3), Index(), torch.tensor(3)], ids=repr)
def test_whatever_is_an_integer_stands_for_one(three: Any) -> None:
    want = gnaforge.na2d(X, X, X, 5, 3, 1)
    assert torch.equal(gnaforge.na2d(X, X, X, (np.int64(5), 5), three), want)
    assert torch.equal(gnaforge.na2d(X, X, X, 5, (three, 3)), want)
    with pytest.raises(ValueError, match="kernel_size 3 times dilation 3 exceeds the 8 tokens"):
        gnaforge.na2d(X, X, X, 3, 1, three)
    module = gnaforge.NeighborhoodAttention2D(np.int64(64), 4, three, dilation=[1, np.int64(2)])
    with torch.no_grad():
        assert module(X.flatten(3)).shape == (1, 8, 8, 64)


def test_numbers_and_bools_of_numpy() -> None:
    want = gnaforge.na2d(X, X, X, 3, is_causal=True, scale=0.5)
    for scale in (np.float32(0.5), np.float64(0.5), np.float16(0.5)):
        assert torch.equal(gnaforge.na2d(X, X, X, 3, is_causal=np.True_, scale=scale), want)
    assert torch.equal(gnaforge.na2d(X, X, X, 3, is_causal=(np.True_, True), scale=np.float32(0.5)), want)
    assert torch.equal(gnaforge.na2d(X, X, X, 3, scale=1), gnaforge.na2d(X, X, X, 3, scale=1.0))


def test_such_numbers_in_graphs() -> None:
    """NumPy's are torch.compile's tensors, so a module keeps none."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: gnaforge.na2d(x, x, x, (5, 3), 2, scale=1), fullgraph=True, backend="eager")
    assert torch.equal(compiled(X), gnaforge.na2d(X, X, X, (5, 3), 2, scale=1.0))
    module = gnaforge.NeighborhoodAttention2D(np.int64(64), 4, np.int64(3), (np.int64(2), 1), is_causal=np.True_)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(X.flatten(3)), module(X.flatten(3)))


BAD: dict[str, tuple[type[Exception], Callable[[], Any]]] = {
    "key must be a torch.Tensor, got None": (TypeError, lambda: gnaforge.na2d(X, None, X, 3)),
    "value must be a torch.Tensor, got ndarray": (TypeError, lambda: gnaforge.na2d(X, X, X.numpy(), 3)),
    "query must be a torch.Tensor, got list": (TypeError, lambda: gnaforge.na2d([X], X, X, 3)),
    "query must be a torch.Tensor, got ndarray": (
        TypeError,
        lambda: gnaforge.neighborhood_attention(X.numpy(), X, X, 3),
    ),
    "key must be a torch.Tensor, got 5": (TypeError, lambda: torch.no_grad()(gnaforge.na2d)(X, 5, X, 3)),
    "value must be a torch.Tensor, got None": (TypeError, lambda: gnaforge.na2d(X, X, None, 3, q_tile_shape=(8, 8))),
    "kernel must be a KernelConfig or a kernel's key, got 5": (TypeError, lambda: gnaforge.na2d(X, X, X, 3, kernel=5)),
    "'no key' is no kernel key": (ValueError, lambda: gnaforge.na2d(X, X, X, 3, kernel="no key")),
    "q_tile_shape must be int or a sequence of 2, got (8, 1.5)": (
        TypeError,
        lambda: gnaforge.na2d(X, X, X, 3, q_tile_shape=(8, 1.5)),
    ),
    "kv_tile_shape: (8, 8, 8) has 3 entries for 2 dimensions": (
        ValueError,
        lambda: gnaforge.na2d(X, X, X, 3, kv_tile_shape=(8, 8, 8)),
    ),
    "kernel_size along dim 0 is beyond 64 bits": (ValueError, lambda: gnaforge.na2d(X, X, X, 2**70)),
    "stride along dim 1 is beyond 64 bits": (ValueError, lambda: gnaforge.na2d(X, X, X, 3, (1, 2**63))),
    "dilation along dim 0 is beyond 64 bits": (ValueError, lambda: gnaforge.na2d(X, X, X, 3, 1, -(2**64))),
    "dilation 9223372036854775807 exceeds": (ValueError, lambda: gnaforge.na2d(X, X, X, 3, 1, 2**63 - 1)),
    "scale must be a number, got 'half'": (TypeError, lambda: gnaforge.na2d(X, X, X, 3, scale="half")),
    "scale must be a number, got True": (TypeError, lambda: gnaforge.na2d(X, X, X, 3, scale=True)),
    "scale must be a number, got Tensor": (TypeError, lambda: gnaforge.na2d(X, X, X, 3, scale=torch.ones(1))),
    "scale must be a number, got complex": (TypeError, lambda: gnaforge.na2d(X, X, X, 3, scale=1j)),
    "scale is too large for a float": (ValueError, lambda: gnaforge.na2d(X, X, X, 3, scale=10**400)),
    "scale is inf; it must be finite": (ValueError, lambda: gnaforge.na2d(X, X, X, 3, scale=float("inf"))),
    "scale is nan; it must be finite": (ValueError, lambda: gnaforge.na2d(X, X, X, 3, scale=float("nan"))),
    "kernel_size must be int or a sequence of 2, got True": (TypeError, lambda: gnaforge.na2d(X, X, X, True)),
    "stride must be int or a sequence of 2, got (1, True)": (TypeError, lambda: gnaforge.na2d(X, X, X, 3, (1, True))),
    "dilation must be int or a sequence of 2, got np.True_": (
        TypeError,
        lambda: gnaforge.na2d(X, X, X, 3, 1, np.True_),
    ),
    "kernel_size must be int or a sequence of 2, got '3'": (TypeError, lambda: gnaforge.na2d(X, X, X, "3")),
    "kernel_size must be int or a sequence of 2, got 3.0": (TypeError, lambda: gnaforge.na2d(X, X, X, 3.0)),
    "kernel_size must be int or a sequence of 2, got None": (TypeError, lambda: gnaforge.na2d(X, X, X, None)),
    "kernel_size must be int or a sequence of 2, got array([3, 3])": (
        TypeError,
        lambda: gnaforge.na2d(X, X, X, np.array([3, 3])),
    ),
    "is_causal must be bool, 'token', 'block' or a sequence of 2, got 1": (
        TypeError,
        lambda: gnaforge.na2d(X, X, X, 3, is_causal=1),
    ),
    "is_causal is 'no'; it must be a bool, 'token' or 'block'": (
        ValueError,
        lambda: gnaforge.na2d(X, X, X, 3, is_causal=(True, "no")),
    ),
    "is_causal: (True,) has 1 entry for 2 dimensions": (
        ValueError,
        lambda: gnaforge.na2d(X, X, X, 3, is_causal=(True,)),
    ),
}


@pytest.mark.parametrize("text", BAD)
def test_bad_arguments(text: str) -> None:
    error, call = BAD[text]
    with pytest.raises(error) as caught:
        call()
    assert text in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_a_kernel() -> None:
    config = cpu_config(2, "fp32", (8, 8), (8, 8))
    want = gnaforge.na2d(X, X, X, 3, kernel=config.key)
    assert torch.equal(gnaforge.na2d(X, X, X, 3, kernel=config), want)
    assert torch.equal(gnaforge.na2d(X, X, X, 3, kernel=gnaforge.registry[config]), want)
    assert torch.equal(gnaforge.na2d(X, X, X, 3, q_tile_shape=np.int64(8), kv_tile_shape=[8, 8]), want)


MODULE = {"embed_dim": 32, "num_heads": 4, "kernel_size": 3}
BAD_MODULES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"num_heads": 5}, ValueError, "num_heads (5) must divide embed_dim (32)"),
    ({"num_heads": 0}, ValueError, "num_heads is 0; it must be at least 1"),
    ({"num_heads": -4}, ValueError, "num_heads is -4; it must be at least 1"),
    ({"embed_dim": 0}, ValueError, "embed_dim is 0; it must be at least 1"),
    ({"embed_dim": 32.0}, TypeError, "embed_dim must be int"),
    ({"num_heads": True}, TypeError, "num_heads must be int"),
    ({"kernel_size": 0}, ValueError, "kernel_size: 0 is not a positive integer (dimension 0)"),
    ({"kernel_size": (3, -1)}, ValueError, "kernel_size: -1 is not a positive integer (dimension 1)"),
    ({"kernel_size": (3, 3, 3)}, ValueError, "kernel_size: (3, 3, 3) has 3 entries for 2 dimensions"),
    ({"kernel_size": 2**40}, ValueError, "kernel_size: 1099511627776 is more than 1073741823"),
    ({"kernel_size": "3"}, TypeError, "kernel_size must be int or a sequence of 2, got '3'"),
    ({"stride": 4}, ValueError, "stride: 4 is more than the window of dimension 0; at most 3"),
    ({"stride": (1, 0)}, ValueError, "stride: 0 is not a positive integer (dimension 1)"),
    ({"dilation": 0}, ValueError, "dilation: 0 is not a positive integer"),
    ({"dilation": True}, TypeError, "dilation must be int"),
    ({"is_causal": "yes"}, ValueError, "is_causal is 'yes'; it must be a bool, 'token' or 'block'"),
    ({"is_causal": 1}, TypeError, "is_causal must be bool, 'token', 'block' or a sequence of 2, got 1"),
    ({"is_causal": (True, False, True)}, ValueError, "is_causal: (True, False, True) has 3 entries for 2 dimensions"),
    ({"qk_scale": "1"}, TypeError, "qk_scale must be a number, got '1'"),
    ({"qk_scale": True}, TypeError, "qk_scale must be a number, got True"),
    ({"qk_scale": float("nan")}, ValueError, "qk_scale is nan; it must be finite"),
    ({"proj_drop": 1.5}, ValueError, "dropout probability has to be between 0 and 1"),
]


@pytest.mark.parametrize(("arguments", "error", "text"), BAD_MODULES, ids=lambda value: str(value)[:40])
def test_modules_that_could_not_work_are_not_made(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error) as caught:
        gnaforge.NeighborhoodAttention2D(**{**MODULE, **arguments})
    assert text in str(caught.value)


def test_a_module_keeps_a_scale_of_zero() -> None:
    """Which is the mean of the values; not the default."""
    module = gnaforge.NeighborhoodAttention1D(16, 2, 3, qk_scale=0)
    x = torch.randn(1, 9, 16)
    with torch.no_grad():
        value = module.qkv(x)[..., 32:]
        index = torch.arange(9).clamp(1, 7)[:, None] + torch.tensor([-1, 0, 1])
        torch.testing.assert_close(module(x), module.proj(value[:, index].mean(2)))


def test_a_module_is_made_without_the_core(forked, own_cache) -> None:
    """Which would be compiled for it."""
    done = forked("import gnaforge\ngnaforge.NeighborhoodAttention3D(32, 4, 3, 2, 2, (True, False, False))")
    assert done.returncode == 0 and done.stderr == "" and not own_cache.exists()
