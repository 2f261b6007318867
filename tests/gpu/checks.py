"""What every kernel is held to, on a GPU or in the emulator. Kernels are called through the C contract, so that the
tests own every byte around inputs and results.

Inputs are views, in a layout that the seed chooses, of memory that holds NaN elsewhere; outputs are views of such
memory too, and every byte of it that is no output must stay what it was.
"""

from __future__ import annotations

import ctypes as c
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from random import Random
from typing import Any

import abi
import oracle
import torch
from gnaforge.runtime.config import KernelConfig
from gnaforge.runtime.reference import Pattern, attention, attention_of_query, error_bound, visible, windows

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
LAYOUTS = ("heads last", "heads first", "packed", "padded channels", "every second token")
_GUARD = 4096  # elements before and after every tensor


class Wrong(Exception):
    """A kernel's result is not what it must be."""


@dataclass
class Memory:
    """A tensor within memory that holds NaN elsewhere."""

    whole: torch.Tensor
    view: torch.Tensor

    def check_rest(self, name: str) -> None:
        """Raises Wrong unless everything but the view is as it was made."""
        fresh = torch.full((1,), torch.nan, dtype=self.whole.dtype, device=self.whole.device)
        bits = torch.int32 if self.whole.dtype == torch.float32 else torch.int16
        saved = self.view.clone()
        self.view.fill_(torch.nan)
        untouched = bool((self.whole.view(bits) == fresh.view(bits)).all())
        self.view.copy_(saved)
        if not untouched:
            raise Wrong(f"{name}: memory outside of the tensor was written")


def _nan(shape: Sequence[int], dtype: torch.dtype, device: str) -> Memory:
    whole = torch.full((prod(shape) + 2 * _GUARD,), torch.nan, dtype=dtype, device=device)
    return Memory(whole, whole[_GUARD : _GUARD + prod(shape)].view(*shape))


def allocate(shape: Sequence[int], dtype: torch.dtype, device: str, layout: str) -> Memory:
    """Memory of [batch, *tokens, heads, channels] in a layout; "packed" is for `inputs`."""
    batch, *tokens, heads, channels = shape
    if layout == "heads first":
        memory = _nan((batch, heads, *tokens, channels), dtype, device)
        order = (0, *range(2, 2 + len(tokens)), 1, 2 + len(tokens))
        return Memory(memory.whole, memory.view.permute(order))
    if layout == "padded channels":
        memory = _nan((batch, *tokens, heads, channels + 8), dtype, device)
        return Memory(memory.whole, memory.view[..., :channels])
    if layout == "every second token":
        memory = _nan((batch, 2 * tokens[0] + 1, *(n + 1 for n in tokens[1:]), heads, channels), dtype, device)
        inner = tuple(slice(1, None) for _ in tokens[1:])
        return Memory(memory.whole, memory.view[(slice(None), slice(1, None, 2), *inner)])
    return _nan(shape, dtype, device)


def inputs(problem: oracle.Problem, dtype: torch.dtype, device: str, layout: str, seed: int) -> list[Memory]:
    """Q, K and V with normally distributed elements."""
    heads = (problem.heads, problem.kv_heads, problem.kv_heads)
    dims = (problem.head_dim, problem.head_dim, problem.value_head_dim)
    start = (problem.batch, *problem.tokens)
    if layout == "packed":
        one = _nan((*start, sum(heads), max(dims)), dtype, device)
        parts = one.view.split(heads, dim=-2)
        made = [Memory(one.whole, part[..., :dim]) for part, dim in zip(parts, dims, strict=True)]
    else:
        made = [allocate((*start, h, d), dtype, device, layout) for h, d in zip(heads, dims, strict=True)]
    generator = torch.Generator(device).manual_seed(seed)
    for memory in made:
        memory.view.copy_(torch.randn(memory.view.shape, generator=generator, device=device))
    return made


