"""Tensors of a call in memory of their own, in every layout that callers have: with guard zones around them, and gaps
within, where nothing may be read or written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch

from ..runtime.dtypes import DTYPES, INT32
from ..runtime.op_table import Op, Role
from ..runtime.problem import Problem

_GUARD = 4096  # elements before and behind a tensor
_ALIGNMENT = 256  # bytes
_MORE_CHANNELS = 16  # a multiple, as kernels demand of strides
_UNWRITTEN = {dtype.torch: dtype.unwritten for dtype in (*DTYPES.values(), INT32)}
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}  # an integer of as many bytes

View = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Guarded:
    """A tensor of a call.

    Attributes:
        role: what it is to the op.
        tensor: [batch, *tokens, heads, channels], or without channels; [batch].
        storage: all of the memory: guard zones, gaps, and the tensor's elements; NaN at first, lengths huge.
    """

    role: Role
    tensor: torch.Tensor
    storage: torch.Tensor

    @property
    def extent(self) -> tuple[int, int]:
        """Address of the first element, and bytes up to the end of the last."""
        size = self.tensor.element_size()
        reach = sum((n - 1) * stride for n, stride in zip(self.tensor.shape, self.tensor.stride(), strict=True))
        return self.tensor.data_ptr(), (reach + 1) * size

    def clear(self) -> None:
        """Makes all of the memory unwritten again."""
        bits_of(self.storage).fill_(_UNWRITTEN[self.storage.dtype])

    def unwritten(self) -> torch.Tensor:
        """Which elements still hold what was there at first."""
        return bits_of(self.tensor) == _UNWRITTEN[self.tensor.dtype]

    def outside(self) -> torch.Tensor:
        """Offsets of elements outside of the tensor that changed, relative to its first element."""
        inside = torch.zeros(self.storage.shape, dtype=torch.bool, device=self.storage.device)
        first = (self.tensor.data_ptr() - self.storage.data_ptr()) // self.storage.element_size()
        inside.as_strided(self.tensor.shape, self.tensor.stride(), first).fill_(True)
        changed = (bits_of(self.storage) != _UNWRITTEN[self.storage.dtype]) & ~inside
        return changed.nonzero().flatten() - first

    def place(self, index: Sequence[int]) -> str:
        """An element's position, for messages."""
        rank = self.tensor.dim() - (2 if self.role.channels is None else 3)
        token = ",".join(map(str, index[1 : 1 + rank]))
        parts = [f"batch entry {index[0]}", f"token {token}", f"head {index[1 + rank]}"]
        return ", ".join(parts + [f"channel {i}" for i in index[2 + rank :]])


Memory = dict[str, Guarded]
"""The tensors of a call, by role."""


def allocate(
    op: Op, problem: Problem, layout: str, device: torch.device | str = "cpu", output_dtype: str = ""
) -> Memory:
    """Memory for all tensors of a call, filled with NaN. Only inputs are packed; results are contiguous then. `fill`
    removes optional ones that a call goes without.

    Args:
        op: what is called.
        problem: it gives the shapes.
        layout: of `kinds.LAYOUTS`.
        device: where.
        output_dtype: of the output, where it is not the problem's.
    """
    memory: Memory = {}
    if layout == "packed":
        packed = [role for role in op.reads(problem) if _is_packed(role, op.inputs[0])]
        for tokens in {role.shape(problem)[:-2]: None for role in packed}:  # those of the queries may be others
            memory |= _pack([role for role in packed if role.shape(problem)[:-2] == tokens], problem, device)
    for role in (*op.reads(problem), *op.writes(problem)):
        if role.name not in memory:
            place = _place if role.side != "batch" and role.has_tokens else _place_numbers
            whole, view = place(role.shape(problem), layout, channels=role.channels is not None)
            storage, tensor = _make(whole, role.dtype(problem, output_dtype).torch, device)
            memory[role.name] = Guarded(role, view(tensor), storage)
    return memory


def fill(memory: Memory, values: Mapping[str, torch.Tensor]) -> None:
    """Copies values into tensors, by role; optional tensors without any leave the memory."""
    for name, tensor in values.items():
        memory[name].tensor.copy_(tensor)
    for name in [name for name, one in memory.items() if one.role.optional and name not in values]:
        del memory[name]


def _is_packed(role: Role, first: Role) -> bool:
    return role.channels is not None and role.element == first.element


def _pack(roles: Sequence[Role], problem: Problem, device: torch.device | str) -> Memory:
    """Tensors as heads of one; they have its tokens, and the first of its channels."""
    shapes = [role.shape(problem) for role in roles]
    heads = [shape[-2] for shape in shapes]
    whole = (*shapes[0][:-2], sum(heads), max(shape[-1] for shape in shapes))
    storage, tensor = _make(whole, roles[0].dtype(problem).torch, device)
    parts = torch.split(tensor, heads, dim=-2)
    return {
        role.name: Guarded(role, part[..., : shape[-1]], storage)
        for role, part, shape in zip(roles, parts, shapes, strict=True)
    }


def _place(shape: tuple[int, ...], layout: str, *, channels: bool) -> tuple[tuple[int, ...], View]:
    """The shape of contiguous memory around a tensor, and the tensor as a view of it."""
    more = _MORE_CHANNELS if channels else 1
    box = tuple(slice(n) for n in shape)
    if layout == "gapped":
        return (*(n + 1 for n in shape[:-1]), shape[-1] + more), lambda whole: whole[box]
    if layout == "padded channels" and channels:
        return (*shape[:-1], shape[-1] + more), lambda whole: whole[box]
    tokens = slice(1, -2 if channels else -1)
    rank, rest = len(shape[tokens]), (slice(None),) * (2 if channels else 1)
    if layout == "heads first":
        order = (0, *range(2, 2 + rank), 1, *range(2 + rank, len(shape)))
        return tuple(shape[i] for i in (0, 1 + rank, *range(1, 1 + rank), *range(2 + rank, len(shape)))), (
            lambda whole: whole.permute(order)
        )
    if layout == "every second token":
        first, *others = shape[tokens]
        inner = (slice(None), slice(1, None, 2), *[slice(1, None)] * (rank - 1), *rest)
        whole = (shape[0], 2 * first + 1, *(n + 1 for n in others), *shape[1 + rank :])
        return whole, lambda whole: whole[inner]
    return shape, lambda whole: whole


def _place_numbers(shape: tuple[int, ...], layout: str, *, channels: bool) -> tuple[tuple[int, ...], View]:
    """The same of one number per batch entry, or of each of its heads."""
    box = tuple(slice(n) for n in shape)
    if layout == "gapped":
        return tuple(n + 1 for n in shape), lambda whole: whole[box]
    if layout == "every second token":
        return (2 * shape[0] + 1, *shape[1:]), lambda whole: whole[1::2]
    return shape, lambda whole: whole


def _make(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor]:
    """Memory with guard zones, and the contiguous tensor between them."""
    size = torch.empty((), dtype=dtype).element_size()
    storage = torch.empty(prod(shape) + 2 * _GUARD + _ALIGNMENT // size, dtype=dtype, device=device)
    bits_of(storage).fill_(_UNWRITTEN[dtype])
    first = _GUARD + (-(storage.data_ptr() + _GUARD * size) % _ALIGNMENT) // size
    return storage, storage[first : first + prod(shape)].view(*shape)


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as integers."""
    return tensor.view(_BITS[tensor.element_size()])
