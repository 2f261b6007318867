"""Gets a kernel for a call that its operator refuses, and tries again; or says what the caller can act on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from . import arguments, core, jit, lookup, sharding
from .errors import NoKernelError
from .request import Request, request_of

T = TypeVar("T")
Results = tuple[torch.Tensor, torch.Tensor]  # output and log-sum-exp


def recover(
    error: RuntimeError, operator: Callable[..., Results], *call: Any, results: tuple[torch.Tensor, ...] = ()
) -> Results:
    """After a failed call: loads or makes a kernel that fits and tries again, or raises what the caller can act on."""
    if sharding.register_when_imported():  # torch.distributed.tensor came after the core
        try:
            return operator(*call)
        except RuntimeError as again:
            error = again
    failure = core.failure_of(error)
    if failure.code not in core.NO_KERNEL:
        raise error_of(error, failure, call, results) from None

    def attempt() -> Results | core.Failure:
        """The operator's result, or the core's `Failure` if it has no kernel for the call."""
        try:
            return operator(*call)
        except RuntimeError as again:
            found = core.failure_of(again)
            if found.code not in core.NO_KERNEL:
                raise error_of(again, found, call, results) from None
            return found

    return find_kernel(failure, attempt, _request_of(call))


def error_of(
    error: RuntimeError, failure: core.Failure, call: tuple[Any, ...], results: tuple[torch.Tensor, ...]
) -> Exception:
    """The error to raise for one of an operator's that no other kernel would mend."""
    from .given import failure_of_call

    if failure.code == core.ErrorCode.BAD_INPUT:
        return ValueError(failure.reason)
    if failure.code == core.ErrorCode.OUT_OF_MEMORY:
        return out_of_memory(failure, call[0], call[2])
    if failure.code == core.ErrorCode.OTHER:
        tensors = (*call[:3], *call[6:], *[None] * (12 - len(call)), *results) if results else (*call[:3], *call[6:])
        if fault := failure_of_call(tensors, *call[3:6]):
            return ValueError(fault.reason)  # torch refused it first, in other words
    return error


def _request_of(call: tuple[Any, ...]) -> Request:
    from .autocast import autocast_tensor

    return request_of(*map(autocast_tensor, call[:3]), call[3], call[5], *call[6:7])


def prepare_trace(*call: Any) -> None:
    """Loads or makes a kernel for a call that torch.jit traces: it doesn't survive an operator that fails.

    Raises:
        ValueError, NoKernelError: as a call.
    """
    from .autocast import autocast_tensor

    arguments.require_call(*call[:4])
    cast = tuple(map(autocast_tensor, call))
    prepare_apart(lambda: prepare((*cast[:3], *cast[6:]), *cast[3:6]))
    prepare_traced_backward("forward", call)


def prepare_traced_backward(name: str, call: Sequence[Any]) -> None:
    """Loads or makes the kernels of gradients of an operator's call that torch.jit traces, if it wants some."""
    if any(isinstance(tensor, torch.Tensor) and tensor.requires_grad for tensor in call):
        from .training import prepare_backward

        prepare_apart(lambda: prepare_backward(name, call))


def prepare_apart(prepare: Callable[[], object]) -> None:
    """Calls a function while torch.jit traces, which must not make a part of the trace of what it looks at."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as other:  # a trace is one thread's
        other.submit(prepare).result()


def prepare(
    tensors: Sequence[Any], pattern: Sequence[int], scale: float | None, key: str, names: Sequence[str] = ()
) -> None:
    """Has a kernel in the table for a forward call that doesn't run now; tensors and names are as
    `given.failure_of_call` takes them.

    Raises:
        ValueError, NoKernelError: as a call.
    """
    from .given import failure_of_call

    def attempt() -> core.Failure | None:
        return failure_of_call(tensors, pattern, scale, key, choose=True, names=names)

    failure = attempt()
    if failure is not None and failure.code == core.ErrorCode.BAD_INPUT:
        raise ValueError(failure.reason)
    if failure is not None and failure.code in core.NO_KERNEL:
        find_kernel(failure, attempt, request_of(tensors[0], tensors[1], tensors[2], pattern, key, *tensors[3:9:3]))


def find_kernel(failure: core.Failure, attempt: Callable[[], T | core.Failure], request: Request) -> T:
    """What ``attempt`` gives when there is a kernel for it, which is loaded or made; until then that is a `Failure`.

    Raises:
        ValueError, NoKernelError: there can't be one, or none may be made.
    """
    if busy := jit.busy():
        lookup.remedy(request)  # raises where there can't be a kernel
        raise NoKernelError(f"{failure.whole}\n{busy}") from None
    lookup.load_matching(request)
    result = attempt()  # also where nothing new came: another thread may have loaded it
    if isinstance(result, core.Failure) and request.key and result.code != core.ErrorCode.MISSING:
        raise NoKernelError(f"{result.text}\nleave out kernel= to let gnaforge choose one that fits") from None
    reason = ""
    if isinstance(result, core.Failure):
        with jit.one_thread(request):
            result = attempt()
            if isinstance(result, core.Failure):
                reason = jit.make_kernels(request)
                result = attempt()
    if isinstance(result, core.Failure):
        # To register one is no help in a package of built kernels.
        text = result.text if lookup.source() is None else result.whole
        raise NoKernelError("\n".join(filter(None, [text, reason, lookup.remedy(request)]))) from None
    return result


def out_of_memory(failure: core.Failure, query: torch.Tensor, value: torch.Tensor) -> torch.OutOfMemoryError:
    """The error of a GPU that has no memory for a call: what was wanted, and what torch says of the device.

    Raises:
        RuntimeError: it isn't memory that torch lacks.
    """
    try:
        _ = (
            query.new_empty((*query.shape[:-1], value.shape[-1])),
            query.new_empty(query.shape[:-1], dtype=torch.float32),
        )
    except torch.OutOfMemoryError as own:
        return torch.OutOfMemoryError(f"{failure.text}\n{own}")
    return torch.OutOfMemoryError(failure.text)
