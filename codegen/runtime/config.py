"""`KernelConfig`: what identifies a kernel, and the key that is derived from it.

Standard library only: built wheels carry this module.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property
from math import prod
from typing import Any, Literal, NamedTuple

from .dtypes import DTYPES

OPS = ("gna_forward", "gna_backward_q", "gna_backward_kv")  # in the order of their codes in abi.h, from 1
Direction = Literal["forward", "backward", "training"]
DIRECTIONS = {"forward": OPS[:1], "backward": OPS[1:], "training": OPS}
"""Ops by the pass that they are for."""
ANY_HEAD_DIM = 0

EXAMPLE_KEY = "gna_forward-sm90-r3-bf16-d128-q2x8x8-kv2x8x8"
_NUMBER, _NAME, _BOX = r"\d+", r"[a-z][a-z0-9]*(?:_[a-z0-9]+)*", r"\d+(?:x\d+)*"


class _Part(NamedTuple):
    """A field's form in the key.

    Attributes:
        field: of `KernelConfig`.
        pattern: of its text.
        prefix: before the text; ``-`` where the part begins.
        parse: from the text to the value.
        show: from the value to the text.
        optional: whether the part is left out where the field has its default.
    """

    field: str
    pattern: str
    prefix: str = "-"
    parse: Callable[[str], Any] = str
    show: Callable[[Any], str] = str
    optional: bool = False


def _parse_head_dim(text: str) -> int:
    return ANY_HEAD_DIM if text == "any" else int(text)


def _show_head_dim(head_dim: int) -> str:
    return "any" if head_dim == ANY_HEAD_DIM else str(head_dim)


def _parse_box(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split("x")))


def _show_box(box: tuple[int, ...]) -> str:
    return "x".join(map(str, box))


_PARTS = (
    _Part("op", "|".join(OPS), prefix=""),
    _Part("arch", r"[a-z][a-z0-9]*"),
    _Part("rank", "[123]", "-r", int),
    _Part("dtype", _NAME),
    _Part("out_dtype", _NAME, "-o", optional=True),
    _Part("head_dim", rf"{_NUMBER}|any", "-d", _parse_head_dim, _show_head_dim),
    _Part("value_head_dim", _NUMBER, "v", int, optional=True),
    _Part("q_tile", _BOX, "-q", _parse_box, _show_box),
    _Part("q_tile_heads", _NUMBER, "h", int, optional=True),
    _Part("kv_tile", _BOX, "-kv", _parse_box, _show_box),
    _Part("variant", r"[a-z][a-z0-9_]*", optional=True),
)
"""The key, part by part: a further field is a further row."""

_KEY = re.compile(
    "".join(
        f"(?:{re.escape(part.prefix)}(?P<{part.field}>{part.pattern})){'?' if part.optional else ''}" for part in _PARTS
    )
)


@dataclass(frozen=True, order=True)
class KernelConfig:
    """Identity of one kernel. Window, stride, dilation and causal are run-time data and not part of it.

    Attributes:
        op: what it computes, of `OPS`: outputs, gradients of Q, or gradients of K and V.
        arch: name of the target: ``cpu``, ``sm90``, ``sm100``.
        rank: number of token dimensions, 1 to 3.
        dtype: element type of Q, K, V and O, of `DTYPES`.
        head_dim: channels per head of Q and K, or `ANY_HEAD_DIM` (0) where the kernel takes it at run time.
        q_tile: query tokens per tile, one extent per token dimension, in the order of the tensor's dims.
        kv_tile: key tokens per tile, likewise.
        value_head_dim: channels per head of V and O; 0 (the default) means equal to ``head_dim``.
        variant: tells the kernel families of an op and arch apart; empty for the one that has none.
        out_dtype: element type of O, where it is another than ``dtype``; empty (the default) means equal, or where that
            is no type of outputs the first of those that ``dtype`` has.
        q_tile_heads: query heads that share keys, of which a Q tile has the tokens: it takes so many rows for each.

    Raises:
        ValueError: a field is malformed; the message names it. Limits of an arch are not checked here.
    """

    op: str
    arch: str
    rank: int
    dtype: str
    head_dim: int
    q_tile: tuple[int, ...]
    kv_tile: tuple[int, ...]
    value_head_dim: int = 0
    variant: str = ""
    out_dtype: str = ""
    q_tile_heads: int = 1

    def __post_init__(self) -> None:
        if self.value_head_dim == self.head_dim:
            object.__setattr__(self, "value_head_dim", 0)
        if not self.out_dtype and (known := DTYPES.get(self.dtype)) is not None:
            object.__setattr__(self, "out_dtype", known.output)
        if self.out_dtype == self.dtype:
            object.__setattr__(self, "out_dtype", "")
        if self.head_dim == ANY_HEAD_DIM and self.value_head_dim:
            raise ValueError("value_head_dim: a kernel that takes head_dim at run time takes value_head_dim too")
        if self.head_dim < 0 or self.value_head_dim < 0:
            raise ValueError("head_dim: must not be negative")
        for name in ("dtype", "out_dtype") if self.out_dtype else ("dtype",):
            if getattr(self, name) not in DTYPES:
                raise ValueError(f"{name}: {getattr(self, name)!r} is not one of {', '.join(DTYPES)}")
        for name in ("q_tile", "kv_tile"):
            box = tuple(getattr(self, name))
            object.__setattr__(self, name, box)
            if len(box) != self.rank:
                raise ValueError(f"{name}: {box} has {len(box)} extents, rank {self.rank} needs {self.rank}")
            if any(type(extent) is not int or extent < 1 for extent in box):
                raise ValueError(f"{name}: {box} must hold positive integers")
        if type(self.q_tile_heads) is not int or self.q_tile_heads < 1:
            raise ValueError(f"q_tile_heads: {self.q_tile_heads!r} is not a positive integer")
        if _KEY.fullmatch(self.key) is None:
            raise ValueError(f"{self.key!r} is no valid key: check op, arch, rank, dtype and variant")

    @cached_property
    def key(self) -> str:
        """Canonical text form, as `EXAMPLE_KEY`."""
        parts = []
        for field, _, prefix, _, show, optional in _PARTS:
            value = getattr(self, field)
            if not optional or value != _DEFAULTS[field]:
                parts.append(prefix + show(value))
        return "".join(parts)

    @classmethod
    def parse(cls, key: str) -> KernelConfig:
        """The config whose `key` is ``key``.

        Raises:
            ValueError: ``key`` does not follow the grammar, or is not in canonical form.
        """
        match = _KEY.fullmatch(key)
        if match is None:
            raise ValueError(f"{key!r} is no kernel key; a key looks like {EXAMPLE_KEY}")
        texts = match.groupdict()
        config = cls(**{part.field: part.parse(text) for part in _PARTS if (text := texts[part.field]) is not None})
        if config.key != key:
            raise ValueError(f"{key!r} is not canonical; write {config.key!r}")
        return config

    @property
    def symbol(self) -> str:
        """C symbol of the kernel's entry in its object file."""
        return "gnaforge_entry_" + self.key.replace("-", "_")

    @property
    def output_dtype(self) -> str:
        """Element type of O."""
        return self.out_dtype or self.dtype

    @property
    def q_rows(self) -> int:
        """Rows of a tile: its query tokens, of each of its heads."""
        return prod(self.q_tile) * self.q_tile_heads

    @property
    def kv_columns(self) -> int:
        """Key tokens per tile."""
        return prod(self.kv_tile)

    def differences(self, other: KernelConfig) -> tuple[str, ...]:
        """Names of the fields in which two configs differ."""
        return tuple(f.name for f in fields(self) if getattr(self, f.name) != getattr(other, f.name))

    def __str__(self) -> str:
        return self.key


_DEFAULTS = {field.name: field.default for field in fields(KernelConfig)}
