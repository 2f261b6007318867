"""The operators' derivatives: first ones; others say that there are none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
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

_NO_OUT = (
    "gnaforge: out= and out_lse= don't support automatic differentiation, but one of the arguments requires grad; "
    "call under torch.no_grad(), or leave them out"
)

_NO_GRADIENTS = (
    "gnaforge: this version has no backward kernels for it: gradients don't flow through {} yet. For inference call it "
    "under torch.no_grad()"
)


_DIFFERENTIABLE = (0, 1, 2, 6, 7)  # arguments of `forward`, in the order of `backward`'s results


class _Once(torch.autograd.Function):
    """An operator of which there are no forward-mode derivatives."""

    @staticmethod
    def jvp(ctx: Any, *tangents: torch.Tensor | None) -> Any:
        """Refuses.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(_NO_TANGENTS)


class _Forward(_Once):
    """`forward`, for autograd and the transformations of torch.func. Arguments are the operator's, all of them."""

    @staticmethod
    def forward(*arguments: Any) -> Any:
        """The operator below autograd."""
        return _below_autograd("forward", arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        """Keeps what a backward kernel reads."""
        whole = *inputs, *[None] * (9 - len(inputs))  # an argument that has its default may be missing
        query, key, value, pattern, scale, _, *extra = whole
        ctx.save_for_backward(query, key, value, *output, *extra)
        ctx.pattern, ctx.scale, ctx.count, ctx.beyond = pattern, scale, len(inputs), _without_gradients(query, pattern)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(
        ctx: Any, grad_out: torch.Tensor | None, grad_lse: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        """The operator `backward`, for what is wanted of Q, K and V.

        Raises:
            RuntimeError: the call has what gradients don't flow through.
        """
        if ctx.beyond:
            raise RuntimeError(_NO_GRADIENTS.format(ctx.beyond))
        query, key, value, out, lse, *extra = ctx.saved_tensors
        needed = (*ctx.needs_input_grad, *[False] * (9 - ctx.count))
        wanted = sum(1 << i for i, argument in enumerate(_DIFFERENTIABLE) if needed[argument])
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        call = grad_out, grad_lse, query, key, value, out, lse, ctx.pattern, ctx.scale, wanted, "", "", *extra
        try:
            found = torch.ops.gnaforge.backward.default(*call)
        except RuntimeError as error:
            raise_missing(error, (query, key, value, extra[0]), ctx.pattern, wanted)
            raise
        gradients: list[torch.Tensor | None] = [None] * 9
        for i, argument in enumerate(_DIFFERENTIABLE):
            if wanted >> i & 1:
                gradients[argument] = found[i]
        return tuple(gradients[: ctx.count])


def _without_gradients(query: torch.Tensor, pattern: Sequence[int]) -> str:
    """The part of a forward call that gradients don't flow through; empty if they do."""
    rank = query.dim() - 3
    return "" if len(pattern) in (4 * rank, 10 * rank) else "windows per head"


class _Backward(_Once):
    """`backward`, whose derivatives are refused, when they are asked for: what torch.func computes of gradients always
    could be differentiated, and mostly isn't. Arguments are the operator's, all of them."""

    @staticmethod
    def forward(*arguments: Any) -> Any:
        """The operator below autograd."""
        return _below_autograd("backward", arguments)

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


def _below_autograd(name: str, arguments: tuple[Any, ...]) -> Any:
    """The operator below this level of autograd. A transformation of torch.func outside of this one, which has a level
    of its own, may want derivatives: so it isn't the operator that has none, nor are gradients switched off."""
    with torch._C._AutoDispatchBelowAutograd(), torch.enable_grad():
        return getattr(torch.ops.gnaforge, name).default(*arguments)


def _wants_gradients(arguments: Iterable[Any]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in arguments)


def _make_rule(name: str, function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """What an operator does where autograd looks."""

    def rule(*arguments: Any) -> Any:
        wanted = _wants_gradients(arguments)
        if wanted and name == "forward" and not (is_compiling() or is_tracing()):
            query, key, value, pattern = arguments[:4]
            if not _without_gradients(query, pattern):
                prepare_backward((query, key, value, *arguments[6:8]), pattern)
        if wanted or forward_ad._current_level >= 0:
            # The dispatcher has taken torch.func's transformations apart: what is left here is one level of autograd.
            with enable_single_level_autograd_function():
                return super(torch.autograd.Function, function).apply(*arguments)  # type: ignore[misc]
        return _below_autograd(name, arguments)

    return rule


def _make_out_rule(name: str) -> Callable[..., None]:
    """What an operator does there that writes to the caller's tensors."""

    def rule(*arguments: Any, **results: torch.Tensor) -> None:
        """Refuses gradients, as torch's own operators with ``out=`` do.

        Raises:
            RuntimeError: they are wanted.
        """
        if _wants_gradients((*arguments, *results.values())):
            raise RuntimeError(_NO_OUT)
        if forward_ad._current_level >= 0:
            raise NotImplementedError(_NO_TANGENTS)
        with torch._C._AutoDispatchBelowADInplaceOrView():
            getattr(torch.ops.gnaforge, name).default(*arguments, **results)
        for result in results.values():
            torch.autograd.graph.increment_version(result)

    return rule


def register_refusal(name: str, library: torch.library.Library) -> None:
    """Registers for an operator that it has no derivatives, in words of their own."""

    class Refusal(_Once):
        """The operator, whose results know that they need a gradient."""

        @staticmethod
        def forward(*arguments: Any) -> Any:
            """The operator below autograd."""
            return _below_autograd(name, arguments)

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

    library.impl(name, _make_rule(name, Refusal), "Autograd")


def register_autograd(library: torch.library.Library) -> None:
    """Registers what the operators do where autograd looks: one is passed by, others refuse or have derivatives."""
    library.impl("forward", _make_rule("forward", _Forward), "Autograd")
    library.impl("backward", _make_rule("backward", _Backward), "Autograd")
    for name in ("forward_out", "joint_out", "joint_apart_out"):
        library.impl(name, _make_out_rule(name), "Autograd")
    for name in ("joint", "joint_apart"):
        register_refusal(name, library)
    library.impl("forward_no_grad", torch.library.fallthrough_kernel, "Autograd")
