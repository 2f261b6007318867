"""The parts of the operators that live in Python: shapes for torch.compile, and autograd."""

from __future__ import annotations

from typing import Any

import torch

from . import lookup, table
from .errors import NoKernelError
from .problem import fields_of_pattern
from .request import Request, request_of


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
    rank = len(fields_of_pattern(pattern)["window"])
    torch._check(q.dim() == rank + 3, lambda: f"gnaforge: query must have {rank + 3} dims, got {q.dim()}")
    _load_for_graph(request_of(q, k, v, pattern, key, extra_k))
    return q.new_empty((*q.shape[:-1], v.shape[-1])), q.new_empty(q.shape[:-1], dtype=torch.float32)


def _load_for_graph(request: Request) -> None:
    """A compiled graph calls the operator without Python: what it needs is loaded now, and must be there already.

    Raises:
        NoKernelError: it isn't.
    """
    lookup.load_matching(request)
    if request.device in ("cpu", "cuda") and not table.serves(request):
        lookup.remedy(request)  # raises what is more to the point than that none is loaded, if there is something
        wanted = request.key or str(request)
        raise NoKernelError(
            f"gnaforge: torch is tracing, no kernel for {wanted} is loaded or in the cache, and none is compiled "
            f"meanwhile\nregister one before: {request.register_call()}"
        )


def _backward_fake(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    pattern: list[int],
    scale: float | None = None,
    key: str = "",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, pattern, scale = inputs[:5]
    ctx.save_for_backward(q, k, v, *output)
    ctx.pattern, ctx.scale = pattern, scale


def _backward(ctx: Any, grad_out: torch.Tensor, grad_lse: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    q, k, v, out, lse = ctx.saved_tensors
    grads = torch.ops.gnaforge.backward(grad_out, grad_lse, q, k, v, out, lse, ctx.pattern, ctx.scale)
    return (*grads, None, None, None, None, None, None)


def register_python_parts() -> None:
    """Registers fakes and the autograd formula; called once per process, after the core registered the operators."""
    for name in ("gnaforge::forward", "gnaforge::forward_with_grad"):
        torch.library.register_fake(name, _forward_fake)
    torch.library.register_fake("gnaforge::backward", _backward_fake)
    torch.library.register_autograd("gnaforge::forward_with_grad", _backward, setup_context=_setup_context)
