"""Passes what a forward call brings to the core, to judge: one that torch only traces keeps the rules of one that runs.

The rules and their words are the core's alone. Sizes that torch doesn't know yet are judged when the graph runs: there,
too, by the core.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from . import core
from .core import Failure

if TYPE_CHECKING:
    import torch

_NAMES = (
    *("query", "key", "value", "additional_keys", "additional_values", "additional_lengths"),
    *("second additional_keys", "second additional_values", "second additional_lengths", "out", "out_lse"),
)
_PLAIN_GROUPS = 4  # numbers per dimension of a pattern without ranges


class _Given(ctypes.Structure):
    """gnaforge_given of templates/core/core.cpp."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("sizes", ctypes.POINTER(ctypes.c_int64)),
        ("dims", ctypes.c_int64),
        ("dtype", ctypes.c_char_p),
        ("device", ctypes.c_char_p),
        ("last_stride", ctypes.c_int64),
    )


def failure_of_call(
    tensors: Sequence[torch.Tensor | None],
    pattern: Sequence[int],
    scale: float | None = None,
    key: str = "",
    *,
    choose: bool = False,
    names: Sequence[str] = (),
) -> Failure | None:
    """What the core refuses a call with these tensors for, real, fake or meta ones; None if it doesn't.

    Args:
        tensors: query, key, value, and perhaps keys, values and lengths of two further pieces, and an output and a
            log-sum-exp to write to.
        pattern, scale, key: as the operator has them.
        choose: also refuse what no kernel that is loaded computes; not looked at where a size isn't known.
        names: what messages call the tensors; by default as `neighborhood_attention` does.
    """
    numbers = [number for entry in pattern if (number := number_of(entry)) is not None]
    if len(numbers) < len(pattern):
        return None
    sizes, known = _sizes(tensors, numbers)
    if sizes is None:
        return None
    entries = _entries(tensors, sizes, names)
    check = core.core().gnaforge_core_check
    check.restype = ctypes.c_char_p
    values = (ctypes.c_int64 * len(numbers))(*numbers)
    words = check(entries, values, ctypes.c_size_t(len(values)), _double(scale), key.encode(), int(choose and known))
    return None if words is None else core.failure_of(RuntimeError(words.decode()))


def failure_of_samples(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rank: int,
    layouts: Sequence[int],
    pattern: Sequence[int],
    scale: float | None = None,
    kernel: str = "",
    extra_k: torch.Tensor | None = None,
    extra_v: torch.Tensor | None = None,
    extra_lengths: torch.Tensor | None = None,
    *,
    results: tuple[torch.Tensor, ...] = (),
    choose: bool = False,
) -> Failure | None:
    """As `failure_of_call`, of a call of ``forward_varlen``; where a size isn't known only of its packed tensors."""
    tensors = query, key, value, extra_k, extra_v, extra_lengths, None, None, None, *results
    found = _failure_of_packed(tensors, rank, layouts, pattern, scale, kernel, choose)
    if found is None or not (fault := misfit_of_packed(*(x[0] for x in (query, key, value, *results)))):
        return found
    return Failure(found.code, *(words.replace(found.reason, fault) for words in found[1:]))


def misfit_of_packed(*tensors: torch.Tensor) -> str:
    """Whether packed query, key, value, and perhaps an output and a log-sum-exp, have sizes that don't fit each other;
    empty if they do. The core, which sees them as one batch entry, would name sizes that the caller didn't give."""
    sizes = [[number_of(size) for size in tensor.shape] for tensor in tensors]
    query, key, value = sizes[:3]
    for name, own in (("key", key), ("value", value)):
        if own[0] != query[0]:
            return f"{name} has shape {own}, query has {query}; they must have as many tokens"
    wanted = [*query[:2], value[2]], query[:2]
    for name, own, size, like in zip(_NAMES[-2:], sizes[3:], wanted, ("query and value", "query"), strict=False):
        if own != size:
            return f"{name} has shape {own}; beside {like} it must be {size}"
    return ""


