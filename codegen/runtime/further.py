"""Calls with extra keys, or with results in the caller's tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch._C import _is_tracing as is_tracing
from torch.compiler import is_compiling

from . import arguments, finding
from .finding import Results


def attend_further(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pattern: list[int],
    scale: float | None,
    kernel: str,
    return_lse: bool,
    extra_k: torch.Tensor | None,
    extra_v: torch.Tensor | None,
    extra_lengths: torch.Tensor | None,
    out: torch.Tensor | None,
    out_lse: torch.Tensor | None,
) -> Any:
    """The rest of `ops.attend` for calls with extra keys or results of the caller's."""
    arguments.require_call(query, key, value, pattern)
    named = {"additional_keys": extra_k, "additional_values": extra_v, "additional_lengths": extra_lengths}
    arguments.require_tensors(**{name: tensor for name, tensor in named.items() if tensor is not None})
    call = query, key, value, pattern, scale, kernel, extra_k, extra_v, extra_lengths
    results = given_results(query, value, out, out_lse)

    def operator(*call: Any) -> Results:
        if results:
            torch.ops.gnaforge.forward_out.default(*call, output=results[0], output_lse=results[1])
            return results[0], results[1]
        return torch.ops.gnaforge.forward.default(*call)  # type: ignore[no-any-return]

    if is_compiling():
        found = operator(*call)
    else:
        try:
            if is_tracing():
                finding.prepare_trace(*call)
            found = operator(*call)
        except RuntimeError as error:
            found = finding.recover(error, operator, *call, results=results)
    return found if return_lse else found[0]


def given_results(
    query: torch.Tensor, value: torch.Tensor, out: torch.Tensor | None, out_lse: torch.Tensor | None
) -> tuple[torch.Tensor, ...]:
    """An output and a log-sum-exp to write to; empty where the caller brings neither.

    Raises:
        TypeError: one is no tensor.
    """
    if out is None and out_lse is None:
        return ()
    named = {"out": out, "out_lse": out_lse}
    arguments.require_tensors(**{name: tensor for name, tensor in named.items() if tensor is not None})
    return complete_results(query, value, out, out_lse)


def complete_results(
    query: torch.Tensor, value: torch.Tensor, out: torch.Tensor | None, out_lse: torch.Tensor | None
) -> Results:
    """An output and a log-sum-exp to write to, where the caller brings one of them."""
    from .autocast import autocast_dtype

    if out is None:
        out = query.new_empty((*query.shape[:-1], *value.shape[-1:]), dtype=autocast_dtype(query))
    if out_lse is None:
        out_lse = query.new_empty(query.shape[:-1], dtype=torch.float32)
    return out, out_lse
