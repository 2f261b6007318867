"""A problem to simulate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from ..errors import as_input_error
from ..gna.axes import Axis, axes_of
from ..runtime.dtypes import DTYPES
from ..runtime.problem import Problem

if TYPE_CHECKING:
    from ..spec import Shape


@dataclass(frozen=True)
class Workload:
    """A problem to simulate: its token dimensions, and what else its cost depends on.

    Attributes:
        axes: token dimensions, outermost first.
        heads, kv_heads, batch, head_dim, value_head_dim: of Q, K and V.
        dtype: ``fp32``, ``bf16`` or ``fp16``.
    """

    axes: tuple[Axis, ...]
    heads: int = 1
    kv_heads: int = 1
    batch: int = 1
    head_dim: int = 128
    value_head_dim: int = 128
    dtype: str = "bf16"

    @property
    def tokens(self) -> int:
        """Tokens of one batch entry."""
        return prod(axis.length for axis in self.axes)

    @property
    def bytes(self) -> int:
        """Q, K, V and O once, and the LSE in fp32."""
        channels = self.heads + self.kv_heads
        elements = channels * (self.head_dim + self.value_head_dim)
        return self.batch * self.tokens * (elements * DTYPES[self.dtype].bytes + 4 * self.heads)


def make_workload(
    tokens: Sequence[int],
    window: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    causal: bool | Sequence[bool] = False,
    *,
    heads: int = 1,
    kv_heads: int | None = None,
    batch: int = 1,
    head_dim: int = 128,
    value_head_dim: int | None = None,
    dtype: str = "bf16",
) -> Workload:
    """A checked `Workload`; single values hold for every token dimension.

    Raises:
        InputError: the fields are wrong or don't fit each other; the message begins with the field.
    """
    with as_input_error():
        problem = Problem(
            tokens,
            window,
            stride,
            dilation,
            causal,
            heads=heads,
            kv_heads=kv_heads,
            batch=batch,
            head_dim=head_dim,
            value_head_dim=value_head_dim,
            dtype=dtype,
        )
        return workload_of_problem(problem)


def workload_of_shape(shape: Shape, **fields: Any) -> Workload:
    """The workload that a spec's shape is; ``fields`` add to its own or take their place.

    Raises:
        InputError: as `make_workload`.
    """
    own = {name: value for name, value in shape.model_dump().items() if value != ()}
    return make_workload(**{**own, **fields})


def workload_of_problem(problem: Problem) -> Workload:
    """The workload that a plain problem is."""
    problem.require_features((), "the simulator")
    axes = axes_of(problem)
    dims = problem.head_dim, problem.value_head_dim
    return Workload(axes, problem.heads, problem.kv_heads, problem.batch, *dims, problem.dtype)
