"""Calls of the operator of gradients, beside autograd: of one kernel of it, or of both."""

from __future__ import annotations

from collections.abc import Callable

import torch

from . import ops  # noqa: F401  registers the operators
from .op_table import Tensors
from .problem import Problem
from .training import BACKWARD_OPS

_WANTED = dict(zip(BACKWARD_OPS, (1, 2 | 4), strict=True))  # as the operator has it
_WANTED_EXTRA = 8 | 16


def gradient_call(problem: Problem, inputs: Tensors, kernels: dict[str, str]) -> Callable[[], tuple[torch.Tensor, ...]]:
    """A call that computes gradients and returns them, in the operator's order.

    Args:
        problem: with at most one piece of extra keys.
        inputs: by role, those of the backward ops.
        kernels: the ops whose gradients are wanted, each with the key of its kernel, or empty for the one that the
            operator chooses.
    """
    wanted = sum(_WANTED[op] for op in kernels)
    if problem.extra_tokens and BACKWARD_OPS[1] in kernels:
        wanted |= _WANTED_EXTRA
    tensors = [inputs.get(name) for name in ("grad_out", "grad_lse", "q", "k", "v", "out", "lse")]
    keys = [kernels.get(op, "") for op in BACKWARD_OPS]
    extra = [inputs.get(name) for name in ("extra_k", "extra_v", "extra_lengths")]
    pattern, scale = problem.pattern, problem.scale

    def call() -> tuple[torch.Tensor, ...]:
        found: tuple[torch.Tensor, ...] = torch.ops.gnaforge.backward.default(
            *tensors, pattern, scale, wanted, *keys, *extra
        )
        return found

    return call
