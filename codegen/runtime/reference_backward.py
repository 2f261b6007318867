"""Exact gradients of neighborhood attention in float64, by brute force over all pairs. Slow; for checks.

For a query i and a key j that it sees, with scale c (FlashAttention-2, arXiv 2307.08691, section 3.1.2):
``P = exp(c Q K^T - LSE)``, ``dS = P (dO V^T - delta)``, ``delta = sum(dO O) - dLSE``; then ``dQ = c dS K``,
``dK = c dS^T Q`` and ``dV = P^T dO``. Output and log-sum-exp are inputs, taken as they are given.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch

from .problem import Problem
from .reference import extra_keys, mask_rows, visible

Tensors = Mapping[str, torch.Tensor]  # by role
Found = dict[str, torch.Tensor]
_OF_QUERIES = ("q", "grad_out", "out", "lse", "grad_lse")
_U = 2.0**-24  # half an ulp of fp32


class _Rounding(NamedTuple):
    """Errors of rounding P and dS: relative ones, and those of subnormal numbers."""

    relative: float = 0.0
    least: float = 0.0


_EXACTLY = _Rounding()


@dataclass(frozen=True)
class _Queries:
    """Some queries, in float64: [..., queries, channels], log-sum-exps and their gradients [..., queries, 1]."""

    q: torch.Tensor
    grad_out: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor
    grad_lse: torch.Tensor

    def part(self, begin: int, end: int) -> _Queries:
        return _Queries(*(value[..., begin:end, :] for value in vars(self).values()))


@dataclass(frozen=True)
class _Pairs:
    """P and dS of pairs of queries and keys, [..., queries, keys], and how far fp32 arithmetic may be from them."""

    probability: torch.Tensor
    slope: torch.Tensor
    bound_probability: torch.Tensor
    bound_slope: torch.Tensor


def _pairs(
    problem: Problem,
    queries: _Queries,
    k: torch.Tensor,
    v: torch.Tensor,
    hidden: torch.Tensor | None = None,
    rounding: _Rounding = _EXACTLY,
) -> _Pairs:
    """Rounding analysis as for `reference.error_bound`; ``rounding``: of P and dS to the inputs' dtype."""
    c, (channels, value_channels) = problem.score_scale, (problem.head_dim, problem.value_head_dim)
    products = queries.grad_out * queries.out
    delta = products.sum(-1, keepdim=True) - queries.grad_lse
    bound_delta = (value_channels + 2) * _U * (products.abs().sum(-1, keepdim=True) + queries.grad_lse.abs())
    scores = (queries.q @ k.mT) * c
    p = torch.exp(scores - queries.lse)
    if hidden is not None:
        p = p.masked_fill(hidden, 0.0)
    inner = queries.grad_out @ v.mT - delta
    magnitude = abs(c) * (queries.q.abs() @ k.abs().mT)
    relative = torch.expm1((channels + 3) * _U * magnitude + 4 * _U * (scores.abs() + queries.lse.abs()))
    relative = relative + 16 * _U + rounding.relative
    least = rounding.least * (p > 0)
    bound_inner = (value_channels + 2) * _U * (queries.grad_out.abs() @ v.abs().mT) + bound_delta
    bound = p * ((relative + 4 * _U + rounding.relative) * inner.abs() + (1 + relative) * bound_inner)
    bound = bound + least * (1 + inner.abs() + bound_inner)
    return _Pairs(p, p * inner, p * relative + least, bound)


def _heads_first(tensor: torch.Tensor, repeats: int = 1) -> torch.Tensor:
    return tensor.double().flatten(1, -3).transpose(1, 2).repeat_interleave(repeats, dim=1)


