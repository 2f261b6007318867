"""The operators' derivatives: which don't exist yet, and say so however they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

_NO_TANGENTS = (
    "gnaforge: neighborhood attention has no forward-mode derivatives (torch.func.jvp, jacfwd, linearize, dual "
    "tensors). Take torch.nn.functional.scaled_dot_product_attention with a boolean mask, under "
    "torch.nn.attention.sdpa_kernel(SDPBackend.MATH), which has them"
)


_NO_OUT = (
    "gnaforge: out= and out_lse= don't support automatic differentiation, but one of the arguments requires grad; "
    "call under torch.no_grad(), or leave them out"
)


class _Forward(torch.autograd.Function):
    """`forward`, for autograd and the transformations of torch.func. Arguments are the operator's, all of them."""

    @staticmethod
    def forward(*arguments: Any) -> Any:
        """The operator below autograd."""
        return _below_autograd("forward_no_grad", arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        """Keeps what a backward kernel reads."""
        query, key, value, pattern, scale = (*inputs, None)[:5]  # an argument that has its default may be missing
        ctx.save_for_backward(query, key, value, *output[:2])
        ctx.pattern, ctx.scale, ctx.count = pattern, scale, len(inputs)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(
        ctx: Any, grad_out: torch.Tensor | None, grad_lse: torch.Tensor | None, *others: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        """The operator `backward`, which this version refuses."""
        query, key, value, out, lse = ctx.saved_tensors
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        gradients = torch.ops.gnaforge.backward(grad_out, grad_lse, query, key, value, out, lse, ctx.pattern, ctx.scale)
        return (*gradients, *[None] * (ctx.count - len(gradients)))

    @staticmethod
    def jvp(ctx: Any, *tangents: torch.Tensor | None) -> Any:
        """Refuses.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(_NO_TANGENTS)


class _Joint(_Forward):
    """`joint`."""

    @staticmethod
    def forward(*arguments: Any) -> Any:
        """The operator below autograd."""
        return _below_autograd("joint", arguments)


class _JointApart(_Forward):
    """`joint_apart`."""

    @staticmethod
    def forward(*arguments: Any) -> Any:
        """The operator below autograd."""
        return _below_autograd("joint_apart", arguments)


def _below_autograd(name: str, arguments: tuple[Any, ...], **results: torch.Tensor) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return getattr(torch.ops.gnaforge, name).default(*arguments, **results)


def _wants_gradients(arguments: Iterable[Any]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in arguments)


def _make_rule(function: type[_Forward], below: str) -> Callable[..., Any]:
    """What an operator does where autograd looks; ``below`` is the same operator without it."""

    def rule(*arguments: Any) -> Any:
        if _wants_gradients(arguments) or forward_ad._current_level >= 0:
            # The dispatcher has taken torch.func's transformations apart: what is left here is one level of autograd.
            with enable_single_level_autograd_function():
                return super(torch.autograd.Function, function).apply(*arguments)  # type: ignore[misc]
        return _below_autograd(below, arguments)

    return rule


def _forward_out(*arguments: Any, **results: torch.Tensor) -> None:
    """Refuses gradients, as torch's own operators with ``out=`` do.

    Raises:
        RuntimeError: they are wanted.
    """
    if _wants_gradients((*arguments, *results.values())):
        raise RuntimeError(_NO_OUT)
    if forward_ad._current_level >= 0:
        raise NotImplementedError(_NO_TANGENTS)
    with torch._C._AutoDispatchBelowADInplaceOrView():
        torch.ops.gnaforge.forward_out.default(*arguments, **results)
    for result in results.values():
        torch.autograd.graph.increment_version(result)


_NO_GRADIENTS = (
    "gnaforge: this version has no backward kernels: gradients don't flow through {} yet. For inference call it under "
    "torch.no_grad()"
)


def register_refusal(name: str, library: torch.library.Library) -> None:
    """Registers for an operator of query, key, value and more that it has no derivatives, in words of their own."""
    operator = getattr(torch.ops.gnaforge, name).default

    class Refusal(torch.autograd.Function):
        """The operator, whose results know that they need a gradient."""

        @staticmethod
        def forward(*arguments: Any) -> Any:
            """The operator below autograd."""
            with torch._C._AutoDispatchBelowAutograd():
                return operator(*arguments)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            """Keeps nothing."""

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            """Refuses.

            Raises:
                RuntimeError: always.
            """
            raise RuntimeError(_NO_GRADIENTS.format(name))

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            """Refuses.

            Raises:
                NotImplementedError: always.
            """
            raise NotImplementedError(_NO_TANGENTS)

    def call(*arguments: Any) -> Any:
        wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in arguments[:3])
        if wanted or forward_ad._current_level >= 0:
            with enable_single_level_autograd_function():
                return super(torch.autograd.Function, Refusal).apply(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*arguments)

    library.impl(name, call, "Autograd")


def register_autograd(library: torch.library.Library) -> None:
    """Registers what the forward operators do where autograd looks: one is passed by, the others have derivatives."""
    library.impl("forward", _make_rule(_Forward, "forward_no_grad"), "Autograd")
    library.impl("joint", _make_rule(_Joint, "joint"), "Autograd")
    library.impl("joint_apart", _make_rule(_JointApart, "joint_apart"), "Autograd")
    library.impl("forward_out", _forward_out, "Autograd")
    library.impl("forward_no_grad", torch.library.fallthrough_kernel, "Autograd")
