"""The formulas of the operators' gradients: which backward operator gives them, of what, and on which kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from . import joint_parts
from .autocast import autocast_dtype, autocast_tensor
from .list_requests import request_of_lengths, request_of_samples
from .request import Request, request_of

Optional = torch.Tensor | None
Found = Sequence[torch.Tensor]


@dataclass(frozen=True)
class Formula:
    """The way in which gradients of an operator come about.

    Attributes:
        name: the operator's.
        arity: how many arguments it takes; those that have a default may be missing.
        tensors: the places of the tensors among them.
        differentiable: of these, those that have gradients. What is ``wanted`` has a bit for each, in this order.
        queries: the bits of queries; others are of keys and values.
        backward: the gradients of the differentiable arguments, of all arguments, results, the results' gradients and
            what is wanted. What isn't wanted has no elements.
        forward_requests: what kernels the forward call needs, of all arguments.
        signature: of all arguments, what these requests depend on.
    """

    name: str
    arity: int
    tensors: tuple[int, ...]
    differentiable: tuple[int, ...]
    queries: int
    backward: Callable[[Sequence[Any], Found, Sequence[Optional], int], Found]
    forward_requests: Callable[[Sequence[Any]], Iterable[Request]]
    signature: Callable[[Sequence[Any]], tuple[Any, ...]]

    def whole(self, arguments: Sequence[Any]) -> list[Any]:
        """All arguments, of those that a call brings."""
        return [*arguments, *[None] * (self.arity - len(arguments))]

    def wanted_of(self, arguments: Sequence[Any]) -> int:
        """What is wanted of a call where autograd looks at it."""
        tensors = [arguments[place] for place in self.differentiable if place < len(arguments)]
        return sum(1 << i for i, tensor in enumerate(tensors) if tensor is not None and tensor.requires_grad)


def _gradients_of(out: torch.Tensor, grad_out: Optional, grad_lse: Optional) -> tuple[torch.Tensor, Optional]:
    """As backward operators take them: the output's must be there, and autograd gives none of what nobody used."""
    return torch.zeros_like(out) if grad_out is None else grad_out, grad_lse


def _gradients_of_rows(out: torch.Tensor, *gradients: Optional) -> tuple[Optional, Optional]:
    """As the operator of joint attention takes them: rows without any run no call."""
    grad_out, grad_lse = gradients
    return (None, None) if grad_out is None and grad_lse is None else _gradients_of(out, grad_out, grad_lse)


def _dims(query: torch.Tensor, value: torch.Tensor) -> tuple[Any, ...]:
    return autocast_dtype(query), query.device, query.shape[-1], value.shape[-1]


# forward


def _backward_of_forward(inputs: Sequence[Any], results: Found, gradients: Sequence[Optional], wanted: int) -> Found:
    query, key, value, pattern, scale, _, *extra = inputs
    grad_out, grad_lse = _gradients_of(results[0], *gradients)
    call = grad_out, grad_lse, query, key, value, *results, pattern, scale, wanted, "", "", *extra
    return torch.ops.gnaforge.backward.default(*call)  # type: ignore[no-any-return]


def _requests_of_forward(inputs: Sequence[Any]) -> list[Request]:
    query, key, value, extra_k = map(autocast_tensor, (*inputs[:3], inputs[6]))
    return [request_of(query, key, value, inputs[3], "", extra_k)]


def _signature_of_forward(inputs: Sequence[Any]) -> tuple[Any, ...]:
    query, key, value, pattern = inputs[:4]
    ranged = len(pattern) > 4 * (query.dim() - 3) or query.shape[1:-2] != key.shape[1:-2]
    sizes = (query.shape, key.shape) if ranged else ()  # else tokens don't decide which kernels there must be
    return (*_dims(query, value), *sizes, inputs[6] is None, *pattern)


# forward_varlen, attention_varlen


def _backward_of_list(name: str) -> Callable[..., Found]:
    def backward(inputs: Sequence[Any], results: Found, gradients: Sequence[Optional], wanted: int) -> Found:
        grad_out, grad_lse = _gradients_of(results[0], *gradients)
        call = grad_out, grad_lse, *inputs[:3], *results, *inputs[3:7], wanted, "", "", *inputs[8:]
        return getattr(torch.ops.gnaforge, name).default(*call)  # type: ignore[no-any-return]

    return backward


def _requests_of_samples(inputs: Sequence[Any]) -> list[Request]:
    query, key, value, rank, layouts, pattern, _, _, extra_k = inputs[:9]
    return [request_of_samples(query, key, value, rank, layouts, pattern, "", extra_k)]


