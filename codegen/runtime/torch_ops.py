"""The parts of the operators that live in Python: what they do where torch traces, differentiates or transforms."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import jit, lookup, table
from .autocast import register_autocast
from .batching import register_batching
from .errors import NoKernelError
from .gradients import register_autograd
from .request import Request, request_of
from .training import backward_requests, load_missing

FORWARD_OPERATORS = ("forward", "forward_no_grad")
"""The second is the first without its autograd formula, which costs time at each call."""


def _forward_fake(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: list[int],
    scale: float | None = None,
    key: str = "",
    extra_k: torch.Tensor | None = None,
    extra_v: torch.Tensor | None = None,
    extra_lengths: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    from .given import failure_of_call

    tensors = q, k, v, extra_k, extra_v, extra_lengths
    if failure := failure_of_call(tensors, pattern, scale, key):
        raise ValueError(failure.reason)
    if q.device.type in ("cpu", "cuda") and not any(type(size) is int and size == 0 for size in q.shape[:-1]):
        _require_kernel(request_of(q, k, v, pattern, key, extra_k), tensors, pattern, scale)
    return q.new_empty((*q.shape[:-1], v.shape[-1])), q.new_empty(q.shape[:-1], dtype=torch.float32)


def _require_kernel(
    request: Request, tensors: Sequence[torch.Tensor | None], pattern: Sequence[int], scale: float | None
) -> None:
    """A compiled graph calls the operator without Python: what it needs is loaded now, and must be there already.

    Raises:
        NoKernelError: it isn't.
    """
    from .given import failure_of_call

    lookup.load_matching(request)
    failure = failure_of_call(tensors, pattern, scale, request.key, choose=True)
    if failure is None and table.serves(request):  # where a size isn't known, the core isn't asked
        return
    lookup.remedy(request)  # raises what is more to the point than that none is loaded, if there is something
    if failure is not None:
        raise NoKernelError(f"{failure.whole}\n{jit.TRACING}")
    wanted, call = request.key or str(request), request.register_call()
    raise NoKernelError(f"gnaforge: no kernel for {wanted} is loaded\nregister one with: {call}\n{jit.TRACING}")


def _backward_fake(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    for request in load_missing(backward_requests(q, k, v, pattern, bool(wanted & 1), bool(wanted & 6))):
        lookup.remedy(request)  # raises where there can be none
        call = request.register_call()
        raise NoKernelError(
            f"gnaforge: no kernel for {request.op}, {request} is loaded\nregister one with: {call}\n{jit.TRACING}"
        )
    of_q, of_k, of_v = (x.new_empty(x.shape if wanted >> i & 1 else 0) for i, x in enumerate((q, k, v)))
    return of_q, of_k, of_v


_library: torch.library.Library | None = None  # what it registered ends with it


def register_python_parts() -> None:
    """Registers fakes, autograd, autocast and vmap; called once per process, when the core has registered itself."""
    global _library
    _library = torch.library.Library("gnaforge", "IMPL")
    for name in FORWARD_OPERATORS:
        torch.library.register_fake(f"gnaforge::{name}", _forward_fake, lib=_library)
        register_autocast(name, _library)
        register_batching(name, _library)
    torch.library.register_fake("gnaforge::backward", _backward_fake, lib=_library)
    register_batching("backward", _library)
    register_autograd(_library)