def _failure_of_packed(
    tensors: Sequence[torch.Tensor | None],
    rank: int,
    layouts: Sequence[int],
    pattern: Sequence[int],
    scale: float | None,
    kernel: str,
    choose: bool,
) -> Failure | None:
    sizes = [() if tensor is None else tuple(tensor.shape) for tensor in tensors]
    if not all(type(number) is int for number in (*layouts, *pattern, *(size for own in sizes for size in own))):
        return failure_of_call((*tensors[:3], *[None] * 6, *tensors[9:]), [1, 1, 1, 0], scale)
    entries = _entries(tensors, sizes)
    extents, numbers = ((ctypes.c_int64 * len(values))(*values) for values in (layouts, pattern))
    lists = extents, ctypes.c_size_t(len(extents)), numbers, ctypes.c_size_t(len(numbers))
    check = core.core().gnaforge_core_check_varlen
    check.restype = ctypes.c_char_p
    words = check(entries, ctypes.c_int64(rank), *lists, _double(scale), kernel.encode(), int(choose))
    return None if words is None else core.failure_of(RuntimeError(words.decode()))


def _entries(
    tensors: Sequence[torch.Tensor | None], sizes: Sequence[Sequence[int]], names: Sequence[str] = ()
) -> ctypes.Array[_Given]:
    """What the core looks at of tensors of these sizes, with their names; by default those of `_NAMES`."""
    entries = (_Given * len(_NAMES))()
    for entry, name in zip(entries, (*names, *_NAMES[len(names) :]), strict=True):
        entry.name = name.encode()
    for entry, tensor, own in zip(entries, tensors, sizes, strict=False):
        if tensor is not None:
            entry.sizes, entry.dims = (ctypes.c_int64 * max(len(own), 1))(*own), len(own)
            entry.dtype, entry.device = str(tensor.dtype).removeprefix("torch.").encode(), str(tensor.device).encode()
            entry.last_stride = (number_of(tensor.stride(-1)) if own else None) or 1
    return entries


def _double(number: Any) -> Any:
    return None if not isinstance(number, int | float) else ctypes.byref(ctypes.c_double(number))


def _sizes(
    tensors: Sequence[torch.Tensor | None], pattern: Sequence[int]
) -> tuple[Sequence[Sequence[int]] | None, bool]:
    """Each tensor's sizes as numbers, and whether torch knows them all. One that it doesn't is what it must be beside
    the others, so that the rules see no fault in it; None where only the run can tell."""
    given = [[] if t is None else [number_of(size) for size in t.shape] for t in tensors]
    known = [[size for size in own if size is not None] for own in given]
    if known == given:
        return known, True
    rank = max(len(given[0]) - 3, 0)
    if len(pattern) != _PLAIN_GROUPS * rank:
        return None, False
    tokens = [f"tokens {d}" for d in range(rank)]
    axes = [
        ["batch", *tokens, "heads", "channels"],
        ["batch", *tokens, "kv heads", "channels"],
        ["batch", *tokens, "kv heads", "value channels"],
        *(
            names
            for piece in ("extra tokens", "second extra tokens")
            for names in (
                ["batch", piece, "kv heads", "channels"],
                ["batch", piece, "kv heads", "value channels"],
                ["batch"],
            )
        ),
        ["batch", *tokens, "heads", "value channels"],
        ["batch", *tokens, "heads"],
    ]
    there: dict[str, int] = {}
    for own, names in zip(given, axes, strict=False):
        for size, name in zip(own, names, strict=False):
            if size is not None:
                there.setdefault(name, size)
    spans = {name: pattern[d] * pattern[2 * rank + d] for d, name in enumerate(tokens)}  # window times dilation
    heads = there.get("heads", 1)
    kv_heads = there.setdefault("kv heads", heads)
    fill = {**spans, "heads": kv_heads, **there}
    whole: list[Sequence[int]] = [
        [fill.get(name, 8) if size is None else size for size, name in zip(own, [*names, *"?" * 9], strict=False)]
        for own, names in zip(given, axes, strict=False)
    ]
    return whole, False


def number_of(size: Any) -> int | None:
    """A size, which may be symbolic: then that of the example that torch traces with, without a guard on it; None if
    there is none."""
    if isinstance(size, int):
        return size
    return int(size.node.hint) if size.node.has_hint() else None