def call(
    entry: abi.Entry,
    problem: oracle.Problem,
    tensors: Sequence[torch.Tensor],
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float | None = None,
) -> None:
    """Runs a kernel on the current stream.

    Raises:
        Wrong: it refuses, or its launch fails.
    """
    q = tensors[0]
    rank = len(problem.tokens)
    columns = [abi.I64x3(*values) for values in (problem.tokens, *problem.pattern)]
    sizes = (problem.heads, problem.kv_heads, problem.head_dim, problem.value_head_dim)
    factor = problem.head_dim**-0.5 if scale is None else scale
    asked = abi.Problem(c.sizeof(abi.Problem), rank, problem.batch, *sizes, factor, *columns)
    host = abi.Host(c.sizeof(abi.Host), 1)
    on_gpu = q.device.type == "cuda"
    views = {name: abi.view(x) for name, x in zip(("q", "k", "v", "out"), (*tensors, out), strict=True)}
    args = abi.make_args("gna_forward", asked, {**views, "lse": abi.view_lse(lse)}, host, q.device.type)
    args.device_index = q.device.index or 0
    text = c.create_string_buffer(1024)
    if entry.can_run(c.byref(args), text, len(text)):
        raise Wrong(f"refused: {text.value.decode()}")
    workspace = torch.empty(max(1, entry.workspace_bytes(c.byref(args))), dtype=torch.uint8, device=q.device)
    stream = torch.cuda.current_stream(q.device).cuda_stream if on_gpu else None
    if entry.run(c.byref(args), workspace.data_ptr(), stream, text, len(text)):
        raise Wrong(f"failed: {text.value.decode()}")


def results(problem: oracle.Problem, dtype: torch.dtype, device: str, layout: str) -> tuple[Memory, Memory]:
    """Memory of the output and the log-sum-exp, NaN all over."""
    start = (problem.batch, *problem.tokens)
    out = allocate((*start, problem.heads, problem.value_head_dim), dtype, device, layout)
    lse = allocate((*start, problem.heads, 1), torch.float32, device, "heads first" if "first" in layout else "")
    return out, Memory(lse.whole, lse.view[..., 0])


