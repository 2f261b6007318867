"""Calls of the operators that run a list: what they do where no kernel fits, and where torch only traces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._C import _is_tracing as is_tracing
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from . import core, finding, ops
from .list_requests import Failing
from .request import Request

Results = tuple[torch.Tensor, torch.Tensor]  # output and log-sum-exp


def run(
    name: str,
    call: tuple[Any, ...],
    request: Callable[[], Request],
    failing: Failing,
    results: tuple[torch.Tensor, ...] = (),
) -> Results:
    """Calls an operator; if no kernel fits, loads or makes one and tries again.

    Args:
        name: the operator's.
        call: its arguments; the first three are query, key and value.
        request: says what kernel a call needs.
        failing: gives the `core.Failure` of a call that doesn't run; True: also where no kernel is loaded that fits.
        results: the caller's tensors for the output and the log-sum-exp, or none.

    Raises:
        ValueError, NoKernelError, MemoryError: as `neighborhood_attention`.
    """
    ops.load_operators()
    operator = getattr(torch.ops.gnaforge, f"{name}_out" if results else name).default

    def operate() -> Results:
        if not results:
            return operator(*call)  # type: ignore[no-any-return]
        operator(*call, output=results[0], output_lse=results[1])
        return results[0], results[1]

    if is_compiling():
        return operate()
    if is_tracing():
        finding.prepare_apart(lambda: _prepare(request(), failing))
        finding.prepare_traced_backward(name, call)
        return operate()

    def attempt() -> Results | core.Failure:
        try:
            if results or _wants_autograd(call):  # autograd also hears of what is written to
                return operate()
            with torch._C._AutoDispatchBelowAutograd():
                return operate()
        except RuntimeError as error:
            failure = core.failure_of(error)
            if failure.code in core.NO_KERNEL:
                return failure
            if failure.code == core.ErrorCode.BAD_INPUT:
                raise ValueError(failure.reason) from None
            if failure.code == core.ErrorCode.OUT_OF_MEMORY:
                raise finding.out_of_memory(failure, call[0], call[2]) from None
            if failure.code == core.ErrorCode.OTHER and (fault := failing(False)):
                raise ValueError(fault.reason) from None  # torch refused it first, in other words
            raise

    found = attempt()
    return finding.find_kernel(found, attempt, request()) if isinstance(found, core.Failure) else found


def _wants_autograd(call: tuple[Any, ...]) -> bool:
    """Whether autograd has to see a call: a tensor requires grad, or one below a transformation of torch.func may; or
    there may be tangents."""
    wanted = torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in call)
    return wanted or forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None


def _prepare(request: Request, failing: Failing) -> None:
    failure = failing(True)
    if failure is not None and failure.code == core.ErrorCode.BAD_INPUT:
        raise ValueError(failure.reason)
    if failure is not None and failure.code in core.NO_KERNEL:
        finding.find_kernel(failure, lambda: failing(True), request)
