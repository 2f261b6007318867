"""Calls of the operators below autograd: what a rank computes of a call, with results in tensors that are there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..runtime.further import attend_further
from ..runtime.ops import load_operators
from ..runtime.training import prepare_backward, raise_missing

Optional = torch.Tensor | None
Extra = tuple[Optional, Optional, Optional]
"""Keys, values and lengths of the extra piece."""

QUERY, KEYS, EXTRA = 1, 2 | 4, 8 | 16
"""Tensors that gradients are wanted of, as the backward operator has it: a bit for each."""


def wanted_of(*tensors: Optional) -> int:
    """The bits of query, key, value, extra keys and values that require gradients. Asked outside of a function of
    autograd's: within, tensors that require some do so under torch.no_grad() too."""
    if not torch.is_grad_enabled():
        return 0
    wanted = sum(1 << i for i, tensor in enumerate(tensors) if tensor is not None and tensor.requires_grad)
    for both in (KEYS, EXTRA):  # of keys and of values, the kernels give both
        wanted |= both if wanted & both else 0
    return wanted


def forward(
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    extra: Extra,
    pattern: list[int],
    scale: float | None,
    kernel: str,
    wanted: int,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """Writes the output and the log-sum-exp of query, key and value; where gradients are ``wanted`` their kernels are
    loaded or made, too.

    Raises:
        ValueError, NoKernelError, MemoryError: as `neighborhood_attention`.
    """
    load_operators()
    if wanted:
        prepare_backward("forward", (*tensors, pattern, scale, kernel, *extra), wanted)
    attend_further(*tensors, pattern, scale, kernel, True, *extra, out, lse)


def backward(
    gradients: tuple[torch.Tensor, Optional],
    tensors: Sequence[torch.Tensor],
    extra: Extra,
    results: tuple[torch.Tensor, torch.Tensor],
    pattern: list[int],
    scale: float | None,
    wanted: int,
) -> tuple[torch.Tensor, ...]:
    """The gradients of query, key, value, extra keys and values; without elements where they aren't wanted. Output and
    log-sum-exp may be those of a softmax over more keys than are given: gradients are these keys' share then.

    Raises:
        NoKernelError: there is no kernel, and within a backward pass none is made.
    """
    call = *gradients, *tensors, *results, pattern, scale, wanted, "", "", *extra
    try:
        return torch.ops.gnaforge.backward.default(*call)  # type: ignore[no-any-return]
    except RuntimeError as error:
        inputs: list[Any] = [*tensors, pattern, scale, "", *extra]
        raise_missing(error, "forward", inputs, wanted)
        raise