def _keys(problem: Problem, inputs: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of all query heads; extra keys come after the grid's, as zeros where they don't count."""
    group = problem.heads // problem.kv_heads
    pieces = [piece.seen() for piece in extra_keys(inputs)]
    k = [_heads_first(tensor, group) for tensor in (inputs["k"], *(piece.key for piece in pieces))]
    v = [_heads_first(tensor, group) for tensor in (inputs["v"], *(piece.value for piece in pieces))]
    return torch.cat(k, dim=2), torch.cat(v, dim=2)


def _hidden(problem: Problem, inputs: Tensors, begin: int, end: int) -> torch.Tensor:
    """The keys that these queries don't see: [batch, 1, queries, keys]."""
    batch = inputs["q"].shape[0]
    masks = [mask_rows(problem, begin, end, inputs["q"].device).expand(batch, 1, -1, -1)]
    masks += [piece.valid()[:, None, None, :].expand(-1, 1, end - begin, -1) for piece in extra_keys(inputs)]
    return ~torch.cat(masks, dim=3)


def _queries(inputs: Tensors) -> _Queries:
    return _Queries(
        *(_heads_first(inputs[name] if name in _OF_QUERIES[:3] else inputs[name][..., None]) for name in _OF_QUERIES)
    )


def _parts(problem: Problem, inputs: Tensors, rounding: _Rounding = _EXACTLY) -> Iterator[tuple[_Queries, _Pairs]]:
    """All queries beside all keys, some of them at a time: their matrix is bounded, not the results."""
    queries, (k, v) = _queries(inputs), _keys(problem, inputs)
    rows = max(1, 2**22 // (k.shape[2] * k.shape[0] * k.shape[1]))
    for begin in range(0, problem.token_count, rows):
        end = min(begin + rows, problem.token_count)
        part = queries.part(begin, end)
        yield part, _pairs(problem, part, k, v, _hidden(problem, inputs, begin, end), rounding)


def _tokens(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return tensor.transpose(1, 2).reshape(like.shape)


def _rounding(inputs: Tensors, rounds_probabilities: bool) -> _Rounding:
    """To the inputs' dtype, by half an ulp or half the spacing of subnormals."""
    info = torch.finfo(inputs["q"].dtype)
    return _Rounding(info.eps / 2, info.smallest_normal * info.eps / 2) if rounds_probabilities else _EXACTLY


def _stored(exact: torch.Tensor, bound: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The bound of a gradient that is rounded to its tensor's dtype."""
    info = torch.finfo(like.dtype)
    half = info.eps / 2
    return exact.abs() * half + bound * (1 + half) + info.smallest_normal * half


def _of_q(problem: Problem, pairs: _Pairs, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """dQ, and its bound in fp32."""
    count = int((pairs.probability > 0).sum(-1).max()) + 2
    bound = (pairs.bound_slope + count * _U * pairs.slope.abs()) @ k.abs()
    return problem.score_scale * (pairs.slope @ k), abs(problem.score_scale) * bound


def _of_kv(
    problem: Problem, pairs: _Pairs, queries: _Queries, count: int
) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """dK and dV, and their bounds in fp32, of each query head; ``count`` products are added up."""
    slopes = pairs.bound_slope + count * _U * pairs.slope.abs()
    probabilities = pairs.bound_probability + count * _U * pairs.probability
    c = problem.score_scale
    return (c * (pairs.slope.mT @ queries.q), pairs.probability.mT @ queries.grad_out), (
        abs(c) * (slopes.mT @ queries.q.abs()),
        probabilities.mT @ queries.grad_out.abs(),
    )


def _numbers(token: Sequence[int], inputs: Tensors) -> torch.Tensor:
    return torch.tensor(token, device=inputs["q"].device)


def _positions(length: int, inputs: Tensors) -> torch.Tensor:
    return torch.arange(length, device=inputs["q"].device)


def _cut(tensor: torch.Tensor, batch: int, box: Sequence[torch.Tensor]) -> torch.Tensor:
    """A batch entry's tokens that are in a box, one after the other: [tokens, heads, ...]."""
    grid = [along.view([-1 if e == d else 1 for e in range(len(box))]) for d, along in enumerate(box)]
    return tensor[batch][tuple(grid)].flatten(0, len(box) - 1)


def gradient_q(problem: Problem, inputs: Tensors) -> Found:
    """``grad_q``, of the shape of Q."""
    k, _ = _keys(problem, inputs)
    parts = [_of_q(problem, pairs, k)[0] for _, pairs in _parts(problem, inputs)]
    return {"grad_q": _tokens(torch.cat(parts, dim=2), inputs["q"])}


def bound_q(problem: Problem, inputs: Tensors, exact: Tensors, *, rounds_probabilities: bool) -> Found:
    """How far a kernel with fp32 arithmetic may be from `gradient_q`, elementwise. With ``rounds_probabilities`` P and
    dS are rounded to the inputs' dtype."""
    k, _ = _keys(problem, inputs)
    parts = _parts(problem, inputs, _rounding(inputs, rounds_probabilities))
    bound = torch.cat([_of_q(problem, pairs, k)[1] for _, pairs in parts], dim=2)
    return {"grad_q": _stored(exact["grad_q"], _tokens(bound, inputs["q"]), inputs["q"])}


def sample_q(
    problem: Problem, inputs: Tensors, at: Sequence[int], *, rounds_probabilities: bool
) -> tuple[Found, Found]:
    """`gradient_q` and `bound_q` of one query, a batch entry and a token, of a problem of any size: ``[heads, D]``."""
    batch, *token = at
    box = tuple(
        visible(axis, own, _positions(axis.keys, inputs)).nonzero().flatten()
        for axis, own in zip(problem.dimensions, _numbers(token, inputs), strict=True)
    )
    group = problem.heads // problem.kv_heads
    tensors = [[_cut(inputs[name], batch, box)] for name in ("k", "v")]
    for piece in extra_keys(inputs):
        counts = piece.valid()[batch]
        tensors[0].append(piece.key[batch, counts])
        tensors[1].append(piece.value[batch, counts])
    k, v = (_heads_first(torch.cat(parts)[None], group)[0] for parts in tensors)
    queries = _queries({name: inputs[name][tuple(at)][None, None] for name in _OF_QUERIES})
    queries = _Queries(*(value[0] for value in vars(queries).values()))
    pairs = _pairs(problem, queries, k, v, None, _rounding(inputs, rounds_probabilities))
    exact, bound = (found[:, 0] for found in _of_q(problem, pairs, k))
    return {"grad_q": exact}, {"grad_q": _stored(exact, bound, inputs["q"])}


def gradient_kv(problem: Problem, inputs: Tensors) -> Found:
    """``grad_k`` and ``grad_v``, of the shapes of K and V, and those of extra keys."""
    return _sums(problem, inputs, 0, _EXACTLY)


def bound_kv(problem: Problem, inputs: Tensors, exact: Tensors, *, rounds_probabilities: bool) -> Found:
    """How far a kernel may be from `gradient_kv`; as `bound_q`."""
    bounds = _sums(problem, inputs, 1, _rounding(inputs, rounds_probabilities))
    return {name: _stored(exact[name], bounds[name], inputs[name.removeprefix("grad_")]) for name in bounds}


def _sums(problem: Problem, inputs: Tensors, which: int, rounding: _Rounding) -> Found:
    """`gradient_kv`, or with ``which`` 1 its bound in fp32."""
    group = problem.heads // problem.kv_heads
    count = group * problem.token_count + 2
    sums: list[torch.Tensor] = []
    for queries, pairs in _parts(problem, inputs, rounding):
        parts = _of_kv(problem, pairs, queries, count)[which]
        sums = [old + new for old, new in zip(sums, parts, strict=True)] if sums else list(parts)
    found = {}
    for each, kind in zip(sums, "kv", strict=True):
        names = [kind, *(name for name in (f"extra_{kind}", f"extra_{kind}_2") if name in inputs)]
        shared = each.unflatten(1, (problem.kv_heads, group)).sum(2)
        for name, part in zip(
            names, shared.split([_heads_first(inputs[n]).shape[2] for n in names], dim=2), strict=True
        ):
            found[f"grad_{name}"] = _tokens(part, inputs[name])
    return found


def sample_kv(
    problem: Problem, inputs: Tensors, at: Sequence[int], *, rounds_probabilities: bool
) -> tuple[Found, Found]:
    """`gradient_kv` and `bound_kv` of one key of a problem of any size: ``[kv_heads, channels]``."""
    batch, *token = at
    box = tuple(
        visible(axis, _positions(axis.tokens, inputs), own).nonzero().flatten()
        for axis, own in zip(problem.dimensions, _numbers(token, inputs), strict=True)
    )
    group = problem.heads // problem.kv_heads
    queries = _queries({name: _cut(inputs[name], batch, box)[None] for name in _OF_QUERIES})
    queries = _Queries(*(value[0] for value in vars(queries).values()))
    k, v = (inputs[name][tuple(at)].double().repeat_interleave(group, dim=0)[:, None] for name in ("k", "v"))
    pairs = _pairs(problem, queries, k, v, None, _rounding(inputs, rounds_probabilities))
    count = group * prod(map(len, box)) + 2
    exact, bound = (
        [each[:, 0].unflatten(0, (problem.kv_heads, group)).sum(1) for each in found]
        for found in _of_kv(problem, pairs, queries, count)
    )
    names = ("grad_k", "grad_v")
    bounds = {name: _stored(own, error, inputs[name[-1]]) for name, own, error in zip(names, exact, bound, strict=True)}
    return dict(zip(names, exact, strict=True)), bounds
