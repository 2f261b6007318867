"""wgmma, ldmatrix and stmatrix of the emulator against NumPy, and the misuse of wgmma that it reports."""

from __future__ import annotations

import numpy as np
import pytest
from emulator_ptx import SCHEDULES, bf16, copy_from_shared, copy_to_shared, dynamic_shared, f16, from_bf16, run
from gnaforge.build_tools.emulator import EmulationError, Options
from test_emulator_instructions import e4m3_values

SIZE = {"bf16": 2, "f16": 2, "tf32": 4, "e4m3": 1}


def values(kind: str, shape: tuple[int, ...], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Random elements: their bits, and the numbers that they are."""
    if kind == "bf16":
        bits = bf16(rng.standard_normal(shape))
        return bits, from_bf16(bits).astype(np.float64)
    if kind == "f16":
        bits = f16(rng.standard_normal(shape))
        return bits, bits.view(np.float16).astype(np.float64)
    if kind == "tf32":
        bits = rng.standard_normal(shape).astype(np.float32).view(np.uint32)
        return bits, (bits & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)
    bits = rng.integers(0, 256, shape).astype(np.uint8)
    bits[bits & 127 > 80] &= 63  # no NaN, nothing huge
    return bits, e4m3_values()[bits]


def k_major(bits: np.ndarray, span: int) -> tuple[bytes, int, int]:
    """A matrix [rows][32 bytes of k] as wgmma wants it where k is contiguous; with leading and stride byte offsets."""
    rows = len(bits)
    raw = np.ascontiguousarray(bits).view(np.uint8).reshape(rows, 32)
    if span == 0:  # core matrices of 8 rows of 16 bytes: all of the first half of k, then all of the second
        cores = raw.reshape(rows // 8, 8, 2, 16).transpose(2, 0, 1, 3)
        return cores.tobytes(), rows * 16, 128
    image = np.zeros((rows, span // 16, 16), np.uint8)
    period = {32: 4, 64: 2, 128: 1}[span]
    for row in range(rows):
        for piece in range(2):
            image[row, piece ^ (row // period % (span // 16))] = raw[row, 16 * piece : 16 * piece + 16]
    return image.tobytes(), 16, 8 * span


def row_major(bits: np.ndarray, span: int) -> tuple[bytes, int, int]:
    """The same matrix where the rows' index is contiguous."""
    rows, depth = bits.shape
    element = bits.itemsize
    width = span // element if span else 16 // element  # rows side by side
    blocks = -(-rows // width)
    padded = np.zeros((blocks * width, depth), bits.dtype)
    padded[:rows] = bits
    image = np.zeros((blocks, depth // 8, 8, width), bits.dtype)  # block of rows, group of k, k, row
    for block in range(blocks):
        for k in range(depth):
            line = padded[block * width : (block + 1) * width, k].reshape(-1, 16 // element)
            if span:
                period = {32: 4, 64: 2, 128: 1}[span]
                order = [piece ^ (k % 8 // period % (span // 16)) for piece in range(len(line))]
                image[block, k // 8, k % 8] = line[order].ravel()
            else:
                image[block, k // 8, k % 8] = line.ravel()
    step = 8 * width * element  # bytes of one group of k
    # With swizzle the leading offset walks along the rows; without, along k.
    return (image.tobytes(), depth // 8 * step, step) if span else (image.tobytes(), step, depth // 8 * step)


def descriptor(address: str, leading: int, stride: int, span: int) -> str:
    """PTX that makes a descriptor in %d20 from a shared address in a register."""
    layout = {0: 0, 128: 1, 64: 2, 32: 3}[span]
    high = (leading >> 4) << 16 | (stride >> 4) << 32 | layout << 62
    return (
        f"and.b32 %r90, {address}, 0x3ffff; shr.u32 %r90, %r90, 4; "
        f"cvt.u64.u32 {{d}}, %r90; or.b64 {{d}}, {{d}}, {high};\n"
    )


def accumulators(columns: int, half: bool) -> tuple[str, int]:
    count = columns // 4 if half else columns // 2
    prefix = "%r" if half else "%f"
    return "{" + ", ".join(f"{prefix}{150 + i}" if half else f"{prefix}{i}" for i in range(count)) + "}", count


def store_accumulators(columns: int, half: bool) -> str:
    """Each thread writes its registers to %p1, register by register."""
    _, count = accumulators(columns, half)
    text = "mul.wide.u32 %d30, %tid, 4; add.s64 %d30, %d30, %p1;\n"
    for i in range(count):
        register = f"%r{150 + i}" if half else f"%f{i}"
        text += f"st.global.b32 [%d30+{512 * i}], {register};\n"
    return text


def unpack(out: np.ndarray, columns: int, half: bool) -> np.ndarray:
    """Registers by thread to the matrix [64][columns], by the figure of the PTX ISA."""
    matrix = np.zeros((64, columns))
    for thread in range(128):
        warp, lane = divmod(thread, 32)
        for row_half in range(2):
            row = 16 * warp + lane // 4 + 8 * row_half
            for group in range(columns // 8):
                for e in range(2):
                    column = 8 * group + 2 * (lane % 4) + e
                    if half:
                        word = out[2 * group + row_half, thread]
                        value = np.uint16(word >> (16 * e) & 0xFFFF).view(np.float16)
                    else:
                        value = out[4 * group + 2 * row_half + e, thread].view(np.float32)
                    matrix[row, column] = value
    return matrix


def fragments(bits: np.ndarray) -> np.ndarray:
    """A's 64 x 32 bytes as the four registers of each thread."""
    raw = np.ascontiguousarray(bits).view(np.uint8).reshape(64, 8, 4)
    out = np.zeros((4, 128), np.uint32)
    for thread in range(128):
        warp, lane = divmod(thread, 32)
        for register in range(4):
            row = 16 * warp + lane // 4 + 8 * (register % 2)
            out[register, thread] = raw[row, lane % 4 + 4 * (register // 2)].view(np.uint32)[0]
    return out


def multiply(
    kind: str,
    columns: int,
    *,
    a_span: int = 128,
    b_span: int = 128,
    a_transposed: bool = False,
    b_transposed: bool = False,
    registers: bool = False,
    half: bool = False,
    signs: tuple[int, int] = (1, 1),
    options: Options | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Two accumulating wgmmas (the second adds the first's result again); what came out, and what should have."""
    rng = np.random.default_rng(columns)
    depth = 32 // SIZE[kind]
    a_bits, a = values(kind, (64, depth), rng)
    b_bits, b = values(kind, (columns, depth), rng)
    a_image, a_leading, a_stride = (row_major if a_transposed else k_major)(a_bits, a_span)
    b_image, b_leading, b_stride = (row_major if b_transposed else k_major)(b_bits, b_span)
    image = a_image + bytes(-len(a_image) % 1024) + b_image
    image += bytes(-len(image) % 16)
    offset = len(a_image) + -len(a_image) % 1024
    names, _ = accumulators(columns, half)
    result = "f16" if half else "f32"
    transposes = (
        ""
        if SIZE[kind] != 2
        else f", {int(b_transposed)}"
        if registers
        else f", {int(a_transposed)}, {int(b_transposed)}"
    )
    a_operand = "{%r10, %r11, %r12, %r13}" if registers else "%d21"
    shape = f"m64n{columns}k{depth}.{result}.{kind}.{kind}"
    mma = f"wgmma.mma_async.sync.aligned.{shape} {names}, {a_operand}, %d22, %qP, {signs[0]}, {signs[1]}{transposes};"
    load_a = "mul.wide.u32 %d31, %tid, 4; add.s64 %d31, %d31, %p2;\n"
    load_a += "".join(f"ld.global.b32 %r{10 + i}, [%d31+{512 * i}];\n" for i in range(4))
    body = (
        copy_to_shared("%p0", len(image), 128)
        + load_a
        + "mov.u32 %r1, shared;\n"
        + f"add.u32 %r2, %r1, {offset};\n"
        + descriptor("%r1", a_leading, a_stride, a_span).format(d="%d21")
        + descriptor("%r2", b_leading, b_stride, b_span).format(d="%d22")
        + "setp.ne.u32 %q1, %tid, %tid; setp.eq.u32 %q2, %tid, %tid;\n"
        + "wgmma.fence.sync.aligned;\n"
        + mma.replace("%qP", "%q1")
        + mma.replace("%qP", "%q2")
        + "wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;\n"
        + store_accumulators(columns, half)
    )
    out = np.zeros((columns // 2, 128), np.uint32)
    data = np.frombuffer(image, np.uint8)
    run(
        body,
        [data, out, fragments(a_bits)],
        threads=128,
        shared_bytes=len(image),
        declarations=dynamic_shared(),
        options=options,
    )
    return unpack(out, columns, half), 2 * signs[0] * signs[1] * (a @ b.T)


@pytest.mark.parametrize("columns", range(8, 257, 8))
def test_every_width(columns: int) -> None:
    got, wanted = multiply("bf16", columns, registers=columns % 16 == 0)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", SIZE)
@pytest.mark.parametrize("span", [0, 32, 64, 128])
@pytest.mark.parametrize("registers", [False, True])
def test_every_type_and_swizzle(kind: str, span: int, registers: bool) -> None:
    got, wanted = multiply(kind, 64, a_span=span, b_span=span, registers=registers)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.parametrize("span", [0, 32, 64, 128])
@pytest.mark.parametrize(("a_transposed", "b_transposed"), [(True, False), (False, True), (True, True)])
def test_transposed_operands(span: int, a_transposed: bool, b_transposed: bool) -> None:
    got, wanted = multiply("f16", 96, a_span=span, b_span=span, a_transposed=a_transposed, b_transposed=b_transposed)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


def test_signs_and_half_accumulators() -> None:
    got, wanted = multiply("f16", 40, signs=(-1, 1))
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)
    got, wanted = multiply("f16", 40, half=True)
    np.testing.assert_allclose(got, wanted, rtol=4e-3, atol=2e-2)


@pytest.mark.parametrize("options", SCHEDULES, ids=lambda o: f"{o.timing}-{o.order}-{o.seed}")
def test_every_schedule_gives_the_same(options: Options) -> None:
    got, wanted = multiply("bf16", 64, options=options)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


# --- misuse: a correct kernel, with one thing changed

CORRECT = """
  mov.u32 %r1, shared;
  and.b32 %r90, %r1, 0x3ffff; shr.u32 %r90, %r90, 4; cvt.u64.u32 %d21, %r90;
  or.b64 %d21, %d21, 0x4000004000010000;
  setp.eq.u32 %q2, %tid, %tid;
  mov.f32 %f0, 0f00000000; mov.f32 %f1, %f0; mov.f32 %f2, %f0; mov.f32 %f3, %f0;
  wgmma.fence.sync.aligned;
  wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f0, %f1, %f2, %f3}, %d21, %d21, %q2, 1, 1, 0, 0;
  wgmma.commit_group.sync.aligned;
  // between
  wgmma.wait_group.sync.aligned 0;
  add.f32 %f4, %f0, %f1;
  mad.lo.u32 %r3, %tid, 4, %r1;
  st.shared.u32 [%r3], %r1;
"""
CHANGES = {
    "no fence": (("wgmma.fence.sync.aligned;\n", ""), "needs a wgmma.fence before it"),
    "an accumulator written after the fence": (
        ("wgmma.fence.sync.aligned;", "wgmma.fence.sync.aligned; mov.f32 %f2, %f0;"),
        "written after the last wgmma.fence",
    ),
    "an accumulator read too early": (
        ("// between", "add.f32 %f5, %f2, %f2;"),
        "register that a matrix instruction in flight still uses",
    ),
    "an accumulator written too early": (
        ("// between", "mov.f32 %f3, %f4;"),
        "register that a matrix instruction in flight still uses",
    ),
    "no wait before the end": (
        (CORRECT[CORRECT.index("  wgmma.wait_group") :], ""),
        "exited with 1 wgmma in flight",
    ),
    "shared memory written too early": (("// between", "st.shared.u32 [%r1], %r1;"), "an MMA may still read"),
    "a wait for nothing": (
        ("wgmma.commit_group.sync.aligned;", ""),
        "register that a matrix instruction in flight still uses",
    ),
    "no proxy fence": (("fence.proxy.async.shared::cta;", ""), "no fence.proxy.async came between"),
    "warps that disagree": (
        ("wgmma.fence", "setp.ge.u32 %q3, %tid, 96; @%q3 add.u64 %d21, %d21, 64; wgmma.fence"),
        "warps of a warpgroup disagree|uninitialised",
    ),
    "one warp stays away": (
        ("wgmma.fence", "setp.ge.u32 %q3, %tid, 96; @%q3 ret; wgmma.fence"),
        "deadlock",
    ),
    "memory that nobody wrote": (
        ("or.b64 %d21, %d21,", "add.u64 %d21, %d21, 256; or.b64 %d21, %d21,"),
        "uninitialised",
    ),
}


@pytest.mark.parametrize("name", ["nothing", *CHANGES])
@pytest.mark.parametrize("options", SCHEDULES[:4], ids=lambda o: f"{o.timing}-{o.order}")
def test_misuse(name: str, options: Options) -> None:
    data = np.zeros(8192, np.uint8)
    body = copy_to_shared("%p0", 8192, 128) + CORRECT

    def launch(text: str) -> None:
        run(text, [data], threads=128, shared_bytes=16384, declarations=dynamic_shared(), options=options)

    if name == "nothing":
        launch(body)
        return
    (old, new), message = CHANGES[name]
    assert old in body
    with pytest.raises(EmulationError, match=message):
        launch(body.replace(old, new))


def test_more_wgmmas_in_flight_than_a_byte_counts() -> None:
    start, end = (CORRECT.index(text) for text in ("  wgmma.mma_async", "  wgmma.commit"))
    body = copy_to_shared("%p0", 8192, 128) + CORRECT[:start] + 256 * CORRECT[start:end]
    body += CORRECT[end:].replace("// between", "add.f32 %f5, %f2, %f2;")
    with pytest.raises(EmulationError, match="register that a matrix instruction in flight still uses"):
        run(body, [np.zeros(8192, np.uint8)], threads=128, shared_bytes=16384, declarations=dynamic_shared())


# --- ldmatrix and stmatrix


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix_and_stmatrix(count: int, transposed: bool) -> None:
    rng = np.random.default_rng(count)
    matrices = rng.integers(0, 2**16, (count, 8, 8)).astype(np.uint16)
    registers = "{" + ", ".join(f"%r{10 + i}" for i in range(count)) + "}"
    form = f"m8n8.x{count}{'.trans' if transposed else ''}.shared.b16"
    body = (
        copy_to_shared("%p0", matrices.nbytes, 32)
        + f"""
      mov.u32 %r1, shared;
      rem.u32 %r3, %lane, {8 * count};
      mad.lo.u32 %r2, %r3, 16, %r1;
      ldmatrix.sync.aligned.{form} {registers}, [%r2];
      stmatrix.sync.aligned.{form} [%r2+{matrices.nbytes}], {registers};
      mul.wide.u32 %d1, %lane, 4; add.s64 %d1, %d1, %p1;
    """
    )
    body += "".join(f"st.global.u32 [%d1+{128 * i}], %r{10 + i};\n" for i in range(count))
    body += copy_from_shared("%p2", matrices.nbytes, 32, matrices.nbytes)
    out, back = np.zeros((count, 32), np.uint32), np.zeros_like(matrices)
    run(body, [matrices, out, back], shared_bytes=2 * matrices.nbytes, declarations=dynamic_shared())
    for i in range(count):
        matrix = matrices[i].T if transposed else matrices[i]
        # A lane holds two neighbours of row lane / 4, the lower one in the lower half.
        np.testing.assert_array_equal(out[i].view(np.uint16).reshape(8, 8), matrix)
    np.testing.assert_array_equal(back, matrices)
