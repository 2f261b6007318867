"""Attention problems to check kernels with: given, drawn at random, or cut down to a size that can be emulated."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from math import ceil, prod
from random import Random
from typing import Any

from ..families import family_of
from ..gna.counts import TileCounts, count_problem, count_tiles, pattern_axes
from ..runtime.config import ANY_HEAD_DIM, KernelConfig
from ..runtime.op_table import OPS
from ..runtime.problem import PlainAxis, Problem
from ..runtime.problem_rules import Dimension

# One visited pair of tiles takes the emulator 2 to 5 ms. So many hold a small problem for two K/V heads.
EMULATED_TILES = 300
# Problems are small: only on few processors does a CTA of a persistent kernel come to a second Q tile.
EMULATED_PROCESSORS = 3
_CTAS = 2 * EMULATED_PROCESSORS  # at once, at most
_WIDE = 8.0  # times the default scale: scores of normal inputs that spread by 11 powers of two
_SETTINGS = {"edge", "block_causal", "sink", "range", "kv_sink", "extra_keys"}
# Pairs of tokens for which exact attention by brute force takes a few seconds.
_REFERENCE_PAIRS = 2**26


def tile_counts(problem: Problem, config: KernelConfig) -> TileCounts:
    """Tiles of one batch entry and as many heads as a Q tile has, by the simulator's model of the kernel."""
    counts = count_tiles(pattern_axes(problem), config.q_tile, config.kv_tile, held=OPS[config.op].held)
    return replace(counts, interior=0) if _pads_columns(config) else counts  # padding is masked in every tile


def _pads_columns(config: KernelConfig) -> bool:
    family = family_of(config)
    _, passing = family.in_order(config.q_rows, config.kv_columns)
    return family.padding.padded_columns(passing) > passing


