"""Refusals of the builds for sm100: machine code that is not as it must be, and configs. Needs no compiler."""

from __future__ import annotations

from itertools import product

import pytest
from gnaforge.build_tools.cuda_compiler import kernel_facts
from gnaforge.build_tools.sass import LOCAL_STORE, MUFU, UTCHMMA_SHARED, UTCHMMA_TENSOR, Sass
from gnaforge.errors import BuildError
from gnaforge.families import faults_of, sm100_cutlass_forward, sm100_forward
from gnaforge.runtime.config import KernelConfig

OWN = KernelConfig.parse("gna_forward-sm100-r2-bf16-d128-q2x128-kv1x128")  # all of whose tiles are computed whole
CUTLASS = KernelConfig.parse("gna_forward-sm100-r1-bf16-d128-q256-kv128-cutlass")


def registers_of(*counts: int) -> tuple[tuple[int, int], ...]:
    """Instructions by which warps set so many registers a thread."""
    return tuple((count << 32 | 0x9C8, 0) for count in counts)


def test_checks_of_machine_code() -> None:
    """Code that lacks one thing at a time."""
    shared, tensor, spill, exp2 = (UTCHMMA_SHARED, 0), (UTCHMMA_TENSOR, 0), (LOCAL_STORE, 0), (MUFU, 0)
    packed, three, fence = (0x049, 0), (0x076, 0), (0x9C6, 0)
    other, softmax = registers_of(64, 192)
    first, last = (exp2,) * 60, (exp2,) * 32
    products = (*(shared,) * 16, *(tensor,) * 16)  # of both halves
    good = (other, *products, softmax, packed, three, *first, fence, *last, fence, other)
    check = sm100_forward.check_machine_code
    assert check(OWN, Sass(good), 128) == {"products": 32, "mufu": 92, "mufu_under_product": 32}

    def without(what: tuple[int, int]) -> tuple[tuple[int, int], ...]:
        return tuple(instruction for instruction in good if instruction != what)

    for code, registers, reason in (
        (without(shared), 128, r"0 .* \(UTCHMMA\) with a left factor in shared memory, its KV tiles take 16"),
        ((other, *good[2:]), 128, r"15 .* \(UTCHMMA\) with a left factor in shared memory, its KV tiles take 16"),
        (without(tensor), 128, r"0 .* \(UTCHMMA\) with a left factor in tensor memory, its KV tiles take 16"),
        (good, 136, "takes 136 registers a thread at its start, planned: 128"),
        (good, 120, "takes 120 registers a thread at its start, planned: 128"),
        (without(softmax), 128, "no warps set 192 registers a thread, as planned for softmax warps; set: 64"),
        (without(other), 128, "no warps set 64 registers a thread, as planned for other warps; set: 192"),
        ((*good, spill), 128, "the machine code has 1 accesses to local memory"),
        (without(packed), 128, r"the softmax has no packed multiplications \(FFMA2\)"),
        (without(three), 128, r"the softmax has no maxima of three \(FMNMX3\)"),
        ((*good[:-36], exp2, fence, *last[1:], fence, other), 128, "first announcement of probabilities: 31 of 32"),
        (without(fence), 128, "first announcement of probabilities: 0 of 32"),
    ):
        with pytest.raises(BuildError, match=reason):
            check(OWN, Sass(code), registers)
    apart = KernelConfig.parse("gna_forward-sm100-r2-bf16-d64-q2x128-kv1x128")  # P in columns of its own
    assert check(apart, Sass((other, *products[8:], *good[33:])), 128)["products"] == 24
    with pytest.raises(BuildError, match=r"7 .* in shared memory, its KV tiles take 8"):
        check(apart, Sass((other, *products[9:], *good[33:])), 128)
    copied = KernelConfig.parse("gna_forward-sm100-r1-bf16-d128-q128-kv32")  # one half, and one word of columns
    assert check(copied, Sass(without(shared)), 128) == {"products": 16, "mufu": 92}
    with pytest.raises(BuildError, match="tensor memory, its KV tiles take 10"):  # 8 with Q and 2 with P
        check(copied, Sass((other, tensor, softmax, packed, three, other)), 128)
    # Tiles of which 64 columns are computed have code of their own, 4 products of a half and exponentials of two words.
    shorter = KernelConfig.parse("gna_forward-sm100-r2-bf16-d128-q2x128-kv2x64")
    both = (*good[:-1], *(tensor,) * 8, *(exp2,) * 20, fence, *last, fence, other)
    assert check(shorter, Sass(both), 128) == {"products": 40, "mufu": 144, "mufu_under_product": 32}
    with pytest.raises(BuildError, match=r"23 .* in tensor memory, its KV tiles take 24"):
        check(shorter, Sass((other, *products[:-1], *both[33:])), 128)
    for at, found in ((-3, "31 of 32"), (-36, "19 of 20")):
        with pytest.raises(BuildError, match=f"first announcement of probabilities: {found}"):
            check(shorter, Sass((*both[:at], *both[at + 1 :])), 128)


