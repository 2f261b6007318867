"""Attention of a layer by a schedule, for adapters whose packages hand over layer, step and grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch

from ..errors import InputError
from ..runtime.joint import joint_attention
from ..runtime.ops import neighborhood_attention
from .pattern import Pattern
from .schedule import Schedule


class Windows:
    """Windows of a schedule on the grids that calls come with.

    Args:
        schedule: or one pattern, for all layers and steps.
        layers, steps: of the model and of a run, where known: checked against the schedule once, here.

    Raises:
        InputError: the schedule is for others, or no schedule.
    """

    def __init__(self, schedule: Schedule | Pattern, layers: int | None = None, steps: int | None = None) -> None:
        if not isinstance(schedule, Schedule | Pattern):
            raise InputError(f"schedule is {schedule!r}; it is a Schedule or a Pattern")
        self.schedule = schedule if isinstance(schedule, Schedule) else Schedule(schedule)
        if layers is not None:
            self.schedule.require_layers(layers)
        if steps is not None:
            self.schedule.require_steps(steps)
        if layers is None and not isinstance(self.schedule.patterns, Mapping):  # layers after a table's last are dense
            layers = self.schedule.layers
        self._layers = layers
        # Patterns live as long as the schedule, so their ids do.
        self._found: dict[tuple[int, tuple[int, ...]], dict[str, Any] | None] = {}

    def at(self, name: str, layer: int | None, step: int | None, grid: Sequence[int]) -> dict[str, Any] | None:
        """Arguments of `gnaforge.joint_attention`; None for dense attention. ``name`` is the layer's, for errors.

        Raises:
            InputError: the schedule doesn't go with the grid, or has no such layer or step.
            RuntimeError: the schedule follows layers or steps, and the call doesn't say its own.
        """
        schedule = self.schedule
        by_layer = not isinstance(schedule.patterns, Pattern) or bool(schedule.dense_layers)
        if by_layer and layer is None:
            raise RuntimeError(f"{name} doesn't say its layer, which the schedule's windows follow")
        if schedule.follows_steps and step is None:
            raise RuntimeError(f"{name} doesn't say the step, which the schedule's windows follow")
        if layer is not None and self._layers is not None and layer >= self._layers:
            raise InputError(f"{name} is layer {layer}, and the schedule has {self._layers}, counted from 0")
        pattern = schedule.at(step or 0, layer or 0)
        if pattern is None:
            return None
        key = id(pattern), tuple(grid)
        if key not in self._found:
            self._found[key] = pattern.at(tuple(grid))
        return self._found[key]


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    grid: Sequence[int],
    window: dict[str, Any],
    scale: float | None = None,
    prefix: int = 0,
) -> torch.Tensor:
    """Attention of tokens ``[batch, prefix + prod(grid), heads, head_dim]``, the first ``prefix`` of them text: these
    see all, and all see them. Returns ``[batch, tokens, heads, head_dim_v]``.

    Raises:
        ValueError, TypeError, NoKernelError: as `gnaforge.joint_attention`.
    """
    if prefix:
        return joint_attention(  # type: ignore[no-any-return]
            query, key, value, grid=grid, prefix=prefix, scale=scale, **window
        )
    if query.shape[1] != prod(grid):
        raise ValueError(f"there are {query.shape[1]} tokens, and the grid {tuple(grid)} has {prod(grid)}")
    q, k, v = (x.reshape(x.shape[0], *grid, *x.shape[2:]) for x in (query, key, value))
    out: torch.Tensor = neighborhood_attention(q, k, v, scale=scale, **window)
    return out.flatten(1, -3)
