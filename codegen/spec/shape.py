"""Shapes of a spec: the problems that its kernels are for."""

from __future__ import annotations

from collections.abc import Iterator
from contextvars import ContextVar
from typing import Annotated, Any

from pydantic import Field, model_validator

from ..runtime.problem import Problem
from ..runtime.problem_rules import Dimension, dimension_faults, head_faults
from .fields import AxisOf, CausalKind, Count, Edge, Fault, Listed, ListOf, Model, Number, Offset, refuse

DEFAULT_CAUSAL: ContextVar[tuple[bool | str, ...] | None] = ContextVar("causal of the entry being read", default=())
"""Of shapes that don't say it; None where the entry's is no list of causal kinds, so that nobody knows."""

OF_WINDOW = ("window", "stride", "dilation", "causal", "edge", "sink")
OF_RANGE = ("grid", "q_offset", "kv_tokens", "kv_offset", "kv_sink")


class HeadWindow(Model):
    """The window of some of a shape's heads; what it leaves out is as the shape has it."""

    heads: Count = Field(description="So many heads, the next ones.")
    window: AxisOf[Count] = Field(description="Keys that their queries see along each dimension.")
    stride: AxisOf[Count] = Field(default_factory=tuple, description="As the shape's.")
    dilation: AxisOf[Count] = Field(default_factory=tuple, description="As the shape's.")
    causal: AxisOf[CausalKind] = Field(default_factory=tuple, description="As the shape's.")
    edge: AxisOf[Edge] = Field(default_factory=tuple, description="As the shape's.")
    sink: AxisOf[Number] = Field(default_factory=tuple, description="As the shape's.")