def count_call_tiles(problem: Problem, config: KernelConfig, lengths: Sequence[Sequence[int] | None]) -> dict[str, int]:
    """Tiles of all batch entries and heads: ``visited``, and ``interior`` ones, which need no mask.

    Args:
        lengths: of each piece of extra keys, by batch entry; None: all count. Their keys have tiles of their own, of
            which the last one of a piece needs a mask where it isn't full. Where KV tiles are held, those of extra keys
            visit all Q tiles of the query tensor, without a mask.
    """
    counts, columns, padded = tile_counts(problem, config), config.kv_columns, _pads_columns(config)
    every = prod(-(-tokens // extent) for tokens, extent in zip(problem.tokens, config.q_tile, strict=True))
    held = OPS[config.op].held
    heads = problem.heads // config.q_tile_heads
    times = problem.batch * heads
    visited, interior = times * counts.visited, times * counts.interior
    for tokens, given in zip(problem.extra_tokens, lengths, strict=True):
        for length in [tokens] * problem.batch if given is None else given:
            keys = min(max(length, 0), tokens)
            if held == "kv":
                visited += heads * every * -(-keys // columns)
                interior += heads * every * -(-keys // columns)
                continue
            visited += heads * counts.q_tiles * -(-keys // columns)
            interior += 0 if padded else heads * counts.q_tiles * (keys // columns)
    return {"visited": visited, "interior": interior}


def for_kernel(problem: Problem, config: KernelConfig) -> Problem:
    """The problem with the dtype of a kernel, and with its head dims where those are fixed."""
    problem = replace(problem, dtype=config.dtype, out_dtype=config.output_dtype)
    if config.head_dim == ANY_HEAD_DIM:
        return problem
    return replace(problem, head_dim=config.head_dim, value_head_dim=config.value_head_dim or config.head_dim)


def with_heads(problem: Problem, config: KernelConfig) -> Problem:
    """The problem with more query heads, where those that share keys make no whole tiles."""
    group, step = problem.heads // problem.kv_heads, config.q_tile_heads
    return replace(problem, heads=problem.kv_heads * -(-group // step) * step)


def random_axis(rng: Random, max_length: int, min_window: int = 1) -> PlainAxis:
    """A token dimension.

    Edge cases get far more than their share: length 1, window 1 and as large as fits, stride 1 and equal to
    the window, small dilations and as large as fit, groups of unequal length.
    """
    length = rng.choice((min_window, *[rng.randint(min_window, max_length)] * 6))
    most = length // min_window
    dilation = rng.choice((1, 1, rng.randint(1, min(3, most)), rng.randint(1, most)))
    widest = length // dilation
    window = rng.choice((min_window, widest, *[rng.randint(min_window, widest)] * 4))
    stride = rng.choice((1, window, *[rng.randint(1, window)] * 3))
    return PlainAxis(length, window, stride, dilation, rng.random() < 0.3)


def random_problem(rng: Random, rank: int | None = None, max_tokens: int = 256, min_window: int = 1) -> Problem:
    """A small problem of any kind.

    All ranks, the edge cases of `random_axis`, causal per dimension, GQA and MQA, head dims that are
    multiples of 8, value head dim equal or not. ``max_tokens`` bounds the product of the tokens.
    """
    rank = rank or rng.randint(1, 3)
    max_length = round(max_tokens ** (1 / rank), 6)  # 216 ** (1 / 3) is 5.99...
    axes = [random_axis(rng, int(max_length), min_window) for _ in range(rank)]
    tokens, window, stride, dilation, causal = zip(*axes, strict=True)
    kv_heads = rng.choice((1, 1, 2, 3))
    head_dim = 8 * rng.choice((1, 2, 3, 4, 5, 8, 9, 16))
    return Problem(
        tokens,
        window,
        stride,
        dilation,
        causal,
        batch=rng.randint(1, 2),
        heads=kv_heads * rng.choice((1, 1, 2, 4)),
        kv_heads=kv_heads,
        head_dim=head_dim,
        value_head_dim=rng.choice((head_dim, head_dim, 8 * rng.randint(1, 16))),
    )


def random_dimension(rng: Random, max_length: int, features: Collection[str]) -> Dimension:
    """A token dimension with settings of these features: edges, block-causal frames, sinks, and queries and keys that
    are parts of a grid. All keys that queries see are there."""
    length, window, stride, dilation, flag = random_axis(rng, max_length)
    causal: bool | str = flag
    edge, sink = "shift", 0
    if "edge" in features and not causal:
        edge = rng.choice(("shift", "cut", "wrap"))
        if edge == "wrap" and length % dilation:
            dilation = 1
    if "block_causal" in features and edge == "shift" and rng.random() < 0.3:
        causal = "block"
    if (edge == "cut" or causal == "block") and rng.random() < 0.2:
        window += length  # a window that is never full
    if "sink" in features and edge != "wrap" and rng.random() < 0.4:
        dilation, sink = 1, rng.choice((1, rng.randint(1, length), length + 1))
    whole = Dimension(length, window, stride, dilation, causal, edge, sink)
    if "range" not in features or rng.random() < 0.5:
        return whole
    begin = rng.randrange(length)
    part = whole._replace(tokens=rng.randint(1, length - begin), grid=length, q_offset=begin)
    if whole.dense:
        return part._replace(tokens=part.tokens + rng.choice((0, length)), kv_tokens=length)
    import torch

    from ..runtime.reference import visible

    # Of all keys that there could be, those that are seen; beyond the grid's ends where it wraps.
    beyond = length if edge == "wrap" else 0
    every = part._replace(kv_offset=-beyond, kv_tokens=length + 2 * beyond)
    seen = visible(every, torch.arange(part.tokens)[:, None], torch.arange(every.keys)).any(0).nonzero().flatten()
    keys = [int(key) - beyond for key in seen]
    head = sink if "kv_sink" in features and 0 < sink < length and rng.random() < 0.5 else 0
    body = [key for key in keys if not head or key >= head] or [head]
    low, high = min(body) - rng.choice((0, 0, 1, 2)), max(body) + 1 + rng.choice((0, 0, 1, 2))
    if edge != "wrap":
        low, high = max(low, head), min(high, length)
    return part._replace(kv_offset=low, kv_tokens=head + high - low, kv_sink=head)


def with_settings(problem: Problem, rng: Random, max_tokens: int, features: Collection[str]) -> Problem:
    """The problem with other tokens, along each dimension settings of these features, and perhaps extra keys."""
    most = int(round(max_tokens ** (1 / problem.rank), 6))
    axes = [random_dimension(rng, most, features) for _ in range(problem.rank)]
    columns: dict[str, Any] = dict(zip(Dimension._fields, zip(*axes, strict=True), strict=True))
    columns["grid"] = tuple(axis.length for axis in axes)
    columns["kv_tokens"] = tuple(axis.keys for axis in axes)
    if "extra_keys" in features and rng.random() < 0.5:
        pieces = range(rng.choice((1, 1, 2)))
        columns["extra_tokens"] = tuple(rng.choice((1, rng.randint(1, 20), rng.randint(1, 150))) for _ in pieces)
    return replace(problem, **columns)


def widen(problem: Problem, config: KernelConfig, rng: Random) -> Problem:
    """The problem with what random ones seldom have: tokens and window for tiles that need no mask, and some after
    them that do; heads for more tiles than there are CTAs at once."""
    _, passing = family_of(config).in_order(config.q_tile, config.kv_tile)
    tokens = tuple(rng.randint(extent, 2 * extent) for extent in passing)
    window = tuple(max(n - rng.randint(0, 1), 1) for n in tokens)
    one = (1,) * config.rank
    wide = replace(problem, tokens=tokens, window=window, stride=one, dilation=one, causal=(False,) * config.rank)
    counts = tile_counts(wide, config)
    heads = max(problem.heads, (_CTAS // (problem.batch * counts.q_tiles) + 1) * config.q_tile_heads)
    heads = -(-heads // problem.kv_heads) * problem.kv_heads
    if OPS[config.op].held == "kv":  # those of K and V are what thread blocks have
        times = -(-heads // problem.kv_heads)
        return replace(
            wide,
            heads=problem.heads * times,
            kv_heads=problem.kv_heads * times,
            window=wide.window if counts.interior else tokens,
        )
    return with_heads(replace(wide, heads=heads, window=wide.window if counts.interior else tokens), config)


def random_problem_for(config: KernelConfig, seed: int, max_tokens: int = 400) -> Problem:
    """A random problem of a kernel's rank and head dims. The same for equal arguments.

    One of three seeds in a row gives one that `widen` made; another, of families that have settings beyond plain GNA,
    one that has some. One of two has a large scale, so that a row's largest score so far often grows much from one KV
    tile to the next.
    """
    rng = Random(f"{config.key} {seed}")
    problem = random_problem(rng, config.rank, max_tokens)
    if seed % 3 == 0:
        problem = widen(problem, config, rng)
    elif seed % 3 == 1 and not _SETTINGS.isdisjoint(features := family_of(config).features):
        problem = with_settings(problem, rng, max_tokens, features)
    problem = with_heads(for_kernel(problem, config), config)
    return replace(problem, scale=_WIDE * problem.score_scale) if seed % 2 else problem


def shrink(problem: Problem, config: KernelConfig, most_tiles: int = EMULATED_TILES) -> Problem:
    """A problem of the same kind that visits at most ``most_tiles`` pairs of tiles; itself if it does so already and
    exact attention can be computed for it.

    First to go are batch entries and heads (at most two of K and V stay, each with a group of at most two, or what a Q
    tile has), then tokens, window and dilation of all dimensions, in proportion, but no window below what has interior
    tiles, and no dilation below 2. If that isn't enough, one of the K/V heads goes, so that interior tiles stay; and if
    that doesn't help either, they go. Strides stay as long as they fit. Sinks and extra keys shrink too. Dimensions
    where queries or keys are a part of a grid stay as they are.
    """

    held = OPS[config.op].held

    def small_enough(of: Problem) -> bool:
        times = of.batch * of.heads
        if times * of.pair_count > _REFERENCE_PAIRS:
            return False
        visited = count_problem(of, config.q_tile, config.kv_tile, held=held).visited
        return times // config.q_tile_heads * visited <= most_tiles

    if small_enough(problem):
        return problem

    def with_kv_heads(count: int) -> Problem:
        group = min(max(2, config.q_tile_heads), problem.heads // problem.kv_heads)
        return replace(problem, batch=1, heads=count * group, kv_heads=count)

    two, one = with_kv_heads(min(2, problem.kv_heads)), with_kv_heads(1)
    with_interior = [q + kv for q, kv in zip(config.q_tile, config.kv_tile, strict=True)]
    anything = [1] * config.rank
    for alone, floors, dilation in (
        (two, with_interior, 2),
        (one, with_interior, 2),
        (two, anything, 2),
        (one, anything, 1),
    ):
        least = _scale(alone, 0.0, floors, dilation)
        if small_enough(least):
            scales = (0.9**i for i in range(70))
            return next((s for at in scales if small_enough(s := _scale(alone, at, floors, dilation))), least)
    return least


def _scale(problem: Problem, scale: float, floors: Sequence[int], least_dilation: int) -> Problem:
    axes = []
    for axis, floor in zip(problem.dimensions, floors, strict=True):
        if (axis.keys, axis.length, axis.q_offset, axis.kv_offset) != (axis.tokens, axis.tokens, 0, 0):
            axes.append(axis)
            continue
        new = min(axis.window, max(2, floor, ceil(axis.window * scale)))
        # A dilation that is a good part of the axis shrinks with it.
        apart = min(axis.dilation, max(least_dilation, ceil(axis.tokens * scale) // new))
        length = min(axis.tokens, max(new * apart, ceil(axis.tokens * scale)))
        if axis.edge == "wrap":
            length += -length % apart
        sink = min(axis.sink, max(1, ceil(axis.sink * scale)))
        shorter = axis._replace(tokens=length, window=new, stride=min(axis.stride, new), dilation=apart, sink=sink)
        axes.append(shorter._replace(grid=length, kv_tokens=length))
    columns: dict[str, Any] = dict(zip(Dimension._fields, zip(*axes, strict=True), strict=True))
    columns["grid"] = tuple(axis.length for axis in axes)
    columns["kv_tokens"] = tuple(axis.keys for axis in axes)
    return replace(problem, **columns, extra_tokens=tuple(max(1, ceil(n * scale)) for n in problem.extra_tokens))
