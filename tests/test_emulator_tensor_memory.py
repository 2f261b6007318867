"""tcgen05 of the emulator against NumPy: tensor memory, its load shapes, matrix products, and misuse."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from emulator_ptx import SCHEDULES, copy_to_shared, dynamic_shared, run
from gnaforge.build_tools.emulator import Counters, EmulationError, Options
from test_emulator_matrix import SIZE, k_major, row_major, values

DECLARATIONS = ".shared .align 8 .b8 barriers[16];\n.shared .align 4 .b8 slot[16];\n" + dynamic_shared()
WIDE = -128  # a swizzle of 128 bytes in atoms of 32
LAYOUTS = {0: 0, 128: 2, 64: 4, 32: 6, WIDE: 1}


def allocated(columns: int) -> str:
    """Warp 0 allocates; every thread gets the address in %r40 and its own warp's lanes' in %r41."""
    return f"""
      mov.u32 %r42, slot;
      mov.u32 %r100, barriers;
      setp.ge.u32 %q1, %tid, 32;
      @%q1 bra HAVE;
      tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r42], {columns};
      tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;
      setp.ne.u32 %q2, %tid, 0;
      @%q2 bra HAVE;
      mbarrier.init.shared::cta.b64 [%r100], 1;
      fence.mbarrier_init.release.cluster;
    HAVE:
      bar.sync 0;
      ld.shared.u32 %r40, [%r42];
      shr.u32 %r43, %tid, 5;
      shl.b32 %r43, %r43, 21;
      add.u32 %r41, %r40, %r43;
    """


def freed(columns: int) -> str:
    return f"""
      bar.sync 0;
      setp.ge.u32 %q1, %tid, 32;
      @%q1 bra FREED;
      tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r40, {columns};
    FREED:
    """


def registers(count: int, first: int = 150) -> str:
    return "{" + ", ".join(f"%r{first + i}" for i in range(count)) + "}"


def launch(body: str, arrays: list[np.ndarray], shared_bytes: int = 0, options: Options | None = None) -> Counters:
    return run(
        body,
        arrays,
        threads=128,
        shared_bytes=shared_bytes,
        declarations=DECLARATIONS,
        options=options,
        target="sm_100a",
    )


# Lane and column of register r of lane l, for one repetition more than was needed to see the pattern.
SHAPES = {
    "32x32b": (32, 1, 1, lambda lane, r: (lane, r)),
    "16x64b": (16, 2, 1, lambda lane, r: (lane // 4 + 8 * (lane % 2), lane // 2 % 2 + 2 * r)),
    "16x128b": (16, 4, 2, lambda lane, r: (lane // 4 + 8 * (r % 2), lane % 4 + 4 * (r // 2))),
    "16x256b": (16, 8, 4, lambda lane, r: (lane // 4 + 8 * (r // 2 % 2), r % 2 + 2 * (lane % 4) + 8 * (r // 4))),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("repeat", [1, 2, 4])
def test_load_and_store_shapes(shape: str, repeat: int) -> None:
    """Written with 32x32b, where lane and column are plain; read with the shape; and the other way round."""
    lanes, width, count, position = SHAPES[shape]
    columns, used = 32, width * repeat
    total = count * repeat
    fill = "".join(f"mad.lo.u32 %r{150 + c}, %tid, 1000, {c};\n" for c in range(columns))
    half = 0 if lanes == 32 else 16  # the upper half of the warp's lanes, where there is one
    body = (
        allocated(32)
        + fill
        + f"""
      tcgen05.st.sync.aligned.32x32b.x32.b32 [%r41], {registers(32)};
      tcgen05.wait::st.sync.aligned;
      add.u32 %r44, %r41, {half << 16};
      tcgen05.ld.sync.aligned.{shape}.x{repeat}.b32 {registers(total)}, [%r44];
      tcgen05.wait::ld.sync.aligned;
      mul.wide.u32 %d1, %tid, 4; add.s64 %d1, %d1, %p0;
    """
    )
    body += "".join(f"st.global.u32 [%d1+{512 * r}], %r{150 + r};\n" for r in range(total))
    body += "".join(f"add.u32 %r{150 + r}, %r{150 + r}, 7;\n" for r in range(total))
    body += f"""
      tcgen05.st.sync.aligned.{shape}.x{repeat}.b32 [%r44], {registers(total)};
      tcgen05.wait::st.sync.aligned;
      tcgen05.ld.sync.aligned.32x32b.x32.b32 {registers(32)}, [%r41];
      tcgen05.wait::ld.sync.aligned;
      mul.wide.u32 %d1, %tid, 4; add.s64 %d1, %d1, %p1;
    """
    body += "".join(f"st.global.u32 [%d1+{512 * c}], %r{150 + c};\n" for c in range(columns)) + freed(32)
    out, after = np.zeros((total, 128), np.uint32), np.zeros((columns, 128), np.uint32)
    launch(body, [out, after])
    cells = 1000 * np.arange(128)[:, None] + np.arange(columns)
    wanted = cells.copy()
    for thread in range(128):
        for r in range(total):
            row, column = position(thread % 32, r)
            lane = thread // 32 * 32 + half + row
            assert out[r, thread] == cells[lane, column], (thread, r)
            wanted[lane, column] += 7
    assert used <= columns
    np.testing.assert_array_equal(after.T, wanted)


def descriptor(target: str, address: str, leading: int, stride: int, span: int) -> str:
    high = (leading >> 4) << 16 | (stride >> 4) << 32 | 1 << 46 | LAYOUTS[span] << 61
    return (
        f"and.b32 %r90, {address}, 0x3ffff; shr.u32 %r90, %r90, 4; cvt.u64.u32 {target}, %r90; "
        f"or.b64 {target}, {target}, {high};\n"
    )


KINDS = {"bf16": ("f16", 1), "f16": ("f16", 0), "tf32": ("tf32", 2), "e4m3": ("f8f6f4", 0)}


def wide_atoms(bits: np.ndarray) -> tuple[bytes, int, int]:
    """A tf32 matrix [rows][8], rows contiguous: 4 lines of 32 rows, atoms of 32 bytes as in the PTX ISA."""
    order = ("0 1 2 3", "1 0 3 2", "2 3 0 1", "3 2 1 0")
    image = np.zeros((len(bits) // 32, 2, 4, 4, 8), np.uint32)  # rows / 32, k / 4, k % 4, atom, row
    for block, k in np.ndindex(len(bits) // 32, 8):
        line = bits[32 * block : 32 * block + 32, k].reshape(4, 8)
        image[block, k // 4, k % 4] = line[[int(atom) for atom in order[k % 4].split()]]
    return image.tobytes(), 1024, 512


def multiply(
    kind: str,
    rows: int,
    columns: int,
    *,
    a_span: int = 128,
    b_span: int = 128,
    a_transposed: bool = False,
    b_transposed: bool = False,
    tensor_a: bool = False,
    negate: tuple[bool, bool] = (False, False),
    kept_lanes: int = 0,
    half: bool = False,
    options: Options | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Two accumulating MMAs; the 128 x columns cells that came out, and the product."""
    rng = np.random.default_rng(rows + columns)
    depth = 32 // SIZE[kind]
    a_bits, a = values(kind, (rows, depth), rng)
    b_bits, b = values(kind, (columns, depth), rng)
    a_image, a_leading, a_stride = (row_major if a_transposed else k_major)(a_bits, abs(a_span))
    b_image, b_leading, b_stride = (row_major if b_transposed else k_major)(b_bits, abs(b_span))
    if WIDE in (a_span, b_span):
        (a_image, a_leading, a_stride), (b_image, b_leading, b_stride) = wide_atoms(a_bits), wide_atoms(b_bits)
    offset = len(a_image) + -len(a_image) % 1024
    image = a_image + bytes(offset - len(a_image)) + b_image
    image += bytes(-len(image) % 16)
    name, code = KINDS[kind]
    instruction = (not half) << 4 | code << 7 | code << 10 | negate[0] << 13 | negate[1] << 14
    instruction |= a_transposed << 15 | b_transposed << 16 | (columns >> 3) << 17 | (rows >> 4) << 24
    a_operand = "[%r45]" if tensor_a else "%d21"
    lanes = f", {{{kept_lanes}, 0, 0, 0}}" if kept_lanes else ""
    mma = f"tcgen05.mma.cta_group::1.kind::{name} [%r40], {a_operand}, %d22, %r46, {{lanes}}%q3;"
    mma = mma.replace("{lanes}", lanes[2:] + ", " if lanes else "")
    body = (
        allocated(512)
        + copy_to_shared("%p0", len(image), 128)
        + "mul.wide.u32 %d31, %tid, 32; add.s64 %d31, %d31, %p2;\n"
        + "".join(f"ld.global.b32 %r{110 + i}, [%d31+{4 * i}];\n" for i in range(8))
        + f"""
          add.u32 %r47, %r41, 256;
          tcgen05.st.sync.aligned.32x32b.x8.b32 [%r47], {registers(8, 110)};
          tcgen05.wait::st.sync.aligned;
          tcgen05.fence::before_thread_sync;
          bar.sync 0;
          tcgen05.fence::after_thread_sync;
          setp.ne.u32 %q2, %tid, 0;
          @%q2 bra ISSUED;
          add.u32 %r45, %r40, 256;
          mov.u32 %r46, {instruction};
          mov.u32 %r1, shared;
          add.u32 %r2, %r1, {offset};
        """
        + descriptor("%d21", "%r1", a_leading, a_stride, a_span)
        + descriptor("%d22", "%r2", b_leading, b_stride, b_span)
        + f"""
          setp.ne.u32 %q3, %tid, %tid;
          {mma.replace(lanes[2:] + ", ", "") if lanes else mma}
          setp.eq.u32 %q3, %tid, %tid;
          {mma}
          tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r100];
        ISSUED:
          mbarrier.try_wait.parity.shared::cta.b64 %q4, [%r100], 0;
          @!%q4 bra ISSUED;
          tcgen05.fence::after_thread_sync;
          mul.wide.u32 %d1, %tid, 4; add.s64 %d1, %d1, %p1;
        """
    )
    if rows == 64:  # the other half of each warp's lanes holds nothing
        body += "and.b32 %r3, %lane, 31;\n"
    load = "16x64b" if rows == 64 else "32x32b"
    step = 2 if rows == 64 else 8
    for column in range(0, columns, step):
        count = 1 if rows == 64 else 8
        body += f"add.u32 %r48, %r41, {column};\n"
        body += (
            f"tcgen05.ld.sync.aligned.{load}.x{count}.b32 {registers(count)}, [%r48];\ntcgen05.wait::ld.sync.aligned;\n"
        )
        body += "".join(
            f"st.global.b32 [%d1+{512 * (column // step * count + i)}], %r{150 + i};\n" for i in range(count)
        )
    body += freed(512)
    out = np.zeros((columns, 128), np.float32)
    fragments = np.zeros((128, 32), np.uint8)
    at = np.arange(rows) if rows == 128 else np.arange(64) // 16 * 32 + np.arange(64) % 16
    fragments[at] = np.ascontiguousarray(a_bits).view(np.uint8).reshape(rows, 32)
    counters = launch(body, [np.frombuffer(image, np.uint8), out, fragments], len(image), options)
    assert counters.mma_operations == 2 * 2 * rows * columns * depth
    if rows == 128:
        got = out.T
    else:
        got = np.zeros((64, columns), np.float32)
        for thread in range(128):
            lane = thread % 32
            row = thread // 32 * 16 + lane // 4 + 8 * (lane % 2)
            got[row, lane // 2 % 2 :: 2] = out[: columns // 2, thread]
    product = a @ b.T * (-1 if negate[0] != negate[1] else 1)
    return got, product


def check(got: np.ndarray, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("span", [0, 32, 64, 128])
@pytest.mark.parametrize("tensor_a", [False, True])
def test_every_type_and_swizzle(kind: str, span: int, tensor_a: bool) -> None:
    got, product = multiply(kind, 128, 64, a_span=span, b_span=span, tensor_a=tensor_a)
    check(got, 2 * product)


@pytest.mark.parametrize(
    ("rows", "columns"), [(128, 16), (128, 48), (128, 240), (128, 256), (64, 8), (64, 72), (64, 256)]
)
@pytest.mark.parametrize("tensor_a", [False, True])
def test_shapes(rows: int, columns: int, tensor_a: bool) -> None:
    got, product = multiply("bf16", rows, columns, tensor_a=tensor_a)
    check(got, 2 * product)


@pytest.mark.parametrize("kind", ["f16", "e4m3"])
@pytest.mark.parametrize("span", [0, 32, 64, 128])
@pytest.mark.parametrize(("a_transposed", "b_transposed"), [(True, False), (False, True), (True, True)])
def test_transposed_operands(kind: str, span: int, a_transposed: bool, b_transposed: bool) -> None:
    got, product = multiply(
        kind, 128, 64, a_span=span, b_span=span, a_transposed=a_transposed, b_transposed=b_transposed
    )
    check(got, 2 * product)


def test_transposed_tf32() -> None:
    got, product = multiply("tf32", 128, 64, a_span=WIDE, b_span=WIDE, a_transposed=True, b_transposed=True)
    check(got, 2 * product)


@pytest.mark.parametrize("kind", ["f16", "e4m3"])
def test_half_results(kind: str) -> None:
    """In the lower half of each cell; rounded after each of the two MMAs."""
    got, product = multiply(kind, 128, 64, half=True)
    cells = np.ascontiguousarray(got).view(np.uint32)
    assert (cells >> 16 == 0).all()
    once = np.float16(product).astype(np.float64)
    bound = 2.0**-10 * (np.abs(product) + np.abs(once)) + 1e-3
    halves = cells.astype(np.uint16).view(np.float16).reshape(cells.shape).astype(np.float64)
    assert (np.abs(halves - (once + product)) <= bound).all()


def test_signs_and_lanes_that_are_left_alone() -> None:
    got, product = multiply("bf16", 128, 32, negate=(True, False))
    check(got, 2 * product)
    got, product = multiply("bf16", 128, 32, kept_lanes=0b1010)
    wanted = 2 * product
    wanted[[1, 3]] = product[[1, 3]]  # not touched by the second MMA
    check(got, wanted)


@pytest.mark.parametrize("options", SCHEDULES, ids=lambda o: f"{o.timing}-{o.order}-{o.seed}")
def test_every_schedule_gives_the_same(options: Options) -> None:
    for tensor_a in (False, True):
        got, product = multiply("bf16", 128, 64, tensor_a=tensor_a, options=options)
        check(got, 2 * product)


# --- misuse: a correct kernel, with one thing changed

CORRECT = (
    allocated(128)
    + copy_to_shared("%p0", 16384, 128)
    + """
  setp.ne.u32 %q2, %tid, 0;
  @%q2 bra ISSUED;
  mov.u32 %r1, shared;
  and.b32 %r90, %r1, 0x3ffff; shr.u32 %r90, %r90, 4; cvt.u64.u32 %d21, %r90;
  or.b64 %d21, %d21, 0x4000404000010000;
  setp.ne.u32 %q3, %tid, %tid;
  tcgen05.mma.cta_group::1.kind::f16 [%r40], %d21, %d21, 0x8100490, %q3;
  // between
  tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r100];
ISSUED:
  mbarrier.try_wait.parity.shared::cta.b64 %q4, [%r100], 0;
  @!%q4 bra ISSUED;
  tcgen05.fence::after_thread_sync;
  // after
  tcgen05.ld.sync.aligned.32x32b.x4.b32 {%r10, %r11, %r12, %r13}, [%r41];
  // loaded
  tcgen05.wait::ld.sync.aligned;
  add.u32 %r14, %r10, %r11;
"""
    + freed(128)
)

COMMIT = "tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r100];\n"
WAIT = "ISSUED:\n  mbarrier.try_wait.parity.shared::cta.b64 %q4, [%r100], 0;\n  @!%q4 bra ISSUED;\n"
CHANGES = {
    "no wait for the MMA": (
        ("mbarrier.try_wait.parity.shared::cta.b64 %q4, [%r100], 0;\n  @!%q4 bra ISSUED;", ""),
        "whose tcgen05.commit has not arrived|uninitialised tensor memory",
    ),
    "no fence after the wait": (
        ("tcgen05.fence::after_thread_sync;\n  // after", ""),
        "race: tcgen05.ld of .* has written with no tcgen05.fence::after_thread_sync between the wait",
    ),
    "a fence before the wait": (
        (
            WAIT + "  tcgen05.fence::after_thread_sync;\n",
            "ISSUED:\n  tcgen05.fence::after_thread_sync;\n" + WAIT.replace("ISSUED", "AGAIN"),
        ),
        "race: tcgen05.ld of .* has written with no tcgen05.fence::after_thread_sync between the wait",
    ),
    "no commit": (("tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r100];", ""), "deadlock"),
    "registers used before they are loaded": (
        ("// loaded", "add.u32 %r14, %r10, %r10;"),
        "tcgen05.wait::ld must come first",
    ),
    "no wait for the load": (("tcgen05.wait::ld.sync.aligned;", ""), "tcgen05.wait::ld must come first"),
    "operands overwritten": (("// between", "st.shared.u32 [%r1], %r1;"), "an MMA may still read"),
    "other lanes": (
        ("[%r41];\n  // loaded", "[%r40];\n  // loaded"),
        r"may access lanes \d+\.\.\d+ of tensor memory, not 0\.\.31",
    ),
    "columns that were not allocated": (
        ("[%r41];\n  // loaded", "[%r41+128];\n  // loaded"),
        "not allocated: column 128",
    ),
    "cells that nobody wrote": (
        ("[%r41];\n  // loaded", "[%r41+62];\n  // loaded"),
        r"uninitialised tensor memory: lane \d+, column 64",
    ),
    "accumulation onto nothing": (("setp.ne.u32 %q3", "setp.eq.u32 %q3"), "accumulation of uninitialised"),
    "several threads issue": (
        ("setp.ne.u32 %q2, %tid, 0;\n  @%q2", "setp.gt.u32 %q2, %tid, 1;\n  @%q2"),
        "issued by one thread, here by 2",
    ),
    "no proxy fence": (("fence.proxy.async.shared::cta;", ""), "no fence.proxy.async came between"),
    "no dealloc": (("tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r40, 128;", ""), "without tcgen05.dealloc"),
    "dealloc of something else": (
        ("aligned.b32 %r40, 128;", "aligned.b32 %r40, 32;"),
        "which tcgen05.alloc did not give",
    ),
    "use after dealloc": (
        ("// after", freed(128).replace("FREED", "EARLY")),
        "not allocated|race: tcgen05.dealloc of tensor memory, .* has read",
    ),
    "a dealloc that nothing orders after other warps' loads": (
        (freed(128), freed(128).replace("bar.sync 0;", "nanosleep.u32 100;\n" * 4)),
        "race: tcgen05.dealloc of tensor memory|not allocated|a load or store that was not waited for",
    ),
    "a commit by another thread": (
        (
            COMMIT + WAIT,
            f"""
            ISSUED: bar.sync 1;
              setp.ne.u32 %q5, %tid, 1;
              @!%q5 {COMMIT}
            {WAIT.replace("ISSUED", "COMMITTED")}
            """,
        ),
        "whose tcgen05.commit has not arrived",
    ),
    "an odd number of columns": (("[%r42], 128;", "[%r42], 48;"), "no power of two in 32..512"),
    "a second allocation": (
        ("bar.sync 0;", "@!%q1 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r42], 32; bar.sync 0;"),
        "after tcgen05.relinquish_alloc_permit",
    ),
    "a store that nobody waited for": (
        ("// after", "tcgen05.st.sync.aligned.32x32b.x1.b32 [%r41], {%r1};"),
        "tcgen05.st was not followed by tcgen05.wait::st",
    ),
}


@pytest.mark.parametrize("name", ["nothing", *CHANGES])
@pytest.mark.parametrize("options", SCHEDULES[:4], ids=lambda o: f"{o.timing}-{o.order}")
def test_misuse(name: str, options: Options) -> None:
    data = np.zeros(16384, np.uint8)
    if name == "nothing":
        launch(CORRECT, [data], 32768, options)
        return
    (old, new), message = CHANGES[name]
    assert old in CORRECT
    with pytest.raises(EmulationError, match=message):
        launch(CORRECT.replace(old, new, 1), [data], 32768, options)


# Warps 1 to 3 load, wait, fence and tell warp 0, which fences; its MMA then overwrites what they loaded.
LOADED, BEFORE, TOLD, AFTER = (
    "tcgen05.wait::ld.sync.aligned;",
    "tcgen05.fence::before_thread_sync;",
    "bar.arrive 1, 128;",
    "tcgen05.fence::after_thread_sync;",
)
HANDOVERS = {
    "all": ([LOADED, BEFORE, TOLD], AFTER, ""),
    "told before it is loaded": ([BEFORE, TOLD, LOADED], AFTER, "has read without any|not followed by tcgen05.wait"),
    "no fence before": ([LOADED, TOLD], AFTER, "has read with neither tcgen05.fence::before_thread_sync nor"),
    "fenced too early": ([BEFORE, LOADED, TOLD], AFTER, "has read with neither tcgen05.fence::before_thread_sync nor"),
    "fenced too late": ([LOADED, TOLD, BEFORE], AFTER, "has read with neither tcgen05.fence::before_thread_sync nor"),
    "no fence after": ([LOADED, BEFORE, TOLD], "", "has read with no tcgen05.fence::after_thread_sync between"),
}


@pytest.mark.parametrize("name", HANDOVERS)
@pytest.mark.parametrize("options", SCHEDULES[:4], ids=lambda o: f"{o.timing}-{o.order}")
def test_what_was_loaded_is_overwritten(name: str, options: Options) -> None:
    steps, after, message = HANDOVERS[name]
    body = CORRECT[: CORRECT.index("  // loaded")]
    body += f"""
      setp.lt.u32 %q5, %tid, 32;
      @%q5 bra FIRST;
      {" ".join(steps)}
      bra AGAIN;
    FIRST:
      tcgen05.wait::ld.sync.aligned;
      {"nanosleep.u32 100; " * 4}
      bar.sync 1, 128;
      {after}
      @%q2 bra AGAIN;
      tcgen05.mma.cta_group::1.kind::f16 [%r40], %d21, %d21, 0x8100490, %q3;
      {COMMIT}
    AGAIN:
      mbarrier.try_wait.parity.shared::cta.b64 %q4, [%r100], 1;
      @!%q4 bra AGAIN;
      {freed(128)}
    """
    data = [np.zeros(16384, np.uint8)]
    if message:
        with pytest.raises(EmulationError, match=message):
            launch(body, data, 32768, options)
    if not message or "fence::" in message:
        launch(body, data, 32768, replace(options, relaxed_tensor_fences=bool(message)))


def test_waits_may_be_left_to_the_hardware() -> None:
    text = CORRECT.replace("tcgen05.wait::ld.sync.aligned;", "")
    launch(text, [np.zeros(16384, np.uint8)], 32768, Options(relaxed_tensor_waits=True))
