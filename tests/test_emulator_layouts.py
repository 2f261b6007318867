"""Layouts against tables by thread and register, written out entry by entry, not from the engine's formulas.

An entry ``5.2`` is register (or element) 2 of lane 5. Each table names the figure of the PTX ISA that shows its layout.
The tables of tensor memory follow the bit layouts in CUTLASS's ``copy_traits_sm100.hpp``; the figures themselves were
not at hand when the tables were written.
"""

from __future__ import annotations

import numpy as np
import pytest
from emulator_ptx import bf16, copy_from_shared, copy_to_shared, dynamic_shared, f16, run
from gnaforge.build_tools.emulator import TensorMap
from test_emulator_async import INIT, load_body
from test_emulator_instructions import e4m3_values
from test_emulator_matrix import descriptor as wgmma_descriptor, k_major
from test_emulator_tensor_memory import allocated, descriptor, freed, launch, registers

Places = list[list[tuple[int, int]]]


def places(table: str) -> Places:
    """Rows of (lane, register)."""
    rows = [line.split() for line in table.split("\n") if line.strip()]
    return [[(int(lane), int(register)) for lane, register in (entry.split(".") for entry in row)] for row in rows]


# --- tensor memory: figures of .16x64b, .16x128b and .16x256b with .x1; lanes down, 32-bit columns across

TENSOR_SHAPES = {
    "16x64b": """
        0.0 2.0
        4.0 6.0
        8.0 10.0
        12.0 14.0
        16.0 18.0
        20.0 22.0
        24.0 26.0
        28.0 30.0
        1.0 3.0
        5.0 7.0
        9.0 11.0
        13.0 15.0
        17.0 19.0
        21.0 23.0
        25.0 27.0
        29.0 31.0
    """,
    "16x128b": """
        0.0 1.0 2.0 3.0
        4.0 5.0 6.0 7.0
        8.0 9.0 10.0 11.0
        12.0 13.0 14.0 15.0
        16.0 17.0 18.0 19.0
        20.0 21.0 22.0 23.0
        24.0 25.0 26.0 27.0
        28.0 29.0 30.0 31.0
        0.1 1.1 2.1 3.1
        4.1 5.1 6.1 7.1
        8.1 9.1 10.1 11.1
        12.1 13.1 14.1 15.1
        16.1 17.1 18.1 19.1
        20.1 21.1 22.1 23.1
        24.1 25.1 26.1 27.1
        28.1 29.1 30.1 31.1
    """,
    "16x256b": """
        0.0 0.1 1.0 1.1 2.0 2.1 3.0 3.1
        4.0 4.1 5.0 5.1 6.0 6.1 7.0 7.1
        8.0 8.1 9.0 9.1 10.0 10.1 11.0 11.1
        12.0 12.1 13.0 13.1 14.0 14.1 15.0 15.1
        16.0 16.1 17.0 17.1 18.0 18.1 19.0 19.1
        20.0 20.1 21.0 21.1 22.0 22.1 23.0 23.1
        24.0 24.1 25.0 25.1 26.0 26.1 27.0 27.1
        28.0 28.1 29.0 29.1 30.0 30.1 31.0 31.1
        0.2 0.3 1.2 1.3 2.2 2.3 3.2 3.3
        4.2 4.3 5.2 5.3 6.2 6.3 7.2 7.3
        8.2 8.3 9.2 9.3 10.2 10.3 11.2 11.3
        12.2 12.3 13.2 13.3 14.2 14.3 15.2 15.3
        16.2 16.3 17.2 17.3 18.2 18.3 19.2 19.3
        20.2 20.3 21.2 21.3 22.2 22.3 23.2 23.3
        24.2 24.3 25.2 25.3 26.2 26.3 27.2 27.3
        28.2 28.3 29.2 29.3 30.2 30.3 31.2 31.3
    """,
    # Lane i of the warp is lane i of tensor memory.
    "32x32b": "\n".join(f"{lane}.0" for lane in range(32)),
    # Lanes 0 to 15 hold the first half, 16 to 31 the second one, immHalfSplitoff columns further.
    "16x32bx2": """
        0.0 16.0
        1.0 17.0
        2.0 18.0
        3.0 19.0
        4.0 20.0
        5.0 21.0
        6.0 22.0
        7.0 23.0
        8.0 24.0
        9.0 25.0
        10.0 26.0
        11.0 27.0
        12.0 28.0
        13.0 29.0
        14.0 30.0
        15.0 31.0
    """,
}
LARGEST = {"16x64b": 128, "16x128b": 64, "16x256b": 32, "32x32b": 128, "16x32bx2": 128}


