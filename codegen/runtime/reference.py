"""The meaning of GNA in a few lines of torch: masks, and exact attention in float64. Slow; for checks and benchmarks.

Semantics: GNA, arXiv 2504.16922, with NATTEN's border behaviour (windows shift inwards at borders). Everything here
takes plain problems, and raises a `ProblemError` for others.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch

from .family import Padding
from .problem import Problem

Pair = tuple[torch.Tensor, torch.Tensor]


def windows(
    query: torch.Tensor, length: int, window: int, stride: int, dilation: int, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys ``[begin, end)`` that the queries at these positions see along one dimension, as positions within the
    queries' dilation groups."""
    group_length = (length - query % dilation + dilation - 1) // dilation
    i = query // dilation
    first = i - i % stride
    if causal:
        leader = torch.minimum(first + stride - 1, group_length - 1)
        return (leader - window + 1).clamp(min=0), i + 1
    leader = torch.minimum(first + stride // 2, group_length - 1)
    begin = torch.minimum((leader - window // 2).clamp(min=0), group_length - window)
    return begin, begin + window


def visible(
    query: torch.Tensor, key: torch.Tensor, length: int, window: int, stride: int, dilation: int, causal: bool
) -> torch.Tensor:
    """Whether ``query`` sees ``key`` along one dimension; both hold positions, of any shapes that broadcast."""
    begin, end = windows(query, length, window, stride, dilation, causal)
    position = key // dilation
    return (position >= begin) & (position < end) & (key % dilation == query % dilation)


def mask_rows(problem: Problem, begin: int, end: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Rows ``[begin, end)`` of the visibility mask, bool ``[end - begin, prod(tokens)]``; tokens in row-major order."""
    rest = torch.arange(begin, end, device=device)
    rank = problem.rank
    rows = torch.ones((end - begin, *[1] * rank), dtype=torch.bool, device=device)
    for d, axis in reversed(list(enumerate(problem.axes))):
        position, rest = rest % axis.length, rest // axis.length
        seen = visible(position[:, None], torch.arange(axis.length, device=device)[None, :], *axis)
        rows = rows & seen.view(end - begin, *[axis.length if e == d else 1 for e in range(rank)])
    return rows.reshape(end - begin, problem.token_count)


def _require_memory(query: torch.Tensor, value: torch.Tensor, rows: int) -> None:
    """Raises what `attention` would where it finds no memory on its way, and says what for."""
    queries = query.shape[:-1].numel()
    parts = {
        "inputs and results": 8 * 2 * queries * (query.shape[-1] + value.shape[-1]),
        f"scores of {rows} queries at a time": 8 * 2 * rows * queries,
    }
    try:
        torch.empty(sum(parts.values()), dtype=torch.uint8, device=query.device)  # not touched: a CPU maps nothing
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        wanted = " and ".join(f"{size:,} bytes for {name}" for name, size in parts.items())
        raise MemoryError(f"out of memory: exact attention in float64 needs {wanted}") from None


def attention(problem: Problem, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Pair:
    """Exact neighborhood attention in float64, by brute force over all pairs.

    Shapes as for `neighborhood_attention`. Returns output ``[batch, *tokens, heads, head_dim_v]`` and log-sum-exp
    ``[batch, *tokens, heads]``, both float64.

    Raises:
        MemoryError, torch.OutOfMemoryError: on a CPU or a GPU, there is no memory for it.
    """
    count, group = problem.token_count, problem.heads // problem.kv_heads
    # The scores' matrix is bounded by this, not the result.
    rows = max(1, 2**24 // (count * query.shape[0] * query.shape[-2]))
    _require_memory(query, value, rows)

    def heads_first(tensor: torch.Tensor, repeats: int) -> torch.Tensor:
        return tensor.double().flatten(1, -3).transpose(1, 2).repeat_interleave(repeats, dim=1)

    q, k, v = heads_first(query, 1), heads_first(key, group), heads_first(value, group)
    outputs, sums = [], []
    for begin in range(0, count, rows):
        end = min(begin + rows, count)
        scores = (q[:, :, begin:end] @ k.mT) * problem.score_scale
        scores.masked_fill_(~mask_rows(problem, begin, end, query.device), float("-inf"))
        sums.append(torch.logsumexp(scores, dim=-1))
        outputs.append(torch.softmax(scores, dim=-1) @ v)
    out = torch.cat(outputs, dim=2).transpose(1, 2)
    lse = torch.cat(sums, dim=2).transpose(1, 2)
    return out.reshape(*query.shape[:-1], value.shape[-1]), lse.reshape(query.shape[:-1])


def visible_pairs(problem: Problem) -> int:
    """(query, key) pairs that the mask lets through, per batch entry and head."""
    pairs = 1
    for axis in problem.axes:
        begin, end = windows(torch.arange(axis.length), *axis)
        pairs *= int((end - begin).sum())
    return pairs


def visited_pairs(problem: Problem, q_tile: Sequence[int], kv_tile: Sequence[int], padding: Padding) -> int:
    """Scores that a kernel with these tiles computes per batch entry and head, padding included. KV tiles are laid from
    where a Q tile's first window begins."""
    step = (1,) * len(kv_tile) if padding.clips else kv_tile
    visited = 1
    for d, axis in enumerate(problem.axes):
        dilation, total = axis.dilation, 0
        for group in range(dilation):
            count = (axis.length - group + dilation - 1) // dilation
            first = torch.arange(0, count, q_tile[d])
            last = torch.clamp(first + q_tile[d], max=count) - 1
            begin, _ = windows(first * dilation + group, *axis)
            _, end = windows(last * dilation + group, *axis)
            total += int(((end - begin + step[d] - 1) // step[d]).sum())
        visited *= total
    return visited * padding.padded_rows(prod(q_tile)) * padding.padded_columns(prod(step))


def error_bound(
    problem: Problem,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    exact: Pair,
    *,
    rounds_probabilities: bool = False,
) -> Pair:
    """How far a kernel with fp32 arithmetic may be from `attention`: bounds for output and log-sum-exp, elementwise.

    Standard rounding analysis (Higham, Accuracy and Stability of Numerical Algorithms, chapter 3), with u = 2^-24 and
    n visible keys: a score is off by at most e = (head_dim + 3) u scale |q| |k|; a probability by e and a few u of
    exp2, relatively; the two sums over keys by n u each; the result is then rounded to the output's dtype.
    With ``rounds_probabilities`` they are also rounded to the dtype of the inputs before the product with V, as kernels
    on tensor cores do: each by half an ulp, or by half the spacing of subnormals. They are relative to one of a row's
    scores, so their sum is at least about 1.
    """
    magnitude = attention(problem, query, key, value.abs())[0] if rounds_probabilities else None
    return _bounds(problem, query, key, value, exact, magnitude)


def query_sample(
    problem: Problem,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    at: Sequence[int],
    *,
    rounds_probabilities: bool = False,
) -> tuple[Pair, Pair]:
    """What `attention` and `error_bound` give for one query of a problem of any size; ``at`` is its batch entry and
    token. Each pair is an output ``[heads, head_dim_v]`` and a log-sum-exp ``[heads]``, float64."""
    batch, *token = at
    box: list[int | slice] = [batch]
    for position, axis in zip(token, problem.axes, strict=True):
        dilation, group = axis.dilation, position % axis.dilation
        begin, end = (int(x) for x in windows(torch.tensor(position), *axis))
        box.append(slice(begin * dilation + group, (end - 1) * dilation + group + 1, dilation))
    group_size = problem.heads // problem.kv_heads
    q = query[tuple(at)]
    k, v = (x[tuple(box)].flatten(0, -3) for x in (key, value))
    keys, values = (x.double().repeat_interleave(group_size, dim=1) for x in (k, v))
    scores = torch.einsum("hd,khd->hk", q.double(), keys) * problem.score_scale
    shares = torch.softmax(scores, -1)
    exact = torch.einsum("hk,khd->hd", shares, values), torch.logsumexp(scores, -1)
    magnitude = torch.einsum("hk,khd->hd", shares, values.abs()) if rounds_probabilities else None
    return exact, _bounds(problem, q, k, v, exact, magnitude)


def _bounds(
    problem: Problem,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    exact: Pair,
    magnitude: torch.Tensor | None,
) -> Pair:
    """As `error_bound` says; ``magnitude``: attention with the values' magnitudes, where probabilities are rounded."""
    u = 2.0**-24
    n = prod(problem.window)
    lengths = [tensor.double().norm(dim=-1).max().item() for tensor in (query, key)]
    e = (query.shape[-1] + 3) * u * abs(problem.score_scale) * lengths[0] * lengths[1]
    out, lse = exact
    rounding = torch.finfo(value.dtype).eps / 2
    largest = value.double().abs().max().item()
    inner = (2 * e + (2 * n + 16) * u) * largest
    subnormal = torch.finfo(value.dtype).smallest_normal * rounding  # half the spacing of subnormals
    if magnitude is not None:
        inner = inner + rounding * magnitude + n * subnormal * largest
    return out.abs() * rounding + inner * (1 + rounding) + subnormal, lse.abs() * 2 * u + e + (n + 16) * u
