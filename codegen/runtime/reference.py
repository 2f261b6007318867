"""The meaning of GNA in a few lines of torch: masks, and exact attention in float64. Slow; for checks and benchmarks.

Semantics: GNA, arXiv 2504.16922, and what `Problem` says of edges, causal kinds, sinks and ranges. `windows` takes
plain axes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import NamedTuple

import torch

from .dtypes import DTYPES
from .family import Padding
from .problem import Problem
from .problem_rules import Dimension

Pair = tuple[torch.Tensor, torch.Tensor]


class ExtraKeys(NamedTuple):
    """A piece of keys beside the grid's, which all queries see.

    Attributes:
        key: ``[batch, tokens, kv_heads, head_dim]``
        value: ``[batch, tokens, kv_heads, head_dim_v]``
        lengths: int ``[batch]``, tokens that count, cut to what there is; None: all. What is beyond is not looked at.
    """

    key: torch.Tensor
    value: torch.Tensor
    lengths: torch.Tensor | None = None

    def valid(self) -> torch.Tensor:
        """Which tokens count, bool ``[batch, tokens]``."""
        batch, tokens = self.key.shape[:2]
        token = torch.arange(tokens, device=self.key.device)
        if self.lengths is None:
            return torch.ones(batch, tokens, dtype=torch.bool, device=token.device)
        return token < self.lengths[:, None]

    def seen(self) -> ExtraKeys:
        """The piece with zeros in place of what doesn't count."""
        keep = self.valid()[:, :, None, None]
        return ExtraKeys(self.key.masked_fill(~keep, 0), self.value.masked_fill(~keep, 0), self.lengths)


def extra_keys(inputs: Mapping[str, torch.Tensor]) -> list[ExtraKeys]:
    """The pieces of extra keys among tensors by role."""
    ends = [end for end in ("", "_2") if f"extra_k{end}" in inputs]
    return [
        ExtraKeys(inputs[f"extra_k{end}"], inputs[f"extra_v{end}"], inputs.get(f"extra_lengths{end}")) for end in ends
    ]