def fill_columns(count: int) -> str:
    """Cell (lane, column) = 1000 lane + column, with the shape whose layout is plain."""
    text = ""
    for first in range(0, count, 32):
        text += "".join(f"mad.lo.u32 %r{150 + c}, %tid, 1000, {first + c};\n" for c in range(32))
        text += f"add.u32 %r44, %r41, {first};\n"
        text += f"tcgen05.st.sync.aligned.32x32b.x32.b32 [%r44], {registers(32)};\n"
    return text + "tcgen05.wait::st.sync.aligned;\n"


def store_registers(count: int) -> str:
    text = "mul.wide.u32 %d1, %tid, 4; add.s64 %d1, %d1, %p0;\n"
    return text + "".join(f"st.global.u32 [%d1+{512 * r}], %r{150 + r};\n" for r in range(count))


@pytest.mark.parametrize("shape", TENSOR_SHAPES)
def test_tensor_memory_shapes(shape: str) -> None:
    """.x1, .x2, and the largest: a repetition is the table again, as many columns and registers further."""
    table = places(TENSOR_SHAPES[shape])
    width = 1 if shape == "16x32bx2" else len(table[0])
    count = 1 + max(register for row in table for _, register in row)
    for repeat in (1, 2, LARGEST[shape]):
        split = 130 if shape == "16x32bx2" else 0
        total = count * repeat
        operand = f"[%r41], {split}" if split else "[%r41]"
        body = allocated(512) + fill_columns(288)
        body += f"tcgen05.ld.sync.aligned.{shape}.x{repeat}.b32 {registers(total)}, {operand};\n"
        body += "tcgen05.wait::ld.sync.aligned;\n" + store_registers(total) + freed(512)
        out = np.zeros((total, 128), np.uint32)
        launch(body, [out])
        for row, line in enumerate(table):
            for column, (lane, register) in enumerate(line):
                first = column * split if split else column
                for again in range(repeat):
                    wanted = 1000 * (row + 32 * np.arange(4)) + first + width * again
                    np.testing.assert_array_equal(out[register + count * again, lane::32], wanted)


def test_packed_halves_of_tensor_memory() -> None:
    """.pack::16b joins the lower halves of two neighbouring columns, the first one lower; .unpack::16b parts them."""
    body = allocated(512) + fill_columns(32)
    body += f"tcgen05.ld.sync.aligned.32x32b.x2.pack::16b.b32 {registers(2)}, [%r41];\n"
    body += "tcgen05.wait::ld.sync.aligned;\n" + store_registers(2)
    body += f"tcgen05.st.sync.aligned.32x32b.x2.unpack::16b.b32 [%r41], {registers(2)};\n"
    body += "tcgen05.wait::st.sync.aligned;\n"
    body += f"tcgen05.ld.sync.aligned.32x32b.x4.b32 {registers(4, 152)}, [%r41];\n"
    body += "tcgen05.wait::ld.sync.aligned;\n" + store_registers(6) + freed(512)
    out = np.zeros((6, 128), np.uint32)
    launch(body, [out])
    lower = 1000 * np.arange(128) % 65536
    np.testing.assert_array_equal(out[0], lower | lower + 1 << 16)
    np.testing.assert_array_equal(out[1], lower + 2 | lower + 3 << 16)
    np.testing.assert_array_equal(out[2:], lower + np.arange(4)[:, None])


# --- tcgen05.cp: which lanes get which row (PTX ISA, tcgen05.cp: multicast), by quarters of 32 lanes

COPIES = {
    "128x256b": (128, 32, (0, 1, 2, 3)),
    "128x128b": (128, 16, (0, 1, 2, 3)),
    "64x128b.warpx2::02_13": (64, 16, (0, 1, 0, 1)),
    "64x128b.warpx2::01_23": (64, 16, (0, 0, 1, 1)),
    "32x128b.warpx4": (32, 16, (0, 0, 0, 0)),
}


