"""Calls with inputs in float8_e4m3fn, whose numbers are multiplied by a descale of their head; outputs are wider."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import is_grad_enabled
from torch._C import _is_tracing as is_tracing
from torch.compiler import is_compiling

from . import arguments, core
from .dtypes import DTYPES, dtype_name
from .finding import error_of, find_kernel
from .request import request_of

_E4M3 = torch.float8_e4m3fn
_NOTHING = (None,) * 5
_SMALLEST, _LARGEST = 2.0**-126, 2.0**128 - 2.0**104  # float32 without its subnormal numbers
_NAMES = ("descale_q", "descale_k", "descale_v")


def is_scaled(tensor: object) -> bool:
    """Whether an input is of a dtype whose calls have descales."""
    return isinstance(tensor, torch.Tensor) and tensor.dtype is _E4M3


def attend_scaled(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pattern: list[int],
    scale: float | None,
    kernel: str,
    return_lse: bool,
    further: tuple[Any, ...] | None = None,
    scales: tuple[Any, ...] | None = None,
) -> Any:
    """The rest of `ops.attend` for such calls; ``further`` and ``scales`` as it has them.

    Raises:
        ValueError: a descale, or the output's dtype, is wrong, or there are descales of other inputs.
        NotImplementedError: gradients are wanted, or torch.jit traces.
    """
    arguments.require_call(query, key, value, pattern)
    *extra, out, out_lse = further or _NOTHING
    *given, out_dtype = scales or (None,) * 4
    names = ("additional_keys", "additional_values", "additional_lengths", "out", "out_lse")
    named = dict(zip(names, (*extra, out, out_lse), strict=True))
    arguments.require_tensors(**{name: tensor for name, tensor in named.items() if tensor is not None})
    if not is_scaled(query):
        raise ValueError(f"descales and out_dtype go with query in float8_e4m3fn; it is {_name(query.dtype)}")
    _refuse_gradients(query, key, value, *extra, out, out_lse, *given)
    heads = query.shape[-2], key.shape[-2], key.shape[-2]
    descales = [_descale(*one, query) for one in zip(_NAMES, given, heads, strict=True)]
    dtype = _output_dtype(query, out, out_dtype)
    if out is None:
        out = query.new_empty((*query.shape[:-1], *value.shape[-1:]), dtype=dtype)
    if out_lse is None:
        out_lse = query.new_empty(query.shape[:-1], dtype=torch.float32)
    call = query, key, value, pattern, scale, kernel, *extra

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        torch.ops.gnaforge.forward_scaled_out.default(*call, *descales, output=out, output_lse=out_lse)
        return out, out_lse

    if is_compiling():
        found = run()
    else:
        try:
            found = run()
        except RuntimeError as error:
            found = _recover(error, run, call, (out, out_lse))
    return found if return_lse else found[0]


def _recover(
    error: RuntimeError, run: Callable[[], Any], call: tuple[Any, ...], results: tuple[torch.Tensor, ...]
) -> Any:
    """As `finding.recover`."""
    failure = core.failure_of(error)
    if failure.code not in core.NO_KERNEL:
        raise error_of(error, failure, call, results) from None

    def attempt() -> Any:
        try:
            return run()
        except RuntimeError as again:
            found = core.failure_of(again)
            if found.code not in core.NO_KERNEL:
                raise error_of(again, found, call, results) from None
            return found

    request = request_of(*call[:4], call[5], *call[6:7])
    output = dtype_name(results[0].dtype)
    problem = None if request.problem is None else replace(request.problem, out_dtype=output)
    return find_kernel(failure, attempt, replace(request, out_dtype=output, problem=problem))


def _descale(name: str, given: Any, heads: int, query: torch.Tensor) -> torch.Tensor | None:
    """A descale as the operator takes it: float32 [batch, heads]."""
    if given is None:
        return None
    shape = query.shape[0], heads
    if isinstance(given, torch.Tensor):
        if given.dtype != torch.float32 or given.dim() > 1 or (given.dim() == 1 and given.shape[0] != heads):
            what = f"{_name(given.dtype)} of shape {list(given.shape)}"
            raise ValueError(f"{name} must be a number or float32 [{heads}], one for each head, got {what}")
        if given.device != query.device:  # where it is meta, torch would trace the call in place of running it
            raise ValueError(f"{name} is on {given.device} and query on {query.device}; both must be on one device")
        return given.expand(shape)
    number = arguments.number(name, given)
    if not _SMALLEST <= number <= _LARGEST:  # NaN is neither
        raise ValueError(f"{name} is {number}; it must be positive and finite, in float32")
    return torch.full((1, 1), number, dtype=torch.float32, device=query.device).expand(shape)


def _output_dtype(query: torch.Tensor, out: torch.Tensor | None, wanted: Any) -> torch.dtype:
    known = [DTYPES[name].torch for name in DTYPES[dtype_name(query.dtype)].outputs]
    if wanted is not None and wanted not in known:
        allowed = " or ".join(map(_name, known))
        raise ValueError(f"out_dtype is {_name(wanted)}; of {_name(query.dtype)} it must be {allowed}")
    if out is not None and wanted is not None and out.dtype != wanted:
        raise ValueError(f"out is {_name(out.dtype)}, and out_dtype {_name(wanted)}")
    return known[0] if wanted is None else wanted


def _refuse_gradients(*tensors: Any) -> None:
    if is_grad_enabled() and any(isinstance(tensor, torch.Tensor) and tensor.requires_grad for tensor in tensors):
        raise NotImplementedError("gnaforge: float8_e4m3fn has no backward pass; call it under torch.no_grad()")
    if not is_compiling() and is_tracing():
        raise NotImplementedError("gnaforge: torch.jit traces no calls in float8_e4m3fn; torch.compile does")


def _name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def forward_scaled_fake(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: list[int],
    scale: float | None = None,
    key: str = "",
    extra_k: torch.Tensor | None = None,
    extra_v: torch.Tensor | None = None,
    extra_lengths: torch.Tensor | None = None,
    descale_q: torch.Tensor | None = None,
    descale_k: torch.Tensor | None = None,
    descale_v: torch.Tensor | None = None,
    *,
    output: torch.Tensor,
    output_lse: torch.Tensor,
) -> None:
    """The operator where torch only traces: refuses what the core would, but for a missing kernel, which the run
    tells of."""
    from .given import failure_of_call

    tensors = q, k, v, extra_k, extra_v, extra_lengths, None, None, None, output, output_lse
    if failure := failure_of_call(tensors, pattern, scale, key):
        raise ValueError(failure.reason)


def refuse_batching(*arguments: Any, **results: Any) -> Any:
    """The operator under torch.vmap."""
    raise NotImplementedError("gnaforge: float8_e4m3fn isn't taken under torch.vmap; make its dimension a batch's")
