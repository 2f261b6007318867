"""Small PTX kernels for the tests of the emulator: text around the instructions that a test is about."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from gnaforge.build_tools.emulator import Counters, EmulationError, Module, Options, load

DTYPES = {
    "b16": np.uint16,
    "u16": np.uint16,
    "s16": np.int16,
    "f16": np.uint16,
    "bf16": np.uint16,
    "b32": np.uint32,
    "u32": np.uint32,
    "s32": np.int32,
    "f32": np.float32,
    "f16x2": np.uint32,
    "bf16x2": np.uint32,
    "b64": np.uint64,
    "u64": np.uint64,
    "s64": np.int64,
    "f64": np.float64,
    "f32x2": np.uint64,
}

# Kernel, CTA, line of the PTX, instruction, line of the source, thread; of a deadlock the same for every waiting warp.
_LINE = r"ptx:\d+: .+ \(kernel\.cu:7\): "
PLACED = re.compile(
    rf"test, CTA \d+,\d+,\d+: ({_LINE}thread \d+: .|"
    rf"(deadlock|hung): .*(\n  warps?( \d+)+: {_LINE}.*)+(\n  (mbarrier 0x|warps that have exited: ).*)*$)"
)

# Every schedule that the options offer, each once.
SCHEDULES = [
    Options("eager", "round-robin"),
    Options("lazy", "depth-first"),
    Options("lazy", "round-robin"),
    Options("random", "random", 1),
    Options("random", "random", 2),
    Options("random", "depth-first", 3),
]


def module_text(body: str, params: int = 1, declarations: str = "", target: str = "sm_90a") -> str:
    """A module with one kernel ``test`` whose parameters ``p0``, ``p1``, ... are pointers.

    The kernel starts with its thread in ``%tid``, lane in ``%lane`` and the pointers in ``%p0``, ...
    """
    signature = ", ".join(f".param .u64 p{i}" for i in range(params))
    pointers = "\n".join(f".reg .b64 %p{i}; ld.param.u64 %p{i}, [p{i}];" for i in range(params))
    return f"""
.version 8.7
.target {target}
.address_size 64
.file 1 "/sources/kernel.cu"
{declarations}
.visible .entry test({signature})
{{
  .reg .pred %q<40>;
  .reg .b16 %h<40>;
  .reg .b32 %r<400>;
  .reg .b64 %d<80>;
  .reg .f32 %f<300>;
  .reg .f64 %g<8>;
  .reg .b32 %tid, %lane;
  mov.u32 %tid, %tid.x;
  and.b32 %lane, %tid, 31;
  {pointers}
  .loc 1 7 3
{body}
  ret;
}}
"""


def run(
    body: str,
    arrays: Sequence[object],
    *,
    threads: int = 32,
    grid: int = 1,
    shared_bytes: int = 0,
    declarations: str = "",
    memory: Sequence[np.ndarray] = (),
    options: Options | None = None,
    target: str = "sm_90a",
) -> Counters:
    """Runs a kernel with this body; ``arrays`` are its arguments.

    Whatever goes wrong, the message has to say where: that is checked here, for every test of an error.
    """
    module = load(module_text(body, len(arrays), declarations, target))
    try:
        return module.launch([grid], [threads], arrays, shared_bytes=shared_bytes, memory=memory, options=options)
    except EmulationError as error:
        assert PLACED.match(str(error)), f"without CTA, PTX line, source line or thread: {error}"
        raise


def module_of(body: str, params: int, declarations: str = "") -> Module:
    """The module of `run`, for tests that launch it more than once."""
    return load(module_text(body, params, declarations))


def element_address(register: str, pointer: str, size: int, index: str = "%tid") -> str:
    """``register`` = ``pointer`` + ``index`` * ``size``."""
    return f"mul.wide.u32 {register}, {index}, {size}; add.s64 {register}, {register}, {pointer};"


def dynamic_shared(name: str = "shared") -> str:
    """Declares dynamic shared memory, aligned for every swizzle."""
    return f".extern .shared .align 1024 .b8 {name}[];"


def copy_to_shared(pointer: str, size: int, threads: int, offset: int = 0, name: str = "shared") -> str:
    """Copies ``size`` bytes from global to shared memory, 16 at a time, then fences for the async proxy and meets."""
    assert size % 16 == 0
    label = f"COPY{offset}"
    return f"""
  {{
    .reg .b32 %at, %to, %w<4>;
    .reg .b64 %from;
    .reg .pred %more;
    shl.b32 %at, %tid, 4;
  {label}:
    setp.ge.u32 %more, %at, {size};
    @%more bra {label}_END;
    cvt.u64.u32 %from, %at;
    add.s64 %from, %from, {pointer};
    ld.global.v4.b32 {{%w0, %w1, %w2, %w3}}, [%from];
    mov.u32 %to, {name};
    add.u32 %to, %to, %at;
    st.shared.v4.b32 [%to+{offset}], {{%w0, %w1, %w2, %w3}};
    add.u32 %at, %at, {16 * threads};
    bra {label};
  {label}_END:
  }}
  fence.proxy.async.shared::cta;
  bar.sync 0;
"""


def copy_from_shared(pointer: str, size: int, threads: int, offset: int = 0, name: str = "shared") -> str:
    """Copies ``size`` bytes from shared to global memory."""
    assert size % 16 == 0
    label = f"BACK{offset}"
    return f"""
  {{
    .reg .b32 %at, %from, %w<4>;
    .reg .b64 %to;
    .reg .pred %more;
    shl.b32 %at, %tid, 4;
  {label}:
    setp.ge.u32 %more, %at, {size};
    @%more bra {label}_END;
    cvt.u64.u32 %to, %at;
    add.s64 %to, %to, {pointer};
    mov.u32 %from, {name};
    add.u32 %from, %from, %at;
    ld.shared.v4.b32 {{%w0, %w1, %w2, %w3}}, [%from+{offset}];
    st.global.v4.b32 [%to], {{%w0, %w1, %w2, %w3}};
    add.u32 %at, %at, {16 * threads};
    bra {label};
  {label}_END:
  }}
"""


def bf16(values: np.ndarray) -> np.ndarray:
    """float32 to the bits of bfloat16, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    """The bits of bfloat16 to float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def f16(values: np.ndarray) -> np.ndarray:
    """float32 to the bits of half precision."""
    return np.asarray(values, np.float32).astype(np.float16).view(np.uint16)
