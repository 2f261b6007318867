"""The meaning of GNA in a few lines of torch: masks, and exact attention in float64. Slow; for checks and benchmarks.

Semantics: GNA, arXiv 2504.16922, with NATTEN's border behaviour (windows shift inwards at borders).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch


@dataclass(frozen=True)
class Pattern:
    """Window, stride, dilation and causal flag of each token dimension."""

    window: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    causal: tuple[bool, ...]

    @property
    def rank(self) -> int:
        """Number of token dimensions."""
        return len(self.window)

    def arguments(self) -> dict[str, Any]:
        """As keyword arguments of `neighborhood_attention`."""
        return {
            "kernel_size": self.window,
            "stride": self.stride,
            "dilation": self.dilation,
            "is_causal": self.causal,
        }


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


def mask_rows(
    tokens: Sequence[int], pattern: Pattern, begin: int, end: int, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Rows ``[begin, end)`` of the visibility mask, bool ``[end - begin, prod(tokens)]``; tokens in row-major order."""
    rest = torch.arange(begin, end, device=device)
    rows = torch.ones((end - begin, *[1] * len(tokens)), dtype=torch.bool, device=device)
    for d in reversed(range(len(tokens))):
        position, rest = rest % tokens[d], rest // tokens[d]
        axis = visible(
            position[:, None],
            torch.arange(tokens[d], device=device)[None, :],
            tokens[d],
            pattern.window[d],
            pattern.stride[d],
            pattern.dilation[d],
            pattern.causal[d],
        )
        rows = rows & axis.view(end - begin, *[tokens[d] if e == d else 1 for e in range(len(tokens))])
    return rows.reshape(end - begin, prod(tokens))


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pattern: Pattern, scale: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact neighborhood attention in float64, by brute force over all pairs.

    Shapes as for `neighborhood_attention`. Returns output ``[batch, *tokens, heads, head_dim_v]`` and log-sum-exp
    ``[batch, *tokens, heads]``, both float64.
    """
    tokens = query.shape[1:-2]
    count, group = prod(tokens), query.shape[-2] // key.shape[-2]

    def heads_first(tensor: torch.Tensor, repeats: int) -> torch.Tensor:
        return tensor.double().flatten(1, -3).transpose(1, 2).repeat_interleave(repeats, dim=1)

    q, k, v = heads_first(query, 1), heads_first(key, group), heads_first(value, group)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    rows = max(1, 2**24 // (count * q.shape[0] * q.shape[1]))  # bounds the score matrix, not the result
    outputs, sums = [], []
    for begin in range(0, count, rows):
        end = min(begin + rows, count)
        scores = (q[:, :, begin:end] @ k.mT) * scale
        scores.masked_fill_(~mask_rows(tokens, pattern, begin, end, query.device), float("-inf"))
        sums.append(torch.logsumexp(scores, dim=-1))
        outputs.append(torch.softmax(scores, dim=-1) @ v)
    out = torch.cat(outputs, dim=2).transpose(1, 2)
    lse = torch.cat(sums, dim=2).transpose(1, 2)
    return out.reshape(*query.shape[:-1], value.shape[-1]), lse.reshape(query.shape[:-1])


def visited_pairs(
    tokens: Sequence[int],
    pattern: Pattern,
    q_tile: Sequence[int],
    kv_tile: Sequence[int],
    multiples: tuple[int, int],
    clips: bool,
) -> int:
    """Scores that a kernel with these tiles computes per batch entry and head, padding included. KV tiles are laid from
    where a Q tile's first window begins; ``multiples`` is what query rows and key columns are padded to, and
    ``clips`` says that the last KV tile ends where the keys do."""
    step = (1,) * len(kv_tile) if clips else kv_tile
    visited = 1
    for d, length in enumerate(tokens):
        axis = [field[d] for field in vars(pattern).values()]
        dilation, total = axis[2], 0
        for group in range(dilation):
            count = (length - group + dilation - 1) // dilation
            first = torch.arange(0, count, q_tile[d])
            last = torch.clamp(first + q_tile[d], max=count) - 1
            begin, _ = windows(first * dilation + group, length, *axis)
            _, end = windows(last * dilation + group, length, *axis)
            total += int(((end - begin + step[d] - 1) // step[d]).sum())
        visited *= total
    rows, columns = (
        -(-prod(box) // multiple) * multiple for box, multiple in zip((q_tile, step), multiples, strict=True)
    )
    return visited * rows * columns


def attention_of_query(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pattern: Pattern,
    at: Sequence[int],
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `attention` gives for one query of a problem of any size; ``at`` is its batch entry and token.

    Returns output ``[heads, head_dim_v]`` and log-sum-exp ``[heads]``, both float64.
    """
    batch, *token = at
    box: list[int | slice] = [batch]
    for d, position in enumerate(token):
        axis = [field[d] for field in vars(pattern).values()]
        dilation, group = axis[2], position % axis[2]
        begin, end = (int(x) for x in windows(torch.tensor(position), key.shape[1 + d], *axis))
        box.append(slice(begin * dilation + group, (end - 1) * dilation + group + 1, dilation))
    group_size = query.shape[-2] // key.shape[-2]
    k, v = (x[tuple(box)].flatten(0, -3).double().repeat_interleave(group_size, dim=1) for x in (key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.einsum("hd,khd->hk", query[tuple(at)].double(), k) * scale
    return torch.einsum("hk,khd->hd", torch.softmax(scores, -1), v), torch.logsumexp(scores, -1)


def error_bound(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pattern: Pattern,
    exact: tuple[torch.Tensor, torch.Tensor],
    scale: float | None = None,
    *,
    rounds_probabilities: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """How far a kernel with fp32 arithmetic may be from `attention`: bounds for output and log-sum-exp, elementwise.

    Standard rounding analysis (Higham, Accuracy and Stability of Numerical Algorithms, chapter 3), with u = 2^-24 and
    n visible keys: a score is off by at most e = (head_dim + 3) u scale |q| |k|; a probability by e and a few u of
    exp2, relatively; the two sums over keys by n u each; the result is then rounded to the output's dtype.
    With ``rounds_probabilities`` they are also rounded to the dtype of the inputs before the product with V, as kernels
    on tensor cores do: each by half an ulp, or in fp16 by half the spacing of subnormals. They are relative to a row's
    maximum so far, so their sum is at least about 1.
    """
    u = 2.0**-24
    n = prod(pattern.window)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    lengths = [tensor.double().norm(dim=-1).max().item() for tensor in (query, key)]
    e = (query.shape[-1] + 3) * u * abs(scale) * lengths[0] * lengths[1]
    out, lse = exact
    rounding = torch.finfo(value.dtype).eps / 2
    inner = (2 * e + (2 * n + 16) * u) * value.double().abs().max().item()
    subnormal = 2.0**-25 if value.dtype == torch.float16 else 0.0  # half the spacing of fp16 below 2^-14
    if rounds_probabilities:
        magnitude, _ = attention(query, key, value.abs(), pattern, scale)
        small = query[0, ..., 0, 0].numel() * subnormal * value.double().abs().max().item()
        inner = inner + rounding * magnitude + small
    return out.abs() * rounding + inner * (1 + rounding) + subnormal, lse.abs() * 2 * u + e + (n + 16) * u
