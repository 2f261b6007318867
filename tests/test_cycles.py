"""The time model of machine code: decoding, the ways through loops, and cycles counted by hand."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from gnaforge.build_tools.cycles import SM90, SM100, RoleLoop, Roles, Step, TileLoop, UnknownCode, model_kernel
from gnaforge.build_tools.cycles.flow import find_ways
from gnaforge.build_tools.cycles.instruction import Instruction, Pipe, Role, decode
from gnaforge.build_tools.cycles.issue import find_turn, simulate
from gnaforge.build_tools.sass import Sass, read_cubin
from gnaforge.errors import BuildError
from gnaforge.families import sm90_cutlass_forward
from gnaforge.families.sm90_forward import FAMILY, tile_loop
from gnaforge.runtime.config import KernelConfig

WORDS = Path(__file__).with_name("data") / "sass_words.txt"
LOOP = TileLoop(SM90, warps=1, threads=256, groups=1)

# Opcodes, with what else of the words says what they do.
OPCODES = {
    "FADD": (0x221, 0),
    "FMUL": (0x220, 0),
    "FSEL": (0x208, 0),
    "FMNMX": (0x209, 0),
    "MUFU": (0x308, 0),
    "LDS": (0x984, 0),
    "ISETP": (0x20C, 0),
    "SEL": (0x207, 0),
    "VIADDMNMX": (0x246, 0),
    "IMAD": (0x224, 0),
    "ARRIVE": (0x9C5, 0),
    "AWAIT": (0x9C5 | 1 << 47, 0x10000),
    "HGMMA": (0x9F0, 0),
    "SYNC": (0x51D, 0x10000),
    "PASS": (0x51D, 0x2000),
    "TRY": (0x5A7, 0),
    "BRA": (0x947, 7 << 23),
    "BRX": (0x949, 0),
    "TELL": (0x9A7, 0),
    "LDTM": (0x9EE, 0),
    "STTM": (0x9ED, 0),
    "UTCHMMA": (0x5EA, 0),
    "UTCBAR": (0x3E9, 0),
    "CALL": (0x944, 0),
    "EXIT": (0x94D, 0),
    "UNKNOWN": (0x1FF, 0),
}


def listing(text: str) -> Sass:
    """Machine code of a listing. A line is ``label:``, or an instruction: ``@`` if it is predicated, its name, what it
    takes, and of its schedule ``stall N``, ``set N`` (a scoreboard, for the result), ``after N``. A BRA takes a label,
    an HGMMA, an LDTM and an STTM their columns, a barrier its threads, AWAIT how many products may be pending; ``end``
    ends a group."""
    lines = [line.split("#")[0].split() for line in text.splitlines()]
    labels: dict[str, int] = {}
    instructions: list[list[str]] = []
    for words in filter(None, lines):
        if words[0].endswith(":"):
            labels[words[0][:-1]] = len(instructions)
        else:
            instructions.append(words)
    return Sass(tuple(_words(index, words, labels) for index, words in enumerate(instructions)))


def _words(index: int, words: list[str], labels: dict[str, int]) -> tuple[int, int]:
    predicate = 0 if words[0] == "@" else 7
    name, *rest = words[1:] if words[0] == "@" else words
    low, high = OPCODES[name]
    low |= predicate << 12
    taken = {"stall": 1, "set": 7, "after": None}
    for at, word in enumerate(rest):
        if word in taken:
            taken[word] = int(rest[at + 1])
    if name == "BRA":
        offset = 16 * (labels[rest[0]] - index - 1) // 4 & (1 << 56) - 1
        low |= (offset & 0xFF) << 16 | (offset >> 8 & (1 << 30) - 1) << 34
        high |= offset >> 38
    elif name == "HGMMA":
        low |= (int(rest[0]) // 8 - 1) << 53
        high |= (0 if "end" in rest else 7) << 20
    elif name in ("LDTM", "STTM"):
        high |= (int(rest[0]).bit_length() - 1) << 19
    elif name in ("SYNC", "PASS"):
        low |= int(rest[0]) << 42
    elif name == "AWAIT":
        high |= int(rest[0]) << 8
    after = taken["after"]
    high |= (taken["stall"] or 0) << 41 | (taken["set"] or 0) << 46 | 7 << 49
    return low, high | (0 if after is None else 1 << after) << 52


def cycles(text: str, warps: int = 1, **options: int | None) -> float:
    """Of one round of all warps, which take the same way."""
    code = decode(listing(text))
    return simulate([code] * warps, SM90, turn=find_turn(tuple(code)), **options).cycles  # type: ignore[arg-type]


def test_warps_have_ways_of_their_own() -> None:
    slow, fast = (decode(listing(text)) for text in ("MUFU \n MUFU \n MUFU", "FADD"))
    # Of two rounds one takes 24 cycles of the pipe, and the other one waits for it, if it may not be ahead.
    assert simulate([slow, fast], SM90, lead=1).cycles == 24
    assert simulate([slow, fast], SM90).cycles < 5


def test_words_are_read_as_nvdisasm_prints_them() -> None:
    """One word of each form of each instruction in our kernels and in those of CUTLASS's examples."""
    lines = WORDS.read_text().splitlines()
    assert len(lines) > 250
    for line in lines:
        address, low, high, text = line.split(maxsplit=3)
        found = decode(Sass(((0, 0),) * (int(address, 16) // 16) + ((int(low, 16), int(high, 16)),)))[-1]
        match = re.fullmatch(r"(?:@(!?\w+) )?([A-Z0-9]+)((?:\.\w+)*)(.*)", text)
        assert match, line
        guard, name, modifiers, operands = match.groups()
        assert found.name == name.removeprefix("CGA").partition("_")[0], line
        _compare_with_text(found, guard, modifiers, operands, line)


def _compare_with_text(found: Instruction, guard: str | None, modifiers: str, operands: str, line: str) -> None:
    by_operand = found.name == "BRA" and not operands.strip().startswith("0x")
    assert found.predicated == (guard is not None or by_operand), line
    if found.name == "BRA":
        assert found.target == int(operands.split()[-1], 16), line
    elif found.name == "HGMMA":
        assert f".64x{found.amount}x16" in modifiers and found.ends_group == ("gsb0" in operands), line
    elif found.name == "WARPGROUP":
        waits = re.search(r"gsb0, 0x(\d)", operands)
        assert found.role is (Role.AWAIT_PRODUCTS if waits else Role.ARRIVE), line
        assert found.amount == (int(waits[1]) if waits else 0), line
    elif found.name == "BAR":
        number, *threads = operands.removesuffix(", PT").split(",")
        assert (found.role is Role.BARRIER_ARRIVE) == (modifiers == ".ARV"), line
        assert (found.barrier_in_register, found.amount) == ("R" in number, int((threads or ["0"])[0], 16)), line


def test_stalls_and_pipes() -> None:
    # MUFU has 4 lanes: 8 cycles for a warp's 32. Three of them: issue at 0, 8, 16, and the next round begins at 24.
    assert cycles("MUFU \n MUFU \n MUFU") == 24
    # ptxas's stall is longer than what the pipe takes: 0, 12, 24.
    assert cycles("MUFU stall 12 \n MUFU stall 12") == 24
    # FP32 has 32 lanes, selects 16: FADDs at 0, 1, FSELs at 2, 4; the pipe of the last is free at 6, but FADDs don't
    # need it: the next round begins at 5.
    assert cycles("FADD \n FADD \n FSEL \n FSEL") == 5
    # Two warps share the pipes: 2 x 3 x 8.
    assert cycles("MUFU \n MUFU \n MUFU", warps=2) == 48
    # Two warps whose 4 FADDs stall 4 cycles each hide behind each other: 16 for both, not 32.
    assert cycles("FADD stall 4 \n" * 4, warps=2) == 16
    # Two thread blocks likewise.
    assert cycles("MUFU \n MUFU \n MUFU", blocks=2) == 48


def test_scoreboards() -> None:
    # A load from shared memory takes 28 cycles, which the FADD awaits: issue at 0 and 28, next round at 29.
    assert cycles("LDS set 2 \n FADD after 2") == 29
    # Another scoreboard is not awaited: 0 and 1; LDS again at 2.
    assert cycles("LDS set 2 \n FADD after 3") == 2


def test_products() -> None:
    # ARRIVE at 0 takes 4. HGMMA of 128 columns at 4: starts at 14, ends at 78; a second one issued at 6 ends at 142.
    # The wait is over 24 later, at 166; the next round begins at 167.
    two = "ARRIVE \n HGMMA 128 \n HGMMA 128 end \n AWAIT 0"
    assert cycles(two) == 167
    # Without a wait the tensor core is busy all the time: 64 cycles each.
    assert cycles("ARRIVE \n HGMMA 128 \n HGMMA 128 end", queue=2) == 128
    # A wait that leaves one group pending waits for the round before.
    assert cycles("ARRIVE \n HGMMA 128 \n HGMMA 128 end \n AWAIT 1") == 128
    # Fewer columns take less.
    assert cycles("ARRIVE \n HGMMA 64 \n HGMMA 64 end \n AWAIT 0") == 103


def test_the_tensor_cores_queue() -> None:
    # Three products at 4, 6, 8, and then 100 cycles of MUFU, which don't wait: 13 x 8 = 104, from 9 to 113. Products
    # end at 78, 142, 206; the wait until 230 covers all: next round at 231.
    code = "ARRIVE \n HGMMA 128 \n HGMMA 128 \n HGMMA 128 end \n" + "MUFU \n" * 13 + "AWAIT 0"
    assert cycles(code) == 231
    # One may be issued and not yet begun. They begin at 14, 78, 142: the second is issued at 14, the third at 78, MUFU
    # from 79 to 183, still before the end: the same.
    assert cycles(code, queue=1) == 231
    # 20 MUFU: 160 cycles. From 9 they end at 169; from 79 at 239, when the products are done. The last MUFU is issued 8
    # before its pipe is free, and the wait right behind it, at 232; next round at 233.
    code = "ARRIVE \n HGMMA 128 \n HGMMA 128 \n HGMMA 128 end \n" + "MUFU \n" * 20 + "AWAIT 0"
    assert cycles(code) == 231 and cycles(code, queue=1) == 233
    # With room for two, the third is issued when the first but one has begun, at 14: MUFU from 15, no harm.
    assert cycles(code, queue=2) == 231


def test_turns() -> None:
    # Each of two warps waits for its turn, stalls 10, and passes the turn: 26 later the other one may go. From turn to
    # turn 10 + 26 = 36, so 72 for a round of both.
    turn = "SYNC 256 stall 10 \n PASS 256"
    assert cycles(turn, warps=2) == 72
    # One warp alone has nobody to pass it to but itself.
    assert cycles(turn, warps=1) == 36
    with pytest.raises(UnknownCode, match="wait for each other for ever"):
        cycles("SYNC 256 \n SYNC 256 \n PASS 256", warps=2)
    with pytest.raises(UnknownCode, match="2 kinds of barriers"):
        cycles("PASS 256 \n PASS 384")


def test_a_barrier_of_all_warps() -> None:
    # Warp 0 gets there at 8 or later, since the pipe is shared: MUFU at 0 and 8, barriers at 8 + 1 - the MUFU of warp 1
    # is issued at 8, its barrier at 9; both go on 26 later, at 35.
    assert cycles("MUFU \n SYNC 256", warps=2) == 35


KERNEL = """
    FADD
    q:
      LDS
    first: TRY
      @ BRA first                # tries again
      tile:
        ARRIVE
        HGMMA 64 end
        TRY
        @ BRA again
      tried:
        @ BRA unmasked
        FSEL
        FSEL
        FMNMX
      unmasked:
        @ BRA same_maximum
        FMUL
        FMUL
        FMUL
        FMUL
        FMUL
      same_maximum:
        AWAIT 0
        @ BRA tile
      @ BRA fast                 # what is called is not on the way
      CALL
    fast:
      FADD
      @ BRA q
    EXIT
    again:
      TRY
      @ BRA again
      BRA tried
"""


def names(way: tuple[Instruction, ...]) -> str:
    return " ".join(instruction.name for instruction in way)


def listing_of(text: str) -> Sass:
    """As `listing`, with labels on lines of instructions."""
    return listing(text.replace(": TRY", ":\n TRY"))


def test_ways_through_a_kernel() -> None:
    facts = TileLoop(SM90, 1, 256, 1, rare=lambda block: sum(i.name == "FMUL" for i in block) > 2)
    ways = find_ways(decode(listing_of(KERNEL)), facts)
    start, end = "WARPGROUP HGMMA SYNCS BRA BRA", "BRA WARPGROUP BRA"
    assert names(ways.interior) == f"{start} {end}"
    # The block of products runs rarely, so that not even the longest way goes through it.
    assert names(ways.shell) == f"{start} FSEL FSEL FMNMX {end}"
    assert [names(way) for way in ways.outside] == ["LDS SYNCS BRA", "BRA FADD BRA"]
    assert ways.q_tile(2) == (*ways.outside[0], *ways.shell, *ways.shell, *ways.outside[1])
    everything = find_ways(decode(listing_of(KERNEL)), LOOP).shell
    assert names(everything) == f"{start} FSEL FSEL FMNMX BRA FMUL FMUL FMUL FMUL FMUL WARPGROUP BRA"


def test_what_leads_to_a_rare_block_alone_is_rare_too() -> None:
    facts = TileLoop(SM90, 1, 256, 1, rare=lambda block: sum(i.name == "FMUL" for i in block) > 2)
    asked = KERNEL.replace("        FMUL\n", "        MUFU\n        @ BRA same_maximum\n        FMUL\n", 1)
    again = "        FMUL\n        @ BRA same_maximum\n" + "        FMUL\n" * 3  # led to by the first one alone
    asked = asked.replace("        FMUL\n      same_maximum:", again + "      same_maximum:")
    expected, found = (find_ways(decode(listing_of(text)), facts) for text in (KERNEL, asked))
    assert names(found.shell) == names(expected.shell) and names(found.interior) == names(expected.interior)
    assert "MUFU" in names(find_ways(decode(listing_of(asked)), LOOP).shell)


def test_what_leads_to_a_block_aside_is_charged() -> None:
    """As the question whether a KV tile is below a split: masked tiles ask it, and few are."""
    facts = TileLoop(
        SM90,
        1,
        256,
        1,
        rare=lambda block: sum(i.name == "FMUL" for i in block) > 2,
        aside=lambda block: {i.name for i in block} == {"SEL"},
    )
    asked = KERNEL.replace(
        "        FSEL\n        FSEL\n", "        @ BRA above\n        SEL\n        SEL\n      above:\n        FSEL\n", 1
    )
    ways = find_ways(decode(listing_of(asked)), facts)
    start, end = "WARPGROUP HGMMA SYNCS BRA BRA", "BRA WARPGROUP BRA"
    assert names(ways.interior) == f"{start} {end}"
    assert names(ways.shell) == f"{start} BRA FSEL FMNMX {end}"
    assert "SEL SEL" in names(find_ways(decode(listing_of(asked)), LOOP).shell)


APART = """
    q:
      LDS
      unmasked:
        ARRIVE
        HGMMA 64 end
        AWAIT 0
        @ BRA unmasked
      FMNMX
      masked:
        ARRIVE
        HGMMA 64 end
        AWAIT 0
        FSEL
        FSEL
        @ BRA masked
      FADD
      @ BRA q
    EXIT
"""


def test_shell_tiles_with_a_loop_of_their_own() -> None:
    facts = TileLoop(SM90, 1, 256, 1, loops=2)
    ways = find_ways(decode(listing(APART)), facts)
    assert names(ways.interior) == "WARPGROUP HGMMA WARPGROUP BRA"
    assert names(ways.shell) == "WARPGROUP HGMMA WARPGROUP FSEL FSEL BRA"
    assert [names(way) for way in ways.outside] == ["LDS", "FMNMX", "FADD BRA"]
    assert names(ways.q_tile(1)) == f"LDS {names(ways.interior)} FMNMX {names(ways.shell)} FADD BRA"
    # 71 to the end of the wait, as above, and a branch; in the shell selections at 71 and 73, a branch at 74.
    found = model_kernel(listing(APART), facts, registers=168, shared_memory=150_000)
    assert (found.interior_tile["2"], found.shell_tile["2"]) == (72, 75)
    with pytest.raises(UnknownCode, match="2 loops have 1 groups"):
        find_ways(decode(listing(APART)), LOOP)


def test_modelled_cycles_of_a_kernel() -> None:
    facts = TileLoop(SM90, 1, 256, 1, rare=lambda block: sum(i.name == "FMUL" for i in block) > 2)
    # ARRIVE 0 to 4, HGMMA of 64 columns 14 to 46, the wait's end at 70; a branch at 71, next round at 72, masked or
    # not. With registers for two blocks, they share the tensor core, and each hides behind the other.
    found = model_kernel(listing_of(KERNEL), facts, registers=168, shared_memory=150_000)
    assert found.blocks == 1 and found.interior_tile == found.shell_tile == {"unlimited": 72, "2": 72, "1": 72}
    assert found.interior_limit == ("tensor", 32 / 72)
    assert found.to_json()["interior_tile_cycles"] == {"queue_unlimited": 72, "queue_2": 72, "queue_1": 72}
    two = model_kernel(listing_of(KERNEL), facts, registers=128, shared_memory=100_000)
    assert two.blocks == 2 and two.interior_tile["2"] < 40


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("FSEL\n", "UNKNOWN\n"), r"the instruction at 0x90 is none that the model knows"),
        (("HGMMA 64 end", "FADD"), None),  # no product, but a loop all the same
        (("ARRIVE", "FADD"), "0 loops have 1 groups of matrix products"),
        (("FADD\n    q:", "own:\n ARRIVE\n @ BRA own\n q:"), "2 loops have 1 groups of matrix products"),
        (("@ BRA tile", "BRA tile"), "the loop over KV tiles ends in 0 places, expected 1"),
        (("@ BRA unmasked", "@ BRA fast"), "the loop over KV tiles ends in 2 places, expected 1"),
        (("AWAIT 0", "BRX"), "0 loops have 1 groups of matrix products"),
    ],
)
def test_code_that_the_model_does_not_know(change: tuple[str, str], reason: str | None) -> None:
    assert KERNEL.count(change[0]) >= 1
    code = decode(listing_of(KERNEL.replace(*change, 1)))
    if reason is None:
        find_ways(code, LOOP)
        return
    with pytest.raises(UnknownCode, match=reason):
        find_ways(code, LOOP)


