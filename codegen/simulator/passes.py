"""A backward pass, or a training step: several kernels, each with tiles of its own, and what they take together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from ..errors import InputError
from ..gna.counts import seen_pairs
from ..gna.source import Tiling
from ..runtime.config import DIRECTIONS, Direction
from ..runtime.problem import Problem
from .cost import Tiles
from .fitting import Objective, simulate_problem
from .simulation import Flat, Simulation


@dataclass(frozen=True)
class Passes:
    """The kernels of a direction. Each of the two backward kernels computes scores anew, so together they take seven
    matrix products a pair of a query and a key; fused kernels take five, and so published FLOP/s of FlashAttention's
    backward pass count five.

    Attributes:
        problem: what was simulated.
        direction: ``backward`` or ``training``.
        kernels: by op.
    """

    problem: Problem
    direction: Direction
    kernels: Mapping[str, Simulation]

    @property
    def seconds(self) -> float:
        """Modelled, of all kernels."""
        return sum(float(found.time.seconds) for found in self.kernels.values())

    @property
    def dense_seconds(self) -> float:
        """Modelled, of dense attention by kernels of the same families: with as many products."""
        return sum(found.dense_seconds for found in self.kernels.values())

    @property
    def model_speedup(self) -> float:
        """Modelled time of dense attention over that of this problem."""
        return self.dense_seconds / self.seconds

    @property
    def flop_speedup(self) -> float:
        """FLOP-wise bound, as that of each kernel."""
        return self.problem.pair_count / seen_pairs(self.problem)

    @property
    def work_bound(self) -> float:
        """FLOP of dense attention over FLOP of all visited tiles, padding included."""
        flop = {op: found.op.flop(self.problem) for op, found in self.kernels.items()}
        return sum(flop.values()) / sum(flop[op] / found.work_bound for op, found in self.kernels.items())

    @property
    def products(self) -> int:
        """Matrix products of a pair: two forward, three for Q's gradient, four for those of K and V."""
        return sum(found.op.products for found in self.kernels.values())

    @property
    def fused_products(self) -> int:
        """Those of kernels that compute all gradients at once, which published FLOP/s count."""
        return {"backward": 5, "training": 7}[self.direction]

    def as_json(self) -> dict[str, Any]:
        """The sum as plain values; the README beside this file documents the keys."""
        return {
            "direction": self.direction,
            "products": self.products,
            "fused_products": self.fused_products,
            "flop_speedup": self.flop_speedup,
            "work_bound": self.work_bound,
            "seconds": self.seconds,
            "dense_seconds": self.dense_seconds,
            "speedup": self.model_speedup,
        }


def ops_of(direction: str) -> tuple[str, ...]:
    """The ops of a direction.

    Raises:
        InputError: there is none of that name.
    """
    if not isinstance(direction, str) or direction not in DIRECTIONS:
        raise InputError(f"direction: {direction!r} is not one of {', '.join(DIRECTIONS)}")
    return DIRECTIONS[direction]


def simulate_passes(
    problem: Problem,
    direction: str,
    tiles: Tiles | None = None,
    arch: str | None = None,
    tiling: Tiling | Flat = "dynamic",
    objective: Objective = "time",
    variant: str | None = None,
) -> Passes:
    """Simulates each kernel of a direction with these tiles, or those that fit it best. Without ``arch`` all are of the
    arch of the first that can have backward kernels.

    Raises:
        InputError: as `simulate_problem`.
    """
    kernels: dict[str, Simulation] = {}
    for op in reversed(ops_of(direction)):  # gradients are what fewer archs have
        kernels[op] = simulate_problem(problem, tiles, arch, tiling, objective, variant, op)
        arch = kernels[op].arch
    return Passes(problem, cast("Direction", direction), {op: kernels[op] for op in ops_of(direction)})
