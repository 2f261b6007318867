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


def prepare_backward(tensors: Sequence[torch.Tensor | None], pattern: Sequence[int]) -> None:
    """Loads or makes what the backward pass of a forward call takes, by the same policy. Where that can't be, the
    backward pass says so: a forward call that nobody differentiates is none the worse for it.

    Args:
        tensors: of the call: query, key, value, and perhaps additional keys and values.
        pattern: as the operator has it.
    """
    query, key, value, extra = (*tensors[:3], tensors[3] if len(tensors) > 3 else None)
    assert query is not None and key is not None and value is not None
    wanted = sum(1 << i for i, tensor in enumerate(tensors) if tensor is not None and tensor.requires_grad)
    of_query, of_others = bool(wanted & 1), wanted > 1
    if not all(type(size) is int for size in (*query.shape, *key.shape, *value.shape)):
        return  # torch traces: sizes are symbols
    ranged = len(pattern) > 4 * (query.dim() - 3) or query.shape[1:-2] != key.shape[1:-2]
    sizes = (query.shape, key.shape) if ranged else ()  # else tokens don't decide which kernels there must be
    signature = (of_query, of_others, autocast_dtype(query), query.device, query.shape[-1], value.shape[-1], *sizes)
    signature += (extra is None, *pattern)
    if signature in _prepared:
        return
    cast = [tensor if tensor is None else autocast_tensor(tensor) for tensor in (query, key, value, extra)]
    missing = load_missing(backward_requests(cast, pattern, wanted))
    if missing and not jit.busy():
        with jit.one_thread(missing[0]):
            if missing := load_missing(missing):
                jit.make_kernels(*missing)
    _prepared.add(signature)


def backward_requests(tensors: Sequence[torch.Tensor | None], pattern: Sequence[int], wanted: int) -> list[Request]:
    """What the backward pass of a forward call needs of kernels: of query, key, value and perhaps additional keys, for
    what is ``wanted`` as the operator has it."""
    query, key, value, extra = tensors
    assert query is not None and key is not None and value is not None
    request = request_of(query, key, value, pattern, "", extra)
    return [replace(request, op=op) for op, there in zip(BACKWARD_OPS, (wanted & 1, wanted & ~1), strict=True) if there]


def load_missing(requests: Sequence[Request]) -> list[Request]:
    """Those of the requests that no kernel serves, when what there is has been loaded for them."""
    for request in requests:
        if not serves(request) and not jit.busy():
            lookup.load_matching(request)
    return [request for request in requests if not serves(request)]


def raise_missing(
    error: RuntimeError, tensors: Sequence[torch.Tensor | None], pattern: Sequence[int], wanted: int
) -> None:
    """Raises what is to be done, where a backward call failed because it has no kernel; arguments as those of
    `backward_requests`.

    Raises:
        NoKernelError, ValueError: there is none.
    """
    failure = core.failure_of(error)
    if failure.code not in core.NO_KERNEL:
        return
    for request in load_missing(backward_requests(tensors, pattern, wanted)):
        text = failure.text if lookup.source() is None else failure.whole
        raise NoKernelError(f"{text}\n{lookup.remedy(request)}") from None