def test_damaged_machine_code_is_refused() -> None:
    header = b"\x7fELF\x02" + bytes(35) + (1 << 40).to_bytes(8, "little") + bytes(12) + b"\x02\x00\x01\x00"
    for data in (b"\x7fELF\x02", header, header[:60]):
        with pytest.raises(BuildError, match=r"damaged|0 kernels"):
            read_cubin(data)
    with pytest.raises(UnknownCode, match="leaves the kernel"):
        find_ways(decode(Sass(((0x947 | 0xFC << 16 | 1 << 40, 7 << 23),))), LOOP)


def test_blocks_of_a_multiprocessor() -> None:
    # 65,536 registers: 256 threads of 128 twice; 228 KB of shared memory, of which a block takes 1 KB more.
    assert SM90.blocks(256, 128, 113 * 1024) == 2 and SM90.blocks(256, 128, 113 * 1024 + 1) == 1
    assert SM90.blocks(384, 168, 0) == 1 and SM90.blocks(256, 129, 0) == 1


def test_what_a_family_says_of_its_loop() -> None:
    for rows, warps in ((64, 1), (100, 2), (192, 3)):
        found = tile_loop(KernelConfig("gna_forward", "sm90", 1, "bf16", 64, (rows,), (64,)))
        assert (found.warps, found.threads) == (warps, 128 * (warps + 1))
    multiply, select = (decode(listing("\n".join([name] * 9 + ["BRA 0"][:0]))) for name in ("FMUL", "FSEL"))
    assert found.rare(multiply) and not found.rare(select)
    below, mask = (decode(listing("ISETP\nSEL\nVIADDMNMX\n" + name)) for name in ("IMAD", "FSEL"))
    assert found.aside(below) and not found.aside(mask) and not found.aside(decode(listing("ISETP\nVIADDMNMX")))
    sets, mask = (decode(listing(text)) for text in ("IMAD\nISETP", "IMAD\nISETP\nFSEL"))  # of extra keys, at rank 3
    asks = [replace(instruction, name="S2R") for instruction in sets[:1]]  # and at rank 1
    assert found.aside(sets) and found.aside([*sets, *asks]) and not found.aside(mask)
    assert FAMILY.machine_code is not None and FAMILY.machine_code.tile_loop is tile_loop


