"""Decides from recordings of a correct kernel whether a mutant breaks the PTX rule that it stands for.

Nothing here looks at what the emulator makes of the mutant. Where a condition can't be decided exactly, it errs towards
calling the mutant wrong.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from .module import Module
from .mutation import Mutant
from .recording import EVENTS, Recording

_TENSOR = 1 << 20  # where tensor memory lies in the space of `Access`: behind shared memory
_WORDS = (1 << 16) + 4 * 512  # of 4 bytes of shared memory; a quarter of the lanes and a column of tensor memory each
_RELEASES = ("mbarrier.arrive", "bar.", "barrier.")
_EVENT = {name: index for index, name in enumerate(EVENTS)}
_END = 1 << 60

_Access = tuple[int, int, bool, int]
"""Words of shared or tensor memory, from and to; whether a write; when."""


@dataclass(frozen=True)
class Verdict:
    """Whether a mutant is wrong by its rule, and why it is or isn't. ``reached``: the runs executed the instruction."""

    wrong: bool
    reason: str
    reached: bool = True


@dataclass
class _Phase:
    """One phase of one mbarrier: instructions and warps that took part."""

    arrivals: set[int] = field(default_factory=set)
    arrivers: dict[int, int] = field(default_factory=dict)  # warp: when last
    waiters: dict[int, int] = field(default_factory=dict)  # warp: when first
    copies: bool = False


@dataclass
class _Warp:
    """A warp's instructions in order, and what it accessed between the barriers that it entered."""

    code: list[int] = field(default_factory=list)
    when: list[int] = field(default_factory=list)  # record number of each
    stores: dict[int, list[tuple[int, int]]] = field(
        default_factory=dict
    )  # ranges read by the bulk store at a position
    segments: list[list[_Access]] = field(default_factory=lambda: [[]])  # a barrier ends one
    entered: list[tuple[int, int]] = field(default_factory=list)  # barrier number and generation after each segment
    groups: list[list[tuple[int, int]]] = field(
        default_factory=lambda: [[]]
    )  # bulk stores not waited for, last one open
    writes: list[tuple[int, int, int]] = field(default_factory=list)  # of its CTA: when, from, to


@dataclass
class _Cta:
    warps: dict[int, _Warp] = field(default_factory=lambda: defaultdict(_Warp))
    phases: dict[tuple[int, int], _Phase] = field(default_factory=lambda: defaultdict(_Phase))
    initialised: dict[int, set[int]] = field(default_factory=lambda: defaultdict(set))  # instruction: mbarriers
    used: set[int] = field(default_factory=set)  # mbarriers
    seen: dict[int, list[tuple[int, _Phase]]] = field(
        default_factory=lambda: defaultdict(list)
    )  # by warp: phases waited for
    expects: dict[int, set[tuple[int, int]]] = field(default_factory=lambda: defaultdict(set))  # instruction: phases
    waits: dict[int, set[tuple[int, int, int]]] = field(default_factory=lambda: defaultdict(set))
    instances: dict[tuple[int, int], list[tuple[int, int, int]]] = field(default_factory=lambda: defaultdict(list))
    writes: list[tuple[int, int, int]] = field(default_factory=list)  # to shared memory: when, from, to


