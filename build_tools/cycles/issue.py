"""Simulates how the warps of one part of a multiprocessor issue instructions.

Warps issue in order, one instruction a cycle between them; of those that can, the one that has waited longest. A warp
waits for its own stalls and scoreboards, which are ptxas's, for pipes that other instructions occupy, for its turn at a
named barrier, for others at mbarriers, and for matrix products, which one tensor core takes first come, first served.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum, auto
from itertools import chain

from .description import Multiprocessor
from .flow import Way
from .instruction import NO_SCOREBOARD, Instruction, Pipe, Role, UnknownCode

_MOST_ROUNDS = 32
_PIPES = list(Pipe)
_SCOREBOARDS = {mask: tuple(i for i in range(6) if mask >> i & 1) for mask in range(64)}


@dataclass(frozen=True)
class Steady:
    """Warps that have come to repeat themselves.

    Attributes:
        cycles: of one round of all warps.
        busy: of each pipe, by name, the share of the cycles in which it is occupied; of ``issue`` that in which an
            instruction is issued.
    """

    cycles: float
    busy: dict[str, float]

    @property
    def limit(self) -> str:
        """What is busiest."""
        return max(self.busy, key=self.busy.__getitem__)


@dataclass(frozen=True)
class Turn:
    """A named barrier that passes a turn from warp to warp: how many threads it counts, and whether its number is
    known at run time only."""

    threads: int
    in_register: bool


def find_turn(loop: Way) -> Turn | None:
    """The barrier at which warps arrive in the loop and don't wait; None if there is none."""
    found = {Turn(i.amount, i.barrier_in_register) for i in loop if i.role is Role.BARRIER_ARRIVE}
    if len(found) > 1:
        raise UnknownCode(f"warps arrive at {len(found)} kinds of barriers in the loop over KV tiles, expected 1")
    return found.pop() if found else None


class _Does(IntEnum):
    """Effects of an instruction beyond its own warp's stalls and scoreboards."""

    NOTHING = 0
    PRODUCT = auto()
    AWAIT_PRODUCTS = auto()
    AWAIT_TURN = auto()
    PASS_TURN = auto()
    MEET = auto()
    AWAIT_TOLD = auto()
    TELL = auto()
    TENSOR_PRODUCT = auto()
    TELL_WHEN_DONE = auto()


_TOLD = {
    Role.AWAIT_TOLD: _Does.AWAIT_TOLD,
    Role.TELL: _Does.TELL,
    Role.TENSOR_PRODUCT: _Does.TENSOR_PRODUCT,
    Role.TELL_WHEN_DONE: _Does.TELL_WHEN_DONE,
}
"""Effects of roles that say all of it."""


@dataclass(slots=True)
class _Op:
    """An instruction, as the simulation takes it."""

    does: int
    waits: tuple[int, ...]
    pipe: int
    occupancy: int
    stall: int
    result: int
    latency: int
    read: int
    amount: int
    ends_group: bool


def _prepare(instruction: Instruction, unit: Multiprocessor, turn: Turn | None, warps: int) -> _Op:
    role, amount = instruction.role, instruction.amount
    does, stall = _TOLD.get(role, _Does.NOTHING), instruction.stall
    occupancy = unit.longer.get(instruction.name, unit.occupancy[instruction.pipe])
    latency = unit.latency.get(instruction.name, unit.other_latency)
    if instruction.pipe is Pipe.TENSOR_MEMORY:
        occupancy *= amount
        latency += occupancy
    if role is Role.PRODUCT:
        does, amount = _Does.PRODUCT, unit.product_cycles(instruction.amount)
    elif role is Role.AWAIT_PRODUCTS:
        does = _Does.AWAIT_PRODUCTS
    elif role is Role.ARRIVE:
        stall = max(stall, unit.arrive)
    elif role is Role.FENCE:
        stall = max(stall, unit.fence)
    elif role in (Role.BARRIER_SYNC, Role.BARRIER_ARRIVE):
        if turn == Turn(instruction.amount, instruction.barrier_in_register):
            does = _Does.AWAIT_TURN if role is Role.BARRIER_SYNC else _Does.PASS_TURN
        elif role is Role.BARRIER_SYNC and warps > 1 and not 0 < amount <= unit.warpgroup_threads:
            does = _Does.MEET
        elif role is Role.BARRIER_SYNC:
            stall = max(stall, unit.barrier)
    return _Op(
        does=does,
        waits=_SCOREBOARDS[instruction.waits],
        pipe=_PIPES.index(instruction.pipe),
        occupancy=occupancy,
        stall=max(1, stall),
        result=instruction.result,
        latency=latency,
        read=instruction.read,
        amount=amount,
        ends_group=instruction.ends_group,
    )