def test_example_88s_kernels_have_two_loops() -> None:
    key = "gna_forward-sm90-r1-bf16-d64-q100-kv64-cutlass"
    found = sm90_cutlass_forward.tile_loop(KernelConfig.parse(key))
    assert (found.warps, found.threads, found.groups, found.loops) == (2, 384, 2, 2)


ROLES = """
    work:
      TRY
      issue:
        TRY
        TRY
        UTCHMMA
        UTCHMMA
        @ BRA passed
        TRY                        # with a further Q tile
      passed:
        UTCHMMA
        UTCBAR
        @ BRA issue
      @ BRA work
    q:
      LDS
      tile:
        @ BRA interior
        FSEL
        FSEL
      interior:
        TRY
        LDTM 32 set 0
        @ BRA unmasked
        FSEL after 0
        FSEL
        FSEL
      unmasked:
        @ BRA same_maximum
        LDTM 16 set 0
        STTM 16
      same_maximum:
        MUFU after 0
        STTM 16
        TELL
        FADD
        @ BRA tile
      FADD
      @ BRA q
    EXIT
"""
HALF = Roles(
    SM100,
    softmax=RoleLoop(
        frozenset({"LDTM", "MUFU", "STTM"}), rare=lambda block: {"LDTM", "STTM"} <= {i.name for i in block}
    ),
    issues=RoleLoop(frozenset({"UTCHMMA"})),
    steps=(Step(2, 50, awaits=1), Step(1, 100, tells=0)),
    scores=(0,),
    probabilities=((1,),),
    streams=True,
)


