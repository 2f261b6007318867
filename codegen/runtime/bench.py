"""Times kernels beside what torch offers for the same mask. ``python -m gnaforge.runtime.bench --help``.

Contenders take turns within a round, so that a change of the machine's speed hits all of them; medians over rounds.
Useful work counts visible pairs only: 2 * heads * pairs * (head_dim + head_dim_v) floating-point operations.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from math import prod
from typing import Any

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from .config import DTYPES
from .ops import DTYPE_NAMES, neighborhood_attention
from .reference import Pattern, mask_rows, windows

_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
CONTENDERS = ("gnaforge", "sdpa", "flex")
_MASK_ELEMENTS = 2**28  # a mask slice of SDPA: 1 GB once torch has made floats of it


@dataclass(frozen=True)
class Problem:
    """What is timed. ``tokens`` and the pattern have one entry per token dimension."""

    tokens: tuple[int, ...]
    pattern: Pattern
    heads: int = 1
    kv_heads: int = 1
    head_dim: int = 64
    batch: int = 1
    dtype: str = "bf16"

    def tensors(self, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Random query, key and value, heads-last."""
        generator = torch.Generator(device).manual_seed(0)
        shapes = [(self.batch, *self.tokens, heads, self.head_dim) for heads in (self.heads, *[self.kv_heads] * 2)]
        q, k, v = (torch.randn(shape, generator=generator, device=device) for shape in shapes)
        dtype = _DTYPES[self.dtype]
        return q.to(dtype), k.to(dtype), v.to(dtype)

    def visible_pairs(self) -> int:
        """(query, key) pairs that the mask lets through, per batch entry and head."""
        pairs = 1
        for d, length in enumerate(self.tokens):
            single = Pattern(*(((field[d],)) for field in vars(self.pattern).values()))
            step = max(1, 2**24 // length)
            pairs *= sum(
                int(mask_rows((length,), single, i, min(i + step, length)).sum()) for i in range(0, length, step)
            )
        return pairs

    def sparsity(self) -> float:
        """Share of all pairs that the mask hides."""
        return 1 - self.visible_pairs() / prod(self.tokens) ** 2

    def useful_flop(self) -> float:
        """Floating-point operations of the visible pairs."""
        return 4.0 * self.batch * self.heads * self.visible_pairs() * self.head_dim


@dataclass(frozen=True)
class Timing:
    """Median seconds of a contender, and its largest difference from gnaforge's output."""

    contender: str
    seconds: float
    useful_gflops: float
    rounds: int
    difference: float | None


def _gnaforge(problem: Problem, kernel: str | None, q: Any, k: Any, v: Any) -> Callable[[], torch.Tensor]:
    return lambda: neighborhood_attention(q, k, v, **problem.pattern.arguments(), kernel=kernel)


def _heads_first(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.flatten(1, -3).transpose(1, 2).contiguous()


def _tokens_first(out: torch.Tensor, tokens: tuple[int, ...]) -> torch.Tensor:
    out = out.transpose(1, 2)
    return out.reshape(out.shape[0], *tokens, *out.shape[2:])


def _sdpa(problem: Problem, q: Any, k: Any, v: Any) -> Callable[[], torch.Tensor]:
    """SDPA with the boolean mask, made beforehand, in slices of queries where it would not fit memory whole."""
    count = prod(problem.tokens)
    rows = max(1, min(count, _MASK_ELEMENTS // count))
    slices = [(i, min(i + rows, count)) for i in range(0, count, rows)]
    # A mask in slices is made anew in each call, outside of the time that SDPA is charged for: see `_timed`.
    whole = mask_rows(problem.tokens, problem.pattern, 0, count) if len(slices) == 1 else None
    q, k, v = _heads_first(q), _heads_first(k), _heads_first(v)
    gqa = problem.heads != problem.kv_heads

    def run() -> torch.Tensor:
        parts = []
        for begin, end in slices:
            with _excluded():
                mask = mask_rows(problem.tokens, problem.pattern, begin, end) if whole is None else whole
            parts.append(
                torch.nn.functional.scaled_dot_product_attention(
                    q[:, :, begin:end], k, v, attn_mask=mask, enable_gqa=gqa
                )
            )
        out = torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]
        return _tokens_first(out, problem.tokens)

    return run


def _flex(problem: Problem, q: Any, k: Any, v: Any) -> Callable[[], torch.Tensor]:
    """Compiled FlexAttention with its block mask, both made beforehand."""
    tokens, pattern = problem.tokens, problem.pattern
    count = prod(tokens)

    # Tables instead of divisions: the mask function runs once per element of each partial block.
    tables = []
    token = torch.arange(count, device=q.device)
    for d in reversed(range(len(tokens))):
        at, token = token % tokens[d], token // tokens[d]
        dilation = pattern.dilation[d]
        begin, end = windows(at, tokens[d], pattern.window[d], pattern.stride[d], dilation, pattern.causal[d])
        tables.append((begin, end, at // dilation, at % dilation if dilation > 1 else None))

    def mask_mod(b: Any, h: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        seen = None
        for begin, end, position, group in tables:
            axis = (position[key] >= begin[query]) & (position[key] < end[query])
            if group is not None:
                axis = axis & (group[query] == group[key])
            seen = axis if seen is None else seen & axis
        assert seen is not None
        return seen

    make = torch.compile(create_block_mask) if count > 2**14 else create_block_mask
    blocks = make(mask_mod, None, None, count, count, device=q.device)
    compiled = torch.compile(flex_attention, dynamic=False)
    q, k, v = _heads_first(q), _heads_first(k), _heads_first(v)
    call = partial(compiled, q, k, v, block_mask=blocks, enable_gqa=problem.heads != problem.kv_heads)
    return lambda: _tokens_first(call(), tokens)


_excluded_seconds = 0.0


class _excluded:
    """Time spent inside is not the contender's."""

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        global _excluded_seconds
        _excluded_seconds += time.perf_counter() - self._start


def _timed(call: Callable[[], object], repeats: int) -> float:
    global _excluded_seconds
    _excluded_seconds = 0.0
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start - _excluded_seconds) / repeats


def matmul_gflops() -> float:
    """Rate of torch's own fp32 matrix product, GFLOP/s, best of five: the yardstick for what the machine gives."""
    a = torch.randn(1536, 1536)
    a @ a
    return 2 * 1536**3 / min(_timed(lambda: a @ a, 1) for _ in range(5)) / 1e9


def run(
    problem: Problem,
    contenders: Sequence[str] = CONTENDERS,
    budget_seconds: float = 20.0,
    kernel: str | None = None,
) -> list[Timing]:
    """Times contenders in turn.

    Args:
        problem: what to compute.
        contenders: any of `CONTENDERS`.
        budget_seconds: how long the rounds may take in all; there are at least three, or a single one where that
            alone takes longer.
        kernel: key of the gnaforge kernel; default: the one with the least work.

    Returns:
        A timing for each contender, in the order given.
    """
    q, k, v = problem.tensors()
    makers: dict[str, Callable[..., Callable[[], torch.Tensor]]] = {
        "gnaforge": lambda p, *qkv: _gnaforge(p, kernel, *qkv),
        "sdpa": _sdpa,
        "flex": _flex,
    }
    calls = {name: makers[name](problem, q, k, v) for name in contenders}
    with torch.no_grad():
        outputs = {name: call() for name, call in calls.items()}  # the warm-up, compilation included
        ours = outputs.get("gnaforge")
        differences = {
            name: None if ours is None else float((out.float() - ours.float()).abs().max())
            for name, out in outputs.items()
        }
        del outputs, ours
        seconds = {name: [_timed(call, 1)] for name, call in calls.items()}
        # A fast contender repeats within its turn until the turn is long enough for the clock.
        repeats = {name: max(1, int(0.05 / first)) for name, (first,) in seconds.items()}
        turn = sum(first * repeats[name] for name, (first,) in seconds.items())
        rounds = max(0 if turn > budget_seconds else 3, min(30, int(budget_seconds / turn)))
        if rounds:
            seconds = {name: [] for name in calls}
        for _ in range(rounds):
            for name, call in calls.items():
                seconds[name].append(_timed(call, repeats[name]))
    flop = problem.useful_flop()
    return [
        Timing(name, median, flop / median / 1e9, len(seconds[name]), differences[name])
        for name in calls
        for median in (statistics.median(seconds[name]),)
    ]


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.replace("x", ",").split(","))


def _per_dim(values: tuple[int, ...], rank: int, name: str) -> tuple[int, ...]:
    if len(values) == 1:
        values *= rank
    if len(values) != rank:
        raise SystemExit(f"error: {name} has {len(values)} entries, tokens have {rank}")
    return values


def make_problem(
    tokens: tuple[int, ...],
    window: tuple[int, ...],
    stride: tuple[int, ...] = (1,),
    dilation: tuple[int, ...] = (1,),
    causal: tuple[int, ...] = (0,),
    **rest: Any,
) -> Problem:
    """A problem from per-dimension tuples; a tuple of one entry counts for all dimensions."""
    rank = len(tokens)
    fields = {"window": window, "stride": stride, "dilation": dilation, "causal": causal}
    full = {name: _per_dim(values, rank, name) for name, values in fields.items()}
    pattern = Pattern(full["window"], full["stride"], full["dilation"], tuple(bool(c) for c in full["causal"]))
    return Problem(tokens, pattern, **rest)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(prog="python -m gnaforge.runtime.bench", description=__doc__)
    parser.add_argument("--tokens", type=_numbers, required=True, help="token layout, for example 56,56")
    parser.add_argument("--window", type=_numbers, required=True, help="window, for example 7,7")
    for name in ("stride", "dilation"):
        parser.add_argument(f"--{name}", type=_numbers, default=(1,))
    parser.add_argument("--causal", type=_numbers, default=(0,), help="0 or 1 per dimension")
    parser.add_argument("--heads", type=int, default=1)
    parser.add_argument("--kv-heads", type=int)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--contenders", default=",".join(CONTENDERS))
    parser.add_argument("--seconds", type=float, default=20.0, help="budget of the timed rounds")
    parser.add_argument("--kernel", help="key of the gnaforge kernel")
    options = vars(parser.parse_args(arguments))
    contenders = options.pop("contenders").split(",")
    budget, kernel = options.pop("seconds"), options.pop("kernel")
    options["kv_heads"] = options["kv_heads"] or options["heads"]
    problem = make_problem(**options)
    timings = run(problem, contenders, budget, kernel)
    json.dump({"problem": asdict(problem), "timings": [asdict(t) for t in timings]}, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