def test_exponentials_before_the_first_probabilities() -> None:
    """At most 3/4 of all, of every number of columns beyond a word; but for 112 where probabilities have columns of
    their own, or are bytes: there it takes longer to announce fewer first."""
    more = set()
    for dtype, dim, columns in product(("bf16", "e4m3-obf16"), (64, 128, 192), range(48, 129, 16)):
        for rows in (128, 256):
            config = KernelConfig.parse(f"gna_forward-sm100-r1-{dtype}-d{dim}-q{rows}-kv{columns}")
            if not faults_of(config):
                first, last = sm100_forward.exponentials(config)
                assert first + last == columns - 12 * ((columns - 1) // 32)
                if first > 3 * last:
                    more.add((dtype, dim, rows, columns))
    of_bytes = {("e4m3-obf16", dim, rows, 112) for dim, rows in product((64, 128), (128, 256))}
    assert more == {("bf16", 64, 256, 112), ("e4m3-obf16", 192, 128, 112), *of_bytes}


def test_checks_of_machine_code_on_cutlass() -> None:
    """Likewise."""
    check_machine_code = sm100_cutlass_forward.check_machine_code
    shared, tensor, spill = (UTCHMMA_SHARED, 0), (UTCHMMA_TENSOR, 0), (LOCAL_STORE, 0)
    softmax, correction, other = registers_of(184, 112, 32)
    good = (shared, tensor, other, correction, spill, softmax, other, spill)
    assert check_machine_code(CUTLASS, Sass(good), 128)["products"] == 2
    assert Sass((spill, *good)).local_accesses() == {0: 1, 32: 1, 112: 1, 184: 0}
    for code, registers, reason in (
        (good[1:], 128, r"no tensor core instruction \(UTCHMMA\) for Q K"),
        ((shared, *good[2:]), 128, r"no tensor core instruction \(UTCHMMA\) for P V"),
        (good, 136, "takes 136 registers a thread at its start, planned: 128"),
        (good, 120, "takes 120 registers a thread at its start, planned: 128"),
        ((shared, tensor, other, correction), 128, "no warps set 184 registers a thread, as planned for softmax warps"),
        ((shared, tensor, softmax), 128, "as planned for correction warps; set: 184"),
        ((shared, tensor), 128, "set: none"),
        ((*good[:6], spill, *good[6:]), 128, "softmax warps spill registers: 1 accesses to local memory"),
    ):
        with pytest.raises(BuildError, match=reason):
            check_machine_code(CUTLASS, Sass(code), registers)
    spills = "136 bytes stack frame, 120 bytes spill stores, 96 bytes spill loads\nUsed 128 registers"
    with pytest.raises(BuildError, match=r"120 bytes of stores and 96 of loads, 136 bytes .* at most 128 of each"):
        kernel_facts(spills, spill_limit=128)


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("r1-bf16-d128-q257-kv128-cutlass", "q_tile: holds 257 query tokens; sm100 cutlass takes at most 256"),
        ("r1-bf16-d128-q256-kv144-cutlass", "kv_tile: holds 144 key tokens; sm100 cutlass takes at most 128"),
        ("r1-bf16-d128-q256-kv120-cutlass", "kv_tile: holds 120 key tokens; sm100 cutlass needs a multiple of 16"),
        ("r1-bf16-d136-q256-kv128-cutlass", "head_dim: 136 is too large; sm100 cutlass takes at most 128"),
        ("r1-bf16-d128v192-q256-kv128-cutlass", "value_head_dim: 192 is too large; sm100 cutlass takes at most 128"),
        ("r3-bf16-d128-q5x7x7-kv2x8x8-cutlass", "q_tile: can't be cut into two boxes of at most 128 tokens"),
        ("r1-bf16-d128-q257-kv128", "q_tile: holds 257 query tokens; sm100 takes at most 256"),
        ("r1-bf16-d128-q256-kv144", "kv_tile: holds 144 key tokens; sm100 takes at most 128"),
        ("r1-bf16-d128-q256-kv120", "kv_tile: holds 120 key tokens; sm100 needs a multiple of 16"),
        ("r1-bf16-d264-q128-kv128", "head_dim: 264 is too large; sm100 takes at most 256"),
        ("r3-bf16-d128-q5x7x7-kv2x8x8", "q_tile: can't be cut into two boxes of at most 128 tokens"),
        ("r1-bf16-d136-q256-kv128", "kv_tile: beside 256 query tokens needs 544 columns of tensor memory"),
        ("r1-bf16-d200-q256-kv48", "kv_tile: beside 256 query tokens needs 544 columns of tensor memory"),
        ("r1-bf16-d256v128-q256-kv128", "kv_tile: beside 256 query tokens needs 267,264 bytes of shared memory"),
        ("r1-bf16-d128-q256-kv128-lean", "variant: 'lean' is not a variant of sm100; it has '', 'cutlass'"),
    ],
)
def test_limits(key: str, reason: str) -> None:
    found = faults_of(KernelConfig.parse(f"gna_forward-sm100-{key}"))
    assert len(found) == 1 and ": ".join(found[0]).startswith(reason)