class _Warp:
    __slots__ = (
        "at",
        "groups",
        "last",
        "met",
        "ops",
        "peers",
        "place",
        "ready",
        "rounds",
        "scoreboards",
        "turn_from",
        "turns",
    )

    def __init__(self, place: int, peers: list[_Warp], ops: Sequence[_Op]) -> None:
        self.place, self.peers = place, peers  # in its thread block
        self.ops = ops
        self.at, self.rounds, self.ready, self.last = 0, 0, 0, -1
        self.scoreboards = [0] * 6
        self.groups: deque[int] = deque([0] * 8, maxlen=8)  # when groups of products are done
        self.turns, self.turn_from = int(place == 0), 0
        self.met = False

    def state(self, now: int) -> tuple[object, ...]:
        """What decides all that it does from now on."""
        times = (self.ready, self.turn_from, *self.scoreboards, *self.groups)
        return self.at, self.turns, self.met, tuple(max(0, time - now) for time in times)


def simulate(
    ways: Sequence[Sequence[Instruction]],
    unit: Multiprocessor,
    *,
    blocks: int = 1,
    queue: int | None = None,
    turn: Turn | None = None,
    lead: int = 0,
    signal: int = 0,
    told: Iterable[int] = (),
) -> Steady:
    """Runs warps that each take their way again and again.

    Args:
        ways: of the warps of one thread block that share the part of the multiprocessor.
        blocks: thread blocks on it.
        queue: matrix products that may be issued before the tensor core has begun with them; None for any number.
        turn: the barrier at which the warps of a block take turns.
        lead: rounds by which a warp may be ahead of the last one of its block; 0 for any number.
        signal: cycles from an arrival at an mbarrier, or from the end of products that it stands for, to the waiter.
        told: mbarriers at which somebody has arrived before all begins.

    Raises:
        UnknownCode: the warps wait for each other for ever.
    """
    warps = len(ways)
    prepared = {id(way): [_prepare(instruction, unit, turn, warps) for instruction in way] for way in ways}
    everyone: list[_Warp] = []
    for _ in range(blocks):
        block: list[_Warp] = []
        block += [_Warp(place, block, prepared[id(way)]) for place, way in enumerate(ways)]
        everyone += block
    free = [0] * len(_PIPES)  # when each pipe is
    starts: deque[int] = deque(maxlen=queue or 1)  # when the last products begin
    tensor_end = 0
    arrivals: defaultdict[int, deque[int]] = defaultdict(deque)  # by mbarrier those that nobody has waited for
    for barrier in told:
        arrivals[barrier].append(0)
    now = 0
    seen: dict[object, tuple[int, int]] = {}
    marks: list[tuple[int, int]] = []  # the time, and the rounds of all warps
    first = everyone[0]
    while True:
        when, warp = -1, first
        for w in everyone:
            op = w.ops[w.at]
            if lead and w.at == 0 and w.rounds >= min(peer.rounds for peer in w.peers) + lead:
                continue
            if w.met or (op.does == _Does.AWAIT_TURN and not w.turns):
                continue
            if op.does == _Does.AWAIT_TOLD and not arrivals[op.amount]:
                continue
            time = w.ready
            for i in op.waits:
                if w.scoreboards[i] > time:
                    time = w.scoreboards[i]
            if free[op.pipe] > time:
                time = free[op.pipe]
            if op.does:
                if op.does == _Does.AWAIT_PRODUCTS:
                    time = max(time, w.groups[-1 - op.amount])
                elif op.does == _Does.AWAIT_TURN:
                    time = max(time, w.turn_from)
                elif op.does == _Does.AWAIT_TOLD:
                    time = max(time, arrivals[op.amount][0])
                elif op.does == _Does.PRODUCT and queue and len(starts) == queue:
                    time = max(time, starts[0])
            if time < now:
                time = now
            if when < 0 or time < when or (time == when and w.last < warp.last):
                when, warp = time, w
        if when < 0:
            raise UnknownCode("warps wait for each other for ever at barriers, as the model reads the code")
        if warp is first and warp.at == 0:
            rounds = sum(w.rounds for w in everyone)
            marks.append((when, rounds))
            state = (
                tuple(w.state(when) for w in everyone),
                tuple(max(0, time - when) for time in (*free, tensor_end, *starts)),
                tuple(w.rounds - first.rounds for w in first.peers) if lead else (),
                tuple((barrier, *(max(0, at - when) for at in arrivals[barrier])) for barrier in sorted(arrivals)),
            )
            if state in seen or len(marks) > _MOST_ROUNDS:
                break
            seen[state] = marks[-1]
        op = warp.ops[warp.at]
        free[op.pipe] = when + op.occupancy
        warp.ready, warp.last = when + op.stall, when
        if op.result != NO_SCOREBOARD:
            warp.scoreboards[op.result] = max(warp.scoreboards[op.result], when + op.latency)
        if op.read != NO_SCOREBOARD:
            warp.scoreboards[op.read] = max(warp.scoreboards[op.read], when + unit.read_latency)
        if op.does:
            if op.does == _Does.PRODUCT:
                start = max(when + unit.product_start, tensor_end)
                tensor_end = start + op.amount
                starts.append(start)
                if op.ends_group:
                    warp.groups.append(tensor_end + unit.product_end)
            elif op.does == _Does.TENSOR_PRODUCT:
                tensor_end = max(when + unit.product_start, tensor_end) + op.amount
            elif op.does == _Does.TELL_WHEN_DONE:
                arrivals[op.amount].append(max(when, tensor_end) + signal)
            elif op.does == _Does.TELL:
                arrivals[op.amount].append(when + signal)
            elif op.does == _Does.AWAIT_TOLD:
                arrivals[op.amount].popleft()
            elif op.does == _Does.AWAIT_TURN:
                warp.turns -= 1
            elif op.does == _Does.PASS_TURN:
                heir = warp.peers[(warp.place + 1) % warps]
                heir.turns, heir.turn_from = heir.turns + 1, when + unit.barrier
            elif op.does == _Does.MEET:
                warp.met = True
                if all(peer.met for peer in warp.peers):
                    for peer in warp.peers:
                        peer.met, peer.ready = False, max(peer.ready, when + unit.barrier)
        warp.at += 1
        if warp.at == len(warp.ops):
            warp.at, warp.rounds = 0, warp.rounds + 1
        now = when + 1
    begin = seen.get(state, marks[len(marks) // 2])
    end = marks[-1]
    cycles = (end[0] - begin[0]) * len(everyone) / (end[1] - begin[1])
    return Steady(cycles, _busy([w.ops for w in everyone], cycles))


def _busy(all_ops: Sequence[Sequence[_Op]], cycles: float) -> dict[str, float]:
    occupied = {pipe: 0 for pipe in Pipe if pipe is not Pipe.CONTROL}
    for op in chain.from_iterable(all_ops):
        if op.does == _Does.TENSOR_PRODUCT:
            occupied[Pipe.TENSOR] += op.amount
        if (pipe := _PIPES[op.pipe]) is not Pipe.CONTROL:
            occupied[pipe] += op.amount if op.does == _Does.PRODUCT else op.occupancy
    shares = {pipe.value: time / cycles for pipe, time in occupied.items()}
    return {**shares, "issue": sum(map(len, all_ops)) / cycles}
