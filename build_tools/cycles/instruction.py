"""Instructions of sm_90 and sm_100 machine code as the time model sees them: pipe, stalls, scoreboards, branches.

NVIDIA documents none of this. An instruction's low 9 bits say what it is, the 3 above them where its operands are; bits
105 to 121 are ptxas's own schedule: cycles to stall, two scoreboards to set (when the result is there, when the
operands have been read), six to wait for. Tables and bits agree with what nvdisasm 13.5 prints of 257 cubins.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum, auto

from ..errors import BuildError
from ..sass import Sass

BYTES = 16  # of an instruction
NO_SCOREBOARD = 7


class UnknownCode(BuildError):
    """Machine code that the model can't read; says what of it."""


class Pipe(str, Enum):
    """A unit that an instruction occupies. The values are what users read."""

    TENSOR = "tensor"
    MUFU = "MUFU"
    ALU = "ALU"
    FMA = "FMA"
    INTEGER = "IMAD"
    MEMORY = "memory"  # loads, stores, shuffles, barriers: what is queued to other units
    TENSOR_MEMORY = "tensor memory"
    UNIFORM = "uniform"
    CONTROL = "control"


class Role(Enum):
    """The part that an instruction plays for the model, beside its pipe."""

    PLAIN = auto()
    BRANCH = auto()
    CALL = auto()
    STOP = auto()  # exit and return
    PRODUCT = auto()  # a matrix product of a warpgroup
    ARRIVE = auto()  # before the first product of several
    AWAIT_PRODUCTS = auto()
    BARRIER_SYNC = auto()
    BARRIER_ARRIVE = auto()
    TRANSACTION = auto()  # on an mbarrier
    MBARRIER_ARRIVE = auto()
    FENCE = auto()
    # These the code alone doesn't tell; roles.py finds them. The amount is a number of an mbarrier, or cycles.
    AWAIT_TOLD = auto()  # at an mbarrier
    TELL = auto()  # arrives there
    TENSOR_PRODUCT = auto()  # a matrix product that one thread issues
    TELL_WHEN_DONE = auto()  # arrives there once the products so far are done


_TABLE = """
FMA: FMUL 020, FADD 021, FFMA 023, HFMA2 031 035, HADD2 030, HMUL2 032, FFMA2 049, FMUL2 04a, FADD2 04b
INTEGER: IMAD 024 025 027, IDP 026
MUFU: F2I 105, I2F 106 112, MUFU 108, FLO 100, BREV 101, FRND 107, POPC 109, F2F 110
ALU: MOV 002, P2R 003, R2P 004, CS2R 005, SEL 007, FSEL 008, FMNMX 009, FSETP 00b, ISETP 00c, VIMNMX3 00f, IADD3 010,
    LEA 011, LOP3 012, IABS 013, PRMT 016, SHF 019, PLOP3 01c, VIADD 036, F2FP 03e, I2FP 045, VIADDMNMX 046,
    VIMNMX 048, FMNMX3 076, VABSDIFF 014, VABSDIFF4 015, HMNMX2 040
UNIFORM: UMOV 082, VOTEU 086, USEL 087, UISETP 08c, UIADD3 090 097, ULEA 091, ULOP3 092, UPRMT 096, USHF 099,
    UPLOP3 09c, UIMAD 0a4 0a5, ULDC 0b9 0bb, UFLO 0bd, R2UR 0ca
MEMORY: VOTE 006, ELECT 02f, STSM 044, S2R 119, BAR 11d, LD 180, LDG 181, LDC 182, LDL 183, LDS 184, ST 185,
    STG 186, STL 187, STS 188, SHFL 189, ATOMS 18c, CCTL 18f, SYNCS 1a7 1b2, LDCU 1ac, UTMALDG 1b4,
    UTMASTG 1b5, UTMACMDFLUSH 1b7, UTMACCTL 1b9, S2UR 1c3, REDUX 1c4, UTCATOMSWS 1e3, UTCBAR 1e9, UTCHMMA 1ea,
    LDSM 03b, MATCH 1a1, ATOMG 1a3 1a8, LDGSTS 1ae, LDGDEPBAR 1af, B2R 11c
CONTROL: NOP 118, DEPBAR 11a, ENDCOLLECTIVE 11b, BSYNC 141, BREAK 142, CALL 143 144, BSSY 145, YIELD 146, BRA 147,
    WARPSYNC 148, BRX 149, EXIT 14d, LEPC 14e, RET 150, BPT 15c, NANOSLEEP 15d, MEMBAR 192, ERRBAR 1ab,
    WARPGROUP 1c5, FENCE 1c6, USETMAXREG 1c8, PMTRIG 001, PREEXIT 02d,
    ACQBULK 02e, UCGABAR 1c7
TENSOR: HGMMA 1f0
TENSOR_MEMORY: STTM 1ed, LDTM 1ee
"""