def _signature_of_samples(inputs: Sequence[Any]) -> tuple[Any, ...]:
    query, _, value, rank, _, pattern = inputs[:6]
    return (*_dims(query, value), rank, inputs[8] is None, *pattern)


def _requests_of_lengths(inputs: Sequence[Any]) -> list[Request]:
    return [
        request_of_lengths(inputs[0], inputs[2], "")
    ]  # lengths aren't looked at: those of a GPU would be waited for


def _signature_of_lengths(inputs: Sequence[Any]) -> tuple[Any, ...]:
    return _dims(inputs[0], inputs[2])


# joint, joint_apart


def _backward_of_joint(inputs: Sequence[Any], results: Found, gradients: Sequence[Optional], wanted: int) -> Found:
    query, key, value, pattern, scale, _, _, *texts = inputs
    extents = query.shape[1:-2]
    counts = [0 if text is None else text.shape[1] for text in texts[::4]]
    counts.insert(1, prod(extents))
    rows = results[0], results[1], *_gradients_of_rows(results[0], *gradients)
    parts = [[None] * 3 if tensor is None else tensor.split(counts, 1) for tensor in rows]
    image = [None if part is None else part.unflatten(1, extents) for _, part, _ in parts]
    call = [query, key, value, pattern, scale, wanted, *image]
    for i, text in ((0, texts[:4]), (2, texts[4:])):
        call += [*text, *([None] * 4 if text[0] is None else [part[i] for part in parts])]
    return torch.ops.gnaforge.joint_backward.default(*call)  # type: ignore[no-any-return]


def _backward_of_parts(inputs: Sequence[Any], results: Found, gradients: Sequence[Optional], wanted: int) -> Found:
    image, text = (
        (out, lse, *_gradients_of_rows(out, *gradients[i : i + 2])) for i in (0, 2) for out, lse in [results[i : i + 2]]
    )
    call = *inputs[:5], wanted, *image, *inputs[7:], *text
    return torch.ops.gnaforge.joint_backward.default(*call)[:6]  # type: ignore[no-any-return]


def _requests_of_parts(of: Callable[..., Iterable[joint_parts.Part]]) -> Callable[[Sequence[Any]], Iterable[Request]]:
    def requests(inputs: Sequence[Any]) -> Iterable[Request]:
        cast = list(map(autocast_tensor, inputs))
        for part in of(*cast[:4], "", "", *cast[7:]):
            query, key, value = part.tensors[:3]
            assert query is not None and key is not None and value is not None
            if query.shape[1]:
                yield request_of(query, key, value, part.pattern, "", *part.tensors[3:9:3])

    return requests


def _signature_of_parts(inputs: Sequence[Any]) -> tuple[Any, ...]:
    query, _, value, pattern = inputs[:4]
    return (*_dims(query, value), *(tensor is None or tensor.shape[1] for tensor in inputs[7::4]), *pattern)


FORMULAS = {
    formula.name: formula
    for formula in (
        Formula(
            "forward",
            9,
            (0, 1, 2, 6, 7, 8),
            (0, 1, 2, 6, 7),
            1,
            _backward_of_forward,
            _requests_of_forward,
            _signature_of_forward,
        ),
        Formula(
            "forward_varlen",
            11,
            (0, 1, 2, 8, 9, 10),
            (0, 1, 2, 8, 9),
            1,
            _backward_of_list("backward_varlen"),
            _requests_of_samples,
            _signature_of_samples,
        ),
        Formula(
            "attention_varlen",
            8,
            (0, 1, 2, 3, 4),
            (0, 1, 2),
            1,
            _backward_of_list("attention_backward_varlen"),
            _requests_of_lengths,
            _signature_of_lengths,
        ),
        Formula(
            "joint",
            15,
            (0, 1, 2, *range(7, 15)),
            (0, 1, 2, 7, 8, 9, 11, 12, 13),
            1 | 1 << 3 | 1 << 6,
            _backward_of_joint,
            _requests_of_parts(joint_parts.of_packed),
            _signature_of_parts,
        ),
        Formula(
            "joint_apart",
            11,
            (0, 1, 2, *range(7, 11)),
            (0, 1, 2, 7, 8, 9),
            1 | 1 << 3,
            _backward_of_parts,
            _requests_of_parts(joint_parts.of_apart),
            _signature_of_parts,
        ),
    )
}
"""The differentiable operators' formulas, by name."""
