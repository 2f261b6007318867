"""Patterns of their own for the heads of a call, or for its samples: which arguments bring them, and the list that the
operators take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from . import arguments

_FIELDS: dict[str, Callable[[str, Any, int], list[int]]] = {
    "kernel_size": arguments.ints_per_dim,
    "stride": arguments.ints_per_dim,
    "dilation": arguments.ints_per_dim,
    "is_causal": arguments.causal_per_dim,
    "edge": arguments.edges_per_dim,
    "sink": arguments.ints_per_dim,
}
_NEUTRAL = {"is_causal": None, "edge": None, "sink": 0}
_SCALARS = frozenset((int, bool, str))


def is_own(value: Any) -> bool:
    """Whether an argument has an entry for each head or sample, itself one per dimension: a sequence of sequences, or a
    tensor or array of two dimensions."""
    kind = type(value)
    if kind is int or kind is bool or kind is str or value is None:
        return False
    if (kind is tuple or kind is list) and value and type(value[0]) in _SCALARS:
        return False
    if isinstance(value, Sequence):
        return (
            bool(value) and not isinstance(value, str) and isinstance(value[0], Sequence) and type(value[0]) is not str
        )
    return getattr(value, "ndim", 0) == 2


def own_patterns(
    rank: int, count: int, who: str, given: tuple[Any, ...], settings: tuple[Any, ...] | None
) -> list[int]:
    """The operators' pattern of a call some of whose arguments have an entry for each head or sample: that of each, one
    after the other, or one if all are equal.

    Args:
        rank: token dimensions.
        count: how many heads or samples there are.
        who: what they are, for errors: ``head`` or ``sample``.
        given: kernel_size, stride, dilation and is_causal.
        settings: as `arguments.settings_pattern` has them, or None; the first two may have an entry for each, too.

    Raises:
        TypeError: an argument is of a type that it can't have.
        ValueError: one has a wrong length.
    """
    edge, sink, *ranges = settings or (None,) * 6
    columns = [_column(name, value, rank, count, who) for name, value in zip(_FIELDS, given, strict=False)]
    if settings is not None:
        columns += [_column(name, value, rank, count, who) for name, value in (("edge", edge), ("sink", sink))]
        rest = arguments.settings_pattern(rank, None, None, *ranges)[2 * rank :]
        columns.append([rest] * count)
    rows = [[number for part in parts for number in part] for parts in zip(*columns, strict=True)]
    if all(row == rows[0] for row in rows):
        return rows[0]
    return [number for row in rows for number in row]


def _column(name: str, value: Any, rank: int, count: int, who: str) -> list[list[int]]:
    """The numbers of one argument for each head or sample."""
    value = _NEUTRAL.get(name) if value is None else value
    read = _FIELDS[name]
    if not is_own(value):
        return [read(name, value, rank)] * count
    try:
        return [read(name, list(entry), rank) for entry in _entries(name, value, count, who)]
    except (TypeError, ValueError) as error:
        text = f"{name} must be [{who}s, {rank}] here: {error}"
        raise (ValueError if isinstance(error, ValueError) else TypeError)(text) from None


def module_patterns(rank: int, heads: int, *given: Any) -> list[Any]:
    """As `arguments.module_pattern`, of arguments that may have an entry for each head: it is a tuple of each then.

    Raises:
        TypeError, ValueError: as there, of a head by its number.
    """
    if not any(map(is_own, given)):
        return arguments.module_pattern(rank, *given)
    columns = [
        _entries(name, value, heads, "head") if is_own(value) else [value] * heads
        for name, value in zip(_FIELDS, given, strict=True)
    ]
    rows = []
    for head, own in enumerate(zip(*columns, strict=True)):
        try:
            rows.append(arguments.module_pattern(rank, *own))
        except (TypeError, ValueError) as error:
            kind = ValueError if isinstance(error, ValueError) else TypeError
            raise kind(f"head {head}: {error}") from None
    return [own if is_own(value) else own[0] for value, own in zip(given, zip(*rows, strict=True), strict=True)]


def _entries(name: str, value: Any, count: int, who: str) -> list[Any]:
    """Those of an argument that has one for each head or sample."""
    entries = value.tolist() if hasattr(value, "tolist") else value
    if len(entries) != count:
        raise ValueError(f"{name} has {len(entries)} rows for {count} {who}{'s' * (count != 1)}")
    return list(entries)
