"""`KernelConfig`: what identifies a kernel, and the key that is derived from it.

Standard library only: built wheels carry this module.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from math import prod

OPS = ("gna_forward", "gna_backward_q", "gna_backward_kv")
DTYPES = ("fp32", "bf16", "fp16")
ANY_HEAD_DIM = 0

_BOX = r"\d+(?:x\d+)*"
_KEY = re.compile(
    rf"(?P<op>{'|'.join(OPS)})-(?P<arch>[a-z][a-z0-9]*)-r(?P<rank>[123])-(?P<dtype>[a-z0-9]+)"
    rf"-d(?P<head_dim>\d+|any)(?:v(?P<value_head_dim>\d+))?"
    rf"-q(?P<q_tile>{_BOX})-kv(?P<kv_tile>{_BOX})(?:-(?P<variant>[a-z][a-z0-9_]*))?"
)


@dataclass(frozen=True, order=True)
class KernelConfig:
    """Identity of one kernel. Window, stride, dilation and causal are run-time data and not part of it.

    Attributes:
        op: what it computes, of `OPS`: outputs, gradients of Q, or gradients of K and V.
        arch: name in the arch table: ``cpu``, ``sm90``, ``sm100``.
        rank: number of token dimensions, 1 to 3.
        dtype: element type of Q, K, V and O: ``fp32``, ``bf16`` or ``fp16``.
        head_dim: channels per head of Q and K, or `ANY_HEAD_DIM` (0) where the kernel takes it at run time.
        q_tile: query tokens per tile, one extent per token dimension, in the order of the tensor's dims.
        kv_tile: key tokens per tile, likewise.
        value_head_dim: channels per head of V and O; 0 (the default) means equal to ``head_dim``.
        variant: kernel family where an arch has several; empty for the default one.

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

    def __post_init__(self) -> None:
        if self.value_head_dim == self.head_dim:
            object.__setattr__(self, "value_head_dim", 0)
        if self.head_dim == ANY_HEAD_DIM and self.value_head_dim:
            raise ValueError("value_head_dim: a kernel that takes head_dim at run time takes value_head_dim too")
        if self.head_dim < 0 or self.value_head_dim < 0:
            raise ValueError("head_dim: must not be negative")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: {self.dtype!r} is not one of {', '.join(DTYPES)}")
        for name in ("q_tile", "kv_tile"):
            box = tuple(getattr(self, name))
            object.__setattr__(self, name, box)
            if len(box) != self.rank:
                raise ValueError(f"{name}: {box} has {len(box)} extents, rank {self.rank} needs {self.rank}")
            if any(type(extent) is not int or extent < 1 for extent in box):
                raise ValueError(f"{name}: {box} must hold positive integers")
        if _KEY.fullmatch(self.key) is None:
            raise ValueError(f"{self.key!r} is no valid key: check op, arch, rank, dtype and variant")

    @property
    def key(self) -> str:
        """Canonical text form, for example ``gna_forward-sm90-r3-bf16-d128-q2x8x8-kv2x8x8``."""
        head_dim = "any" if self.head_dim == ANY_HEAD_DIM else str(self.head_dim)
        value = f"v{self.value_head_dim}" if self.value_head_dim else ""
        parts = [
            self.op,
            self.arch,
            f"r{self.rank}",
            self.dtype,
            f"d{head_dim}{value}",
            "q" + "x".join(map(str, self.q_tile)),
            "kv" + "x".join(map(str, self.kv_tile)),
        ]
        return "-".join([*parts, self.variant] if self.variant else parts)

    @classmethod
    def parse(cls, key: str) -> KernelConfig:
        """The config whose `key` is ``key``.

        Raises:
            ValueError: ``key`` does not follow the grammar, or is not in canonical form.
        """
        match = _KEY.fullmatch(key)
        if match is None:
            raise ValueError(f"{key!r} is no kernel key; a key looks like gna_forward-sm90-r3-bf16-d128-q2x8x8-kv2x8x8")
        part = match.groupdict()
        config = cls(
            op=part["op"],
            arch=part["arch"],
            rank=int(part["rank"]),
            dtype=part["dtype"],
            head_dim=ANY_HEAD_DIM if part["head_dim"] == "any" else int(part["head_dim"]),
            value_head_dim=int(part["value_head_dim"] or 0),
            q_tile=tuple(map(int, part["q_tile"].split("x"))),
            kv_tile=tuple(map(int, part["kv_tile"].split("x"))),
            variant=part["variant"] or "",
        )
        if config.key != key:
            raise ValueError(f"{key!r} is not canonical; write {config.key!r}")
        return config

    @property
    def symbol(self) -> str:
        """C symbol of the kernel's entry in its object file."""
        return "gnaforge_entry_" + self.key.replace("-", "_")

    @property
    def q_rows(self) -> int:
        """Query tokens per tile."""
        return prod(self.q_tile)

    @property
    def kv_columns(self) -> int:
        """Key tokens per tile."""
        return prod(self.kv_tile)

    def differences(self, other: KernelConfig) -> tuple[str, ...]:
        """Names of the fields in which two configs differ."""
        return tuple(f.name for f in fields(self) if getattr(self, f.name) != getattr(other, f.name))

    def __str__(self) -> str:
        return self.key
