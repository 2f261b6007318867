"""Finds in a kernel the loop over KV tiles and the one over Q tiles around it, and the ways through them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

from .description import RoleLoop, TileLoop
from .instruction import Instruction, Role, UnknownCode

_LONGEST = 20_000  # example 77's backward kernel has 8,000 in all

Way = tuple[Instruction, ...]
"""Instructions as one warp issues them."""


@dataclass(frozen=True)
class Ways:
    """The ways through a kernel.

    Attributes:
        interior, shell: one KV tile: where all have one loop the shortest way through it, and the longest, which masks.
        loops: the ways of a Q tile's KV tiles, in order: those of its loops.
        outside: what a Q tile takes before, between and behind its loops, on the longest way: row windows, outputs
            stored. Where there is no loop over Q tiles, a thread block takes one: this begins and ends with the kernel.
    """

    interior: Way
    shell: Way
    loops: tuple[Way, ...]
    outside: tuple[Way, ...]

    def q_tile(self, passes: int) -> Way:
        """A Q tile that goes through each of its loops so many times."""
        found = self.outside[0]
        for loop, after in zip(self.loops, self.outside[1:], strict=True):
            found = (*found, *loop * passes, *after)
        return found


@dataclass(frozen=True)
class _Loop:
    """A loop: its first block, the blocks that jump back to it, and all of its blocks."""

    head: int
    ends: frozenset[int]
    blocks: frozenset[int]


class _Graph:
    """Basic blocks, by the index of their first instruction. A call is never made: what ptxas calls is what it does
    with numbers that are out of range."""

    def __init__(self, code: Sequence[Instruction]) -> None:
        index = {instruction.address: i for i, instruction in enumerate(code)}
        starts = {0}
        for i, instruction in enumerate(code):
            if instruction.role in (Role.BRANCH, Role.CALL, Role.STOP):
                starts.add(i + 1)
            if instruction.target is not None:
                if instruction.target not in index:
                    raise UnknownCode(f"the branch at {instruction.address:#x} leaves the kernel")
                starts.add(index[instruction.target])
        edges = sorted(starts - {len(code)})
        self.blocks = {start: tuple(code[start:end]) for start, end in zip(edges, [*edges[1:], len(code)], strict=True)}
        self.next = {start: self._onward(start, index) for start in self.blocks}
        self.done, backward = self._walk()
        self.forward = {block: tuple(n for n in self.next[block] if (block, n) not in backward) for block in self.done}
        heads: dict[int, set[int]] = {}
        for end, head in backward:
            heads.setdefault(head, set()).add(end)
        self.loops = [self._loop(head, frozenset(ends)) for head, ends in heads.items()]

    def _onward(self, start: int, index: dict[int, int]) -> tuple[int, ...]:
        last, after = self.blocks[start][-1], start + len(self.blocks[start])
        onward = {after: None} if after in self.blocks else {}
        if last.role is Role.CALL or (last.role is Role.STOP and not last.predicated):
            return ()
        if last.role is Role.BRANCH:
            if last.target is None:  # an address in a register: nobody knows where that leads
                return ()
            return (*(onward if last.predicated else ()), index[last.target])
        return tuple(onward)

    def _walk(self) -> tuple[list[int], set[tuple[int, int]]]:
        """Blocks that the kernel's start leads to, each behind those that it leads to; and edges back to a block that
        leads here: (from, to)."""
        on_way, known, done = {0}, {0}, []
        backward = set()
        stack = [(0, iter(self.next[0]))]
        while stack:
            block, onward = stack[-1]
            for n in onward:
                if n in on_way:
                    backward.add((block, n))
                elif n not in known:
                    known.add(n)
                    on_way.add(n)
                    stack.append((n, iter(self.next[n])))
                    break
            else:
                done.append(block)
                on_way.discard(block)
                stack.pop()
        return done, backward

    def _loop(self, head: int, ends: frozenset[int]) -> _Loop:
        before: dict[int, list[int]] = {}
        for block in self.done:
            for n in self.next[block]:
                before.setdefault(n, []).append(block)
        found, todo = {head, *ends}, list(ends - {head})
        while todo:
            for block in before.get(todo.pop(), ()):
                if block not in found:
                    found.add(block)
                    todo.append(block)
        return _Loop(head, ends, frozenset(found))

    def whole(self) -> _Loop:
        """The kernel, as a loop that each thread block goes through once."""
        ends = {block for block in self.done if self.blocks[block][-1].role is Role.STOP}
        return _Loop(0, frozenset(ends), frozenset(self.done))

    def instructions(self, blocks: Collection[int]) -> Iterator[Instruction]:
        """Those of some blocks."""
        return (instruction for block in blocks for instruction in self.blocks[block])

    def way(
        self,
        start: int,
        ends: Collection[int],
        blocks: Collection[int],
        *,
        longest: bool,
        length: Callable[[Way], int] = len,
    ) -> list[int] | None:
        """The blocks of the shortest or longest way from ``start`` to one of ``ends`` within ``blocks``, round no loop
        more than once; None if there is none. ``length`` is a block's."""
        sign = -1 if longest else 1
        best: dict[int, tuple[int, int | None]] = {}  # the length from here on, and the next block
        for block in self.done:
            if block not in blocks:
                continue
            ways: list[tuple[int, int | None]] = [(best[n][0], n) for n in self.forward[block] if n in best]
            if ways := [(0, None)] if block in ends else ways:
                rest, onward = min(ways, key=lambda way: sign * way[0])
                best[block] = (rest + length(self.blocks[block]), onward)
        if start not in best:
            return None
        found = [start]
        while (after := best[found[-1]][1]) is not None:
            found.append(after)
        return found

    def usual_way(
        self,
        start: int,
        ends: Collection[int],
        blocks: Collection[int],
        facts: TileLoop | RoleLoop,
        *,
        longest: bool = True,
    ) -> list[int]:
        """`way` past all blocks that can be passed by and are rare or aside, or try an mbarrier again: the model finds
        all data there.

        Raises:
            UnknownCode: there is no way.
        """
        kept = set(blocks)
        if isinstance(facts, RoleLoop):
            kept = {block for block in kept if not facts.is_of_others(self.blocks[block])}

        def passes_by(block: int) -> bool:
            return self.way(start, ends, kept - {block}, longest=False) is not None

        for block in sorted(kept - {start, *ends}):
            if block not in kept or self.way(start, {block}, kept, longest=False) is None:
                continue
            retry = block in self.next[block] and any(i.role is Role.TRANSACTION for i in self.blocks[block])
            if (retry or facts.aside(self.blocks[block])) and passes_by(block):
                kept.discard(block)
            elif facts.rare(self.blocks[block]) and passes_by(block):
                # With it go those that lead to it alone, such as the question whether it is to run.
                leading = [b for b in kept - {start, *ends} if not self.way(start, {block}, kept - {b}, longest=False)]
                for b in leading:
                    if passes_by(b):
                        kept.discard(b)
        found = self.way(start, ends, kept, longest=longest)
        if found is None:
            raise UnknownCode("there is no way through the loops that the model can follow")
        return found


