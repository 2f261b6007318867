"""Has the kernels of a backward pass ready when its forward call returns: a compiler has no business in `backward`,
which autograd runs on a thread of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from . import core, jit, lookup
from .autocast import autocast_dtype, autocast_tensor
from .errors import NoKernelError
from .request import Request, request_of
from .table import serves

BACKWARD_OPS = ("gna_backward_q", "gna_backward_kv")

_prepared: set[tuple[object, ...]] = set()


def prepare_backward(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pattern: Sequence[int]) -> None:
    """Loads or makes what the backward pass of a forward call takes, by the same policy. Where that can't be, the
    backward pass says so: a forward call that nobody differentiates is none the worse for it."""
    wanted = query.requires_grad, key.requires_grad or value.requires_grad
    ranged = len(pattern) > 4 * (query.dim() - 3) or query.shape[1:-2] != key.shape[1:-2]
    sizes = (query.shape, key.shape) if ranged else ()  # else tokens don't decide which kernels there must be
    signature = (*wanted, autocast_dtype(query), query.device, query.shape[-1], value.shape[-1], *sizes, *pattern)
    if signature in _prepared:
        return
    q, k, v = map(autocast_tensor, (query, key, value))
    requests = backward_requests(q, k, v, pattern, *wanted)
    missing = load_missing(requests)
    if missing and not jit.busy():
        with jit.one_thread(missing[0]):
            if missing := load_missing(missing):
                jit.make_kernels(*missing)
    _prepared.add(signature)


def backward_requests(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pattern: Sequence[int], of_q: bool, of_kv: bool
) -> list[Request]:
    """What the backward pass of a forward call needs of kernels, for these gradients."""
    request = request_of(query, key, value, pattern)
    return [replace(request, op=op) for op, wanted in zip(BACKWARD_OPS, (of_q, of_kv), strict=True) if wanted]


def load_missing(requests: Sequence[Request]) -> list[Request]:
    """Those of the requests that no kernel serves, when what there is has been loaded for them."""
    for request in requests:
        if not serves(request) and not jit.busy():
            lookup.load_matching(request)
    return [request for request in requests if not serves(request)]


def raise_missing(
    error: RuntimeError,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pattern: Sequence[int],
    wanted: int,
) -> None:
    """Raises what is to be done, where a backward call failed because it has no kernel; ``wanted`` as it has it.

    Raises:
        NoKernelError, ValueError: there is none.
    """
    failure = core.failure_of(error)
    if failure.code not in core.NO_KERNEL:
        return
    for request in load_missing(backward_requests(query, key, value, pattern, bool(wanted & 1), bool(wanted & 6))):
        text = failure.text if lookup.source() is None else failure.whole
        raise NoKernelError(f"{text}\n{lookup.remedy(request)}") from None
