"""Speed-up of a whole model from that of its attention."""

from __future__ import annotations

from decimal import ROUND_HALF_UP, Decimal

from ..errors import InputError


def end_to_end(speedup: float, share: float, dense_steps: int = 0, steps: int = 1) -> float:
    """Speed-up of a whole model whose attention becomes ``speedup`` times faster (Amdahl's law).

    Args:
        speedup: of attention.
        share: attention's part of the run time, 0 to 1.
        dense_steps: of ``steps`` diffusion steps, those that keep dense attention.

    Raises:
        InputError: a number is out of range.
    """
    if not 0 <= share <= 1:
        raise InputError(f"end-to-end: {share} is no share; give a number from 0 to 1")
    if steps < 1 or not 0 <= dense_steps <= steps:
        raise InputError(f"dense-steps: {dense_steps}/{steps} is no part of all steps; write for example 15/50")
    share *= (steps - dense_steps) / steps
    return 1 / (1 - share + share / speedup)


def published_rounding(bound: float) -> float:
    """A bound as the GNA paper puts it into its end-to-end numbers: rounded to two decimals, then to one, half up."""
    twice = Decimal(repr(bound)).quantize(Decimal("0.01"), ROUND_HALF_UP)
    return float(twice.quantize(Decimal("0.1"), ROUND_HALF_UP))
