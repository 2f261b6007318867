"""Exact gradients of neighborhood attention in float64, by brute force over all pairs. Slow; for checks.

For a query i and a key j that it sees, with scale c (FlashAttention-2, arXiv 2307.08691, section 3.1.2):
``P = exp(c Q K^T - LSE)``, ``dS = P (dO V^T - delta)``, ``delta = sum(dO O) - dLSE``; then ``dQ = c dS K``,
``dK = c dS^T Q`` and ``dV = P^T dO``. Output and log-sum-exp are inputs, taken as they are given.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch

from .op_table import Tensors
from .problem import Problem
from .reference import mask_rows

_U = 2.0**-24  # half an ulp of fp32


@dataclass(frozen=True)
class _Rows:
    """Some of the queries beside all keys; heads first, float64. ``bound_p`` and ``bound_ds`` are errors of P and dS as
    fp32 arithmetic has them."""

    begin: int
    end: int
    query: torch.Tensor
    grad_out: torch.Tensor
    probability: torch.Tensor
    slope: torch.Tensor
    bound_p: torch.Tensor
    bound_ds: torch.Tensor


def _heads_first(tensor: torch.Tensor, repeats: int = 1) -> torch.Tensor:
    return tensor.double().flatten(1, -3).transpose(1, 2).repeat_interleave(repeats, dim=1)


def _numbers(tensor: torch.Tensor) -> torch.Tensor:
    """[batch, *tokens, heads] as [batch, heads, tokens, 1]."""
    return tensor.double().flatten(1, -2).transpose(1, 2)[..., None]


def _rows(problem: Problem, inputs: Tensors, rounding: float) -> Iterator[_Rows]:
    group, c = problem.heads // problem.kv_heads, problem.score_scale
    q, grad_out, out = (_heads_first(inputs[name]) for name in ("q", "grad_out", "out"))
    k, v = (_heads_first(inputs[name], group) for name in ("k", "v"))
    lse, grad_lse = _numbers(inputs["lse"]), _numbers(inputs["grad_lse"])
    delta = (grad_out * out).sum(-1, keepdim=True) - grad_lse
    channels = problem.head_dim, problem.value_head_dim
    bound_delta = (channels[1] + 2) * _U * ((grad_out * out).abs().sum(-1, keepdim=True) + grad_lse.abs())
    rows = max(1, 2**22 // (prod(problem.kv_tokens or problem.tokens) * q.shape[0] * q.shape[1]))
    for begin in range(0, problem.token_count, rows):
        end = min(begin + rows, problem.token_count)
        part = slice(begin, end)
        hidden = ~mask_rows(problem, begin, end, q.device)
        scores = (q[:, :, part] @ k.mT) * c
        p = torch.exp(scores - lse[:, :, part]).masked_fill(hidden, 0.0)
        slope = grad_out[:, :, part] @ v.mT - delta[:, :, part]
        # A score's error, and what exp2 of it, relative to the log-sum-exp, adds: see `reference.error_bound`.
        magnitude = abs(c) * (q[:, :, part].abs() @ k.abs().mT)
        relative = torch.expm1((channels[0] + 3) * _U * magnitude + 4 * _U * (scores.abs() + lse[:, :, part].abs()))
        relative = relative + 16 * _U + rounding
        of_slope = (channels[1] + 2) * _U * (grad_out[:, :, part].abs() @ v.abs().mT) + bound_delta[:, :, part]
        bound_ds = p * (relative * slope.abs() + (1 + relative) * of_slope + (4 * _U + rounding) * slope.abs())
        yield _Rows(begin, end, q[:, :, part], grad_out[:, :, part], p, p * slope, p * relative, bound_ds)


def _tokens(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return tensor.transpose(1, 2).reshape(like.shape)


def _stored(exact: torch.Tensor, bound: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The bound of a gradient that is rounded to its tensor's dtype."""
    info = torch.finfo(like.dtype)
    half = info.eps / 2
    return exact.abs() * half + bound * (1 + half) + info.smallest_normal * half


def gradient_q(problem: Problem, inputs: Tensors) -> dict[str, torch.Tensor]:
    """``grad_q``, of the shape of Q."""
    k = _heads_first(inputs["k"], problem.heads // problem.kv_heads)
    parts = [problem.score_scale * (rows.slope @ k) for rows in _rows(problem, inputs, 0.0)]
    return {"grad_q": _tokens(torch.cat(parts, dim=2), inputs["q"])}


def bound_q(
    problem: Problem, inputs: Tensors, exact: Tensors, *, rounds_probabilities: bool
) -> dict[str, torch.Tensor]:
    """How far a kernel with fp32 arithmetic may be from `gradient_q`, elementwise: rounding analysis as for
    `reference.error_bound`. With ``rounds_probabilities`` dS is rounded to the inputs' dtype, once more."""
    k = _heads_first(inputs["k"], problem.heads // problem.kv_heads).abs()
    rounding, c = _rounding(inputs, rounds_probabilities), abs(problem.score_scale)
    parts = []
    for rows in _rows(problem, inputs, rounding):
        count = int((rows.probability > 0).sum(-1).max()) + 2
        parts.append(c * ((rows.bound_ds + count * _U * rows.slope.abs()) @ k))
    return {"grad_q": _stored(exact["grad_q"], _tokens(torch.cat(parts, dim=2), inputs["q"]), inputs["q"])}


def gradient_kv(problem: Problem, inputs: Tensors) -> dict[str, torch.Tensor]:
    """``grad_k`` and ``grad_v``, of the shapes of K and V."""
    sums = [0.0, 0.0]
    for rows in _rows(problem, inputs, 0.0):
        sums[0] = sums[0] + problem.score_scale * (rows.slope.mT @ rows.query)
        sums[1] = sums[1] + rows.probability.mT @ rows.grad_out
    return _of_groups(problem, inputs, sums)


def bound_kv(
    problem: Problem, inputs: Tensors, exact: Tensors, *, rounds_probabilities: bool
) -> dict[str, torch.Tensor]:
    """How far a kernel may be from `gradient_kv`; as `bound_q`. P is rounded too."""
    rounding, c = _rounding(inputs, rounds_probabilities), abs(problem.score_scale)
    group = problem.heads // problem.kv_heads
    seen = sum((rows.probability > 0).sum(2) for rows in _rows(problem, inputs, 0.0))
    count = int(torch.as_tensor(seen).max()) * group + 2
    sums = [0.0, 0.0]
    for rows in _rows(problem, inputs, rounding):
        slopes = rows.bound_ds + count * _U * rows.slope.abs()
        probabilities = rows.bound_p + (count * _U) * rows.probability
        sums[0] = sums[0] + c * (slopes.mT @ rows.query.abs())
        sums[1] = sums[1] + probabilities.mT @ rows.grad_out.abs()
    bounds = _of_groups(problem, inputs, sums)
    return {
        name: _stored(exact[name], bounds[name], inputs[role]) for name, role in (("grad_k", "k"), ("grad_v", "v"))
    }


def _rounding(inputs: Tensors, rounds_probabilities: bool) -> float:
    return float(torch.finfo(inputs["q"].dtype).eps / 2) if rounds_probabilities else 0.0


def _of_groups(problem: Problem, inputs: Tensors, sums: list) -> dict[str, torch.Tensor]:  # type: ignore[type-arg]
    """Sums over the query heads that share keys."""
    group = problem.heads // problem.kv_heads
    found = {}
    for name, role, each in (("grad_k", "k", sums[0]), ("grad_v", "v", sums[1])):
        found[name] = _tokens(each.unflatten(1, (problem.kv_heads, group)).sum(2), inputs[role])
    return found