def attend(
    entry: abi.Entry, problem: oracle.Problem, tensors: Sequence[torch.Tensor], layout: str = "", scale: Any = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp of a kernel; nothing else may be written."""
    out, lse = results(problem, tensors[0].dtype, str(tensors[0].device), layout)
    call(entry, problem, tensors, out.view, lse.view, scale)
    out.check_rest("output")
    lse.check_rest("log-sum-exp")
    return out.view, lse.view


bounds = partial(error_bound, rounds_probabilities=True)


def shares(got: Any, exact: Any, limits: Any) -> list[float]:
    """How much of their bounds the errors of output and log-sum-exp take, at most; infinity where one is NaN."""
    errors = [(g.double() - w).abs() / limit for g, w, limit in zip(got, exact, limits, strict=True)]
    return [float("inf") if error.isnan().any() else error.max().item() for error in errors]


def random_problem(config: KernelConfig, seed: int, max_tokens: int) -> tuple[oracle.Problem, str]:
    """A problem that the kernel takes, and a layout."""
    rng = Random(f"{config.key} {seed}")
    problem = oracle.random_problem(rng, rank=config.rank, max_tokens=max_tokens)
    dims = {"head_dim": config.head_dim, "value_head_dim": config.value_head_dim or config.head_dim}
    return replace(problem, batch=rng.choice((1, 1, 2, 3)), **dims), rng.choice(LAYOUTS)


def _outer(axes: Sequence[torch.Tensor]) -> torch.Tensor:
    """Tokens for which all of the flags, one per dimension, are set."""
    rank = len(axes)
    return torch.stack(
        torch.broadcast_tensors(*(a.view([-1 if e == d else 1 for e in range(rank)]) for d, a in enumerate(axes)))
    ).all(0)


def seeing(problem: oracle.Problem, key: Sequence[int], device: str) -> torch.Tensor:
    """The queries, bool [*tokens], that see the token ``key``."""
    return _outer(
        [
            visible(torch.arange(axis[0], device=device), torch.tensor(at, device=device), *axis)
            for axis, at in zip(problem.axes, key, strict=True)
        ]
    )


def visiting(problem: oracle.Problem, config: KernelConfig, key: Sequence[int], device: str) -> torch.Tensor:
    """The queries, bool [*tokens], whose Q tile visits a KV tile that holds the token ``key``."""
    found = []
    for (length, *pattern), at, q, kv in zip(problem.axes, key, config.q_tile, config.kv_tile, strict=True):
        dilation = pattern[2]
        token = torch.arange(length, device=device)
        group, position = token % dilation, token // dilation
        count = (length - group + dilation - 1) // dilation
        first = position // q * q
        last = torch.minimum(first + q, count) - 1
        begin, _ = windows(first * dilation + group, length, *pattern)
        _, end = windows(last * dilation + group, length, *pattern)
        reach = begin + (end - begin + kv - 1) // kv * kv
        where = at // dilation
        found.append((group == at % dilation) & (begin <= where) & (where < reach))
    return _outer(found)


def check_poison(
    entry: abi.Entry,
    config: KernelConfig,
    problem: oracle.Problem,
    layout: str,
    made: Sequence[Memory],
    clean: Any,
    seed: int,
) -> None:
    """What a query doesn't see has no influence, to the bit. NaN in one batch entry, in K and V of one head, in K of
    a token and in V of another that no query of the Q tile comes near; large V of the first token.

    Raises:
        Wrong: there is one.
    """
    rng = Random(f"poison {seed}")
    q, k, v = (memory.view for memory in made)
    device = str(q.device)
    masked, far = ([rng.randrange(n) for n in problem.tokens] for _ in range(2))
    unseen = ~(seeing(problem, masked, device) | visiting(problem, config, far, device))
    k[(slice(None), *masked)] = torch.nan
    v[(slice(None), *masked)] = torch.finfo(v.dtype).max
    v[(slice(None), *far)] = torch.nan
    heads = torch.ones(problem.heads, dtype=torch.bool, device=device)
    batches = torch.ones(problem.batch, dtype=torch.bool, device=device)
    if problem.kv_heads > 1:
        bad = rng.randrange(problem.kv_heads)
        k[..., bad, :] = torch.nan
        v[..., bad, :] = torch.nan
        group = problem.heads // problem.kv_heads
        heads[bad * group : (bad + 1) * group] = False
    if problem.batch > 1:
        bad = rng.randrange(problem.batch)
        for x in (q, k, v):
            x[bad] = torch.nan
        batches[bad] = False
    got = attend(entry, problem, (q, k, v), layout)
    kept = batches.view(-1, *[1] * (len(problem.tokens) + 1)) & unseen[None, ..., None] & heads
    for name, g, w in zip(("output", "log-sum-exp"), got, clean, strict=True):
        if not torch.equal(g[kept], w[kept]):
            raise Wrong(f"{name}: depends on tokens {masked} or {far}, heads or batch entries that it must not see")
    if not got[0][:, seeing(problem, masked, device)].isnan().all():
        raise Wrong(f"output: queries that see the NaN key {masked} don't show it")


def check_problem(
    entry: abi.Entry,
    config: KernelConfig,
    problem: oracle.Problem,
    layout: str,
    device: str,
    seed: int,
    repeats: int = 0,
    poison: bool = True,
) -> list[float]:
    """Runs a kernel on a problem and compares with exact attention; then `repeats` times more, for the same bits; then
    with poisoned inputs. Returns `shares`.

    Raises:
        Wrong: something is not as it must be.
    """
    made = inputs(problem, DTYPES[config.dtype], device, layout, seed)
    tensors = [memory.view for memory in made]
    got = attend(entry, problem, tensors, layout)
    pattern = Pattern(*problem.pattern)
    exact = attention(*tensors, pattern)
    found = shares(got, exact, bounds(*tensors, pattern, exact))
    if max(found) > 1:
        raise Wrong(f"errors take {found[0]:.3g} of the output's bound and {found[1]:.3g} of the log-sum-exp's")
    for _ in range(repeats):
        again = attend(entry, problem, tensors, layout)
        if not all(torch.equal(a, b) for a, b in zip(again, got, strict=True)):
            raise Wrong("another run gives other bits")
    if poison:
        check_poison(entry, config, problem, layout, made, got, seed)
    return found


def check_samples(
    entry: abi.Entry,
    problem: oracle.Problem,
    tensors: Sequence[torch.Tensor],
    out: torch.Tensor,
    lse: torch.Tensor,
    samples: int,
) -> float:
    """Runs a kernel on a problem too large for `attention`, and compares some queries: the first, the last, others at
    random. Returns the largest share of their bounds that errors take.

    Raises:
        Wrong: something is not as it must be.
    """
    call(entry, problem, tensors, out, lse)
    q, k, v = tensors
    rng = Random(0)
    tokens = [(0,) * len(problem.tokens), tuple(n - 1 for n in problem.tokens)]
    tokens += [tuple(rng.randrange(n) for n in problem.tokens) for _ in range(samples)]
    pattern = Pattern(*problem.pattern)
    u = torch.finfo(q.dtype).eps / 2
    worst = 0.0
    for batch in {0, problem.batch - 1}:
        for token in tokens:
            at = (batch, *token)
            exact = attention_of_query(q, k, v, pattern, at)
            magnitude, _ = attention_of_query(q, k, v.abs(), pattern, at)
            limits = error_bound(q[at], k[at], v[at], pattern, exact)
            limits = limits[0] + 2 * u * magnitude + 2.0**-16, limits[1] + 2.0**-16
            got = out[at], lse[at]
            worst = max(worst, *shares(got, exact, limits))
            if worst > 1:
                raise Wrong(f"batch entry {batch}, token {token}: errors take {worst:.3g} of their bound")
    return worst
