"""The Python parts of the backward operators: what they do where torch only traces, or maps."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from .batching import register_batching
from .training import backward_requests, require_traced

Optional = torch.Tensor | None


def _results(like: torch.Tensor, inputs: Sequence[Optional], wanted: int) -> tuple[torch.Tensor, ...]:
    likes = [tensor if tensor is not None and wanted >> i & 1 else None for i, tensor in enumerate(inputs)]
    return tuple(like.new_empty(0 if tensor is None else tensor.shape) for tensor in likes)


def _backward_fake(
    grad_out: torch.Tensor,
    grad_lse: Optional,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    pattern: list[int],
    scale: float | None,
    wanted: int,
    key_q: str = "",
    key_kv: str = "",
    extra_k: Optional = None,
    extra_v: Optional = None,
    extra_lengths: Optional = None,
) -> tuple[torch.Tensor, ...]:
    inputs = q, k, v, pattern, scale, "", extra_k, extra_v, extra_lengths
    require_traced(backward_requests("forward", inputs, wanted))
    return _results(q, (q, k, v, extra_k, extra_v), wanted)


def _joint_backward_fake(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: list[int],
    scale: float | None,
    wanted: int,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_out: Optional,
    grad_lse: Optional,
    *texts: Optional,
    key_q: str = "",
    key_kv: str = "",
    text_key_q: str = "",
    text_key_kv: str = "",
) -> tuple[torch.Tensor, ...]:
    whole = *texts, *[None] * (16 - len(texts))
    require_traced(backward_requests("joint", (q, k, v, pattern, scale, "", "", *whole[:4], *whole[8:12]), wanted))
    return _results(q, (q, k, v, *whole[:3], *whole[8:11]), wanted)


def _backward_varlen_fake(
    grad_out: torch.Tensor,
    grad_lse: Optional,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    rank: int,
    layouts: list[int],
    pattern: list[int],
    scale: float | None,
    wanted: int,
    key_q: str = "",
    key_kv: str = "",
    extra_k: Optional = None,
    extra_v: Optional = None,
    extra_lengths: Optional = None,
) -> tuple[torch.Tensor, ...]:
    inputs = q, k, v, rank, layouts, pattern, scale, "", extra_k, extra_v, extra_lengths
    require_traced(backward_requests("forward_varlen", inputs, wanted))
    return _results(q, (q, k, v, extra_k, extra_v), wanted)


def _attention_backward_varlen_fake(
    grad_out: torch.Tensor,
    grad_lse: Optional,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cumulative_q: torch.Tensor,
    cumulative_kv: torch.Tensor,
    is_causal: bool,
    scale: float | None,
    wanted: int,
    key_q: str = "",
    key_kv: str = "",
) -> tuple[torch.Tensor, ...]:
    inputs = q, k, v, cumulative_q, cumulative_kv, is_causal, scale, ""
    require_traced(backward_requests("attention_varlen", inputs, wanted))
    return _results(q, (q, k, v), wanted)


_FAKES: dict[str, Callable[..., tuple[torch.Tensor, ...]]] = {
    "backward": _backward_fake,
    "joint_backward": _joint_backward_fake,
    "backward_varlen": _backward_varlen_fake,
    "attention_backward_varlen": _attention_backward_varlen_fake,
}
BACKWARD_OPERATORS = tuple(_FAKES)


def register_backward_parts(library: torch.library.Library) -> None:
    """Registers fakes and vmap of the operators."""
    for name, fake in _FAKES.items():
        torch.library.register_fake(f"gnaforge::{name}", fake, lib=library)
        register_batching(name, library)
