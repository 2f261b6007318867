"""The Python parts of the operators that run a list of calls over packed samples."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from .autocast import register_autocast
from .batching import register_batching
from .list_requests import check_traced, failure_of_lengths, request_of_lengths, request_of_samples

Results = tuple[torch.Tensor, torch.Tensor]  # output and log-sum-exp


def _results(q: torch.Tensor, v: torch.Tensor) -> Results:
    return q.new_empty((*q.shape[:-1], v.shape[-1])), q.new_empty(q.shape[:-1], dtype=torch.float32)


def _may_run(q: torch.Tensor) -> bool:
    sizes = q.shape[:-1]
    return q.device.type in ("cpu", "cuda") and not any(type(size) is int and size == 0 for size in sizes)


def _forward_varlen_fake(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rank: int,
    layouts: list[int],
    pattern: list[int],
    scale: float | None = None,
    key: str = "",
    extra_k: torch.Tensor | None = None,
    extra_v: torch.Tensor | None = None,
    extra_lengths: torch.Tensor | None = None,
    **results: torch.Tensor,
) -> Results:
    from .given import failure_of_samples

    request = request_of_samples(q, k, v, rank, layouts, pattern, key, extra_k)
    call = q, k, v, rank, layouts, pattern, scale, key, extra_k, extra_v, extra_lengths
    failing = partial(failure_of_samples, *call, results=tuple(results.values()))
    check_traced(request, lambda choose: failing(choose=choose), may_run=_may_run(q))
    return _results(q, v)


def _attention_varlen_fake(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cumulative_q: torch.Tensor,
    cumulative_kv: torch.Tensor,
    is_causal: bool = False,
    scale: float | None = None,
    key: str = "",
    **results: torch.Tensor,
) -> Results:
    failing = partial(failure_of_lengths, q, k, v, scale, key, results=tuple(results.values()))
    check_traced(request_of_lengths(q, v, key), lambda choose: failing(choose=choose), may_run=_may_run(q))
    return _results(q, v)


def _without_results(fake: Callable[..., Results]) -> Callable[..., None]:
    """The fake of the operator that writes to the caller's tensors."""

    def checked(*arguments: Any, output: torch.Tensor, output_lse: torch.Tensor) -> None:
        fake(*arguments, output=output, output_lse=output_lse)

    return checked


def register_list_parts(library: torch.library.Library) -> None:
    """Registers fakes, autocast and vmap of the operators."""
    for name, fake in (("forward_varlen", _forward_varlen_fake), ("attention_varlen", _attention_varlen_fake)):
        torch.library.register_fake(f"gnaforge::{name}", fake, lib=library)
        torch.library.register_fake(f"gnaforge::{name}_out", _without_results(fake), lib=library)
        for own in (name, f"{name}_out"):
            register_autocast(own, library)
            register_batching(own, library)
