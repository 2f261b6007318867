"""Reads recordings of a kernel, per CTA: who executed, accessed, arrived at and waited for what."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from .module import Module
from .recording import EVENTS, Recording

TENSOR = 1 << 18  # where tensor memory lies in the words of `Access`: behind shared memory
WORDS = TENSOR + 4 * 512  # 4 bytes of shared memory each; a quarter of the lanes and a column of tensor memory each

Access = tuple[int, int, bool, int]
"""Words of shared or tensor memory, from and to; whether a write; when."""


@dataclass
class Phase:
    """One phase of one mbarrier: instructions and warps that took part."""

    arrivals: set[int] = field(default_factory=set)
    arrivers: dict[int, int] = field(default_factory=dict)  # warp: when last
    waiters: dict[int, int] = field(default_factory=dict)  # warp: when first
    copies: bool = False


@dataclass
class WarpHistory:
    """A warp's instructions in order, and what it accessed between the barriers that it entered."""

    code: list[int] = field(default_factory=list)
    when: list[int] = field(default_factory=list)  # record number of each
    stores: dict[int, list[tuple[int, int]]] = field(default_factory=dict)  # what the bulk store at a position reads
    segments: list[list[Access]] = field(default_factory=lambda: [[]])  # a barrier ends one
    entered: list[tuple[int, int]] = field(default_factory=list)  # barrier number and generation after each segment
    groups: list[list[tuple[int, int]]] = field(default_factory=lambda: [[]])  # of bulk stores, the last one open
    writes: list[tuple[int, int, int]] = field(default_factory=list)  # of its CTA: when, from, to


@dataclass
class CtaHistory:
    """A CTA's warps, mbarriers and barriers. Instructions and warps are numbers, mbarriers are addresses."""

    warps: dict[int, WarpHistory] = field(default_factory=lambda: defaultdict(WarpHistory))
    phases: dict[tuple[int, int], Phase] = field(default_factory=lambda: defaultdict(Phase))
    initialised: dict[int, set[int]] = field(default_factory=lambda: defaultdict(set))  # instruction: mbarriers
    used: set[int] = field(default_factory=set)  # mbarriers
    seen: dict[int, list[tuple[int, Phase]]] = field(default_factory=lambda: defaultdict(list))  # by warp: waited for
    expects: dict[int, set[tuple[int, int]]] = field(default_factory=lambda: defaultdict(set))  # instruction: phases
    waits: dict[int, set[tuple[int, int, int]]] = field(default_factory=lambda: defaultdict(set))
    instances: dict[tuple[int, int], list[tuple[int, int, int]]] = field(default_factory=lambda: defaultdict(list))
    writes: list[tuple[int, int, int]] = field(default_factory=list)  # to shared memory: when, from, to
    commits: Counter[tuple[int, int]] = field(default_factory=Counter)  # warp, instruction: arrivals so far


class History:
    """Answers questions about recordings of a correct kernel.

    Args:
        module: the kernel.
        text: its PTX.
        recordings: recordings of several schedules.
    """

    def __init__(self, module: Module, text: str, recordings: Iterable[Recording]) -> None:
        self.opcodes = [opcode for _, opcode in module.instructions]
        self.lines: dict[tuple[int, str], int] = {}
        self.statements = _statements(text, module.instructions)
        for index, (line, opcode) in enumerate(module.instructions):
            self.lines.setdefault((line, opcode), index)
        self.registers = [set(re.findall(r"%\w+", statement)) for statement in self.statements]
        self.ctas: list[CtaHistory] = []
        self.executed: set[int] = set()
        self.found_open: set[int] = set()
        self.fences_needed: set[int] = set()
        for recording in recordings:
            self._read(recording)

    # --- reading

    def _read(self, recording: Recording) -> None:
        columns = [recording.records[name].tolist() for name in ("event", "warp", "instruction", "address", "value")]
        cta = CtaHistory()
        written: dict[int, tuple[int, int]] = {}  # 16 bytes of shared memory: when and by which warp
        fences: dict[int, list[tuple[int, int]]] = defaultdict(list)  # by warp: when, instruction
        proxy = {i for i, opcode in enumerate(self.opcodes) if opcode.startswith("fence.proxy.async")}
        for now, (event, index, instruction, address, value) in enumerate(zip(*columns, strict=True)):
            name = EVENTS[event]
            if name == "cta":
                cta = CtaHistory()
                self.ctas.append(cta)
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
                    warp.segments[-1].append((TENSOR, WORDS, True, now))
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
                if self.opcodes[instruction].startswith("tcgen05.dealloc"):
                    continue  # noted as a whole where it ends
                first = TENSOR + (address >> 16) * 512 + (address & 0xFFFF)
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

    def _read_bulk_group(self, warp: WarpHistory, instruction: int, now: int) -> None:
        """A bulk store reads until it is waited for: by that wait, as far as barriers are concerned."""
        opcode = self.opcodes[instruction]
        if opcode.startswith("cp.async.bulk.commit_group"):
            warp.groups.append([])
        elif opcode.startswith("cp.async.bulk.wait_group"):
            while len(warp.groups) - 1 > self.number(instruction):
                warp.segments[-1] += [(low // 4, high // 4, False, now) for low, high in warp.groups.pop(0)]
        elif opcode.startswith("cp.") and (stores := warp.stores.get(len(warp.code) - 1)):
            warp.groups[-1] += stores

    def number(self, instruction: int) -> int:
        """The number that a wait for groups ends with."""
        return int(re.findall(r"(\d+)\s*$", self.statements[instruction])[0])

    def _read_mbarrier(
        self, cta: CtaHistory, now: int, name: str, warp: int, instruction: int, address: int, value: int
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
                number = cta.commits[warp, instruction]
                cta.commits[warp, instruction] += 1
                times = [at for i, at in zip(own.code, own.when, strict=True) if i == instruction]
                issued = times[number] if number < len(times) else now  # its end is recorded after an eager arrival
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