class Shape(Model):
    """A problem that the kernels are for. Feeds tile fitting and checks; kernels also run other shapes."""

    tokens: AxisOf[Count] = Field(description="Tokens along each dimension, outermost first.")
    window: AxisOf[Count] = Field(
        default_factory=tuple, description="Keys that a query sees along each dimension; required without windows."
    )
    stride: AxisOf[Count] = Field(
        default_factory=tuple, description="Consecutive queries that share a window; default 1 everywhere."
    )
    dilation: AxisOf[Count] = Field(
        default_factory=tuple, description="Distance between the keys of a window; default 1 everywhere."
    )
    causal: AxisOf[CausalKind] = Field(
        default_factory=tuple,
        description="Dimensions where keys after the query are hidden (true, token), or after its group of stride "
        "queries (block); default: the entry's.",
    )
    edge: AxisOf[Edge] = Field(
        default_factory=tuple,
        description="What a window does that would leave the tokens: shift inwards, be cut, or wrap; default shift.",
    )
    sink: AxisOf[Number] = Field(
        default_factory=tuple, description="First tokens that are seen beside the window; default 0 everywhere."
    )
    windows: ListOf[HeadWindow] = Field(
        default_factory=tuple,
        description="In place of window: windows of some heads each, a problem of its own for fitting, checks and "
        "bounds.",
    )
    grid: AxisOf[Count] = Field(
        default_factory=tuple,
        description="Tokens that windows are laid in, where queries or keys are a part of them; default: the keys'.",
    )
    q_offset: AxisOf[Number] = Field(
        default_factory=tuple, description="Where in the grid the queries begin; default 0."
    )
    kv_tokens: AxisOf[Count] = Field(default_factory=tuple, description="Tokens of the keys; default: as tokens.")
    kv_offset: AxisOf[Offset] = Field(default_factory=tuple, description="Where in the grid the keys begin; default 0.")
    kv_sink: AxisOf[Number] = Field(
        default_factory=tuple,
        description="So many keys are the grid's first, the others begin at kv_offset; default 0.",
    )
    extra_tokens: Annotated[tuple[Count, ...], Listed(or_one=True, most=2)] = Field(
        default_factory=tuple,
        description="Keys that all queries see beside their window, such as a text's: one piece, or a list of two.",
    )
    heads: Count = Field(default_factory=int, description="Query heads; default 1, or those of the windows.")
    kv_heads: Count = Field(
        default_factory=int,
        description="Key/value heads, a divisor of heads (GQA, MQA); default: as many as heads.",
    )
    batch: Count = Field(default=1, description="Batch size.")

    @model_validator(mode="after")
    def _complete(self) -> Shape:
        rank = len(self.tokens)
        default = DEFAULT_CAUSAL.get()
        heads = sum(each.heads for each in self.windows) or 1
        if not (self.window or self.windows):
            refuse([(("window",), "is required")])
        if self.window and self.windows:
            refuse([(("windows",), "can't be given beside window, which all heads have")])
        if self.windows and self.heads not in (0, heads):
            refuse([(("heads",), f"{self.heads} is not the {heads} heads of the windows together")])
        for name, value in (
            ("stride", (1,) * rank),
            ("dilation", (1,) * rank),
            ("causal", default or ()),
            ("edge", ("shift",) * rank),
            ("sink", (0,) * rank),
            ("heads", heads),
            ("kv_heads", self.heads or heads),
        ):
            object.__setattr__(self, name, getattr(self, name) or value)
        extents = [] if default is None and not self.causal else self.extent_faults()
        refuse([*extents, *self._head_faults()])
        return self

    @property
    def parts(self) -> tuple[Shape, ...]:
        """The shape; of one with windows for some heads each, those with their heads, in that order."""
        if not self.windows:
            return (self,)
        return tuple(part for part, _ in self._parts())

    def _parts(self) -> Iterator[tuple[Shape, int]]:
        """A shape for each of the windows, and the number of its first head."""
        group, first = self.heads // self.kv_heads, 0
        for each in self.windows:
            given = {name: getattr(each, name) or getattr(self, name) for name in OF_WINDOW}
            kv_heads = max(each.heads // group, 1)
            yield self.model_copy(update={**given, "windows": (), "heads": each.heads, "kv_heads": kv_heads}), first
            first += each.heads

    def problem(self, **fields: Any) -> Problem:
        """The problem that the shape is, one of `parts`; ``fields`` add to its own, or take their place.

        Raises:
            ProblemError: they don't fit each other.
        """
        own = {name: getattr(self, name) for name in type(self).model_fields if name != "windows"}
        return Problem(**{**{name: value for name, value in own.items() if value != ()}, **fields})

    def extent_faults(self) -> Iterator[Fault]:
        """The rules that a dimension breaks."""
        if not self.windows:
            yield from self._dimension_faults()
        for index, (part, _) in enumerate(self._parts() if self.windows else ()):
            for path, text in part._dimension_faults():
                own = getattr(self.windows[index], str(path[0]), ())
                yield (("windows", index, *path) if own else path), text

    def _dimension_faults(self) -> Iterator[Fault]:
        # Columns of unequal length end at the shortest: their entry reports the length.
        names = ("tokens", *OF_WINDOW, *OF_RANGE)
        columns = {name: values for name in names if (values := getattr(self, name))}
        for dim in range(min(map(len, columns.values()))):
            axis = Dimension(**{name: values[dim] for name, values in columns.items()})
            for fault in dimension_faults(axis, dim):
                yield (fault.field, dim), fault.text

    def _head_faults(self) -> Iterator[Fault]:
        faults = [*head_faults(self.heads, self.kv_heads)]
        for fault in faults:
            yield (fault.field,), fault.text
        group = self.heads // self.kv_heads if not faults else 1
        for index, (part, first) in enumerate(self._parts() if self.windows and not faults else ()):
            last = first + part.heads - 1
            if first // group != last // group and (first % group or part.heads % group):
                text = f"heads {first} to {last} share heads of K and V, {group} each, with others"
                yield ("windows", index, "heads"), f"{text}; allowed: a multiple of {group}, or some of one head's"