def test_warps_with_roles_of_their_own() -> None:
    found = model_kernel(listing(ROLES), HALF, registers=128, shared_memory=0)
    # The wait for scores at 0, LDTM at 1, branches at 2 and 3. Its 32 columns take 32 cycles, and 60 until they are in
    # registers, at 93: MUFU at 93, STTM at 94, TELL at 95. A signal later the MMA warp's wait, at 195, and, since waits
    # and products go through one pipe, a product at 197, which starts at 207. The tensor cores are done at 407, and a
    # signal later the scores' wait is over.
    assert found.interior_tile == {"60": 427, "100": 507, "150": 607}
    assert found.interior_limit == ("tensor", 200 / 507)
    # Selections at 93, 95 and 97, the second branch at 98, MUFU at 99. Those before the scores cost nothing.
    assert found.shell_tile["100"] == 513
    more = found.more
    assert more["tensor_busy_share"] == {"interior": 0.394, "shell": 0.39}
    assert more["softmax_instructions"] == {"interior": 10, "shell": 15, "shell_before_scores": 2}
    assert more["first_probabilities_cycles"] == {"interior": 95, "shell": 101}
    assert found.to_json()["shell_tile_cycles"]["signal_100"] == 513
    # Between Q tiles there are an FADD, a branch and an LDS, whose time nobody waits for.
    assert abs(found.q_tile["100"]) <= 4


