"""Requests for kernels of the operators that run a list, and refusals of their calls while torch traces."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch

from . import lookup, table
from .autocast import autocast_dtype, autocast_tensor
from .core import Failure
from .dtypes import dtype_name
from .errors import NoKernelError
from .given import failure_of_call
from .jit import TRACING
from .problem import Problem, fields_of_pattern, hungriest, split_patterns
from .request import Request, heads_per_kv, is_zero

Failing = Callable[[bool], Failure | None]


def check_traced(request: Request, failing: Failing, *, may_run: bool) -> None:
    """Refuses a call that torch traces as it would be refused when it runs. A compiled graph calls an operator without
    Python: the kernel that it needs is loaded now, and must be there already.

    Args:
        request, failing: as for `run`.
        may_run: whether a kernel could run it, on its device, and has something to do.

    Raises:
        ValueError: the call breaks a rule.
        NoKernelError: there is no kernel.
    """
    if failure := failing(False):
        raise ValueError(failure.reason)
    if not may_run:
        return
    lookup.load_matching(request)
    failure = failing(True)
    if failure is None and table.serves(request):
        return
    lookup.remedy(request)  # raises what is more to the point than that none is loaded, if there is something
    if failure is not None:
        raise NoKernelError(f"{failure.whole}\n{TRACING}")
    wanted, call = request.key or str(request), request.register_call()
    raise NoKernelError(f"gnaforge: no kernel for {wanted} is loaded\nregister one with: {call}\n{TRACING}")


def request_of_samples(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rank: int,
    layouts: Sequence[int],
    pattern: Sequence[int],
    pinned: str,
    extra_k: torch.Tensor | None = None,
) -> Request:
    """The request that a call of ``forward_varlen`` makes: that of the sample that asks most of a kernel."""
    samples = len(layouts) // rank
    own = split_patterns(pattern, rank, samples)
    sizes = (*layouts, *pattern, query.shape[0], *query.shape[2:], *key.shape[2:], value.shape[-1])
    extra = () if extra_k is None or is_zero(extra_k.shape[1]) else (extra_k.shape[1],)
    problem = None
    if all(type(size) is int for size in (*sizes, *extra)) and all(sizes[len(layouts) + len(pattern) :]):
        rows = [tuple(layouts[i * rank : (i + 1) * rank]) for i in range(samples)]
        pairs = [(row, own[i if len(own) > 1 else 0]) for i, row in enumerate(rows) if prod(row)]
        if pairs:
            wanted = hungriest([pattern for _, pattern in pairs], rank)
            tokens = max((row for row, pattern in pairs if pattern is wanted), key=prod)
            fields: dict[str, Any] = fields_of_pattern(wanted)
            fields.pop("grid", None)
            heads, kv_heads = query.shape[2], key.shape[2]
            problem = Problem(
                tokens,
                **fields,
                heads=heads,
                kv_heads=kv_heads,
                head_dim=query.shape[-1],
                value_head_dim=value.shape[-1],
                batch=query.shape[0],
                dtype=dtype_name(autocast_dtype(query)),
                extra_tokens=extra,
            )
    return Request(
        "gna_forward",
        rank,
        dtype_name(autocast_dtype(query)),
        int(query.shape[-1]),
        int(value.shape[-1]),
        query.device.type,
        device_index=query.device.index or 0,
        key=pinned,
        problem=problem,
        heads_per_kv=heads_per_kv(query, key),
    )


def request_of_lengths(
    query: torch.Tensor,
    value: torch.Tensor,
    pinned: str,
    key: torch.Tensor | None = None,
    cumulative_q: torch.Tensor | None = None,
    cumulative_kv: torch.Tensor | None = None,
) -> Request:
    """The request that a call of the operator ``attention_varlen`` makes: that of its longest sample, if lengths are
    known."""
    dtype, problem = dtype_name(autocast_dtype(query)), None
    if key is not None and cumulative_q is not None and cumulative_kv is not None:
        lengths = [ends.diff().tolist() for ends in (cumulative_q, cumulative_kv)]
        queries, keys = max(zip(*lengths, strict=False), key=lambda pair: (pair[0] != pair[1]) + pair[0] * pair[1])
        if min(queries, keys, query.shape[0]) > 0:
            problem = Problem(
                (queries,),
                (keys,),
                heads=query.shape[2],
                kv_heads=key.shape[2],
                head_dim=query.shape[3],
                value_head_dim=value.shape[3],
                batch=query.shape[0],
                dtype=dtype,
                kv_tokens=(keys,),
            )
    dims = int(query.shape[-1]), int(value.shape[-1])
    index = query.device.index or 0
    group = 0 if key is None else heads_per_kv(query, key)
    further: dict[str, Any] = {"device_index": index, "key": pinned, "problem": problem, "heads_per_kv": group}
    return Request("gna_forward", 1, dtype, *dims, query.device.type, **further)


def failure_of_lengths(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float | None,
    pinned: str,
    *,
    results: tuple[torch.Tensor, ...] = (),
    choose: bool,
) -> Failure | None:
    """What a call of ``attention_varlen`` is refused for, whatever its lengths are; ``choose``: also that no kernel for
    all tokens as one sample is loaded."""
    tensors = (*map(autocast_tensor, (query, key, value)), *[None] * 6, *results)
    keys = key.shape[1] if key.dim() == 4 else 1
    if type(keys) is not int or keys == 0:
        return None
    return failure_of_call(tensors, [keys, 1, 1, 0], scale, pinned, choose=choose)
