"""The arguments of calls, made plain: what may stand for a number, and words for what may not."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from math import isfinite
from numbers import Real
from typing import Any

import torch

from .problem import Causal, Problem, per_dim
from .problem_rules import EDGES, MAX_EXTENT, ProblemError

_LIMIT = 2**63
_FIELDS = ("kernel_size", "stride", "dilation", "is_causal", "edge", "sink", "grid", "q_offset", "kv_offset", "kv_sink")
_CAUSAL = {"token": 1, "block": 2}


def require_tensors(**given: object) -> None:
    """Refuses arguments, by name, that are no tensors.

    Raises:
        TypeError: one isn't.
    """
    for name, value in given.items():
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {_kind(value)}")


def require_call(query: object, key: object, value: object, pattern: Sequence[int]) -> None:
    """Refuses what the operator can't even be given.

    Raises:
        TypeError: one of the first three is no tensor.
        ValueError: a number of the pattern is beyond 64 bits.
    """
    require_tensors(query=query, key=key, value=value)
    for position, number in enumerate(pattern):
        if type(number) is int and not -_LIMIT <= number < _LIMIT:
            assert isinstance(query, torch.Tensor)
            raise _too_large(position, len(pattern), query.dim() - 3)


def require_numbers(pattern: Sequence[int], rank: int) -> None:
    """Refuses numbers of a pattern, or of several, that the operators can't be given.

    Raises:
        ValueError: one is beyond 64 bits.
    """
    if torch.compiler.is_compiling() or not pattern or (max(pattern) < _LIMIT and min(pattern) >= -_LIMIT):
        return
    position = next(position for position, number in enumerate(pattern) if not -_LIMIT <= number < _LIMIT)
    raise _too_large(position, len(pattern), rank)


def _too_large(position: int, count: int, rank: int) -> ValueError:
    """Of one number of ``count``, which are of one pattern or of several."""
    own = next((groups for groups in (len(_FIELDS), 4) if rank > 0 and count % (groups * rank) == 0), len(_FIELDS))
    return ValueError(
        f"{_FIELDS[position // max(rank, 1) % own]} along dim {position % max(rank, 1)} is beyond 64 bits"
    )


def ints_per_dim(name: str, value: Any, rank: int) -> list[int]:
    """One integer per token dimension: those given, or the one for all. Whatever has ``__index__`` is an integer, such
    as those of NumPy; a bool is none.

    Raises:
        TypeError: there is something else.
        ValueError: there are more or fewer.
    """
    if type(value) is int:
        return [value] * rank
    if type(value) is tuple and len(value) == rank and all(type(entry) is int for entry in value):
        return list(value)  # as below, in less time
    return [entry if type(entry) is int else _int(name, value, entry, rank) for entry in per_dim(name, value, rank)]


def causal_per_dim(name: str, value: Any, rank: int) -> list[int]:
    """The number of gnaforge_causal per token dimension, of bools, Python's or NumPy's, ``token`` for True, and
    ``block``; None is False.

    Raises:
        TypeError: there is something else.
        ValueError: there are more or fewer, or another word.
    """
    if type(value) is bool:
        return [value] * rank
    if type(value) is tuple and len(value) == rank and all(type(entry) is bool for entry in value):
        return list(value)  # as below, in less time
    entries = per_dim(name, False if value is None else value, rank)
    for entry in entries:
        if isinstance(entry, str) and entry not in _CAUSAL:
            raise ValueError(f"{name} is {entry!r}; it must be a bool, 'token' or 'block'")
    if not all(_is_flag(entry) or isinstance(entry, str) for entry in entries):
        raise TypeError(f"{name} must be bool, 'token', 'block' or a sequence of {rank}, got {value!r}")
    return [_CAUSAL[entry] if isinstance(entry, str) else int(bool(entry)) for entry in entries]


def edges_per_dim(name: str, value: Any, rank: int) -> list[int]:
    """The number of gnaforge_edge per token dimension, of names; None is ``shift``.

    Raises:
        TypeError: there is something else than texts.
        ValueError: there are more or fewer, or other words.
    """
    entries = per_dim(name, EDGES[0] if value is None else value, rank)
    for entry in entries:
        if not isinstance(entry, str):
            raise TypeError(f"{name} must be a name or a sequence of {rank}, of {', '.join(EDGES)}; got {value!r}")
        if entry not in EDGES:
            raise ValueError(f"{name} is {entry!r}; it must be one of {', '.join(EDGES)}")
    return [EDGES.index(entry) for entry in entries]


def plain_pattern(rank: int, kernel_size: Any, stride: Any, dilation: Any, is_causal: Any) -> list[int]:
    """The operator's pattern of a call without settings.

    Raises:
        TypeError: an argument is of a type that it can't have.
        ValueError: one has a wrong length.
    """
    return [
        *ints_per_dim("kernel_size", kernel_size, rank),
        *ints_per_dim("stride", stride, rank),
        *ints_per_dim("dilation", dilation, rank),
        *causal_per_dim("is_causal", is_causal, rank),
    ]


def settings_pattern(
    rank: int, edge: Any, sink: Any, grid: Any, q_offset: Any, kv_offset: Any, kv_sink: Any
) -> list[int]:
    """The part of the operator's pattern that says more than a plain one; None is neutral. A grid of 0 is the key
    tensor's tokens, whose number torch may not know yet.

    Raises:
        TypeError: a setting is of a type that it can't have.
        ValueError: one has a wrong length, or a value that no other setting makes right.
    """
    pattern = edges_per_dim("edge", edge, rank)
    for name, value in (("sink", sink), ("grid", grid), ("q_offset", q_offset), ("kv_offset", kv_offset)):
        numbers = ints_per_dim(name, 0 if value is None else value, rank)
        if name == "grid" and value is not None and min(numbers) < 1:
            raise ValueError(f"grid is {min(numbers)} along dim {numbers.index(min(numbers))}; it must be at least 1")
        pattern += numbers
    return pattern + ints_per_dim("kv_sink", 0 if kv_sink is None else kv_sink, rank)


def number(name: str, value: Any) -> Any:
    """A real number as a float.

    Raises:
        TypeError: it is none; a bool isn't, nor is a tensor: it would get no gradient.
        ValueError: it is too large.
    """
    if isinstance(value, torch.SymFloat):
        return value
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {_kind(value)}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} is too large for a float") from None


def finite_number(name: str, value: Any) -> float:
    """A real number as a float, neither infinite nor NaN.

    Raises:
        TypeError: it is no number.
        ValueError: it isn't finite.
    """
    found = float(number(name, value))
    if not isfinite(found):
        raise ValueError(f"{name} is {found}; it must be finite")
    return found


def positive_int(name: str, value: Any) -> int:
    """An integer of at least 1.

    Raises:
        TypeError: it is no integer.
        ValueError: it is less.
    """
    (found,) = ints_per_dim(name, value, 1)
    if found < 1:
        raise ValueError(f"{name} is {found}; it must be at least 1")
    return found


def module_pattern(
    rank: int, kernel_size: Any, stride: Any, dilation: Any, is_causal: Any, edge: Any, sink: Any
) -> list[Any]:
    """The arguments as Python's own values, one entry per token dimension if they were a sequence. Refuses what no
    number of tokens could make right.

    Raises:
        TypeError: an argument is of a type that it can't have.
        ValueError: one has a wrong length, or breaks a rule that it keeps with others.
    """
    windows = ints_per_dim("kernel_size", kernel_size, rank)
    strides, dilations = ints_per_dim("stride", stride, rank), ints_per_dim("dilation", dilation, rank)
    causal: list[Causal] = [(False, True, "block")[kind] for kind in causal_per_dim("is_causal", is_causal, rank)]
    edges = [EDGES[kind] for kind in edges_per_dim("edge", edge, rank)]
    sinks = ints_per_dim("sink", sink, rank)
    spans = (min(max(1, window * step), MAX_EXTENT) for window, step in zip(windows, dilations, strict=True))
    try:
        Problem(tuple(spans), windows, strides, dilations, causal, edge=edges, sink=sinks)
    except ProblemError as error:
        name = {"window": "kernel_size", "causal": "is_causal"}.get(error.field, error.field)
        raise ValueError(f"{name}: {error.text}") from None
    plain: tuple[list[Any], ...] = windows, strides, dilations, causal, edges, sinks
    given = kernel_size, stride, dilation, is_causal, edge, sink
    return [
        tuple(own) if isinstance(value, Sequence) and not isinstance(value, str) else own[0]
        for own, value in zip(plain, given, strict=True)
    ]


def key_of(kernel: object) -> str:
    """The key of a `KernelConfig`, perhaps another package's.

    Raises:
        TypeError: it is none.
    """
    key = getattr(kernel, "key", None)
    if not isinstance(key, str):
        raise TypeError(f"kernel must be a KernelConfig or a kernel's key, got {_kind(kernel)}")
    return key


def _int(name: str, value: Any, entry: Any, rank: int) -> int:
    if not _is_flag(entry):
        try:
            return operator.index(entry)
        except TypeError:
            pass
    raise TypeError(f"{name} must be int or a sequence of {rank}, got {value!r}")


def _is_flag(value: Any) -> bool:
    """Also of NumPy's, whose dtype is equal to Python's bool."""
    return bool in (type(value), getattr(value, "dtype", None))


def _kind(value: object) -> str:
    return "None" if value is None else f"{value!r}" if isinstance(value, int | str) else type(value).__name__