class Evidence:
    """What recordings of a correct kernel say about its synchronising instructions.

    Args:
        module: the kernel.
        text: its PTX.
        recordings: recordings of several schedules.
    """

    def __init__(self, module: Module, text: str, recordings: Iterable[Recording]) -> None:
        self.opcodes = [opcode for _, opcode in module.instructions]
        self._lines: dict[tuple[int, str], int] = {}
        self._statements = _statements(text, module.instructions)
        for index, (line, opcode) in enumerate(module.instructions):
            self._lines.setdefault((line, opcode), index)
        self._registers = [set(re.findall(r"%\w+", statement)) for statement in self._statements]
        self._ctas: list[_Cta] = []
        self.executed: set[int] = set()
        self.found_open: set[int] = set()
        self.fences_needed: set[int] = set()
        for recording in recordings:
            self._read(recording)

    # --- reading

    def _read(self, recording: Recording) -> None:
        columns = [recording.records[name].tolist() for name in ("event", "warp", "instruction", "address", "value")]
        cta = _Cta()
        written: dict[int, tuple[int, int]] = {}  # 16 bytes of shared memory: when and by which warp
        fences: dict[int, list[tuple[int, int]]] = defaultdict(list)  # by warp: when, instruction
        proxy = {i for i, opcode in enumerate(self.opcodes) if opcode.startswith("fence.proxy.async")}
        for now, (event, index, instruction, address, value) in enumerate(zip(*columns, strict=True)):
            name = EVENTS[event]
            if name == "cta":
                cta = _Cta()
                self._ctas.append(cta)
                written.clear()
                fences.clear()
                continue
            warp = cta.warps[index]
            warp.writes = cta.writes
            if name == "execute":
                warp.code.append(instruction)
                warp.when.append(now)
                self.executed.add(instruction)
                self._read_bulk_group(warp, instruction, now)
                if instruction in proxy:
                    fences[index].append((now, instruction))
                elif self.opcodes[instruction].startswith("tcgen05.dealloc"):
                    warp.segments[-1].append((_TENSOR // 4, _TENSOR // 4 + 2048, True, now))
            elif name in ("read", "write", "async_read", "async_write"):
                warp.segments[-1].append((address // 4, (address + value + 3) // 4, name.endswith("write"), now))
                if name == "write":
                    for granule in range(address // 16, (address + value + 15) // 16):
                        written[granule] = (now, index)
                elif name == "async_write" and written:
                    for granule in range(address // 16, (address + value + 15) // 16):
                        written.pop(granule, None)
                elif name == "async_read" and written:
                    self._check_proxy(range(address // 16, (address + value + 15) // 16), index, written, fences)
                if name.endswith("write"):
                    cta.writes.append((now, address, address + value))
                if name == "async_read" and self.opcodes[instruction].startswith("cp."):
                    warp.stores.setdefault(len(warp.code), []).append((address, address + value))
            elif name in ("tensor_read", "tensor_write"):
                first = _TENSOR // 4 + (address >> 16) * 512 + (address & 0xFFFF)
                warp.segments[-1].append((first, first + value, name == "tensor_write", now))
            elif name == "barrier":
                cta.instances[address, value].append((index, instruction, len(warp.segments) - 1))
                warp.entered.append((address, value))
                warp.segments.append([])
            elif name == "landed":
                pass
            else:
                self._read_mbarrier(cta, now, name, index, instruction, address, value)
                warp.segments[-1].append((address // 4, address // 4 + 2, name == "init", now))

    def _read_bulk_group(self, warp: _Warp, instruction: int, now: int) -> None:
        """A bulk store reads until it is waited for: by that wait, as far as barriers are concerned."""
        opcode = self.opcodes[instruction]
        if opcode.startswith("cp.async.bulk.commit_group"):
            warp.groups.append([])
        elif opcode.startswith("cp.async.bulk.wait_group"):
            while len(warp.groups) - 1 > self._number(instruction):
                warp.segments[-1] += [(low // 4, high // 4, False, now) for low, high in warp.groups.pop(0)]
        elif opcode.startswith("cp.") and (stores := warp.stores.get(len(warp.code) - 1)):
            warp.groups[-1] += stores

    def _number(self, instruction: int) -> int:
        """The number that a wait for groups ends with."""
        return int(re.findall(r"(\d+)\s*$", self._statements[instruction])[0])

    def _read_mbarrier(
        self, cta: _Cta, now: int, name: str, warp: int, instruction: int, address: int, value: int
    ) -> None:
        phase = cta.phases[address, value]
        if name == "init":
            cta.initialised[instruction].add(address)
            return
        cta.used.add(address)
        if name == "arrive":
            phase.arrivals.add(instruction)
            issued = now
            if self.opcodes[instruction].startswith("tcgen05.commit"):  # it tells of what came before it was issued
                own = cta.warps[warp]
                issued = next(
                    (at for i, at in zip(reversed(own.code), reversed(own.when), strict=True) if i == instruction), now
                )
            phase.arrivers[warp] = max(issued, phase.arrivers.get(warp, 0))
        elif name == "complete":
            phase.copies = True
        elif name == "expect":
            cta.expects[instruction].add((address, value))
        elif name == "wait_open":
            self.found_open.add(instruction)
            cta.waits[instruction].add((warp, address, value))
        elif name == "wait_done":
            phase.waiters.setdefault(warp, now)
            cta.seen[warp].append((now, phase))
            cta.waits[instruction].add((warp, address, value))

    def _check_proxy(
        self,
        granules: range,
        issuer: int,
        written: dict[int, tuple[int, int]],
        fences: dict[int, list[tuple[int, int]]],
    ) -> None:
        """Notes a proxy fence that alone stands between a generic write and this access of the async proxy."""
        for writer in {written.pop(granule) for granule in granules if granule in written}:
            when, warp = writer
            between = [instruction for other in {warp, issuer} for at, instruction in fences[other] if at > when]
            if len(set(between)) == 1:
                self.fences_needed.add(between[0])

    # --- verdicts

    def verdict(self, mutant: Mutant) -> Verdict:
        """Whether the mutant breaks its rule."""
        opcode = mutant.instruction.split()[0].rstrip(";")
        index = self._lines.get((mutant.line, opcode))
        if index is None:
            raise ValueError(f"no instruction {opcode} in line {mutant.line}")
        if index not in self.executed:
            return Verdict(False, "never executed", reached=False)
        kind = mutant.rule.kind.replace(" ", "_")
        why: str | None = getattr(self, f"_{kind}")(index, mutant)
        return Verdict(why is None, why or mutant.rule.why)

    # Each returns None if the mutant is wrong, else the reason why it is not.

    def _always(self, _index: int, _mutant: Mutant) -> str | None:
        return None

    _thread_fence = _tensor_fence = _always

    def _phase_wait(self, index: int, _mutant: Mutant) -> str | None:
        if index not in self.found_open:
            return "its phase was complete whenever it looked, in all schedules recorded"
        if all(self._passes_turns(cta, index) for cta in self._ctas):
            return "it only passes turns: no copies complete there, and arrivers and waiters share no memory that either writes"
        return None

    def _passes_turns(self, cta: _Cta, index: int) -> bool:
        """Whether what the wait alone orders has no conflict.

        That is: what an arriver did since the last arrival of its that the waiter had seen, and what the waiter does until
        it sees a later one.
        """
        for warp, address, number in cta.waits[index]:
            phase = cta.phases.get((address, number))
            if phase is None or warp not in phase.waiters:
                continue
            if phase.copies:
                return False
            begin = phase.waiters[warp]
            later = [(at, other) for at, other in cta.seen[warp] if at > begin and other is not phase]
            earlier = [other for at, other in cta.seen[warp] if at < begin and other is not phase]
            for arriver, when in phase.arrivers.items():
                end = next((at for at, other in later if other.arrivers.get(arriver, -1) >= when), _END)
                future = self._accesses(cta, warp, begin, end)
                known = max((at for other in earlier if (at := other.arrivers.get(arriver, 0)) < when), default=0)
                if arriver != warp and self._conflict(self._accesses(cta, arriver, known, when), future):
                    return False
        return True

    def _accesses(self, cta: _Cta, warp: int, begin: int, end: int) -> list[_Access]:
        """What a warp accessed in an interval, mbarriers left out: they are made for that."""
        barriers = {address // 4 for address in cta.used}
        return [
            access
            for segment in cta.warps[warp].segments
            for access in segment
            if begin <= access[3] < end and access[0] not in barriers
        ]

    @staticmethod
    def _conflict(a: Sequence[_Access], b: Sequence[_Access]) -> bool:
        marks = np.zeros((2, _TENSOR // 4 + _WORDS), bool)
        for low, high, write, _ in a:
            marks[int(write), low:high] = True
        any_access = marks[0] | marks[1]
        return any((any_access if write else marks[1])[low:high].any() for low, high, write, _ in b)

    def _arrival(self, index: int, _mutant: Mutant) -> str | None:
        if any(index in phase.arrivals and phase.waiters for cta in self._ctas for phase in cta.phases.values()):
            return None
        return "nobody waits for any phase that it ends"

    def _expected_bytes(self, index: int, _mutant: Mutant) -> str | None:
        for cta in self._ctas:
            if any(cta.phases[at].waiters and cta.phases[at].copies for at in cta.expects[index]):
                return None
        return "nobody waits for a phase with these bytes"

    def _initialisation(self, index: int, _mutant: Mutant) -> str | None:
        if any(cta.initialised[index] & cta.used for cta in self._ctas):
            return None
        return "nothing else uses the mbarriers that it initialises"

    def _initialisation_fence(self, index: int, _mutant: Mutant) -> str | None:
        """Wrong if copies complete on a barrier that this thread initialised, with no other such fence before its use."""
        fence = {i for i, opcode in enumerate(self.opcodes) if opcode.startswith("fence.mbarrier_init")}
        for cta in self._ctas:
            signalled = {address for (address, _), phase in cta.phases.items() if phase.copies}
            for warp in cta.warps.values():
                pending: set[int] = set()
                for position, instruction in enumerate(warp.code):
                    if instruction in cta.initialised:
                        pending |= cta.initialised[instruction] & signalled
                    if instruction == index and pending:
                        later = warp.code[position + 1 :]
                        until = next(
                            (i for i, x in enumerate(later) if self.opcodes[x].startswith(_RELEASES)), len(later)
                        )
                        if not fence & set(later[:until]):
                            return None
        return "another fence.mbarrier_init follows before the barriers are used, or no copy completes on them"

    def _barrier(self, index: int, _mutant: Mutant) -> str | None:
        for cta in self._ctas:
            history: dict[frozenset[int], dict[int, int]] = {}
            for members in cta.instances.values():
                group = frozenset(warp for warp, _, _ in members)
                before = history.get(group, {})
                history[group] = {warp: segment for warp, _, segment in members}
                lines = {instruction for _, instruction, _ in members}
                if index not in lines:
                    continue
                if len(lines) > 1 or len({self.opcodes[line] for line in lines}) > 1:
                    return None  # the number of threads is missed
                past = {w: _joined(cta.warps[w].segments[before.get(w, -1) + 1 : s + 1]) for w, _, s in members}
                future = {
                    w: _joined(cta.warps[w].segments[s + 1 : self._next(cta, w, s, group) + 1]) for w, _, s in members
                }
                if any(
                    self._conflict(past[a], future[b]) for a in past for b in future if a != b and past[a] and future[b]
                ):
                    return None
        return "no thread that meets here accesses shared or tensor memory in conflict with what another did before"

    @staticmethod
    def _next(cta: _Cta, warp: int, segment: int, group: frozenset[int]) -> int:
        """The last segment before the warp meets the same warps again."""
        entered = cta.warps[warp].entered
        for later in range(segment + 1, len(entered)):
            if frozenset(w for w, _, _ in cta.instances[entered[later]]) >= group:
                return later
        return len(entered)

    def _proxy_fence(self, index: int, _mutant: Mutant) -> str | None:
        if index in self.fences_needed:
            return None
        return "no bytes that its thread wrote reach the async proxy through it alone"

    def _wgmma_fence(self, index: int, _mutant: Mutant) -> str | None:
        for warp in self._distinct_warps():
            fences = [
                at for at, instruction in enumerate(warp.code) if self.opcodes[instruction].startswith("wgmma.fence")
            ]
            for number, position in enumerate(fences):
                if warp.code[position] != index:
                    continue
                until = fences[number + 1] if number + 1 < len(fences) else len(warp.code)
                behind = {i for i in warp.code[position:until] if self.opcodes[i].startswith("wgmma.mma")}
                before = {i for i in warp.code[fences[max(number, 1) - 1] : position]} - {
                    i for i, opcode in enumerate(self.opcodes) if opcode.startswith("wgmma")
                }
                touched = {register for i in before for register in self._registers[i]}
                if behind and (number == 0 or any(self._fragments(i) & touched for i in behind)):
                    return None
        return "no register of the wgmmas behind it was touched since the fence before"

    def _fragments(self, instruction: int) -> set[str]:
        """Accumulators of a wgmma, and its registers of A."""
        return {
            r for group in re.findall(r"\{([^}]*)\}", self._statements[instruction]) for r in re.findall(r"%\w+", group)
        }

    def _wgmma_wait(self, index: int, mutant: Mutant) -> str | None:
        return self._later(index, mutant, "wgmma.mma_async", "wgmma.commit_group", "wgmma.wait_group")

    def _bulk_wait(self, index: int, mutant: Mutant) -> str | None:
        return self._later(index, mutant, None, "cp.async.bulk.commit_group", "cp.async.bulk.wait_group")

    def _later(self, index: int, mutant: Mutant, work: str | None, commit: str, wait: str) -> str | None:
        """Wrong if work is waited for later than before, or never, and something relies on it in between."""
        weaker = mutant.rule.change == "waits for one group less"
        for warp in self._distinct_warps():
            if index not in warp.code:
                continue
            events: list[tuple[int, str, int]] = []
            for position, instruction in enumerate(warp.code):
                opcode = self.opcodes[instruction]
                if opcode.startswith(wait):
                    events.append((position, "wait", self._number(instruction)))
                elif opcode.startswith(commit):
                    events.append((position, "commit", 0))
                elif opcode.startswith(work) if work else position in warp.stores:
                    events.append((position, "work", 0))
            changed = []
            for position, what, number in events:
                if warp.code[position] != index:
                    changed.append((position, what, number))
                elif weaker:
                    changed.append((position, what, number + 1))
            correct, mutated = _covered(events), _covered(changed)
            for item, at in correct.items():
                late = mutated.get(item, _END)
                if late > at and (late == _END or self._relied_on(warp, item, at, late, work is not None)):
                    return None
        return "all that it waits for is waited for by others before anything relies on it"

    def _relied_on(self, warp: _Warp, item: int, low: int, high: int, matrix: bool) -> bool:
        if not matrix:
            begin, end = warp.when[low], warp.when[high] if high < len(warp.when) else _END
            writes = warp.writes[bisect_left(warp.writes, (begin,)) : bisect_left(warp.writes, (end,))]
            return any(
                first < above and below < last for _, first, last in writes for below, above in warp.stores[item]
            )
        fragments = self._fragments(warp.code[item])
        for instruction in warp.code[low + 1 : high]:
            opcode = self.opcodes[instruction]
            if opcode.startswith(_RELEASES):
                return True
            if not opcode.startswith("wgmma") and self._registers[instruction] & fragments:
                return True
        return False

    def _tensor_wait(self, index: int, work: str, wait: str) -> str | None:
        for warp in self._distinct_warps():
            outstanding = False
            for instruction in warp.code:
                if instruction == index and outstanding:
                    return None
                if self.opcodes[instruction].startswith(wait):
                    outstanding = False
                elif self.opcodes[instruction].startswith(work):
                    outstanding = True
        return "nothing is in flight when it waits"

    def _tensor_load_wait(self, index: int, _mutant: Mutant) -> str | None:
        return self._tensor_wait(index, "tcgen05.ld", "tcgen05.wait::ld")

    def _tensor_store_wait(self, index: int, _mutant: Mutant) -> str | None:
        return self._tensor_wait(index, "tcgen05.st", "tcgen05.wait::st")

    def _distinct_warps(self) -> list[_Warp]:
        """Warps of the first recording, one per sequence of instructions."""
        if not hasattr(self, "_distinct"):
            distinct: dict[int, _Warp] = {}
            for cta in self._ctas:
                for warp in cta.warps.values():
                    distinct.setdefault(hash(tuple(warp.code)), warp)
            self._distinct = list(distinct.values())
        return self._distinct


def _joined(segments: Sequence[list[_Access]]) -> list[_Access]:
    return [access for segment in segments for access in segment]


def _covered(events: Sequence[tuple[int, str, int]]) -> dict[int, int]:
    """For each piece of work the position of the wait that covers it, as bulk groups and wgmma groups have it."""
    open_group: list[int] = []
    groups: list[list[int]] = []
    covered: dict[int, int] = {}
    for position, what, keep in events:
        if what == "work":
            open_group.append(position)
        elif what == "commit":
            groups.append(open_group)
            open_group = []
        else:
            while len(groups) > keep:
                covered.update(dict.fromkeys(groups.pop(0), position))
    return covered


def _statements(text: str, instructions: Sequence[tuple[int, str]]) -> list[str]:
    """The text of each instruction."""
    lines = text.split("\n")
    starts = np.cumsum([0, *(len(line) + 1 for line in lines)]).tolist()
    found: list[str] = []
    ends: dict[tuple[int, str], int] = {}  # where the search in a line goes on, if it holds several of a kind
    for line, opcode in instructions:
        at = text.find(opcode, ends.get((line, opcode), starts[line - 1]))
        end = text.find(";", at)
        ends[line, opcode] = end
        found.append(text[at:end] if at >= 0 else "")  # the ret at a function's end may go without saying
    return found
