"""Tensors with guard zones around them and, if wanted, gaps within: nothing there may be read or written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch

from ..runtime.dtypes import DTYPES

LAYOUTS = ("contiguous", "gapped")
_GUARD = 4096  # elements before and behind a tensor
_ALIGNMENT = 256  # bytes
_UNWRITTEN = {dtype.torch: dtype.unwritten for dtype in DTYPES.values()}
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}  # an integer of as many bytes


@dataclass(frozen=True)
class Guarded:
    """A heads-last tensor in memory of its own.

    Attributes:
        name: for messages.
        tensor: [batch, *tokens, heads, channels], or without channels.
        storage: all of the memory: guard zones, gaps, and the tensor's elements; NaN at first.
    """

    name: str
    tensor: torch.Tensor
    storage: torch.Tensor

    @property
    def extent(self) -> tuple[int, int]:
        """Address of the first element, and bytes up to the end of the last."""
        size = self.tensor.element_size()
        reach = sum((n - 1) * stride for n, stride in zip(self.tensor.shape, self.tensor.stride(), strict=True))
        return self.tensor.data_ptr(), (reach + 1) * size

    def unwritten(self) -> torch.Tensor:
        """Which elements still hold what was there at first."""
        return _bits(self.tensor) == _UNWRITTEN[self.tensor.dtype]

    def outside(self) -> torch.Tensor:
        """Offsets of elements outside of the tensor that changed, relative to its first element."""
        inside = torch.zeros(self.storage.shape, dtype=torch.bool)
        first = (self.tensor.data_ptr() - self.storage.data_ptr()) // self.storage.element_size()
        inside.as_strided(self.tensor.shape, self.tensor.stride(), first).fill_(True)
        changed = (_bits(self.storage) != _UNWRITTEN[self.storage.dtype]) & ~inside
        return changed.nonzero().flatten() - first

    def place(self, index: Sequence[int]) -> str:
        """An element's position, for messages."""
        names = ["batch entry", *(["token"] if len(index) > 2 else []), "head", "channel"]
        rank = self.tensor.dim() - (2 if self.name == "lse" else 3)
        token = ",".join(map(str, index[1 : 1 + rank]))
        parts = [f"{names[0]} {index[0]}", f"token {token}", f"head {index[1 + rank]}"]
        return ", ".join(parts + [f"channel {i}" for i in index[2 + rank :]])


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(_BITS[tensor.element_size()])


def guarded(name: str, shape: Sequence[int], dtype: torch.dtype, layout: str, channels: bool = True) -> Guarded:
    """Memory for a tensor, filled with NaN.

    Args:
        name: for messages.
        shape: [batch, *tokens, heads, channels], or without channels.
        dtype: of the elements.
        layout: ``contiguous``, or ``gapped``: with room behind the channels, the heads and every token dimension.
        channels: whether the shape ends with channels. Their number is kept a multiple of 8, as kernels demand.
    """
    padded = list(shape)
    if layout == "gapped":
        padded = [n + 1 for n in shape]
        if channels:
            padded[-1] = shape[-1] + 8
    count = prod(padded)
    size = torch.empty((), dtype=dtype).element_size()
    slack = _ALIGNMENT // size
    storage = torch.empty(count + 2 * _GUARD + slack, dtype=dtype)
    _bits(storage).fill_(_UNWRITTEN[dtype])
    first = _GUARD + (-(storage.data_ptr() + _GUARD * size) % _ALIGNMENT) // size
    strides = [prod(padded[i + 1 :]) for i in range(len(padded))]
    return Guarded(name, storage.as_strided(tuple(shape), strides, first), storage)
