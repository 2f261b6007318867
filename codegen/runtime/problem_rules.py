"""The rules that the fields of an attention problem keep among each other, each with the words for a break.

Standard library only: built wheels carry this module.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import isfinite
from typing import Any, NamedTuple

from .dtypes import DTYPES
from .missing_keys import missing_keys

MAX_EXTENT = 2**30 - 1
"""Most tokens along one dimension, as max_axis_length in problem.h; also the bound of heads, batch and channels."""

EDGES = ("shift", "cut", "wrap")
"""What a window does that would leave the grid: it is shifted inwards, is cut, or goes on at the other end."""


SCALARS = ("heads", "kv_heads", "head_dim", "value_head_dim", "batch")
"""Fields of one positive integer."""

_POSITIVE = ("tokens", "window", "stride", "dilation")
_COUNTED = ("sink", "q_offset", "kv_sink")  # 0 is neutral
_MOST_PIECES = 2  # of extra keys


class ProblemError(ValueError):
    """A field of a problem is wrong; the message begins with it.

    Attributes:
        field: its name.
        text: what is wrong, without the name.
    """

    def __init__(self, field: str, text: str) -> None:
        super().__init__(field, text)
        self.field, self.text = field, text

    def __str__(self) -> str:
        return f"{self.field}: {self.text}"


class Fault(NamedTuple):
    """A broken rule: the field to blame, its token dimension if it has one per dimension, and a sentence."""

    field: str
    dim: int | None
    text: str


class Dimension(NamedTuple):
    """One token dimension of a problem; see `Problem` for the meaning. ``causal`` is False, True or
    ``block``; ``tokens`` are those of the queries."""

    tokens: int
    window: int
    stride: int = 1
    dilation: int = 1
    causal: bool | str = False
    edge: str = "shift"
    sink: int = 0
    grid: int | None = None
    q_offset: int = 0
    kv_tokens: int | None = None
    kv_offset: int = 0
    kv_sink: int = 0

    @property
    def keys(self) -> int:
        """Tokens of the keys."""
        return self.tokens if self.kv_tokens is None else self.kv_tokens

    @property
    def length(self) -> int:
        """Tokens of the grid that windows are laid in."""
        return self.keys if self.grid is None else self.grid

    @property
    def dense(self) -> bool:
        """Whether each query sees all of the grid, so that there may be any number of queries."""
        return self.window == self.length and self.dilation == 1 and not self.causal and self.edge != "cut"


_FIRST_OF_RANGE = Dimension._fields.index("grid")
_WHOLE = tuple(Dimension._field_defaults.values())[_FIRST_OF_RANGE - 2 :]  # two fields have no default


def dimension_faults(axis: Dimension, dim: int | None = None) -> Iterator[Fault]:
    """The rules that a dimension breaks, in words that name it by its number ``dim`` if it has one, those of rules.h
    where they are not about its window alone. Its fields have the right types, and are not negative."""
    faults = [*_window_faults(axis, dim)]
    if axis.edge != "shift" or axis.sink:
        faults += _edge_faults(axis, dim)
    if axis[_FIRST_OF_RANGE:] != _WHOLE:
        faults += _range_faults(axis, dim)
        if not faults and (missing := missing_keys(axis)):
            faults.append(Fault("kv_offset", dim, missing.text(axis, dim)))
    yield from faults


def head_faults(heads: int, kv_heads: int) -> Iterator[Fault]:
    """The rule that the heads of K and V keep."""
    if heads % kv_heads:
        near = next(n for n in range(min(kv_heads, 1000), 0, -1) if heads % n == 0)
        allowed = f"allowed: a divisor of heads, which is {heads}; did you mean {near}?"
        yield Fault("kv_heads", None, f"{kv_heads} does not divide heads; {allowed}")


def _window_faults(axis: Dimension, dim: int | None) -> Iterator[Fault]:
    window, dilation = axis.window, axis.dilation
    name = "" if dim is None else f" of dimension {dim}"
    if axis.edge != "cut" and axis.causal != "block":  # these may have a window that is never full
        there = f"more than the {_count(axis.length, 'token')}{name}; at most"
        if dilation > axis.length:
            yield Fault("dilation", dim, f"{dilation} is {there} {axis.length}")
        elif window * dilation > axis.length:
            spread = f" with dilation {dilation} spans {window * dilation} tokens and" if dilation > 1 else ""
            yield Fault("window", dim, f"{window}{spread} is {there} {axis.length // dilation}")
    if axis.stride > window:
        text = f"{axis.stride} is more than the window{name}; at most {window}"
        yield Fault("stride", dim, text)


def _edge_faults(axis: Dimension, dim: int | None) -> Iterator[Fault]:
    at, wraps = f"along dimension {dim}", axis.edge == "wrap"
    if wraps and axis.length % axis.dilation:
        tokens = _count(axis.length, "token")
        yield Fault("dilation", dim, f"{axis.dilation} {at}, which wraps; it must divide the {tokens} there")
    if wraps and axis.causal:
        kind = "block" if axis.causal == "block" else "true"
        yield Fault("causal", dim, f"{kind} {at}, where edge is wrap; it must be false there")
    if axis.sink and (wraps or axis.dilation > 1):
        why = "wraps" if wraps else "has dilation"
        yield Fault("sink", dim, f"{axis.sink} {at}, which {why}; it must be 0 there")


def _range_faults(axis: Dimension, dim: int | None) -> Iterator[Fault]:
    at, wraps = f"along dimension {dim}", axis.edge == "wrap"
    ends = f"they must end by {axis.length}, as the grid does"
    body = axis.keys - axis.kv_sink
    end, last = axis.kv_offset + body, axis.q_offset + axis.tokens
    if axis.kv_sink > axis.keys:
        yield Fault("kv_sink", dim, f"{axis.kv_sink} {at}; it must be 0 to the {_count(axis.keys, 'key token')}")
        return
    if axis.kv_sink and (wraps or axis.dilation > 1):
        why = "wraps" if wraps else "has dilation"
        yield Fault("kv_sink", dim, f"{axis.kv_sink} {at}, which {why}; it must be 0 there")
    if not wraps and axis.kv_offset < axis.kv_sink:
        why = ", which is kv_sink" if axis.kv_sink else " where edge is not wrap"
        yield Fault("kv_offset", dim, f"{axis.kv_offset} {at}; it must be at least {axis.kv_sink}{why}")
    if not wraps and end > axis.length:
        keys = f"{_count(body, 'key')} from there on end at {end}"
        yield Fault("kv_offset", dim, f"{axis.kv_offset} {at}, and the {keys}; {ends}")
    if axis.dense:
        if axis.keys != axis.length:
            text = f"{axis.keys} {at}, where every query sees all of the grid; they must be its {axis.length}"
            yield Fault("kv_tokens", dim, text)
    elif axis.grid is None and axis.keys != axis.tokens:
        parts = f"{_count(axis.keys, 'key token')} and {_count(axis.tokens, 'query token')}"
        yield Fault("kv_tokens", dim, f"{parts} {at} are parts of a grid; say of which with grid")
    elif last > axis.length:
        queries = f"{axis.tokens} {'query' if axis.tokens == 1 else 'queries'} from there on end at {last}"
        yield Fault("q_offset", dim, f"{axis.q_offset} {at}, and the {queries}; {ends}")


def _count(number: int, name: str) -> str:
    return f"{number} {name}{'' if number == 1 else 's'}"


def require_types(values: Mapping[str, Any]) -> None:
    """Refuses fields of a problem, by name, that have a wrong type or are out of range whatever the others are.

    Raises:
        ProblemError: one does.
    """
    for name in _POSITIVE:
        for dim, value in enumerate(values[name]):
            if type(value) is not int or value < 1:
                raise ProblemError(name, f"{value!r} is not a positive integer (dimension {dim})")
            if value > MAX_EXTENT:
                raise ProblemError(name, f"{value} is more than {MAX_EXTENT} (dimension {dim})")
    for value in values["causal"]:
        if type(value) is not bool and value != "block":
            raise ProblemError("causal", f"{value!r} is not true or false, token or block")
    for value in values["edge"]:
        if value not in EDGES:
            raise ProblemError("edge", f"{value!r} is not one of {', '.join(EDGES)}")
    for name in _COUNTED:
        for value in values[name]:
            if type(value) is not int or not 0 <= value <= MAX_EXTENT:
                raise ProblemError(name, f"{value!r} is not an integer from 0 to {MAX_EXTENT}")
    for value in values["kv_offset"]:
        if type(value) is not int or abs(value) > MAX_EXTENT:
            raise ProblemError("kv_offset", f"{value!r} is not an integer up to {MAX_EXTENT}")
    for name in ("grid", "kv_tokens", "extra_tokens"):
        for value in values[name] or ():
            if type(value) is not int or not 1 <= value <= MAX_EXTENT:
                raise ProblemError(name, f"{value!r} is not a positive integer up to {MAX_EXTENT}")
    if len(values["extra_tokens"]) > _MOST_PIECES:
        raise ProblemError("extra_tokens", f"{values['extra_tokens']} has more than {_MOST_PIECES} entries")
    for name in SCALARS:
        if type(values[name]) is not int or not 1 <= values[name] <= MAX_EXTENT:
            raise ProblemError(name, f"{values[name]!r} is not a positive integer below 2^30")
    if values["dtype"] not in DTYPES:
        raise ProblemError("dtype", f"{values['dtype']!r} is not one of {', '.join(DTYPES)}")
    dtype, output = DTYPES[values["dtype"]], values["out_dtype"]
    if output and output not in (dtype.outputs or (dtype.name,)):
        allowed = ", ".join(dtype.outputs or (dtype.name,))
        raise ProblemError("out_dtype", f"{output!r} is no type of outputs of {dtype.name}; allowed: {allowed}")
    scale = values["scale"]
    if scale is not None and not (isinstance(scale, int | float) and isfinite(scale)):
        raise ProblemError("scale", f"{scale!r} is not a finite number")
