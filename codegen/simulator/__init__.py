"""The simulator: how fast a pattern can be, with which tiles, and which stride makes it perfectly block-sparse.

`simulate`, `simulate_schedule` and `fit` are also ``gnaforge.simulate`` and so on. The README beside this file explains
the bounds with a worked example.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Union, overload

from ..errors import InputError, as_input_error
from ..gna.source import Tiling
from ..runtime.config import Direction
from ..runtime.op_table import FORWARD
from ..runtime.problem import Causal, Problem
from .cost import Tiles
from .fitting import Fit, Objective, fit_problems, simulate_problem
from .passes import Passes, ops_of, simulate_passes
from .schedules import EndToEnd, simulate_schedule as _simulate_schedule
from .simulation import Flat, Simulation, family_for

if TYPE_CHECKING:
    from ..models.schedule import Schedule
    from ..spec import Shape

Shapes = Union["Shape", Mapping[str, Any], Sequence["Shape | Mapping[str, Any]"]]

__all__ = ["EndToEnd", "Fit", "Passes", "Simulation", "Tiles", "fit", "simulate", "simulate_schedule"]


@overload
def simulate(*arguments: Any, direction: Literal["forward"] = "forward", **options: Any) -> Simulation: ...
@overload
def simulate(*arguments: Any, direction: Literal["backward", "training"], **options: Any) -> Passes: ...
def simulate(  # type: ignore[misc]  # it takes fewer options than any
    tokens: Sequence[int],
    window: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    causal: Causal | Sequence[Causal] = False,
    *,
    q_tile: Sequence[int] | None = None,
    kv_tile: Sequence[int] | None = None,
    q_tile_heads: int = 1,
    tiling: Tiling | Flat = "dynamic",
    direction: Direction = "forward",
    arch: str | None = None,
    variant: str | None = None,
    heads: int = 1,
    kv_heads: int | None = None,
    batch: int = 1,
    head_dim: int = 128,
    value_head_dim: int | None = None,
    dtype: str = "bf16",
    **settings: Any,
) -> Simulation | Passes:
    """Exact bounds on the speed-up of a problem over dense attention, and a model of its time.

    Args:
        tokens, window, stride, dilation, causal: as in ``na1d`` to ``na3d``; single values hold for every dimension.
        q_tile, kv_tile: tokens per dimension; without them the tiles that fit the problem best.
        q_tile_heads: query heads that share keys, of which the Q tile has the tokens; fitted where tiles are.
        tiling: ``dynamic`` (KV tiles begin where a Q tile's window does, as in our kernels) or ``static`` (on a fixed
            grid, as in NATTEN's for Hopper and Blackwell); or ``flat``: tiles are runs of consecutive tokens, as for
            kernels that know of one dimension only, with one extent each, 128 where none is given.
        direction: ``backward`` or ``training`` (both passes) for the kernels of gradients, each with tiles of its own.
        arch, variant: the kernel family whose tile limits and time constants to take; by default sm90's, or sm100's
            where only that can have the tiles. An arch's own default is the first of its families that can have them.
        heads, kv_heads, batch, head_dim, value_head_dim, dtype: for the model of the time, and what tiles fit.
        settings: further fields of a spec's shape: ``edge``, ``sink``, ``extra_tokens``, ``grid``, ``q_offset``, ...

    Returns:
        A `Simulation`; of other directions than ``forward`` a `Passes`, with one of each kernel.

    Raises:
        InputError: (a `ValueError`) an argument is wrong; the message begins with its name.
    """
    elements: dict[str, Any] = {"head_dim": head_dim, "value_head_dim": value_head_dim, "dtype": dtype}
    counted = {"heads": heads, "kv_heads": kv_heads, "batch": batch}
    with as_input_error():
        problem = _problem({**settings, **counted, **elements}, tokens, window, stride, dilation, causal)
    tiles = _tiles(q_tile, kv_tile, q_tile_heads)
    if direction != "forward":
        return simulate_passes(problem, direction, tiles, arch, tiling, variant=variant)
    return simulate_problem(problem, tiles, arch, tiling, variant=variant)


def simulate_schedule(
    schedule: Schedule,
    tokens: Sequence[int],
    attention_share: float,
    *,
    steps: int | None = None,
    layers: int | None = None,
    q_tile: Sequence[int] | None = None,
    kv_tile: Sequence[int] | None = None,
    tiling: Tiling | Flat = "dynamic",
    arch: str | None = None,
    variant: str | None = None,
    heads: int = 1,
    kv_heads: int | None = None,
    batch: int = 1,
    head_dim: int = 128,
    value_head_dim: int | None = None,
    dtype: str = "bf16",
    extra_tokens: int | Sequence[int] = (),
) -> EndToEnd:
    """Bounds on the speed-up of a whole model, whose layers have windows by a `gnaforge.models.schedule.Schedule`.

    Args:
        schedule: windows by layer, step and head; what it leaves dense stays as it is.
        tokens: the grid that windows are laid in.
        attention_share: the share of attention, over ``tokens``, of the time of the model with dense attention; 0 to 1.
        steps, layers: of the run; by default those of the schedule. One pattern for all layers says neither: ``layers``
            must be given beside its ``dense_layers``. ``steps`` must be beside ``dense_steps``, without a table.
        q_tile, kv_tile: tokens per dimension, of all windows; without them the tiles that fit each best.
        tiling, arch, variant, heads, kv_heads, batch, head_dim, value_head_dim, dtype, extra_tokens: as in `simulate`.

    Returns:
        An `EndToEnd`, with a `Simulation` of each window.

    Raises:
        InputError: (a `ValueError`) an argument is wrong, or the schedule is for other layers, steps, axes or heads.
    """
    elements: dict[str, Any] = {"head_dim": head_dim, "value_head_dim": value_head_dim, "dtype": dtype}
    counted = {"heads": heads, "kv_heads": kv_heads, "batch": batch, "extra_tokens": extra_tokens}
    with as_input_error():
        whole = _problem({**counted, **elements}, tokens, tokens)
    tiles = _tiles(q_tile, kv_tile)
    return _simulate_schedule(
        schedule,
        whole,
        attention_share,
        steps,
        layers,
        lambda problem: simulate_problem(problem, tiles, arch, tiling, variant=variant),
    )


@overload
def fit(shapes: Shapes, *, direction: Literal["forward"] = "forward", **options: Any) -> Fit: ...
@overload
def fit(shapes: Shapes, *, direction: Literal["backward", "training"], **options: Any) -> dict[str, Fit]: ...
def fit(  # type: ignore[misc]  # as above
    shapes: Shapes,
    *,
    direction: Direction = "forward",
    arch: str | None = None,
    variant: str | None = None,
    head_dim: int = 128,
    value_head_dim: int | None = None,
    dtype: str = "bf16",
    tiling: Tiling = "dynamic",
    objective: Objective = "time",
    within: float = 0.05,
) -> Fit | dict[str, Fit]:
    """The fewest tiles of which, for each shape, one is at most ``within`` (0.05: 5 %) worse than the best there is.

    ``gnaforge.fit({"tokens": (30, 48, 80), "window": (18, 24, 24)}).tiles[0]`` has the best for one problem; this is
    what ``tiles: auto`` does in a spec.

    Args:
        shapes: of one rank, each a mapping with the fields of a spec's shape: ``tokens``, ``window`` and optionally
            ``stride``, ``dilation``, ``causal``, ``edge``, ``sink``, ``extra_tokens``, ``heads``, ... ; of a shape of a
            spec with windows for some heads each, every window counts.
        direction, arch, variant: as those of `simulate`.
        objective: ``time`` (the model of it) or ``work`` (the work bound).

    Returns:
        A `Fit`; of other directions than ``forward`` one of each kernel, by op.

    Raises:
        InputError: (a `ValueError`) an argument is wrong, or no tile fits.
    """
    from ..spec import Shape

    listed = [shapes] if isinstance(shapes, Mapping | Shape) else shapes
    problems = []
    for shape in (part for one in listed for part in ([one] if isinstance(one, Mapping) else one.parts)):
        fields = dict(shape) if isinstance(shape, Mapping) else shape.model_dump(exclude={"windows"})
        unknown = fields.keys() - (Shape.model_fields.keys() - {"windows"})
        missing = {"tokens", "window"} - fields.keys()
        if unknown or missing:
            what = "has no field" if unknown else "needs"
            raise InputError(f"shapes: a shape {what} {', '.join(sorted(unknown or missing))}")
        given = {name: value for name, value in fields.items() if value != ()}
        with as_input_error():
            elements = {"head_dim": head_dim, "value_head_dim": value_head_dim, "dtype": dtype}
            problems.append(_problem({**given, **elements}))
    if not problems:
        raise InputError("shapes: there is none to fit tiles to")
    fits: dict[str, Fit] = {}
    for op in reversed(ops_of(direction)):  # gradients are what fewer archs have
        family = family_for(problems[0], None, arch, variant, op=op)
        fits[op], arch = fit_problems(problems, family, tiling, objective, within), family.arch
    return fits[FORWARD.name] if direction == "forward" else {op: fits[op] for op in ops_of(direction)}


def _tiles(q_tile: Sequence[int] | None, kv_tile: Sequence[int] | None, q_tile_heads: int = 1) -> Tiles | None:
    if (q_tile is None) != (kv_tile is None):
        raise InputError("q_tile and kv_tile: give both, or neither to have them fitted")
    if q_tile is None and q_tile_heads != 1:
        raise InputError("q_tile_heads: is fitted with the tiles; give q_tile and kv_tile too")
    return None if q_tile is None or kv_tile is None else Tiles(tuple(q_tile), tuple(kv_tile), q_tile_heads)


def _problem(fields: Mapping[str, Any], *positional: Any) -> Problem:
    """The problem of these fields; one piece of extra keys may be a number."""
    extra = fields.get("extra_tokens", ())
    try:
        return Problem(*positional, **{**fields, "extra_tokens": (extra,) if isinstance(extra, int) else extra})
    except TypeError as error:
        unknown = sorted(fields.keys() - Problem.__dataclass_fields__.keys())
        if not unknown:
            raise
        raise InputError(f"{unknown[0]}: is no field of a problem") from error
