"""A problem to simulate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..gna.axes import Axis, axes as make_axes
from ..runtime.dtypes import DTYPES

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
    tokens = [tokens] if isinstance(tokens, int) else list(tokens)
    if not 1 <= len(tokens) <= 3:
        raise InputError(f"tokens: {tuple(tokens)} has {len(tokens)} entries; one to three dimensions are possible")
    try:
        axes = make_axes(tokens, window, stride, dilation, causal)
    except ValueError as error:
        raise InputError(str(error).replace("length: ", "tokens: ")) from None
    kv_heads = heads if kv_heads is None else kv_heads
    value_head_dim = head_dim if value_head_dim is None else value_head_dim
    numbers = {
        "heads": heads,
        "kv_heads": kv_heads,
        "batch": batch,
        "head_dim": head_dim,
        "value_head_dim": value_head_dim,
    }
    for name, value in numbers.items():
        if type(value) is not int or not 1 <= value < 2**30:
            raise InputError(f"{name}: {value!r} is not a positive integer below 2^30")
    if heads % kv_heads:
        raise InputError(f"kv_heads: {kv_heads} does not divide the {heads} heads")
    if dtype not in DTYPES:
        raise InputError(f"dtype: {dtype!r} is not one of {', '.join(DTYPES)}")
    return Workload(axes, heads, kv_heads, batch, head_dim, value_head_dim, dtype)


def workload_of_shape(shape: Shape, **fields: Any) -> Workload:
    """The workload that a spec's shape is; ``fields`` add to its own or take their place.

    Raises:
        InputError: as `make_workload`.
    """
    own = {name: value for name, value in shape.model_dump().items() if value != ()}
    return make_workload(**{**own, **fields})
