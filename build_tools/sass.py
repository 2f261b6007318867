"""Reads machine code of sm_90 and sm_100 as far as the checks of a build need: which instructions, in which order.

A cubin is an ELF file with a section ``.text.<kernel>`` of 128-bit instructions, whose low 12 bits are the opcode. The
toolkit's disassembler would say more, but the pip wheels of the compiler don't bring it. The time model in ``cycles``
reads more of an instruction.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from .errors import BuildError

_HEADER = struct.Struct("<16s2xH4x8x8xQ4x2x4xHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")

# Opcodes as nvdisasm 13 names them.
HGMMA_SHARED, HGMMA_REGISTERS = 0x9F0, 0xDF0  # where the left factor is
UTCHMMA_SHARED, UTCHMMA_TENSOR = 0x5EA, 0x9EA  # likewise: shared or tensor memory
MUFU = 0x308
_SET_REGISTERS = 0x9C8  # USETMAXREG; the number is in bits 32 to 40
LOCAL_LOAD, LOCAL_STORE = 0x983, 0x387
_WARPGROUP = 0x9C5  # ARRIVE, or DEPBAR where bit 47 is set
_DEPBAR = 1 << 47
_BRANCH, _EXIT = 0x947, 0x94D
_ALWAYS = 7  # the predicate of what is done always, in bits 12 to 15


@dataclass(frozen=True)
class Sass:
    """A kernel's instructions as (low word, high word)."""

    instructions: tuple[tuple[int, int], ...]

    def count(self, opcode: int) -> int:
        """How many instructions have this opcode."""
        return sum(low & 0xFFF == opcode for low, _ in self.instructions)

    def local_accesses(self) -> dict[int, int]:
        """Accesses to local memory, which is where registers are spilled, by the registers a thread that the
        setmaxnreg before them set; 0 stands for code before the first. Warpgroups with roles of their own set them
        first, and the compiler leaves their code behind that, but for a few blocks at the kernel's end."""
        found = {0: 0}
        for registers, (low, _) in self._by_registers():
            found[registers] = found.get(registers, 0) + (low & 0xFFF in (LOCAL_LOAD, LOCAL_STORE))
        return found

    def code_of(self, registers: int) -> Sass:
        """The code of warps that set so many registers a thread; see `local_accesses`."""
        return Sass(tuple(instruction for own, instruction in self._by_registers() if own == registers))

    def _by_registers(self) -> Iterator[tuple[int, tuple[int, int]]]:
        """Instructions, each with the registers that the setmaxnreg before it set."""
        registers = 0
        for low, high in self.instructions:
            if low & 0xFFF == _SET_REGISTERS:
                registers = low >> 32 & 0x1FF
            yield registers, (low, high)

    def overlap(self, opcode: int) -> int:
        """Instructions of this opcode while a product is under way: the most from a wait that leaves one pending to
        where the next wait of any kind ends it. Ways that a branch forward opens count apart, and where ways with a
        product pending meet, the one with the fewest counts: a wait in code that is skipped ends nothing."""
        return max(self._overlaps(opcode), default=0)

    def overlap_everywhere(self, opcode: int) -> int:
        """Instructions of this opcode while a product is under way, of all such stretches of code together."""
        return sum(1 for _ in self._overlaps(opcode))

    def _overlaps(self, opcode: int) -> Iterator[int]:
        """Of each instruction of this opcode while a product is under way, the how manieth it is since the wait."""
        current: int | None = None  # no product is pending, or nothing comes this way
        arriving: dict[int, int] = {}  # by the instruction where a branch goes: counts
        for index, (low, high) in enumerate(self.instructions):
            if (jumped := arriving.pop(index, None)) is not None:
                current = jumped if current is None else min(current, jumped)
            if low & 0xFFF == _WARPGROUP and low & _DEPBAR:
                current = 0 if high >> 8 & 0x7 > 0 else None
            elif low & 0xFFF == opcode and current is not None:
                current += 1
                yield current
            elif low & 0xFFF in (_BRANCH, _EXIT):
                target = _branch_target(index, low, high) if low & 0xFFF == _BRANCH else 0
                if target > index and current is not None:
                    arriving[target] = min(current, arriving.get(target, current))
                if low >> 12 & 0xF == _ALWAYS:
                    current = None


def _branch_target(index: int, low: int, high: int) -> int:
    """The instruction where a branch at ``index`` goes: relative to the next one, in units of 4 bytes of which an
    instruction has 16; bits 16 to 23 are the offset's lowest, those from 34 on the others."""
    offset = (low >> 34 | (high & 0x3FFFF) << 30) << 8 | low >> 16 & 0xFF
    if offset >> 55:
        offset -= 1 << 56
    return index + 1 + offset // 4


def read_cubin(data: bytes) -> Sass:
    """The code of the kernel in a cubin: the longest, where others prepare for it.

    Raises:
        BuildError: the file is no cubin, or holds no kernel.
    """
    if data[:5] != b"\x7fELF\x02":
        raise BuildError("the compiler's cubin is no 64-bit ELF file")
    try:
        _, _, offset, size, count, names_index = _HEADER.unpack_from(data)
        sections = [_SECTION.unpack_from(data, offset + i * size) for i in range(count)]
        start = sections[names_index][4]
        found = [s for s in sections if data.startswith(b".text.", start + s[0])]
        texts = [tuple(struct.iter_unpack("<QQ", data[s[4] : s[4] + s[5]])) for s in found]
    except (struct.error, IndexError) as error:
        raise BuildError(f"the compiler's cubin is damaged: {error}") from error
    if not texts:
        raise BuildError("the compiler's cubin holds no kernel")
    return Sass(max(texts, key=len))