def find_ways(code: Sequence[Instruction], facts: TileLoop | RoleLoop) -> Ways:
    """The ways through a kernel's loops.

    Raises:
        UnknownCode: there are not as many such loops; or an instruction on the way is none that the model knows.
    """
    graph = _Graph(code)
    loops = _tile_loops(graph, facts)
    tiles = frozenset[int]().union(*(loop.blocks for loop in loops))
    around = [loop for loop in graph.loops if tiles < loop.blocks]
    # Loops that other tiles have part in may lie between.
    which = max if isinstance(facts, RoleLoop) else min
    q_tiles = which(around, key=lambda loop: len(loop.blocks)) if around else graph.whole()
    rest = q_tiles.blocks - tiles
    begin, outside = q_tiles.head, []
    for loop in loops:
        way = graph.usual_way(begin, {loop.head}, rest | {loop.head}, facts)
        outside.append(_instructions(graph, way[:-1]))
        exits = {n for block in loop.blocks for n in graph.next[block] if n in rest and _leads(graph, n, q_tiles)}
        if len(exits) != 1:
            raise UnknownCode(f"the loop over KV tiles ends in {len(exits)} places, expected 1")
        begin = exits.pop()
    outside.append(_instructions(graph, graph.usual_way(begin, q_tiles.ends, rest, facts)))
    short, long = (
        [_instructions(graph, graph.usual_way(x.head, x.ends, x.blocks, facts, longest=longest)) for x in loops]
        for longest in (False, True)
    )
    return Ways(min(short, key=len), max(long, key=len), tuple(long), tuple(outside))


def find_longest_way(code: Sequence[Instruction], facts: RoleLoop) -> Way:
    """The longest way through a loop, as `find_ways` has it.

    Raises:
        UnknownCode: as of `find_ways`.
    """
    graph = _Graph(code)
    (loop,) = _tile_loops(graph, facts)
    return _instructions(graph, graph.usual_way(loop.head, loop.ends, loop.blocks, facts))


def find_way_of_most(code: Sequence[Instruction], facts: RoleLoop, name: str) -> Way:
    """The way through a loop with the most instructions of a name; of such, the shortest.

    Raises:
        UnknownCode: as of `find_ways`.
    """
    graph = _Graph(code)
    (loop,) = _tile_loops(graph, facts)

    def length(block: Way) -> int:
        return _LONGEST * sum(instruction.name == name for instruction in block) - len(block)

    way = graph.way(loop.head, loop.ends, loop.blocks, longest=True, length=length)
    if way is None:
        raise UnknownCode(f"there is no way through the loop with {facts.contents} that the model can follow")
    return _instructions(graph, way)


def _leads(graph: _Graph, block: int, loop: _Loop) -> bool:
    return graph.way(block, loop.ends, loop.blocks, longest=False) is not None


def _tile_loops(graph: _Graph, facts: TileLoop | RoleLoop) -> list[_Loop]:
    """The loops over KV tiles, in the order in which a Q tile comes to them."""
    found = [loop for loop in graph.loops if facts.admits(list(graph.instructions(loop.blocks)))]
    found = [loop for loop in found if not any(other.blocks < loop.blocks for other in found)]
    if isinstance(facts, RoleLoop):
        found = [loop for loop in found if any(facts.is_own(graph.blocks[block]) for block in loop.blocks)]
    if len(found) != facts.loops:
        raise UnknownCode(f"{len(found)} loops have {facts.contents}, expected {facts.loops}")
    return sorted(found, key=lambda loop: -graph.done.index(loop.head))


def _instructions(graph: _Graph, way: Sequence[int]) -> Way:
    found = tuple(instruction for block in way for instruction in graph.blocks[block])
    if len(found) > _LONGEST:
        raise UnknownCode(
            f"a tile takes {len(found):,} instructions, more than the {_LONGEST:,} that the model takes on"
        )
    for instruction in found:
        if not instruction.name:
            raise UnknownCode(f"the instruction at {instruction.address:#x} is none that the model knows")
    return found
