"""The schedules that a kernel runs under."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..build_tools.emulator.module import ORDERS, TIMINGS

PATIENCE = 20_000_000


@dataclass(frozen=True)
class Schedule:
    """The timing of asynchronous work, the order of warps, and the seed of what is random; see `emulator.Options`."""

    timing: str
    order: str
    seed: int = 0

    def __str__(self) -> str:
        return f"timing {self.timing}, order {self.order}, seed {self.seed}"

    def as_json(self, trace: bool = False) -> dict[str, Any]:
        """As the worker takes it."""
        return {"timing": self.timing, "order": self.order, "seed": self.seed, "patience": PATIENCE, "trace": trace}


def schedules(
    timings: Sequence[str] = TIMINGS, orders: Sequence[str] = ORDERS, seeds: int = 1, first_seed: int = 0
) -> list[Schedule]:
    """Every timing with every order, ``seeds`` times where anything is random.

    Eager work is done when it is issued, lazy work in an order that is drawn; so are turns of warps in random order.
    """
    found = []
    for timing in timings:
        for order in orders:
            times = 1 if timing == "eager" and order != "random" else seeds
            found += [Schedule(timing, order, first_seed + i) for i in range(times)]
    return found