def _read_table() -> dict[int, tuple[str, Pipe]]:
    found = {}
    for pipe, names in re.findall(r"(\w+):([^:]*)(?=\n|\Z)", _TABLE):
        for name, *numbers in (entry.split() for entry in names.split(",") if entry.strip()):
            found.update({int(number, 16): (name, Pipe[pipe]) for number in numbers})
    return found


_PIPES = _read_table()
_ROLES = {
    **{"BRA": Role.BRANCH, "BRX": Role.BRANCH, "CALL": Role.CALL, "EXIT": Role.STOP, "RET": Role.STOP},
    **{"HGMMA": Role.PRODUCT, "SYNCS": Role.TRANSACTION, "MEMBAR": Role.FENCE},
}


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        address: in bytes, from the kernel's start.
        name: as nvdisasm has it, without modifiers; empty if the table lacks it.
        predicated: whether a predicate may switch it off.
        target: of a branch, the address.
        amount: of a product its columns, of a wait for products how many may be pending, of a barrier its threads, of
            an access to tensor memory its columns.
        ends_group: of a product, whether a later wait can wait for it and those before it.
        barrier_in_register: of a barrier, whether its number is known at run time only.
        stall: cycles until the warp may issue its next instruction.
        result, read: scoreboards to set when the result is there, and when the operands were read; 7 for none.
        waits: a bit for each scoreboard to wait for.
    """

    address: int
    name: str
    pipe: Pipe
    role: Role
    predicated: bool
    target: int | None
    amount: int
    ends_group: bool
    barrier_in_register: bool
    stall: int
    result: int
    read: int
    waits: int


def decode(code: Sass) -> list[Instruction]:
    """All instructions of a kernel, in the order of their addresses."""
    return [_decode(index * BYTES, low, high) for index, (low, high) in enumerate(code.instructions)]


def _decode(address: int, low: int, high: int) -> Instruction:
    name, pipe = _PIPES.get(low & 0x1FF, ("", Pipe.CONTROL))
    role, amount, target = _ROLES.get(name, Role.PLAIN), 0, None
    operand = False
    if name == "BRA":
        words = (low >> 34 | (high & 0x3FFFF) << 30) << 8 | low >> 16 & 0xFF
        target = address + BYTES + 4 * (words - (words >> 55 << 56))
        operand = low & 0xFFF == 0x547 or high >> 23 & 0x1F != 7  # a uniform predicate, a second one, divergence
    elif name == "HGMMA":
        amount = 8 * ((low >> 53 & 0x1F) + 1)
    elif name == "WARPGROUP":
        role, amount = (Role.AWAIT_PRODUCTS, high >> 8 & 7) if low >> 47 & 1 else (Role.ARRIVE, 0)
    elif name == "BAR":
        role = Role.BARRIER_ARRIVE if high >> 13 & 7 == 1 else Role.BARRIER_SYNC
        amount = low >> 42 & 0xFFF
    elif name == "SYNCS" and low & 0xFFF == 0x9A7:
        role = Role.MBARRIER_ARRIVE
    elif pipe is Pipe.TENSOR_MEMORY:
        amount = 1 << (high >> 19 & 7)
    return Instruction(
        address=address,
        name=name,
        pipe=pipe,
        role=role,
        predicated=operand or low >> 12 & 0xF != 7,
        target=target,
        amount=amount,
        ends_group=name == "HGMMA" and high >> 20 & 7 != 7,
        barrier_in_register=name == "BAR" and low & 0xFFF == 0x51D,
        stall=high >> 41 & 0xF,
        result=high >> 46 & 7,
        read=high >> 49 & 7,
        waits=high >> 52 & 0x3F,
    )
