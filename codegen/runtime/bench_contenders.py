"""The contenders of `bench`: everybody who computes a problem, or dense attention over the same tokens."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import pad

from .dtypes import DTYPES
from .ops import neighborhood_attention
from .problem import Problem
from .reference import mask_rows, visible, windows

_FLEX_BLOCK = 128  # keys of a block of FlexAttention's mask
_MASK_ELEMENTS = 2**28  # a mask slice of SDPA: 1 GB once torch has made floats of it

Tensors = tuple[torch.Tensor, ...]
"""Q, K, V, and K, V of each piece of extra keys."""
Call = Callable[[Tensors], torch.Tensor]


class Unavailable(Exception):
    """A contender that can't run here, or not on this problem; says why."""


def _gnaforge(problem: Problem, kernel: str | None, tensors: Tensors) -> Call:
    arguments = replace(problem, extra_tokens=()).arguments()
    if DTYPES[problem.dtype].scaled:
        arguments["out_dtype"] = DTYPES[problem.output_dtype].torch
    names = ("additional_keys", "additional_values")[: len(tensors) - 3]
    if len(problem.extra_tokens) > 1:
        raise Unavailable("calls take one piece of extra keys")

    def call(qkv: Tensors) -> torch.Tensor:
        q, k, v, *extra = qkv
        further: dict[str, Any] = dict(zip(names, extra, strict=True))
        out: torch.Tensor = neighborhood_attention(q, k, v, **arguments, **further, kernel=kernel)
        return out

    return call


def _gnaforge_dense(problem: Problem, kernel: str | None, tensors: Tensors) -> Call:
    return _gnaforge(problem.dense(), kernel, tensors)


def heads_first(tensors: Tensors) -> Tensors:
    """As torch's own attention takes them: Q, K and V as [batch, heads, tokens, channels], contiguous, and those of 8
    bits in bf16; extra keys follow the others."""
    wide = (x.bfloat16() if x.itemsize == 1 else x for x in tensors)
    q, k, v, *extra = (x.flatten(1, -3).transpose(1, 2).contiguous() for x in wide)
    return q, torch.cat([k, *extra[::2]], 2), torch.cat([v, *extra[1::2]], 2)


def _tokens_first(out: torch.Tensor, tokens: tuple[int, ...]) -> torch.Tensor:
    out = out.transpose(1, 2)
    return out.reshape(out.shape[0], *tokens, *out.shape[2:])


def _sdpa(problem: Problem, kernel: str | None, tensors: Tensors) -> Call:
    """SDPA with the boolean mask, made beforehand, in slices of queries where it would not fit memory whole."""
    count = problem.token_count
    rows = max(1, min(count, _MASK_ELEMENTS * count // problem.pair_count))
    slices = [(i, min(i + rows, count)) for i in range(0, count, rows)]
    device = tensors[0].device
    if len(slices) > 1 and device.type != "cpu":
        raise Unavailable("the mask doesn't fit memory")
    # A mask in slices is made anew in each call, outside of the time that SDPA is charged for.
    whole = _mask(problem, 0, count, device) if len(slices) == 1 else None
    gqa = problem.heads != problem.kv_heads

    def run(qkv: Tensors) -> torch.Tensor:
        q, k, v = qkv
        parts = []
        for begin, end in slices:
            with excluded:
                mask = _mask(problem, begin, end, device) if whole is None else whole
            parts.append(
                torch.nn.functional.scaled_dot_product_attention(
                    q[:, :, begin:end], k, v, attn_mask=mask, scale=problem.scale, enable_gqa=gqa
                )
            )
        out = torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]
        return _tokens_first(out, problem.tokens)

    return run


def _mask(problem: Problem, begin: int, end: int, device: torch.device) -> torch.Tensor:
    """Rows of the mask; extra keys, which all queries see, follow the others."""
    seen = mask_rows(problem, begin, end, device)
    extra = sum(problem.extra_tokens)
    return torch.cat([seen, seen.new_ones(end - begin, extra)], 1) if extra else seen


def _sdpa_dense(backend: SDPBackend, problem: Problem, kernel: str | None, tensors: Tensors) -> Call:
    """SDPA over all pairs, by one backend."""
    gqa = problem.heads != problem.kv_heads

    def run(qkv: Tensors) -> torch.Tensor:
        q, k, v = qkv
        with sdpa_kernel(backend):
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=problem.scale, enable_gqa=gqa)
        return _tokens_first(out, problem.tokens)

    return run


def _flex(problem: Problem, kernel: str | None, tensors: Tensors) -> Call:
    """Compiled FlexAttention with its block mask, both made beforehand."""
    # Each problem compiles the same functions anew, and after 8 times dynamo would run them uncompiled without a word.
    torch.compiler.reset()
    tokens, count = problem.tokens, problem.token_count
    device, keys = tensors[0].device, problem.pair_count // count
    # Its code for CPUs reads memory that nobody wrote where the last keys don't fill a block (torch 2.13).
    spare = -keys % _FLEX_BLOCK if device.type == "cpu" else 0
    mask_mod = flex_mask(problem, device, spare)
    make = torch.compile(create_block_mask) if count > 2**14 else create_block_mask
    blocks = make(mask_mod, None, None, count, keys + spare, device=device)
    compiled = torch.compile(flex_attention, dynamic=False)
    gqa = problem.heads != problem.kv_heads

    def run(qkv: Tensors) -> torch.Tensor:
        q, k, v = qkv
        if spare:
            with excluded:
                k, v = (pad(x, (0, 0, 0, spare)) for x in (k, v))
        return _tokens_first(compiled(q, k, v, block_mask=blocks, scale=problem.scale, enable_gqa=gqa), tokens)

    return run