def dequantise(inputs: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """Tensors by role, of which those of 8 bits are replaced by what they stand for, in float64: their numbers times
    the descales of their heads, ``[batch, heads]`` each, or 1 without. Extra keys and their values have K's and V's."""
    found = dict(inputs)
    for name, tensor in inputs.items():
        if tensor.is_floating_point() and tensor.itemsize == 1:
            found[name] = tensor.double()
            scale = inputs.get(f"descale_{name.removeprefix('extra_')[0]}")
            if scale is not None:
                found[name] *= scale.double().view(len(scale), *[1] * (tensor.dim() - 3), -1, 1)
    return found


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


def visible(axis: Dimension, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Whether ``query`` sees ``key`` along one dimension; both hold positions in their tensors, of any shapes that
    broadcast."""
    if axis.dense:
        return (query >= 0) & (key >= 0)
    at = torch.where(key < axis.kv_sink, key, key - axis.kv_sink + axis.kv_offset)
    place = query + axis.q_offset
    group, i = place % axis.dilation, place // axis.dilation
    length = (axis.length - group + axis.dilation - 1) // axis.dilation
    j = (at - group) // axis.dilation
    first, window = i - i % axis.stride, axis.window
    if axis.causal:
        begin, end = first + axis.stride - window, first + axis.stride
        if axis.causal != "block":
            begin, end = torch.minimum(begin, length - window), i + 1
        begin, end = begin.clamp(min=0), torch.minimum(end, length)
    else:
        begin = first + axis.stride // 2 - window // 2
        if axis.edge == "shift":
            begin = torch.minimum(begin.clamp(min=0), length - window)
        end = begin + window
        if axis.edge == "cut":
            begin, end = begin.clamp(min=0), torch.minimum(end, length)
    seen = (j >= begin) & (j < end)
    if axis.edge == "wrap" and axis.kv_offset == 0 and axis.keys == axis.length:
        seen = seen | ((j + length >= begin) & (j + length < end)) | ((j - length >= begin) & (j - length < end))
    if axis.sink:
        seen = seen | ((j < axis.sink) & (j < end) if axis.causal else j < axis.sink)
    return seen & ((at - place) % axis.dilation == 0)


def _key_tokens(problem: Problem) -> tuple[int, ...]:
    return problem.kv_tokens or problem.tokens


def mask_rows(problem: Problem, begin: int, end: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Rows ``[begin, end)`` of the visibility mask, bool ``[end - begin, prod(key tokens)]``; tokens in row-major
    order."""
    rest = torch.arange(begin, end, device=device)
    rank = problem.rank
    rows = torch.ones((end - begin, *[1] * rank), dtype=torch.bool, device=device)
    for d, axis in reversed(list(enumerate(problem.dimensions))):
        position, rest = rest % axis.tokens, rest // axis.tokens
        seen = visible(axis, position[:, None], torch.arange(axis.keys, device=device)[None, :])
        rows = rows & seen.view(end - begin, *[axis.keys if e == d else 1 for e in range(rank)])
    return rows.reshape(end - begin, prod(_key_tokens(problem)))


def _require_memory(query: torch.Tensor, value: torch.Tensor, rows: int) -> None:
    """Raises what `attention` would where it finds no memory on its way, and says what for."""
    queries, keys = query.shape[:-1].numel(), query.shape[-2] * value.shape[:-2].numel()
    parts = {
        "inputs and results": 8 * (queries + keys) * (query.shape[-1] + value.shape[-1]),
        f"scores of {rows} queries at a time": 8 * 2 * rows * keys,
    }
    try:
        torch.empty(sum(parts.values()), dtype=torch.uint8, device=query.device)  # not touched: a CPU maps nothing
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        wanted = " and ".join(f"{size:,} bytes for {name}" for name, size in parts.items())
        raise MemoryError(f"out of memory: exact attention in float64 needs {wanted}") from None


def attention(problem: Problem, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *extra: ExtraKeys) -> Pair:
    """Exact neighborhood attention in float64, by brute force over all pairs.

    Shapes as for `neighborhood_attention`; ``extra``: the pieces of keys that all queries see. Returns output
    ``[batch, *tokens, heads, head_dim_v]`` and log-sum-exp ``[batch, *tokens, heads]``, both float64.

    Raises:
        MemoryError, torch.OutOfMemoryError: on a CPU or a GPU, there is no memory for it.
    """
    count, group = problem.token_count, problem.heads // problem.kv_heads
    # The scores' matrix is bounded by this, not the result.
    keys = prod(_key_tokens(problem)) + sum(piece.key.shape[1] for piece in extra)
    rows = max(1, 2**24 // (keys * query.shape[0] * query.shape[-2]))
    _require_memory(query, value, rows)

    def heads_first(tensor: torch.Tensor, repeats: int) -> torch.Tensor:
        return tensor.double().flatten(1, -3).transpose(1, 2).repeat_interleave(repeats, dim=1)

    pieces = [piece.seen() for piece in extra]
    q = heads_first(query, 1)
    k = torch.cat([heads_first(x, group) for x in (key, *(piece.key for piece in pieces))], 2)
    v = torch.cat([heads_first(x, group) for x in (value, *(piece.value for piece in pieces))], 2)
    hidden = [~piece.valid()[:, None, None, :] for piece in pieces]
    outputs, sums = [], []
    for begin in range(0, count, rows):
        end = min(begin + rows, count)
        scores = (q[:, :, begin:end] @ k.mT) * problem.score_scale
        masks = [~mask_rows(problem, begin, end, query.device)[None, None], *hidden]
        for part, mask in zip(scores.split([mask.shape[-1] for mask in masks], -1), masks, strict=True):
            part.masked_fill_(mask, float("-inf"))
        sums.append(torch.logsumexp(scores, dim=-1))
        outputs.append(torch.softmax(scores, dim=-1) @ v)
    out = torch.cat(outputs, dim=2).transpose(1, 2)
    lse = torch.cat(sums, dim=2).transpose(1, 2)
    return out.reshape(*query.shape[:-1], value.shape[-1]), lse.reshape(query.shape[:-1])


def visible_pairs(problem: Problem) -> int:
    """(query, key) pairs that the mask lets through, per batch entry and head; all extra keys are."""
    if problem.extra_tokens:
        return visible_pairs(replace(problem, extra_tokens=())) + problem.token_count * sum(problem.extra_tokens)
    pairs = 1
    if not problem.features():
        for axis in problem.axes:
            begin, end = windows(torch.arange(axis.length), *axis)
            pairs *= int((end - begin).sum())
        return pairs
    for dim in problem.dimensions:
        keys = torch.arange(dim.keys)
        rows = torch.arange(dim.tokens).split(max(1, 2**24 // dim.keys))
        pairs *= sum(int(visible(dim, part[:, None], keys).sum()) for part in rows)
    return pairs


def visited_pairs(
    problem: Problem, q_tile: Sequence[int], kv_tile: Sequence[int], padding: Padding, q_heads: int = 1
) -> int:
    """Scores that a kernel with these tiles, Q tiles of ``q_heads`` heads, computes per batch entry and head, padding
    included. KV tiles are laid from where a Q tile's first window begins; keys of a sink, those on the other side of a
    seam where keys wrap around, and extra keys have tiles of their own."""
    step = (1,) * len(kv_tile) if padding.clips else tuple(kv_tile)
    q_tiles, visited, spared = 1, 1, 0
    for d, axis in enumerate(problem.dimensions):
        tiles, total, spared_here = 0, 0, 0
        for hulls in _hulls(axis, q_tile[d]):
            tiles += len(hulls[0][0])
            for begin, end in hulls:
                total += int((((end - begin).clamp(min=0) + step[d] - 1) // step[d]).sum())
            spared_here += _spared_columns(hulls, step, padding) if d == 0 else 0
        spared = spared * total if d else spared_here
        visited *= total
        q_tiles *= tiles
    visited += q_tiles * sum(-(-n // prod(step)) for n in problem.extra_tokens)
    rows = padding.padded_rows(prod(q_tile) * q_heads) / q_heads
    return round((visited * padding.padded_columns(prod(step)) - spared) * rows)


def _spared_columns(hulls: Hulls, kv_tile: Sequence[int], padding: Padding) -> int:
    """Columns of last KV tiles along the first axis that aren't computed, of Q tiles with no keys in other hulls."""
    columns, spared = prod(kv_tile), 0
    begin, end = hulls[-1]
    alone = torch.ones_like(begin, dtype=torch.bool)
    for low, high in hulls[:-1]:
        alone &= high <= low
    rows = ((end - begin)[alone & (end > begin)] - 1) % kv_tile[0] + 1
    least = 0
    for short in padding.short_tiles(kv_tile):
        seen = rows * (columns // kv_tile[0])
        spared += int(((least < seen) & (seen <= short)).sum()) * (columns - short)
        least = short
    return spared


Hulls = list[tuple[torch.Tensor, torch.Tensor]]


def _hulls(axis: Dimension, q_extent: int) -> Iterator[Hulls]:
    """Of each dilation group that has queries, the intervals [begin, end) of keys that each Q tile visits along a
    dimension; two where tiles are laid anew: below a sink's end and from there on, and on a side of a seam each."""
    far = 2**62
    for group in range(axis.dilation):
        length = (axis.length - group + axis.dilation - 1) // axis.dilation
        offset = 0 if axis.dense else axis.q_offset
        first, stop = ((at - group + axis.dilation - 1) // axis.dilation for at in (offset, offset + axis.tokens))
        begins = torch.arange(first, stop, q_extent)
        ends = torch.clamp(begins + q_extent, max=stop) - 1
        if not len(begins):
            continue
        if axis.dense:
            yield [(torch.zeros_like(begins), torch.full_like(begins, axis.length))]
            continue
        (begin, _), (_, end) = (_main_interval(axis, at, length) for at in (begins, ends))
        if axis.edge == "wrap" and axis.kv_offset == 0 and axis.keys == axis.length:
            seams = [(-far, 0), (0, length), (length, far)] if axis.window < length else [(-far, far)]
            if axis.window == length:
                begin, end = torch.zeros_like(begin), torch.full_like(end, length)
            yield [(begin.clamp(min=low), end.clamp(max=high)) for low, high in seams]
        elif axis.sink:
            sink = min(axis.sink, length)
            low = end.clamp(max=sink) if axis.causal else torch.full_like(end, sink)
            yield [(torch.zeros_like(begin), low), (begin.clamp(min=sink), end)]
        else:
            yield [(begin, end)]


def _main_interval(axis: Dimension, query: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys [begin, end) of a dilation group of so many tokens that queries at these positions of it see beside a sink;
    where it wraps, they may lie beyond both ends."""
    first, window = query - query % axis.stride, axis.window
    if axis.causal:
        begin, end = first + axis.stride - window, first + axis.stride
        if axis.causal != "block":
            begin, end = begin.clamp(max=max(length - window, 0)), query + 1
        return begin.clamp(min=0), end.clamp(max=length)
    begin = first + axis.stride // 2 - window // 2
    if axis.edge == "shift":
        begin = begin.clamp(0, length - window)
    end = begin + window
    return (begin.clamp(min=0), end.clamp(max=length)) if axis.edge == "cut" else (begin, end)


def error_bound(
    problem: Problem,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    exact: Pair,
    *extra: ExtraKeys,
    rounds_probabilities: bool = False,
) -> Pair:
    """How far a kernel with fp32 arithmetic may be from `attention`: bounds for output and log-sum-exp, elementwise.

    Standard rounding analysis (Higham, Accuracy and Stability of Numerical Algorithms, chapter 3), with u = 2^-24 and
    n visible keys: a score is off by at most e = (head_dim + 3) u scale |q| |k|; a probability by e and a few u of
    exp2, relatively; the two sums over keys by n u each; the result is then rounded to the output's dtype.
    With ``rounds_probabilities`` they are also rounded to the dtype of the inputs before the product with V, as kernels
    on tensor cores do: each by half an ulp, or by half the spacing of subnormals. They are relative to one of a row's
    scores, so their sum is at least about 1.

    Of inputs of 8 bits, which are given as `dequantise` gives them, descales make three more products of a score's
    factor and two of a result's, u each. Probabilities are multiplied by 2^p_exponent before they are rounded (see
    `Dtype`), so that half the spacing of subnormals is that much less of their sum. For e4m3, with 3 bits of mantissa,
    least normal number 2^-6 and p_exponent 8: half an ulp is 2^-4, half the spacing of subnormals 2^-10 of a sum of at
    least 2^8. The exponent is added to a score's shift, which costs one more u of the score and 8 u. What is rounded is
    added up in fp32, as above (PTX ISA, tcgen05.mma, kind::f8f6f4).
    """
    pieces = [piece.seen() for piece in extra]
    magnitude = None
    if rounds_probabilities:
        others = (ExtraKeys(piece.key, piece.value.abs(), piece.lengths) for piece in pieces)
        magnitude = attention(problem, query, key, value.abs(), *others)[0]
    keys, values = [key, *(piece.key for piece in pieces)], [value, *(piece.value for piece in pieces)]
    return _bounds(problem, query, keys, values, exact, magnitude)


def query_sample(
    problem: Problem,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    at: Sequence[int],
    *extra: ExtraKeys,
    rounds_probabilities: bool = False,
) -> tuple[Pair, Pair]:
    """What `attention` and `error_bound` give for one query of a problem of any size; ``at`` is its batch entry and
    token. Each pair is an output ``[heads, head_dim_v]`` and a log-sum-exp ``[heads]``, float64."""
    batch, *token = at
    box = []
    for d, (position, axis) in enumerate(zip(token, problem.dimensions, strict=True)):
        keys = torch.arange(axis.keys, device=key.device)
        seen = keys[visible(axis, torch.tensor(position, device=key.device), keys)]
        box.append(seen.view([-1 if e == d else 1 for e in range(problem.rank)]))
    group_size = problem.heads // problem.kv_heads
    q = query[tuple(at)]
    k, v = (x[batch][tuple(box)].flatten(0, -3) for x in (key, value))
    counts = [piece.valid()[batch] for piece in extra]
    k = torch.cat([k, *(piece.key[batch][valid] for piece, valid in zip(extra, counts, strict=True))])
    v = torch.cat([v, *(piece.value[batch][valid] for piece, valid in zip(extra, counts, strict=True))])
    keys, values = (x.double().repeat_interleave(group_size, dim=1) for x in (k, v))
    scores = torch.einsum("hd,khd->hk", q.double(), keys) * problem.score_scale
    shares = torch.softmax(scores, -1)
    exact = torch.einsum("hk,khd->hd", shares, values), torch.logsumexp(scores, -1)
    magnitude = torch.einsum("hk,khd->hd", shares, values.abs()) if rounds_probabilities else None
    return exact, _bounds(problem, q, [k], [v], exact, magnitude)


def _bounds(
    problem: Problem,
    query: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    exact: Pair,
    magnitude: torch.Tensor | None,
) -> Pair:
    """As `error_bound` says; ``magnitude``: attention with the values' magnitudes, where probabilities are rounded."""
    u = 2.0**-24
    dtype = DTYPES[problem.dtype]
    given = dtype.torch if dtype.scaled else values[0].dtype
    result = DTYPES[problem.output_dtype].torch if dtype.scaled else given
    n = prod(min(axis.window + axis.sink, axis.keys) for axis in problem.dimensions) + sum(problem.extra_tokens)
    longest = max(key.double().norm(dim=-1).max().item() for key in keys)
    e = (
        (query.shape[-1] + (7 if dtype.scaled else 3))
        * u
        * abs(problem.score_scale)
        * query.double().norm(dim=-1).max().item()
        * longest
    )
    out, lse = exact
    rounding, subnormal = _half_steps(result)
    largest = max(value.double().abs().max().item() for value in values)
    more = 2 + 2 * dtype.p_exponent if dtype.scaled else 0
    inner = (2 * e + (2 * n + 16 + more) * u) * largest
    if magnitude is not None:
        of_p, least = _half_steps(given)
        inner = inner + of_p * magnitude + n * least * 2.0**-dtype.p_exponent * largest
    return out.abs() * rounding + inner * (1 + rounding) + subnormal, lse.abs() * 2 * u + e + (
        n + 16 + dtype.p_exponent
    ) * u


def _half_steps(dtype: torch.dtype) -> tuple[float, float]:
    """How far rounding to a type may move a number: half an ulp, relatively, and half the spacing of subnormals."""
    info = torch.finfo(dtype)
    return info.eps / 2, info.smallest_normal * info.eps / 2
