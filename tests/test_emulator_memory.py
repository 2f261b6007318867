"""Accesses that the emulator refuses: out of bounds, unaligned, uninitialised; each message names place and thread."""

from __future__ import annotations

import re

import numpy as np
import pytest
from emulator_ptx import SCHEDULES, element_address, module_of, run
from gnaforge.build_tools.emulator import EmulationError, Options, TensorMap, load

SHARED = ".shared .align 16 .b8 shared[64];"


def failure(body: str, *arrays: np.ndarray, threads: int = 32, declarations: str = SHARED) -> str:
    with pytest.raises(EmulationError) as caught:
        run(body, arrays, threads=threads, declarations=declarations)
    return str(caught.value)


def test_a_global_access_past_the_end_names_the_allocation() -> None:
    data = np.zeros(31, np.uint32)
    message = failure(element_address("%d1", "%p0", 4) + "\nld.global.u32 %r1, [%d1];", data)
    assert re.search(
        r"ptx:\d+: ld.global.u32 %r1, \[%d1\] \(kernel\.cu:7\): thread 31: global memory out of bounds: 4 bytes",
        message,
    )
    assert "array 0 uint32[31] (124 bytes" in message and "ends 0 bytes before it" in message


def test_a_store_before_the_beginning() -> None:
    data = np.zeros(8, np.uint32)
    assert "begins 4 bytes after it" in failure("st.global.u32 [%p0+-4], %tid;", data, threads=1)


def test_kernel_parameters_are_read_only() -> None:
    message = failure("mov.u64 %d1, p0; cvta.param.u64 %d1, %d1; st.u32 [%d1], %tid;", np.zeros(4, np.uint32))
    assert "write to read-only memory" in message


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("mov.u32 %r1, shared; ld.shared.u32 %r2, [%r1];", "read of uninitialised shared memory: byte 0x400"),
        ("mov.u32 %r1, shared; st.shared.u32 [%r1+2], %r1;", "unaligned access: 4 bytes at 0x402"),
        ("mov.u32 %r1, shared; st.shared.u32 [%r1+64], %r1;", "shared memory out of bounds: write of 4 bytes at 0x440"),
        ("mov.u32 %r1, 0; st.shared.u32 [%r1], %r1;", "shared memory out of bounds"),
        ("ld.global.u32 %r1, [%p0+1];", "unaligned access"),
        (
            "mov.u32 %r1, shared; cvt.u64.u32 %d1, %r1; cvta.shared.u64 %d1, %d1; ld.global.u32 %r1, [%d1];",
            "not an address in global",
        ),
    ],
)
def test_bad_accesses(body: str, message: str) -> None:
    text = failure(body, np.zeros(4, np.uint32), threads=1)
    assert message in text
    assert "thread 0" in text


def test_generic_addresses_reach_every_space() -> None:
    out = np.zeros(3, np.uint32)
    body = """
    {
      .local .align 4 .b8 room[4];
      .reg .b64 %at;
      mov.u32 %r1, shared; cvt.u64.u32 %d1, %r1; cvta.shared.u64 %d1, %d1;
      mov.u32 %r2, 5; st.u32 [%d1], %r2; ld.shared.u32 %r3, [%r1];
      mov.u64 %at, room; cvta.local.u64 %d2, %at; st.u32 [%d2], %r3; ld.local.u32 %r4, [%at];
      ld.const.u32 %r5, [table+4];
      add.u32 %r4, %r4, %r5;
      st.u32 [%p0], %r4;
      isspacep.shared %q1, %d1; selp.u32 %r6, 1, 0, %q1; st.u32 [%p0+4], %r6;
      isspacep.global %q1, %d2; selp.u32 %r6, 1, 0, %q1; st.u32 [%p0+8], %r6;
    }
    """
    run(body, [out], threads=1, declarations=SHARED + "\n.const .align 4 .b32 table[2] = {1000, 2000};")
    np.testing.assert_array_equal(out, [2005, 1, 0])


def test_line_information_is_in_the_message() -> None:
    text = """
.version 8.7
.target sm_90a
.address_size 64
.file 1 "/somewhere/kernel.cu"
.visible .entry k()
{
  .reg .b32 %r<4>;
  .loc 1 77 3
  mov.u32 %r1, 0;
  .loc 1 78 5
  ld.shared.u32 %r2, [%r1];
  ret;
}
"""
    with pytest.raises(EmulationError, match=r"ptx:12: ld\.shared\.u32 %r2, \[%r1\] \(kernel\.cu:78\): thread 0"):
        load(text).launch([1], [1], [])


def test_launch_limits() -> None:
    data = np.zeros(1, np.uint32)
    with pytest.raises(EmulationError, match=r"size 1056 is out of range"):
        module_of("", 1).launch([1], [1056], [data])
    with pytest.raises(EmulationError, match="exceed 232448"):
        module_of("", 1).launch([1], [32], [data], shared_bytes=232449)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"box": (257, 1)}, r"boxDim\[0\] = 257 is not in 1..256"),
        ({"box": (3, 4)}, "12 bytes, not a multiple of 16"),
        ({"box": (32, 4), "swizzle": 64}, "128 bytes, more than the swizzle's 64"),
        ({"strides": (72,)}, "not a multiple of 16"),
        ({"strides": (1 << 40,)}, "not less than 2.40"),
        ({"dims": (0, 8)}, r"globalDim\[0\] = 0"),
        ({"element_strides": (1, 9)}, r"elementStrides\[1\] = 9"),
        ({"data_type": "u32", "fill_nan": True}, "NaN fill needs a floating-point type"),
        ({"dims": (8,) * 6, "strides": (32,) * 5, "box": (4,) * 6}, "rank 6 is not in 1..5"),
    ],
)
def test_every_rule_of_tensor_maps(change: dict[str, object], message: str) -> None:
    array = np.zeros((16, 32), np.float32)
    arguments = {"box": (16, 4), **change}
    with pytest.raises(EmulationError, match=message):
        TensorMap(array, **arguments)