Mask = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def is_plain(problem: Problem) -> bool:
    """Whether its windows are plain GNA; there may be extra keys beside them."""
    return set(problem.features()) <= {"extra_keys"}


def flex_mask(problem: Problem, device: torch.device, spare: int = 0) -> Callable[..., torch.Tensor]:
    """FlexAttention's ``mask_mod``: of batch entry, head, and query and key by number; extra keys follow the others,
    and ``spare`` keys that nobody sees follow them."""
    make = _plain_mask if is_plain(problem) else _any_mask
    extra = sum(problem.extra_tokens)
    see = make(problem, device, extra + spare)
    first_extra = prod(problem.kv_tokens or problem.tokens)

    def mask(b: Any, h: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        seen = see(query, key)
        if extra:
            seen = seen | (key >= first_extra)
        return seen & (key < first_extra + extra) if spare else seen

    return mask


def _plain_mask(problem: Problem, device: torch.device, others: int) -> Mask:
    """Whether a query sees a key, both by number; of the ``others`` that follow the keys it says anything."""
    # Tables instead of divisions: the mask function runs once per element of each partial block.
    tables = []
    token = pad(torch.arange(problem.token_count, device=device), (0, others))
    for axis in reversed(replace(problem, extra_tokens=()).axes):
        at, token = token % axis.length, token // axis.length
        group = at % axis.dilation if axis.dilation > 1 else None
        tables.append((*windows(at, *axis), at // axis.dilation, group))

    def see(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        seen = None
        for begin, end, position, group in tables:
            axis = (position[key] >= begin[query]) & (position[key] < end[query])
            if group is not None:
                axis = axis & (group[query] == group[key])
            seen = axis if seen is None else seen & axis
        assert seen is not None
        return seen

    return see


def _any_mask(problem: Problem, device: torch.device, others: int) -> Mask:
    """As `_plain_mask`, of any pattern: a table of each dimension says which position sees which."""
    tables = []
    query_token = torch.arange(problem.token_count, device=device)
    key_token = pad(torch.arange(prod(problem.kv_tokens or problem.tokens), device=device), (0, others))
    for axis in reversed(problem.dimensions):
        positions = [torch.arange(n, device=device) for n in (axis.tokens, axis.keys)]
        table = visible(axis, positions[0][:, None], positions[1])
        tables.append((table, query_token % axis.tokens, key_token % axis.keys))
        query_token, key_token = query_token // axis.tokens, key_token // axis.keys

    def see(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        seen = None
        for table, rows, columns in tables:
            axis = table[rows[query], columns[key]]
            seen = axis if seen is None else seen & axis
        assert seen is not None
        return seen

    return see


def _natten(problem: Problem, kernel: str | None, tensors: Tensors) -> Call:
    """NATTEN's own choice of kernel, token permutation included."""
    try:
        import natten
    except ImportError as error:
        raise Unavailable(f"natten can't be imported: {error}") from None
    if lacked := problem.features():
        raise Unavailable(f"NATTEN's kernels don't have {', '.join(lacked)}")
    if tensors[0].device.type == "cpu":
        raise Unavailable("NATTEN's kernels need a GPU")
    operator = {1: natten.na1d, 2: natten.na2d, 3: natten.na3d}[problem.rank]
    arguments = problem.arguments()

    def run(qkv: Tensors) -> torch.Tensor:
        q, k, v = qkv
        group = problem.heads // problem.kv_heads
        k, v = (x.repeat_interleave(group, dim=-2) if group > 1 else x for x in (k, v))
        return operator(q, k, v, **arguments)  # type: ignore[no-any-return]

    return run


class _Excluded:
    """Time spent inside is not the contender's."""

    seconds = 0.0

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._start


excluded = _Excluded()

Maker = Callable[[Problem, "str | None", Tensors], Call]

DENSE: dict[str, Maker] = {
    "gnaforge dense": _gnaforge_dense,
    "cudnn dense": partial(_sdpa_dense, SDPBackend.CUDNN_ATTENTION),
    "flash dense": partial(_sdpa_dense, SDPBackend.FLASH_ATTENTION),
}
"""Contenders that compute all pairs of tokens, and so something else."""

MASKED: dict[str, Maker] = {"gnaforge": _gnaforge, "sdpa": _sdpa, "flex": _flex, "natten": _natten}
"""Contenders that compute the problem."""

CONTENDERS: dict[str, Maker] = {**MASKED, **DENSE}
"""Each makes the call to time, which takes Q, K and V heads-last or, those in `HEADS_FIRST`, as torch's own attention
does. Raises `Unavailable`."""

OWN = "gnaforge"
"""The contender that takes our kernel with the least work, or a given one; followed by a space and a variant, the
kernel with the least work of that variant."""


def variant_of(contender: str) -> str | None:
    """The variant that a contender like ``gnaforge cutlass`` names; None for the contenders of `CONTENDERS`."""
    own, _, variant = contender.partition(" ")
    return variant if own == OWN and variant and contender not in CONTENDERS else None


HEADS_FIRST = frozenset(("sdpa", "flex", "cudnn dense", "flash dense"))