def test_halves_that_take_turns() -> None:
    """Each half's products run while the other's softmax does."""
    other = (Step(2, 50, awaits=3), Step(1, 100, tells=2))
    both = replace(HALF, steps=(*HALF.steps, *other), scores=(0, 2), probabilities=((1,), (3,)))
    issue = "        TRY\n        UTCHMMA\n        UTCHMMA\n        UTCHMMA\n        UTCBAR\n"
    text = ROLES.replace("      passed:\n", f"      passed:\n        UTCHMMA\n        UTCBAR\n{issue[:-23]}")
    found = model_kernel(listing(text), both, registers=128, shared_memory=0)
    one = model_kernel(listing(ROLES), HALF, registers=128, shared_memory=0)
    assert found.interior_tile["100"] < one.interior_tile["100"] + 20
    assert found.interior_limit[1] > 1.9 * one.interior_limit[1]


def test_one_half_whose_next_scores_come_first() -> None:
    """Scores of the next KV tile come before the output of this one: tiles take the longer one of both."""
    steps = (HALF.steps[1], HALF.steps[0])
    text = ROLES.replace("        TRY\n        TRY\n", "        TRY\n        UTCHMMA\n        UTCBAR\n        TRY\n")
    text = text.replace("      passed:\n        UTCHMMA\n        UTCBAR\n", "      passed:\n")
    found = model_kernel(listing(text), replace(HALF, steps=steps, streams=False), registers=128, shared_memory=0)
    # Products of 200 cycles, which P of this tile and scores of the next have to themselves.
    assert found.interior_tile["100"] < 330
    assert found.q_tile["100"] > 100  # nothing overlaps with the first scores and the last output


