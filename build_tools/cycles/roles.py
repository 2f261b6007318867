"""Models kernels whose warps have roles of their own: one thread issues products, others do the softmax."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from .description import Multiprocessor, Roles, Step
from .flow import Way, find_longest_way, find_way_of_most, find_ways
from .instruction import Instruction, Role, UnknownCode
from .issue import Steady, simulate

SIGNALS: Mapping[str, int] = {"60": 60, "100": 100, "150": 150}
"""Cycles that it may take from an arrival at an mbarrier, or from a product's end, to the waiter: nobody has published
how many, so the model is run with each."""

_LONG = 1000
_MARKED = (Role.AWAIT_TOLD, Role.TELL)


@dataclass(frozen=True)
class _SoftmaxWay:
    """A way through the softmax's loop.

    Attributes:
        way: its instructions, with those marked that wait for scores and tell of probabilities.
        scores: where in it the former is.
        first: where the first one of the latter is.
    """

    way: list[Instruction]
    scores: int
    first: int

    def cycles_to_first(self, unit: Multiprocessor) -> float:
        """From the scores' arrival until the first probabilities are told of, of a warp by itself."""
        inner = [
            replace(i, role=Role.PLAIN) if i.role in _MARKED else i for i in self.way[self.scores + 1 : self.first]
        ]
        # As if that brought the next scores, after so long that nothing is under way any more.
        way = [replace(self.way[self.scores], amount=0), *inner, replace(self.way[self.first], amount=0)]
        return simulate([way], unit, signal=_LONG, told=(0,)).cycles - _LONG

    def of(self, barriers: Mapping[int, int]) -> Way:
        """The same with other barriers."""
        return tuple(replace(i, amount=barriers[i.amount]) if i.role in _MARKED else i for i in self.way)


def _mark_softmax(way: Way, roles: Roles) -> _SoftmaxWay:
    """Finds in the way of a softmax warp, the first one's, where it waits and arrives."""
    marked = list(way)
    loads = next((at for at, i in enumerate(way) if i.name == "LDTM"), 0)
    stores = next((at for at, i in enumerate(way) if i.name == "STTM"), 0)
    waits = [at for at, i in enumerate(way[:stores]) if i.role is Role.TRANSACTION]
    before = [at for at in waits if at < loads]
    arrives = [at for at, i in enumerate(way) if i.role is Role.MBARRIER_ARRIVE]
    read = [read for read, _ in roles.apart[:1]]
    told = (*read, *roles.probabilities[0])
    if not before or len(arrives) != len(told):
        raise UnknownCode(f"softmax warps arrive in {len(arrives)} places for a KV tile, expected {len(told)}")
    if roles.apart:
        if waits[-1] == before[-1]:
            raise UnknownCode("softmax warps store probabilities (STTM) and don't wait until those before are read")
        marked[waits[-1]] = replace(way[waits[-1]], role=Role.AWAIT_TOLD, amount=roles.apart[0][1])
    marked[before[-1]] = replace(way[before[-1]], role=Role.AWAIT_TOLD, amount=roles.scores[0])
    for at, barrier in zip(arrives, told, strict=True):
        marked[at] = replace(way[at], role=Role.TELL, amount=barrier)
    return _SoftmaxWay(marked, before[-1], arrives[len(read)])


def _cut(way: Way, steps: Sequence[Step]) -> list[Way]:
    """The way of the thread that issues products, step by step, with what it waits for and tells marked."""
    products = [at for at, i in enumerate(way) if i.name == "UTCHMMA"]
    expected = sum(step.products for step in steps)
    if len(products) != expected:
        raise UnknownCode(f"a KV tile takes {len(products)} matrix products (UTCHMMA), expected {expected}")
    marked, ends, begin = list(way), [], 0
    for step in steps:
        own, products = products[: step.products], products[step.products :]
        for at in own:
            marked[at] = replace(way[at], role=Role.TENSOR_PRODUCT, amount=step.cycles)
        if step.awaits is not None:
            waits = [at for at in range(begin, own[0]) if way[at].role is Role.TRANSACTION]
            if not waits:
                raise UnknownCode("matrix products (UTCHMMA) are issued that wait for no softmax warps")
            marked[waits[-1]] = replace(way[waits[-1]], role=Role.AWAIT_TOLD, amount=step.awaits)
        begin = own[-1] + 1
        if step.tells is not None:
            after = products[0] if products else len(way)
            begin = next((at for at in range(begin, after) if way[at].name == "UTCBAR"), after)
            if begin == after:
                raise UnknownCode("nothing tells (UTCBAR) that matrix products are done for which softmax warps wait")
            marked[begin] = replace(way[begin], role=Role.TELL_WHEN_DONE, amount=step.tells)
            begin += 1
        ends.append(begin)
    ends[-1] = len(way)
    return [tuple(marked[first:last]) for first, last in zip([0, *ends], ends, strict=False)]


