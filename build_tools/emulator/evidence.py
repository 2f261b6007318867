"""Decides from recordings of a correct kernel whether a mutant breaks the PTX rule that it stands for.

Nothing here looks at what the emulator makes of the mutant. Where a condition can't be decided exactly, it errs towards
calling the mutant wrong.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .history import TENSOR, WORDS, Access, CtaHistory, History, WarpHistory
from .mutation import Mutant

_RELEASES = ("mbarrier.arrive", "bar.", "barrier.")
_END = 1 << 60


@dataclass(frozen=True)
class Verdict:
    """Says that a mutant is wrong by its rule, or isn't, and why. ``reached``: the runs executed the instruction."""

    wrong: bool
    reason: str
    reached: bool = True


class Evidence(History):
    """Judges which mutants of the kernel recorded are wrong."""

    def verdict(self, mutant: Mutant) -> Verdict:
        """Whether the mutant breaks its rule."""
        opcode = mutant.instruction.split()[0].rstrip(";")
        index = self.lines.get((mutant.line, opcode))
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

    _thread_fence = _always

    def _phase_wait(self, index: int, _mutant: Mutant) -> str | None:
        if index not in self.found_open:
            return "its phase was complete whenever it looked, in all schedules recorded"
        if all(self._passes_turns(cta, index) for cta in self.ctas):
            return "it only passes turns: no copies complete there, and what it alone orders has no conflict"
        return None

    def _passes_turns(self, cta: CtaHistory, index: int) -> bool:
        """Whether what the wait alone orders has no conflict.

        That is: what an arriver did since its last arrival that the waiter had seen, and what the waiter does until it
        sees a later one.
        """
        wgmmas = any(opcode.startswith("wgmma") for opcode in self.opcodes)
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
                if wgmmas:  # they read on after arrivals for other stages
                    known = 0
                if arriver != warp and self._conflict(self._accesses(cta, arriver, known, when), future):
                    return False
        return True

    def _accesses(self, cta: CtaHistory, warp: int, begin: int, end: int) -> list[Access]:
        """What a warp accessed in an interval, mbarriers left out: they are made for that."""
        barriers = {address // 4 for address in cta.used}
        return [
            access
            for segment in cta.warps[warp].segments
            for access in segment
            if begin <= access[3] < end and access[0] not in barriers
        ]

    @staticmethod
    def _conflict(a: Sequence[Access], b: Sequence[Access]) -> bool:
        marks = np.zeros((2, WORDS), bool)
        for low, high, write, _ in a:
            marks[int(write), low:high] = True
        any_access = marks[0] | marks[1]
        return any((any_access if write else marks[1])[low:high].any() for low, high, write, _ in b)

    def _arrival(self, index: int, _mutant: Mutant) -> str | None:
        if any(index in phase.arrivals and phase.waiters for cta in self.ctas for phase in cta.phases.values()):
            return None
        return "nobody waits for any phase that it ends"

    def _expected_bytes(self, index: int, _mutant: Mutant) -> str | None:
        for cta in self.ctas:
            if any(cta.phases[at].waiters and cta.phases[at].copies for at in cta.expects[index]):
                return None
        return "nobody waits for a phase with these bytes"

    def _initialisation(self, index: int, _mutant: Mutant) -> str | None:
        if any(cta.initialised[index] & cta.used for cta in self.ctas):
            return None
        return "nothing else uses the mbarriers that it initialises"

    def _initialisation_fence(self, index: int, _mutant: Mutant) -> str | None:
        """Wrong if copies complete on a barrier that its thread initialised, without another, or one of proxies,
        before its use."""
        kinds = ("fence.mbarrier_init", "fence.proxy.async")
        fence = {i for i, opcode in enumerate(self.opcodes) if opcode.startswith(kinds) and ".global" not in opcode}
        for cta in self.ctas:
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
                    if instruction in fence:
                        pending.clear()
        return "another fence covers the barriers on which copies complete"

    def _barrier(self, index: int, _mutant: Mutant) -> str | None:
        for cta in self.ctas:
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
                past = {w: _join(cta.warps[w].segments[before.get(w, -1) + 1 : s + 1]) for w, _, s in members}
                future = {
                    w: _join(cta.warps[w].segments[s + 1 : self._next(cta, w, s, group) + 1]) for w, _, s in members
                }
                if any(
                    self._conflict(past[a], future[b]) for a in past for b in future if a != b and past[a] and future[b]
                ):
                    return None
        return "no thread that meets here accesses shared or tensor memory in conflict with what another did before"

    @staticmethod
    def _next(cta: CtaHistory, warp: int, segment: int, group: frozenset[int]) -> int:
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
            fences = [at for at, i in enumerate(warp.code) if self.opcodes[i].startswith("wgmma.fence")]
            for number, position in enumerate(fences):
                if warp.code[position] != index:
                    continue
                until = fences[number + 1] if number + 1 < len(fences) else len(warp.code)
                behind = {i for i in warp.code[position:until] if self.opcodes[i].startswith("wgmma.mma")}
                before = set(warp.code[fences[max(number, 1) - 1] : position])
                before -= {i for i in before if self.opcodes[i].startswith("wgmma")}
                touched = {register for i in before for register in self.registers[i]}
                if behind and (number == 0 or any(self._fragments(i) & touched for i in behind)):
                    return None
        return "no register of the wgmmas behind it was touched since the fence before"

    def _fragments(self, instruction: int) -> set[str]:
        """Accumulators of a wgmma, and its registers of A."""
        return {
            r for group in re.findall(r"\{([^}]*)\}", self.statements[instruction]) for r in re.findall(r"%\w+", group)
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
                    events.append((position, "wait", self.number(instruction)))
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
            correct, mutated = _covering_waits(events), _covering_waits(changed)
            for item, at in correct.items():
                late = mutated.get(item, _END)
                if late > at and (late == _END or self._relied_on(warp, item, at, late, work is not None)):
                    return None
        return "all that it waits for is waited for by others before anything relies on it"

    def _relied_on(self, warp: WarpHistory, item: int, low: int, high: int, matrix: bool) -> bool:
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
            if not opcode.startswith("wgmma") and self.registers[instruction] & fragments:
                return True
        return False

    def _tensor_wait(self, index: int, work: str, wait: str) -> str | None:
        relied_on = (*_RELEASES, "tcgen05.commit", "tcgen05.ld", "tcgen05.mma", "tcgen05.cp", "tcgen05.dealloc")
        for warp in self._distinct_warps():
            outstanding = False
            for position, instruction in enumerate(warp.code):
                if instruction == index and outstanding:
                    if work != "tcgen05.st":
                        return None
                    later = (self.opcodes[i] for i in warp.code[position + 1 :])
                    if not next((x for x in later if x.startswith((wait, *relied_on))), "").startswith(wait):
                        return None
                if self.opcodes[instruction].startswith(wait):
                    outstanding = False
                elif self.opcodes[instruction].startswith(work):
                    outstanding = True
        return "nothing is in flight when it waits, or the next wait comes before anything relies on it"

    def _tensor_load_wait(self, index: int, _mutant: Mutant) -> str | None:
        return self._tensor_wait(index, "tcgen05.ld", "tcgen05.wait::ld")

    def _tensor_store_wait(self, index: int, _mutant: Mutant) -> str | None:
        return self._tensor_wait(index, "tcgen05.st", "tcgen05.wait::st")

    def _tensor_fence(self, index: int, _mutant: Mutant) -> str | None:
        """Wrong if, on its side of it and up to the next such fence, its warp accesses cells in conflict with another
        warp on the other side, and the warp itself doesn't access them between the two."""
        before = "before_thread_sync" in self.opcodes[index]
        kinds = ("tcgen05.fence::before", "tcgen05.commit") if before else ("tcgen05.fence::after",)
        for cta in self.ctas:
            cells = {number: _in_tensor_memory(_join(warp.segments)) for number, warp in cta.warps.items()}
            for number, warp in cta.warps.items():
                if index not in warp.code:
                    continue
                own = cells[number]
                others = [x for other, accesses in cells.items() if other != number for x in accesses]
                fences = [
                    (at, i) for at, i in zip(warp.when, warp.code, strict=True) if self.opcodes[i].startswith(kinds)
                ]
                for place, (at, instruction) in enumerate(fences):
                    if instruction != index:
                        continue
                    low = fences[place - 1][0] if before and place else at if not before else 0
                    high = at if before else fences[place + 1][0] if place + 1 < len(fences) else _END
                    mine = [x for x in own if low < x[3] < high]
                    theirs = [x for x in others if (x[3] > at) == before]
                    if any(_in_conflict(a, b) and not _touched(own, a, b) for a in mine for b in theirs):
                        return None
        return "no conflict with another warp's accesses is ordered through it"

    def _distinct_warps(self) -> list[WarpHistory]:
        """Warps of the first recording, one per sequence of instructions."""
        if not hasattr(self, "_distinct"):
            distinct: dict[int, WarpHistory] = {}
            for cta in self.ctas:
                for warp in cta.warps.values():
                    distinct.setdefault(hash(tuple(warp.code)), warp)
            self._distinct = list(distinct.values())
        return self._distinct


def _join(segments: Sequence[list[Access]]) -> list[Access]:
    return [access for segment in segments for access in segment]


def _in_tensor_memory(accesses: Sequence[Access]) -> list[Access]:
    """Those by loads, stores and MMAs: dealloc, of all of it, needs no fence."""
    return [x for x in accesses if x[0] >= TENSOR and x[:2] != (TENSOR, WORDS)]


def _in_conflict(a: Access, b: Access) -> bool:
    return (a[2] or b[2]) and a[0] < b[1] and b[0] < a[1]


def _touched(own: Sequence[Access], a: Access, b: Access) -> bool:
    """Whether accesses of the warp that did ``a`` come between ``a`` and ``b``, to some of the same cells."""
    first, last = sorted((a[3], b[3]))
    low, high = max(a[0], b[0]), min(a[1], b[1])
    return any(first < x[3] < last and x[0] < high and low < x[1] for x in own)


def _covering_waits(events: Sequence[tuple[int, str, int]]) -> dict[int, int]:
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
