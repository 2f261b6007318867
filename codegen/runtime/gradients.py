"""The operators' derivatives: first ones by their formulas; others say that there are none."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch._C import _is_tracing as is_tracing
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from .backward_parts import BACKWARD_OPERATORS
from .formulas import FORMULAS, Formula
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


class _Once(torch.autograd.Function):
    """An operator of which there are no forward-mode derivatives."""

    @staticmethod
    def jvp(ctx: Any, *tangents: torch.Tensor | None) -> Any:
        """Refuses.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(_NO_TANGENTS)


def _differentiable(formula: Formula) -> type[_Once]:
    """An operator for autograd and the transformations of torch.func. Arguments are the operator's, all of them."""

    class Differentiable(_Once):
        """The operator, with its formula."""

        @staticmethod
        def forward(*arguments: Any) -> Any:
            """The operator below autograd."""
            return _below_autograd(formula.name, arguments)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
            """Keeps what a backward kernel reads."""
            whole = formula.whole(inputs)
            ctx.save_for_backward(*[whole[place] for place in formula.tensors], *output)
            for place in formula.tensors:
                whole[place] = None
            ctx.others, ctx.count = whole, len(inputs)
            ctx.set_materialize_grads(False)

        @staticmethod
        def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
            """The backward operator, for what is wanted."""
            saved, inputs = ctx.saved_tensors, list(ctx.others)
            for place, tensor in zip(formula.tensors, saved, strict=False):
                inputs[place] = tensor
            results = saved[len(formula.tensors) :]
            needed = (*ctx.needs_input_grad, *[False] * (formula.arity - ctx.count))
            wanted = sum(1 << i for i, place in enumerate(formula.differentiable) if needed[place])
            try:
                found = formula.backward(inputs, results, gradients, wanted)
            except RuntimeError as error:
                raise_missing(error, formula.name, inputs, wanted)
                raise
            own: list[torch.Tensor | None] = [None] * formula.arity
            for i, place in enumerate(formula.differentiable):
                if wanted >> i & 1:
                    own[place] = found[i]
            return tuple(own[: ctx.count])

    return Differentiable


def _once_differentiable(name: str) -> type[_Once]:
    """A backward operator, whose derivatives are refused, when they are asked for: what torch.func computes of
    gradients always could be differentiated, and mostly isn't. Arguments are the operator's, all of them."""

    class OnceDifferentiable(_Once):
        """The operator, whose results know that they need a gradient."""

        @staticmethod
        def forward(*arguments: Any) -> Any:
            """The operator below autograd."""
            return _below_autograd(name, arguments)

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

    return OnceDifferentiable


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
        if wanted and name in FORMULAS and not (is_compiling() or is_tracing()):
            prepare_backward(name, arguments)
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


def register_autograd(library: torch.library.Library) -> None:
    """Registers what the operators do where autograd looks: one is passed by, others refuse or have derivatives."""
    for name, formula in FORMULAS.items():
        library.impl(name, _make_rule(name, _differentiable(formula)), "Autograd")
    for name in BACKWARD_OPERATORS:
        library.impl(name, _make_rule(name, _once_differentiable(name)), "Autograd")
    for name in ("forward_out", "joint_out", "joint_apart_out", "forward_varlen_out", "attention_varlen_out"):
        library.impl(name, _make_out_rule(name), "Autograd")
    library.impl("forward_no_grad", torch.library.fallthrough_kernel, "Autograd")
