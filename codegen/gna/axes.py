"""Token dimensions of a GNA problem.

GNA is separable: a key is visible to a query iff it is visible along every token dimension. So everything here works on
one dimension, an `Axis`, and problems are sequences of axes, outermost dimension first. An axis with dilation falls
apart into groups (tokens g, g + dilation, ...) that do not see each other; windows and tiles are those of a group (see
`source`), and positions are positions within the group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..runtime.problem import Problem
from ..runtime.problem_rules import MAX_EXTENT, Dimension, dimension_faults


@dataclass(frozen=True)
class Axis:
    """One token dimension of a problem.

    Attributes:
        length: tokens.
        window: keys that a query sees (at most, where causal).
        stride: consecutive queries that share one window.
        dilation: tokens from one key of a window to the next.
        causal: a query sees no key after itself.

    Raises:
        ValueError: a field is not a positive integer (``causal``: not a bool), or the fields break
            stride <= window, window * dilation <= length <= MAX_EXTENT. The message begins with the field.
    """

    length: int
    window: int
    stride: int = 1
    dilation: int = 1
    causal: bool = False

    def __post_init__(self) -> None:
        for field in ("length", "window", "stride", "dilation"):
            check_positive(field, getattr(self, field))
        if type(self.causal) is not bool:
            raise ValueError(f"causal: {self.causal!r} is not true or false")
        if self.length > MAX_EXTENT:
            raise ValueError(f"length: {self.length} is more than {MAX_EXTENT} tokens")
        dimension = Dimension(self.length, self.window, self.stride, self.dilation, self.causal)
        for fault in dimension_faults(dimension):
            raise ValueError(f"{fault.field}: {fault.text}")

    def group(self, index: int) -> Axis:
        """Dilation group ``index`` (0 <= index < dilation) as an axis of its own, with dilation 1."""
        return replace(self, length=group_length(self.length, self.dilation, index), dilation=1)

    def groups(self) -> list[tuple[Axis, int]]:
        """All dilation groups, equal ones together: one or two pairs (axis, how many there are of it)."""
        longer = self.length % self.dilation  # this many groups, the first ones, hold one token more
        pairs = [(self.group(0), longer), (self.group(longer), self.dilation - longer)]
        return [pair for pair in pairs if pair[1]]


def axes_of(problem: Problem) -> tuple[Axis, ...]:
    """The axes of a plain problem; `counts.pattern_axes` has those of any.

    Raises:
        ProblemError: it is not plain.
    """
    return tuple(Axis(*axis) for axis in problem.axes)


def group_length(length: int, dilation: int, group: int) -> int:
    """Tokens of dilation group ``group``: group, group + dilation, ... below ``length``."""
    return (length - group + dilation - 1) // dilation


def check_positive(name: str, value: int) -> None:
    """Refuses, with a ValueError that begins with the name, what is no positive integer."""
    if type(value) is not int or value < 1:
        raise ValueError(f"{name}: {value!r} is not a positive integer")


def check_rank(axes: Sequence[object], **values: Sequence[int]) -> None:
    """Refuses, with a ValueError, a value that has not one entry per axis."""
    for name, value in values.items():
        if len(value) != len(axes):
            raise ValueError(f"{name}: {tuple(value)} has {len(value)} entries for {len(axes)} dimensions")
