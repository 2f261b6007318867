"""Has the kernels of a backward pass ready when its forward call returns: a compiler has no business in `backward`,
which autograd runs on a thread of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from . import core, jit, lookup
from .errors import NoKernelError
from .formulas import FORMULAS, Formula
from .request import Request
from .table import serves

BACKWARD_OPS = ("gna_backward_q", "gna_backward_kv")

_prepared: set[tuple[object, ...]] = set()
_refusals: dict[Request, str] = {}
"""Why a kernel wasn't made at the forward call, for the backward call that lacks it."""


def prepare_backward(name: str, arguments: Sequence[Any], wanted: int | None = None) -> None:
    """Loads or makes what the backward pass of an operator's call takes, by the same policy. Where that can't be, the
    backward pass says so: a forward call that nobody differentiates is none the worse for it.

    Args:
        name: the operator's.
        arguments: the call's.
        wanted: of which of them gradients are, as the `Formula` has it; by default of those that require some.
    """
    formula = FORMULAS[name]
    wanted = formula.wanted_of(arguments) if wanted is None else wanted
    if wanted == 0:
        return
    inputs = formula.whole(arguments)
    sizes = (size for place in formula.tensors if inputs[place] is not None for size in inputs[place].shape)
    if not all(type(size) is int for size in sizes):
        return  # torch traces: sizes are symbols
    of_query, of_others = _kinds(formula, wanted)
    signature = (name, of_query, of_others, jit.policy(), *formula.signature(inputs))
    if signature in _prepared:
        return
    missing = load_missing(backward_requests(name, inputs, wanted))
    if missing and not jit.busy():
        with jit.one_thread(missing[0]):
            if missing := load_missing(missing):
                _refusals.update(dict.fromkeys(missing, jit.make_kernels(*missing)))
    _prepared.add(signature)


def _kinds(formula: Formula, wanted: int) -> tuple[bool, bool]:
    """Whether gradients of queries are wanted, and whether those of others."""
    return bool(wanted & formula.queries), bool(wanted & ~formula.queries)


def backward_requests(name: str, inputs: Sequence[Any], wanted: int) -> list[Request]:
    """What the backward pass of an operator's call needs of kernels, of all arguments, for what is ``wanted`` as its
    `Formula` has it."""
    formula = FORMULAS[name]
    ops = [op for op, there in zip(BACKWARD_OPS, _kinds(formula, wanted), strict=True) if there]
    return list(dict.fromkeys(replace(own, op=op) for own in formula.forward_requests(inputs) for op in ops))


def load_missing(requests: Sequence[Request]) -> list[Request]:
    """Those of the requests that no kernel serves, when what there is has been loaded for them."""
    for request in requests:
        if not serves(request) and not jit.busy():
            lookup.load_matching(request)
    return [request for request in requests if not serves(request)]


def require_traced(requests: Sequence[Request]) -> None:
    """Refuses a backward call that torch traces and no kernel serves: a compiled graph calls operators without Python.

    Raises:
        NoKernelError, ValueError: there is none.
    """
    missing = load_missing(requests)
    for request in missing:
        lookup.remedy(request)  # raises where there can be none
    if missing:
        lines = [f"gnaforge: no kernel for {request.op}, {request} is loaded" for request in missing]
        calls = dict.fromkeys(f"register one with: {request.register_call()}" for request in missing)
        raise NoKernelError("\n".join([*lines, *calls, jit.TRACING]))


def raise_missing(error: RuntimeError, name: str, inputs: Sequence[Any], wanted: int) -> None:
    """Raises what is to be done, where a backward call failed because it has no kernel; arguments as those of
    `backward_requests`.

    Raises:
        NoKernelError, ValueError: there is none.
    """
    failure = core.failure_of(error)
    if failure.code not in core.NO_KERNEL:
        return
    if missing := load_missing(backward_requests(name, inputs, wanted)):
        text = failure.text if lookup.source() is None else failure.whole
        reasons = dict.fromkeys(_refusals.get(request, "") for request in missing)
        raise NoKernelError("\n".join([text, *filter(None, reasons), lookup.remedy(*missing)])) from None