@pytest.mark.parametrize("form", COPIES)
def test_copies_to_tensor_memory(form: str) -> None:
    rows, width, quarters = COPIES[form]
    data = np.arange(rows * width, dtype=np.uint32).astype(np.uint8).reshape(rows, width)
    data[:, 0], data[:, 4] = np.arange(rows), 7
    # Without swizzle: pieces of 16 bytes, 8 rows after one another, then the next 8 rows, then the next 16 bytes.
    image = b"".join(data[:, at : at + 16].tobytes() for at in range(0, width, 16))
    body = (
        allocated(512)
        + copy_to_shared("%p1", len(image), 128)
        + """
          setp.ne.u32 %q2, %tid, 0;
          @%q2 bra ISSUED;
          mov.u32 %r1, shared;
          add.u32 %r45, %r40, 64;
        """
        + descriptor("%d21", "%r1", rows * 16, 128, 0)
        + f"""
          tcgen05.cp.cta_group::1.{form} [%r45], %d21;
          tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r100];
        ISSUED:
          mbarrier.try_wait.parity.shared::cta.b64 %q4, [%r100], 0;
          @!%q4 bra ISSUED;
          tcgen05.fence::after_thread_sync;
          add.u32 %r41, %r41, 64;
          tcgen05.ld.sync.aligned.32x32b.x{width // 4}.b32 {registers(width // 4)}, [%r41];
          tcgen05.wait::ld.sync.aligned;
        """
        + store_registers(width // 4)
        + freed(512)
    )
    out = np.zeros((width // 4, 128), np.uint32)
    launch(body, [out, np.frombuffer(image, np.uint8)], len(image))
    words = data.view(np.uint32)
    for quarter, source in enumerate(quarters):
        np.testing.assert_array_equal(
            out[:, 32 * quarter : 32 * quarter + 32].T, words[32 * source : 32 * source + 32], err_msg=str(quarter)
        )


# --- mma.sync and wgmma: rows 0, 1, 7, 8, 9 and 15 of the figures; "lane.element", elements counted as a0, a1, ...

A_16_BIT = {  # "mma.m16n8k16: matrix A with .f16 / .bf16 type", and wgmma's .m64nNk16 A for the first warp
    0: "0.0 0.1 1.0 1.1 2.0 2.1 3.0 3.1 0.4 0.5 1.4 1.5 2.4 2.5 3.4 3.5",
    1: "4.0 4.1 5.0 5.1 6.0 6.1 7.0 7.1 4.4 4.5 5.4 5.5 6.4 6.5 7.4 7.5",
    7: "28.0 28.1 29.0 29.1 30.0 30.1 31.0 31.1 28.4 28.5 29.4 29.5 30.4 30.5 31.4 31.5",
    8: "0.2 0.3 1.2 1.3 2.2 2.3 3.2 3.3 0.6 0.7 1.6 1.7 2.6 2.7 3.6 3.7",
    9: "4.2 4.3 5.2 5.3 6.2 6.3 7.2 7.3 4.6 4.7 5.6 5.7 6.6 6.7 7.6 7.7",
    15: "28.2 28.3 29.2 29.3 30.2 30.3 31.2 31.3 28.6 28.7 29.6 29.7 30.6 30.7 31.6 31.7",
}
A_TF32 = {  # "mma.m16n8k8: matrix A with .tf32 type"
    0: "0.0 1.0 2.0 3.0 0.2 1.2 2.2 3.2",
    1: "4.0 5.0 6.0 7.0 4.2 5.2 6.2 7.2",
    7: "28.0 29.0 30.0 31.0 28.2 29.2 30.2 31.2",
    8: "0.1 1.1 2.1 3.1 0.3 1.3 2.3 3.3",
    9: "4.1 5.1 6.1 7.1 4.3 5.3 6.3 7.3",
    15: "28.1 29.1 30.1 31.1 28.3 29.3 30.3 31.3",
}
A_8_BIT = {  # "mma.m16n8k32: matrix A with .e4m3 / .e5m2 type"
    0: "0.0 0.1 0.2 0.3 1.0 1.1 1.2 1.3 2.0 2.1 2.2 2.3 3.0 3.1 3.2 3.3"
    " 0.8 0.9 0.10 0.11 1.8 1.9 1.10 1.11 2.8 2.9 2.10 2.11 3.8 3.9 3.10 3.11",
    7: "28.0 28.1 28.2 28.3 29.0 29.1 29.2 29.3 30.0 30.1 30.2 30.3 31.0 31.1 31.2 31.3"
    " 28.8 28.9 28.10 28.11 29.8 29.9 29.10 29.11 30.8 30.9 30.10 30.11 31.8 31.9 31.10 31.11",
    8: "0.4 0.5 0.6 0.7 1.4 1.5 1.6 1.7 2.4 2.5 2.6 2.7 3.4 3.5 3.6 3.7"
    " 0.12 0.13 0.14 0.15 1.12 1.13 1.14 1.15 2.12 2.13 2.14 2.15 3.12 3.13 3.14 3.15",
}
# Columns 0 and 7 of B, k downwards: "matrix B" of the same figures.
B_16_BIT = {
    0: "0.0 0.1 1.0 1.1 2.0 2.1 3.0 3.1 0.2 0.3 1.2 1.3 2.2 2.3 3.2 3.3",
    7: "28.0 28.1 29.0 29.1 30.0 30.1 31.0 31.1 28.2 28.3 29.2 29.3 30.2 30.3 31.2 31.3",
}
B_TF32 = {0: "0.0 1.0 2.0 3.0 0.1 1.1 2.1 3.1", 7: "28.0 29.0 30.0 31.0 28.1 29.1 30.1 31.1"}
B_8_BIT = {
    0: "0.0 0.1 0.2 0.3 1.0 1.1 1.2 1.3 2.0 2.1 2.2 2.3 3.0 3.1 3.2 3.3"
    " 0.4 0.5 0.6 0.7 1.4 1.5 1.6 1.7 2.4 2.5 2.6 2.7 3.4 3.5 3.6 3.7",
}
RESULT = {  # "accumulator matrix fragment"; columns 0 to 7
    0: "0.0 0.1 1.0 1.1 2.0 2.1 3.0 3.1",
    1: "4.0 4.1 5.0 5.1 6.0 6.1 7.0 7.1",
    7: "28.0 28.1 29.0 29.1 30.0 30.1 31.0 31.1",
    8: "0.2 0.3 1.2 1.3 2.2 2.3 3.2 3.3",
    9: "4.2 4.3 5.2 5.3 6.2 6.3 7.2 7.3",
    15: "28.2 28.3 29.2 29.3 30.2 30.3 31.2 31.3",
}
# Shape and type: A's table, B's table, element bytes, k, encoder of small integers.
ENCODERS = {"f16": f16, "bf16": bf16, "tf32": lambda x: np.asarray(x, np.float32).view(np.uint32)}
MMA = {
    "m16n8k16 f16": (A_16_BIT, B_16_BIT),
    "m16n8k16 bf16": (A_16_BIT, B_16_BIT),
    "m16n8k8 f16": (A_16_BIT, B_16_BIT),
    "m16n8k8 bf16": (A_16_BIT, B_16_BIT),
    "m16n8k8 tf32": (A_TF32, B_TF32),
    "m16n8k4 tf32": (A_TF32, B_TF32),
    "m16n8k32 e4m3": (A_8_BIT, B_8_BIT),
}


def encoded(kind: str, values: np.ndarray) -> np.ndarray:
    if kind == "e4m3":
        table = e4m3_values()
        return np.array([int(np.flatnonzero(table == value)[0]) for value in values.ravel()], np.uint8).reshape(
            values.shape
        )
    return ENCODERS[kind](values)


def elements(per_lane: int, kind: str, chosen: dict[tuple[int, int], float]) -> np.ndarray:
    """Registers of 32 lanes, [register][lane], whose elements (lane, index) have these values; the others are 0."""
    values = np.zeros((32, per_lane))
    for (lane, index), value in chosen.items():
        values[lane, index] = value
    return np.ascontiguousarray(encoded(kind, values)).view(np.uint32).T.copy()


@pytest.mark.parametrize("name", MMA)
def test_mma_fragments(name: str) -> None:
    """Row r of A is r + 1 at one k, column n of B is n + 1 there; their product is 0 where tables and engine differ."""
    shape, kind = name.split()
    depth = int(shape.split("k")[1])
    a_table, b_table = MMA[name]
    size = {"e4m3": 1, "tf32": 4}.get(kind, 2)
    a_count, b_count = 16 * depth * size // 32 // 4, 8 * depth * size // 32 // 4
    scale = {0: 1.0, 1: 2.0, 7: 0.5, 8: 4.0, 9: 1.5, 15: 3.0}
    body = "mul.wide.u32 %d9, %lane, 4; add.s64 %d1, %d9, %p0; add.s64 %d2, %d9, %p1; add.s64 %d3, %d9, %p2;\n"
    body += "".join(f"ld.global.b32 %r{10 + i}, [%d1+{128 * i}];\n" for i in range(a_count))
    body += "".join(f"ld.global.b32 %r{20 + i}, [%d2+{128 * i}];\n" for i in range(b_count))
    a_names, b_names = registers(a_count, 10), registers(b_count, 20)
    body += "mov.f32 %f10, 0f41200000;\n"  # C is 10
    body += f"mma.sync.aligned.{shape}.row.col.f32.{kind}.{kind}.f32 {{%f0, %f1, %f2, %f3}}, {a_names}, {b_names},"
    body += "{%f10, %f10, %f10, %f10};\n"
    body += "".join(f"st.global.f32 [%d3+{128 * i}], %f{i};\n" for i in range(4))
    # k of a shape with half the depth is the first half of the figure.
    a_rows = {row: places(text)[0] for row, text in a_table.items()}
    b_columns = {column: places(text)[0] for column, text in b_table.items()}
    for k in range(depth):
        a = elements(a_count * 4 // size, kind, {line[k]: scale[row] for row, line in a_rows.items()})
        b = elements(b_count * 4 // size, kind, {line[k]: column + 1.0 for column, line in b_columns.items()})
        out = np.zeros((4, 32), np.float32)
        run(body, [a, b, out])
        for row, text in RESULT.items():
            for column, (lane, register) in enumerate(places(text)[0]):
                wanted = 10 + scale[row] * (column + 1) * (column in b_columns) * (row in a_rows)
                assert out[register, lane] == wanted, (k, row, column)


def test_mma_with_half_results() -> None:
    """f16 C and D: registers hold elements 0, 1 and 2, 3, the lower index in the lower half."""
    a = elements(8, "f16", {(0, 0): 1.0, (0, 2): 2.0})  # rows 0 and 8 at k 0
    b = elements(4, "f16", {(0, 0): 3.0, (4, 0): 5.0})  # columns 0 and 1 at k 0
    c, out = np.zeros((2, 32), np.uint32), np.zeros((2, 32), np.uint32)
    c[0, 0] = int(f16(np.float32(0.5)))
    body = "mul.wide.u32 %d9, %lane, 4; add.s64 %d1, %d9, %p0; add.s64 %d2, %d9, %p1; add.s64 %d3, %d9, %p2;\n"
    body += "add.s64 %d4, %d9, %p3;\n"
    body += "".join(f"ld.global.b32 %r{10 + i}, [%d1+{128 * i}];\n" for i in range(4))
    body += "".join(
        f"ld.global.b32 %r{20 + i}, [%d2+{128 * i}]; ld.global.b32 %r{30 + i}, [%d3+{128 * i}];\n" for i in range(2)
    )
    body += (
        f"mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {registers(2, 40)}, {registers(4, 10)}, {registers(2, 20)},"
    )
    body += f"{registers(2, 30)}; st.global.b32 [%d4], %r40; st.global.b32 [%d4+128], %r41;\n"
    run(body, [a, b, c, out])
    assert out.view(np.uint16).view(np.float16).reshape(2, 32, 2)[:, 0].tolist() == [[3.5, 5.0], [6.0, 10.0]]


WGMMA = {"f16": A_16_BIT, "bf16": A_16_BIT, "tf32": A_TF32, "e4m3": A_8_BIT}


@pytest.mark.parametrize("kind", WGMMA)
def test_wgmma_fragments(kind: str) -> None:
    """A from registers times the identity is A: figures "WGMMA .m64nNk..", matrices A and D; warp w has rows 16 w."""
    size = {"e4m3": 1, "tf32": 4}.get(kind, 2)
    depth, columns = 32 // size, 32
    identity = np.zeros((columns, depth))
    identity[np.arange(depth), np.arange(depth)] = 1
    image, leading, stride = k_major(np.ascontiguousarray(encoded(kind, identity)), 0)
    transpose = ", 0" if size == 2 else ""
    result = "{" + ", ".join(f"%f{i}" for i in range(columns // 2)) + "}"
    body = copy_to_shared("%p0", len(image), 128)
    body += "mul.wide.u32 %d9, %tid, 4; add.s64 %d1, %d9, %p1; add.s64 %d2, %d9, %p2;\n"
    body += "".join(f"ld.global.b32 %r{10 + i}, [%d1+{512 * i}];\n" for i in range(4))
    body += "mov.u32 %r1, shared;\n" + wgmma_descriptor("%r1", leading, stride, 0).format(d="%d22")
    body += "setp.ne.u32 %q1, %tid, %tid;\nwgmma.fence.sync.aligned;\n"
    body += (
        f"wgmma.mma_async.sync.aligned.m64n{columns}k{depth}.f32.{kind}.{kind} {result}, {registers(4, 10)}, %d22, %q1,"
    )
    body += f" 1, 1{transpose};\nwgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;\n"
    body += "".join(f"st.global.f32 [%d2+{512 * i}], %f{i};\n" for i in range(columns // 2))
    table = {row: places(text)[0] for row, text in WGMMA[kind].items()}
    chosen = {
        place: (1.0 + k % 8) * (1 if row < 8 else 2) for row, line in table.items() for k, place in enumerate(line)
    }
    a = np.zeros((4, 128), np.uint32)
    for warp in range(4):
        a[:, 32 * warp : 32 * warp + 32] = elements(
            16 // size, kind, {at: value * 2.0**warp for at, value in chosen.items()}
        )
    out = np.zeros((columns // 2, 128), np.float32)
    run(
        body,
        [np.frombuffer(image, np.uint8), a, out],
        threads=128,
        shared_bytes=len(image),
        declarations=dynamic_shared(),
    )
    for warp in range(4):
        for row, line in table.items():
            for k, place in enumerate(line):
                # Columns 8 j to 8 j + 7 are the figure's first eight, 4 registers further for each j.
                lane, register = places(RESULT[row])[0][k % 8]
                got = out[register + 4 * (k // 8), 32 * warp + lane]
                assert got == chosen[place] * 2.0**warp, (warp, row, k)


# --- swizzles: pieces of 16 bytes (of 32 in the last one) in lines of 128, figures of "Swizzling Modes"

SWIZZLES = {
    (32, 16): ["0 1 2 3 4 5 6 7", "1 0 3 2 5 4 7 6", "0 1 2 3 4 5 6 7", "1 0 3 2 5 4 7 6"],
    (64, 16): ["0 1 2 3 4 5 6 7", "1 0 3 2 5 4 7 6", "2 3 0 1 6 7 4 5", "3 2 1 0 7 6 5 4", "0 1 2 3 4 5 6 7"],
    (128, 16): [
        "0 1 2 3 4 5 6 7",
        "1 0 3 2 5 4 7 6",
        "2 3 0 1 6 7 4 5",
        "3 2 1 0 7 6 5 4",
        "4 5 6 7 0 1 2 3",
        "5 4 7 6 1 0 3 2",
        "6 7 4 5 2 3 0 1",
        "7 6 5 4 3 2 1 0",
        "0 1 2 3 4 5 6 7",
    ],
    (128, 32): ["0 1 2 3", "1 0 3 2", "2 3 0 1", "3 2 1 0", "0 1 2 3"],
}


@pytest.mark.parametrize(("span", "atom"), SWIZZLES)
def test_swizzles(span: int, atom: int) -> None:
    """Line l of shared memory holds, at piece p, the piece of line l that the table names."""
    table = [[int(piece) for piece in line.split()] for line in SWIZZLES[span, atom]]
    rows = len(table) * 128 // span
    source = np.arange(rows * span // 2, dtype=np.uint16).reshape(rows, span // 2)
    tensor = TensorMap(source, (span // 2, rows), data_type="u16", swizzle=span, swizzle_atom=atom)
    out = np.zeros(source.size, np.uint16)
    size = source.nbytes
    run(
        load_body(2, (0, 0), size) + copy_from_shared("%p0", size, 32),
        [out, tensor.bytes],
        memory=[source],
        shared_bytes=-(-size // 1024) * 1024,
        declarations=INIT[0] + dynamic_shared(),
    )
    lines = source.reshape(len(table), 128 // atom, atom // 2)
    wanted = np.stack([lines[line, order] for line, order in enumerate(table)])
    np.testing.assert_array_equal(out.reshape(wanted.shape), wanted)


# --- tensor maps at their edges: 3 rows of 5 elements with a pitch of 8, box 8 x 4

EDGES = {
    # origin, element strides, fill: what arrives
    "inside": (
        (0, 0),
        (1, 1),
        False,
        ["1 2 3 4 5 0 0 0", "11 12 13 14 15 0 0 0", "21 22 23 24 25 0 0 0", "0 0 0 0 0 0 0 0"],
    ),
    "before the first element": (
        (-2, -1),
        (1, 1),
        False,
        ["0 0 0 0 0 0 0 0", "0 0 1 2 3 4 5 0", "0 0 11 12 13 14 15 0", "0 0 21 22 23 24 25 0"],
    ),
    "past the last": (
        (3, 2),
        (1, 1),
        False,
        ["24 25 0 0 0 0 0 0", "0 0 0 0 0 0 0 0", "0 0 0 0 0 0 0 0", "0 0 0 0 0 0 0 0"],
    ),
    "nothing of it": ((5, 0), (1, 1), False, ["0 0 0 0 0 0 0 0"] * 4),
    "far away": ((-100000, 70000), (1, 1), False, ["0 0 0 0 0 0 0 0"] * 4),
    "every other row": ((0, 0), (1, 2), False, ["1 2 3 4 5 0 0 0", "21 22 23 24 25 0 0 0"]),
    "every other row, from the second": ((0, 1), (1, 2), False, ["11 12 13 14 15 0 0 0", "0 0 0 0 0 0 0 0"]),
    "NaN": ((4, 2), (1, 1), True, ["25 N N N N N N N", "N N N N N N N N", "N N N N N N N N", "N N N N N N N N"]),
}


@pytest.mark.parametrize("name", EDGES)
def test_edges_of_tensor_maps(name: str) -> None:
    """PTX ISA, Tensors: out of bounds reads as zero or NaN, and so does what lies between dimension and pitch."""
    origin, steps, nan, lines = EDGES[name]
    source = np.full((3, 8), 99, np.uint16)
    source[:, :5] = [[1, 2, 3, 4, 5], [11, 12, 13, 14, 15], [21, 22, 23, 24, 25]]
    kind = "f16" if nan else "u16"
    tensor = TensorMap(source, (8, 4), data_type=kind, dims=(5, 3), strides=(16,), element_strides=steps, fill_nan=nan)
    wanted = np.array([[0x7FFF if entry == "N" else int(entry) for entry in line.split()] for line in lines], np.uint16)
    out = np.zeros_like(wanted)
    run(
        load_body(2, origin, wanted.nbytes) + copy_from_shared("%p0", wanted.nbytes, 32),
        [out, tensor.bytes],
        memory=[source],
        shared_bytes=1024,
        declarations=INIT[0] + dynamic_shared(),
    )
    np.testing.assert_array_equal(out, wanted)


# --- ldmatrix: figure "ldmatrix fragment layout for one 8x8 matrix with 16-bit elements"


def test_ldmatrix_rows() -> None:
    """Lane 0 holds elements 0 and 1 of row 0, lane 3 its last two, lane 4 begins row 1; transposed, columns."""
    matrix = np.arange(64, dtype=np.uint16).reshape(8, 8)
    plain = {0: (0, 1), 1: (2, 3), 3: (6, 7), 4: (8, 9), 27: (54, 55), 28: (56, 57), 31: (62, 63)}
    transposed = {0: (0, 8), 1: (16, 24), 3: (48, 56), 4: (1, 9), 27: (54, 62), 28: (7, 15), 31: (55, 63)}
    for form, table in (("", plain), (".trans", transposed)):
        out = np.zeros(32, np.uint32)
        body = (
            copy_to_shared("%p0", 128, 32)
            + "mov.u32 %r1, shared; and.b32 %r2, %lane, 7; mad.lo.u32 %r2, %r2, 16, %r1;\n"
        )
        body += f"ldmatrix.sync.aligned.m8n8.x1{form}.shared.b16 {{%r3}}, [%r2];\n"
        body += "mul.wide.u32 %d1, %lane, 4; add.s64 %d1, %d1, %p1; st.global.b32 [%d1], %r3;\n"
        run(body, [matrix, out], shared_bytes=128, declarations=dynamic_shared())
        for lane, pair in table.items():
            assert tuple(out.view(np.uint16).reshape(32, 2)[lane].tolist()) == pair, (form, lane)
