"""Modelled cycles of a kernel, from its machine code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..sass import Sass
from .description import Roles, TileLoop
from .flow import Way, find_ways
from .instruction import decode
from .issue import Steady, find_turn, simulate
from .roles import SIGNALS, RoleCycles, model_roles

QUEUES: Mapping[str, int | None] = {"unlimited": None, "2": 2, "1": 1}
"""Matrix products that may wait for the tensor core: nobody has published how many, so the model is run with each."""

_MIDDLE_SIGNAL = "100"
_PASSES = 4  # through each loop for a Q tile in the model; what it costs beside them hardly depends on it


@dataclass(frozen=True)
class KernelCycles:
    """Modelled cycles of one multiprocessor, by what nobody has published: the number of products that may wait for the
    tensor core (`QUEUES`), or the cycles of a signal (`SIGNALS`).

    Attributes:
        interior_tile, shell_tile: a KV tile of one thread block, without a mask and with one.
        q_tile: a Q tile of one thread block, beyond its KV tiles; all of these take the longest way.
        interior_limit, shell_limit: what is busiest with two products waiting, or signals of 100 cycles, and for which
            share of the cycles.
        blocks: thread blocks on the multiprocessor, between which the cycles are divided.
        unknown: ``queue`` or ``signal``.
        more: of kernels whose warps have roles of their own, more numbers, each for interior and shell tiles; and
            ``short_tile_cycles``, with signals of 100 cycles, by the columns that are computed.
    """

    interior_tile: Mapping[str, float]
    shell_tile: Mapping[str, float]
    q_tile: Mapping[str, float]
    interior_limit: tuple[str, float]
    shell_limit: tuple[str, float]
    blocks: int
    unknown: str = "queue"
    more: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def to_json(self) -> dict[str, object]:
        """For `gnaforge list --static --json`; keys say the unit."""
        return {
            **{
                f"{name}_cycles": {
                    f"{self.unknown}_{key}": round(cycles) for key, cycles in getattr(self, name).items()
                }
                for name in ("interior_tile", "shell_tile", "q_tile")
            },
            **{
                name: {"pipe": limit[0], "busy_share": round(limit[1], 3)}
                for name, limit in (("interior_limit", self.interior_limit), ("shell_limit", self.shell_limit))
            },
            "blocks_per_multiprocessor": self.blocks,
            **self.more,
        }


def model_kernel(code: Sass, loop: TileLoop | Roles, *, registers: int, shared_memory: int) -> KernelCycles:
    """Models a kernel.

    Args:
        registers: of a thread at launch.
        shared_memory: bytes of a thread block.

    Raises:
        UnknownCode: the code is not laid out as ``loop`` says, or holds an instruction that the model doesn't know.
    """
    if isinstance(loop, Roles):
        return _of_roles(model_roles(decode(code), loop, _PASSES))
    unit = loop.multiprocessor
    blocks = min(unit.blocks(loop.threads, registers, shared_memory), loop.most_blocks)
    instructions = decode(code)
    apart = [loop] if loop.beside is None else [loop, loop.beside]
    ways = [find_ways(instructions, one) for one in apart]
    turn = find_turn(ways[0].interior)
    peeled = max(one.peeled for one in apart)

    def run(each: Sequence[Way]) -> dict[str, Steady]:
        taken = [way for way in each for _ in range(loop.warps // len(each))]
        return {
            name: simulate(taken, unit, blocks=blocks, queue=queue, turn=turn, lead=loop.lead)
            for name, queue in QUEUES.items()
        }

    def per_tile(found: Mapping[str, Steady]) -> dict[str, float]:
        return {name: steady.cycles / blocks for name, steady in found.items()}

    interior, shell = run([found.interior for found in ways]), run([found.shell for found in ways])
    interior_tile, shell_tile = per_tile(interior), per_tile(shell)
    passes = [_PASSES + peeled - one.peeled for one in apart]
    whole = per_tile(run([found.q_tile(count) for found, count in zip(ways, passes, strict=True)]))
    kinds = [shell_tile] if loop.loops == 1 else [interior_tile, shell_tile]
    # Of the products of a peeled tile some are before the loops and some behind.
    first = {name: (_PASSES + peeled) * kinds[0][name] for name in QUEUES}
    tiles = {name: first[name] + _PASSES * sum(k[name] for k in kinds[1:]) for name in QUEUES}
    return KernelCycles(
        interior_tile=interior_tile,
        shell_tile=shell_tile,
        q_tile={name: whole[name] - tiles[name] for name in QUEUES},
        interior_limit=_limit(interior["2"]),
        shell_limit=_limit(shell["2"]),
        blocks=blocks,
    )


def _of_roles(found: RoleCycles) -> KernelCycles:
    interior, shell, q_tile = (
        {name: steady.cycles for name, steady in each.items()} for each in (found.interior, found.shell, found.q_tile)
    )
    middle = found.interior[_MIDDLE_SIGNAL], found.shell[_MIDDLE_SIGNAL]
    kinds = ("interior", "shell")
    return KernelCycles(
        interior_tile=interior,
        shell_tile=shell,
        q_tile={name: q_tile[name] - _PASSES * shell[name] for name in SIGNALS},
        interior_limit=_limit(middle[0]),
        shell_limit=_limit(middle[1]),
        blocks=1,
        unknown="signal",
        more={
            "tensor_busy_share": {kind: round(one.busy["tensor"], 3) for kind, one in zip(kinds, middle, strict=True)},
            "first_probabilities_cycles": dict(zip(kinds, map(round, found.first), strict=True)),
            "short_tile_cycles": {
                str(columns): round(each[_MIDDLE_SIGNAL].cycles) for columns, each in found.short.items()
            },
            "softmax_instructions": dict(zip((*kinds, "shell_before_scores"), found.instructions, strict=True)),
        },
    )


def _limit(steady: Steady) -> tuple[str, float]:
    return steady.limit, steady.busy[steady.limit]