def _shorten(steps: Sequence[Way], whole: Sequence[Step], short: Sequence[Step]) -> Way:
    """The way of `_cut` with fewer products in its steps, and of other cycles. Who issues none awaits none."""
    found: list[Instruction] = []
    for way, full, step in zip(steps, whole, short, strict=True):
        left = step.products
        for instruction in way:
            if instruction.role is Role.TENSOR_PRODUCT:
                left -= 1
                if left < 0:
                    continue
                instruction = replace(instruction, amount=step.cycles)
            elif instruction.role is Role.AWAIT_TOLD and instruction.amount == full.awaits and not step.products:
                instruction = replace(instruction, role=Role.PLAIN)
            found.append(instruction)
    return tuple(found)


@dataclass(frozen=True)
class RoleCycles:
    """Modelled cycles, by the cycles of a signal (`SIGNALS`).

    Attributes:
        interior, shell: of a KV tile.
        short: of a shell tile of which so many columns are computed, again and again.
        q_tile: of a Q tile with ``passes`` KV tiles, all shell.
        first: from scores to the first probabilities, without a mask and with one, of a warp by itself.
        instructions: of a softmax warp for an interior tile, a shell tile, and of these before the scores come, more
            than an interior tile's.
    """

    interior: Mapping[str, Steady]
    shell: Mapping[str, Steady]
    short: Mapping[int, Mapping[str, Steady]]
    q_tile: Mapping[str, Steady]
    first: tuple[float, float]
    instructions: tuple[int, int, int]


def model_roles(code: Sequence[Instruction], roles: Roles, passes: int) -> RoleCycles:
    """Models a kernel.

    Raises:
        UnknownCode: it is not laid out as ``roles`` says.
    """
    ways = find_ways(code, roles.softmax)
    interior, shell = _mark_softmax(ways.interior, roles), _mark_softmax(ways.shell, roles)
    steps = _cut(find_way_of_most(code, roles.issues, "UTCHMMA"), roles.steps)
    products: Way = sum(steps, ())
    apart: Sequence[tuple[int, ...]] = roles.apart or ((),) * len(roles.scores)
    barriers = [(one, *parts, *more) for one, parts, more in zip(roles.scores, roles.probabilities, apart, strict=True)]
    others = [dict(zip(barriers[0], one, strict=True)) for one in barriers]

    def run(softmax: _SoftmaxWay, issued: Way, count: int = 0, ahead: bool = True) -> dict[str, Steady]:
        """The ways again and again; with a ``count``, of a Q tile with so many KV tiles."""
        own = [softmax.of(barriers) for barriers in others]
        if count:
            own = [(*ways.outside[0], *way * count, *ways.outside[1]) for way in own]
        told = (*roles.scores, *(done for _, done in roles.apart)) if ahead else ()
        return {
            name: simulate([*own, issued], roles.multiprocessor, signal=signal, told=told)
            for name, signal in SIGNALS.items()
        }

    if roles.streams:
        q_tile = run(shell, products * passes, passes)
    else:  # scores of the first KV tile, then by turns those of the next and the output of the one before
        q_tile = run(shell, (*steps[0], *products * (passes - 1), *sum(steps[1:], ())), passes, ahead=False)
    short = {}
    for columns, (loads, fewer) in roles.short.items():
        way = find_longest_way(code, replace(roles.softmax, loads=loads))
        short[columns] = run(_mark_softmax(way, roles), _shorten(steps, roles.steps, fewer))
    return RoleCycles(
        interior=run(interior, products),
        shell=run(shell, products),
        short=short,
        q_tile=q_tile,
        first=(interior.cycles_to_first(roles.multiprocessor), shell.cycles_to_first(roles.multiprocessor)),
        instructions=(len(interior.way), len(shell.way), shell.scores - interior.scores),
    )
