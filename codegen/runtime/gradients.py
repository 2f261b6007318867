"""The operators' derivatives: first ones; others say that there are none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._C import _is_tracing as is_tracing
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from .training import prepare_backward, raise_missing

_NO_TANGENTS = (
    "gnaforge: neighborhood attention has no forward-mode derivatives (torch.func.jvp, jacfwd, linearize, dual "
    "tensors). Take torch.nn.functional.scaled_dot_product_attention with a boolean mask, under "
    "torch.nn.attention.sdpa_kernel(SDPBackend.MATH), which has them"
)

_NO_SECOND_DERIVATIVES = (
    "gnaforge: neighborhood attention has no second derivatives (gradient penalties, torch.func.hessian). Take "
    "torch.nn.functional.scaled_dot_product_attention with a boolean mask, under "
    "torch.nn.attention.sdpa_kernel(SDPBackend.MATH), which has them"
)

_NO_EXTRA_KEYS = (
    "gnaforge: gradients don't flow through additional keys yet. Call it under torch.no_grad(), or attend to them "
    "apart and merge both results (gnaforge.merge_attentions)"
)


class _Forward(torch.autograd.Function):
    """`forward`, for autograd and the transformations of torch.func. Arguments are the operator's, all of them."""

    @staticmethod
    def forward(*arguments: Any) -> Any:
        """The operator below autograd."""
        return _below_autograd(torch.ops.gnaforge.forward.default, arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Keeps what a backward kernel reads."""
        query, key, value, pattern, scale, _, *extra = inputs
        if any(tensor is not None for tensor in extra):
            raise NotImplementedError(_NO_EXTRA_KEYS)
        ctx.save_for_backward(query, key, value, *output)
        ctx.pattern, ctx.scale = pattern, scale
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(
        ctx: Any, grad_out: torch.Tensor | None, grad_lse: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        """The operator `backward`, for what is wanted of Q, K and V."""
        query, key, value, out, lse = ctx.saved_tensors
        wanted = sum(1 << i for i in range(3) if ctx.needs_input_grad[i])
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        call = grad_out, grad_lse, query, key, value, out, lse, ctx.pattern, ctx.scale, wanted
        try:
            found = torch.ops.gnaforge.backward.default(*call)
        except RuntimeError as error:
            raise_missing(error, query, key, value, ctx.pattern, wanted)
            raise
        gradients = (gradient if wanted >> i & 1 else None for i, gradient in enumerate(found))
        return (*gradients, None, None, None, None, None, None)

    @staticmethod
    def jvp(ctx: Any, *tangents: torch.Tensor | None) -> Any:
        """Refuses.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(_NO_TANGENTS)


class _Backward(torch.autograd.Function):
    """`backward`, whose derivatives are refused, when they are asked for: what torch.func computes of gradients always
    could be differentiated, and mostly isn't. Arguments are the operator's, all of them."""

    @staticmethod
    def forward(*arguments: Any) -> Any:
        """The operator below autograd."""
        return _below_autograd(torch.ops.gnaforge.backward.default, arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        """Keeps nothing."""

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        """Refuses.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(_NO_SECOND_DERIVATIVES)

    @staticmethod
    def jvp(ctx: Any, *tangents: torch.Tensor | None) -> Any:
        """Refuses.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(_NO_TANGENTS)


def _backward(*arguments: Any) -> Any:
    wanted = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in arguments[:7])
    if wanted or forward_ad._current_level >= 0:
        with enable_single_level_autograd_function():
            return super(torch.autograd.Function, _Backward).apply(*arguments)
    return _Backward.forward(*arguments)


def _below_autograd(operator: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """The operator below this level of autograd. A transformation of torch.func outside of this one, which has a level
    of its own, may want derivatives: so it isn't the operator that has none, nor are gradients switched off."""
    with torch._C._AutoDispatchBelowAutograd(), torch.enable_grad():
        return operator(*arguments)


def _forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pattern: list[int],
    scale: float | None = None,
    kernel: str = "",
    extra_k: torch.Tensor | None = None,
    extra_v: torch.Tensor | None = None,
    extra_lengths: torch.Tensor | None = None,
) -> Any:
    arguments = query, key, value, pattern, scale, kernel, extra_k, extra_v, extra_lengths
    tensors = [tensor for tensor in (query, key, value, extra_k, extra_v) if tensor is not None]
    wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    if wanted and not (is_compiling() or is_tracing()):
        prepare_backward(query, key, value, pattern)
    if wanted or forward_ad._current_level >= 0:
        # The dispatcher has taken torch.func's transformations apart: what is left here is one level of autograd.
        with enable_single_level_autograd_function():
            return super(torch.autograd.Function, _Forward).apply(*arguments)
    return _below_autograd(torch.ops.gnaforge.forward.default, arguments)


def register_autograd(library: torch.library.Library) -> None:
    """Registers what the operators do where autograd looks: one has derivatives, one refuses them, one is passed by."""
    library.impl("forward", _forward, "Autograd")
    library.impl("backward", _backward, "Autograd")
    library.impl("forward_no_grad", torch.library.fallthrough_kernel, "Autograd")