OWN_COLUMNS = ROLES
for _old, _new in (
    # Scores of the next tile once those of this one are read; then this one's output.
    ("        UTCHMMA\n        UTCHMMA\n", "        UTCHMMA\n        UTCBAR\n        TRY\n"),
    ("      passed:\n        UTCHMMA\n", "      passed:\n        UTCHMMA\n        UTCHMMA\n"),
    ("        LDTM 32 set 0\n", "        LDTM 32 set 0\n        TELL after 0\n"),
    ("        MUFU after 0\n", "        TRY\n        MUFU after 0\n"),
):
    assert ROLES.count(_old) == 1
    OWN_COLUMNS = OWN_COLUMNS.replace(_old, _new)


def test_probabilities_apart_from_scores() -> None:
    """The next scores wait until these are read, not for the product with the probabilities."""
    steps = (Step(1, 100, awaits=3, tells=0), Step(2, 50, awaits=1, tells=4))
    apart = replace(HALF, steps=steps, apart=((3, 4),))
    found = model_kernel(listing(OWN_COLUMNS), apart, registers=128, shared_memory=0)
    # Scores told of at 0 are in registers at 93, which the MMA warp hears of at 193; their product starts at 205, is
    # done at 305, and that is told at 405.
    assert found.interior_tile == {"60": 325, "100": 405, "150": 505}
    for change, reason in (
        (("        TRY\n        MUFU", "        MUFU"), "don't wait until those before are read"),
        (("        TELL after 0\n", ""), "arrive in 1 places for a KV tile, expected 2"),
    ):
        assert OWN_COLUMNS.count(change[0]) == 1
        with pytest.raises(UnknownCode, match=reason):
            model_kernel(listing(OWN_COLUMNS.replace(*change)), apart, registers=128, shared_memory=0)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("        UTCHMMA\n        UTCBAR", "        UTCBAR"), r"takes 2 matrix products \(UTCHMMA\), expected 3"),
        (("        UTCBAR\n", ""), r"nothing tells \(UTCBAR\) that matrix products are done"),
        (("        TRY\n        TRY\n        UTCHMMA", "        UTCHMMA"), "that wait for no softmax warps"),
        (("        TELL\n", "        TELL\n        TELL\n"), "arrive in 2 places for a KV tile, expected 1"),
        (("        MUFU after 0\n", ""), "0 loops have LDTM and MUFU and STTM, expected 1"),
    ],
)
def test_roles_that_the_model_does_not_know(change: tuple[str, str], reason: str) -> None:
    assert ROLES.count(change[0]) == 1
    with pytest.raises(UnknownCode, match=reason):
        model_kernel(listing(ROLES.replace(*change)), HALF, registers=128, shared_memory=0)


def test_pipes_have_an_occupancy() -> None:
    assert set(SM90.occupancy) == set(SM100.occupancy) == set(Pipe)


def test_importing_gnaforge_leaves_the_model_alone() -> None:
    code = (
        "import sys, gnaforge, gnaforge.families as f; f.families(); print([m for m in sys.modules if 'cycles' in m])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
