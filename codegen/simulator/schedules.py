"""A whole model, whose layers have windows by a schedule: `simulate_schedule`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import gcd
from typing import TYPE_CHECKING, Any

from ..errors import InputError, as_input_error
from ..runtime.problem import Problem
from .end_to_end import end_to_end, published_rounding
from .simulation import Simulation

if TYPE_CHECKING:
    from ..models.pattern import Pattern
    from ..models.schedule import Schedule


@dataclass(frozen=True)
class Part:
    """A window of a schedule.

    Attributes:
        simulation: of the heads that have it, in one layer.
        share: of all heads, layers and steps together.
    """

    simulation: Simulation
    share: float


@dataclass(frozen=True)
class EndToEnd:
    """The bounds of a whole model with a schedule. Each is Amdahl's law: attention is a share of the time, and of it
    each window's share becomes as much faster as its own bound says; what is dense stays as it is.

    Attributes:
        problem: heads, head dim, dtype, extra keys; its window is all tokens.
        attention_share: of the time of the model with dense attention.
        steps, layers: of the run.
        parts: the windows.
    """

    problem: Problem
    attention_share: float
    steps: int
    layers: int
    parts: tuple[Part, ...]

    @property
    def dense_share(self) -> float:
        """The share of heads, layers and steps that see all tokens."""
        return 1 - sum(part.share for part in self.parts)

    @property
    def flop_bound(self) -> float:
        """By `Simulation.flop_speedup`."""
        return self._whole(lambda found: found.flop_speedup)

    @property
    def work_bound(self) -> float:
        """By `Simulation.work_bound`."""
        return self._whole(lambda found: found.work_bound)

    @property
    def paper_bound(self) -> float | None:
        """By `Simulation.paper_bound`, rounded as the GNA paper does; None where one window has none."""
        if any(part.simulation.paper_bound is None for part in self.parts):
            return None
        return self._whole(lambda found: published_rounding(found.paper_bound or 1.0))

    @property
    def model_speedup(self) -> float:
        """By `Simulation.model_speedup`: modelled, no bound."""
        return self._whole(lambda found: found.model_speedup)

    def _whole(self, speedup_of: Callable[[Simulation], float]) -> float:
        left = sum(part.share / speedup_of(part.simulation) for part in self.parts) + max(0.0, self.dense_share)
        return end_to_end(1 / left, self.attention_share)

    def as_json(self) -> dict[str, Any]:
        """Everything as plain values; the README beside this file documents the keys."""
        own = self.problem
        fields = ("tokens", "heads", "kv_heads", "batch", "head_dim", "value_head_dim", "dtype", "extra_tokens")
        row = own.as_json()
        return {
            **{name: row[name] for name in fields if name in row},
            "attention_share": self.attention_share,
            "steps": self.steps,
            "layers": self.layers,
            "dense_share": self.dense_share,
            "flop_bound": self.flop_bound,
            "work_bound": self.work_bound,
            "paper_bound": self.paper_bound,
            "model_speedup": self.model_speedup,
            "windows": [{"share": part.share, **part.simulation.as_json()} for part in self.parts],
        }


def problems_of(
    schedule: Schedule, whole: Problem, steps: int | None = None, layers: int | None = None
) -> tuple[dict[Problem, float], int, int]:
    """The problems of a schedule, each with its share of all heads, layers and steps; and how many steps and layers
    there are.

    Args:
        schedule: the windows.
        whole: tokens, heads, head dim and so on; its window has no effect.
        steps, layers: of the run; None: as the schedule says.

    Raises:
        InputError: the schedule is for other steps, layers, axes or heads, or doesn't say how many steps or layers
            there are; or its windows and these tokens don't go.
    """
    steps, given = schedule.size_of_run(steps, layers)
    count = given or 1
    found: dict[Problem, float] = {}
    for pattern, times in schedule.counts(steps, count):
        for problem in [] if pattern is None else _problems(pattern, whole):
            share = problem.heads / whole.heads * times / (steps * count)
            found[problem] = found.get(problem, 0.0) + share
    return found, steps, count


def _problems(pattern: Pattern, whole: Problem) -> list[Problem]:
    """A problem for all heads that have the same window."""
    heads = pattern.axes_at(whole.tokens)
    if len(heads) > 1 and len(heads) != whole.heads:
        raise InputError(f"the schedule has windows of {len(heads)} heads, and there are {whole.heads}")
    found = []
    for axes, times in Counter(heads).items():
        if all(axis.dense for axis in axes):
            continue
        count = times if len(heads) > 1 else whole.heads
        group = whole.heads // whole.kv_heads
        names = ("window", "stride", "dilation", "causal", "edge", "sink")
        fields: dict[str, Any] = {name: tuple(getattr(axis, name) for axis in axes) for name in names}
        with as_input_error():
            found.append(replace(whole, **fields, heads=count, kv_heads=count // gcd(count, group)))
    return found


def simulate_schedule(
    schedule: Schedule,
    whole: Problem,
    attention_share: float,
    steps: int | None,
    layers: int | None,
    simulate: Callable[[Problem], Simulation],
) -> EndToEnd:
    """A model with a schedule; ``simulate`` says what each of its problems costs, once.

    Raises:
        InputError: as `problems_of` and `end_to_end`.
    """
    shares, steps, count = problems_of(schedule, whole, steps, layers)
    end_to_end(1.0, attention_share)  # refuses what is no share, before the work
    parts = tuple(Part(simulate(problem), share) for problem, share in shares.items())
    return EndToEnd(whole, attention_share, steps, count, parts)