def test_a_tensor_map_needs_an_aligned_address() -> None:
    array = np.zeros(1024, np.uint8)
    start = -array.ctypes.data % 16 + 8
    with pytest.raises(EmulationError, match="not aligned to 16 bytes"):
        TensorMap(array[start : start + 256].reshape(4, 64), (16, 1))


# --- races between warps, found by what each has waited for, not by luck

RACES = {
    "a read without a barrier": (
        "setp.eq.u32 %q1, %tid, 0; @%q1 st.shared.u32 [%r1], %tid; @!%q1 ld.shared.u32 %r2, [%r1];"
    ),
    "two writers": "st.shared.u32 [%r1], %tid;",
    "a write after a read": (
        "setp.lt.u32 %q1, %tid, 32; @%q1 st.shared.u32 [%r2], %tid; bar.sync 0;"
        "@!%q1 ld.shared.u32 %r3, [%r1]; @%q1 st.shared.u32 [%r2], %tid;"
    ),
    "a barrier of the wrong warps": (
        "setp.lt.u32 %q1, %tid, 32; setp.ge.u32 %q2, %tid, 96; @%q1 st.shared.u32 [%r2], %tid;"
        "@%q1 bar.arrive 1, 64; @%q2 bar.sync 1, 64; setp.eq.u32 %q3, %tid, 40; @%q3 ld.shared.u32 %r3, [%r1];"
    ),
}
ADDRESSES = "mov.u32 %r1, shared; and.b32 %r2, %tid, 15; mad.lo.u32 %r2, %r2, 4, %r1;\n"


@pytest.mark.parametrize("name", RACES)
@pytest.mark.parametrize("options", SCHEDULES, ids=lambda o: f"{o.timing}-{o.order}-{o.seed}")
def test_races_between_warps(name: str, options: Options) -> None:
    with pytest.raises(EmulationError, match=r"race: (read|write) of shared memory at|uninitialised"):
        run(ADDRESSES + RACES[name], [], threads=128, declarations=SHARED, options=options)


@pytest.mark.parametrize("options", SCHEDULES, ids=lambda o: f"{o.timing}-{o.order}-{o.seed}")
def test_what_looks_like_a_race_and_is_none(options: Options) -> None:
    """A flag with release and acquire, an atomic counter, different words, and lanes of one warp."""
    out = np.zeros(64, np.uint32)
    body = """
      mov.u32 %r1, shared;
      setp.ge.u32 %q1, %tid, 32;
      setp.ne.u32 %q2, %lane, 0;
      mov.u32 %r4, 0;
      setp.ne.u32 %q4, %tid, 0;
      @%q4 bra READY;
      st.shared.u32 [%r1], %r4;
      st.shared.u32 [%r1+4], %r4;
    READY:
      bar.sync 0;
      @!%q2 atom.shared.add.u32 %r2, [%r1+4], 1;
      @%q1 bra READER;
      mov.u32 %r3, 77;
      st.shared.u32 [%r1+8], %r3;
      st.shared.u32 [%r1+12], %r3;
      mov.u32 %r4, 1;
      st.release.cta.shared.u32 [%r1], %r4;
      bra END;
    READER:
      ld.acquire.cta.shared.u32 %r4, [%r1];
      setp.eq.u32 %q3, %r4, 0;
      @%q3 bra READER;
      ld.shared.u32 %r3, [%r1+8];
    END:
    """
    store = element_address("%d9", "%p0", 4) + "st.global.u32 [%d9], %r3;"
    run(body + store, [out], threads=64, declarations=SHARED, options=options)
    assert (out == 77).all()


def test_kernels_of_one_module_share_no_shared_memory_and_no_registers() -> None:
    # Each has 8 bytes of its own and then what the launch adds, 1,024 aligned where nothing static comes first.
    kernel = """
.visible .entry {name}(.param .u64 p0)
{{
  .reg .b32 %r<{registers}>;
  .reg .b64 %d<2>;
  {static}
  ld.param.u64 %d1, [p0];
  mov.u32 %r{last}, %tid.x;
  mov.u32 %r1, room;
  add.u32 %r1, %r1, %r{last};
  st.global.u32 [%d1], %r1;
  ret;
}}
"""
    head = ".version 8.7\n.target sm_90a\n.address_size 64\n.extern .shared .align 16 .b8 room[];\n"
    first = kernel.format(name="first", registers=9, last=8, static=".shared .align 8 .b8 own[40];")
    second = kernel.format(name="second", registers=3, last=2, static="")
    helper = ".func helper()\n{\n  .reg .b32 %r<2>;\n  mov.u32 %r1, room;\n  ret;\n}\n"
    out = np.zeros(1, np.uint32)
    for text, places in ((first + second, (0x430, 0x400)), (first + second + helper, (0x430, 0x430))):
        module = load(head + text)
        for name, place in zip(("first", "second"), places, strict=True):
            module.launch([1], [1], [out], kernel=name, shared_bytes=64)
            assert out[0] == place, (name, hex(out[0]))
