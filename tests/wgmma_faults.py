"""Kernels that ptxas reports on: their matrix products wait for each other, or registers stay as they were. Each is a
few wgmmas with something between them that PTX doesn't allow, or that no registers are left for."""

from __future__ import annotations

from typing import NamedTuple

FENCE, COMMIT, WAIT, SET_REGISTERS = (
    f'asm volatile("{instruction};" ::: "memory");\n'
    for instruction in (
        "wgmma.fence.sync.aligned",
        "wgmma.commit_group.sync.aligned",
        "wgmma.wait_group.sync.aligned 0",
        "setmaxnreg.inc.sync.aligned.u32 240",
    )
)


class Fault(NamedTuple):
    """A kernel's source, flags of nvcc, and what ptxas says of it."""

    source: str
    flags: tuple[str, ...]
    message: str


def product(columns: int, accumulator: str = "c", registers: str = "") -> str:
    """One wgmma; its left factor is in ``registers`` or, if empty, in shared memory."""
    count = columns // 2
    found, left = (", ".join(f"%{i}" for i in range(first, last)) for first, last in ((0, count), (count, count + 4)))
    outputs = ", ".join(f'"+f"({accumulator}[{i}])' for i in range(count))
    factors = [f'"r"({registers}[{i}])' for i in range(4)] if registers else ['"l"(b)']
    where = f"{{{left}}}, %{count + 4}, 1, 1, 1, 0" if registers else f"%{count}, %{count + 1}, 1, 1, 1, 0, 0"
    name = f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.bf16.bf16"
    return f'asm volatile("{name} {{{found}}}, {where};" : {outputs} : {", ".join(factors)}, "l"(b));\n'


def kernel(body: str, columns: int = 64, bounds: str = "__launch_bounds__(128)", before: str = "") -> str:
    """A kernel around ``body``, which has an accumulator c, a left factor a and a descriptor b."""
    count = columns // 2
    return f"""{before}
__global__ void {bounds} kernel(float* out, unsigned long long b, int n) {{
  float c[{count}];
  unsigned a[4];
  for (int i = 0; i < {count}; ++i) c[i] = out[threadIdx.x + 128 * i];
  for (int i = 0; i < 4; ++i) a[i] = n * i;
  {body}
  for (int i = 0; i < {count}; ++i) out[threadIdx.x + 128 * i] = c[i];
}}
"""


def loop(body: str) -> str:
    return f"for (int j = 0; j < n; ++j) {{\n{body}}}\n"


ONE = FENCE + product(64) + COMMIT
GOOD = kernel(loop(ONE + WAIT))
TWO_LARGE = (
    "float d[128];\nfor (int i = 0; i < 128; ++i) d[i] = i;\n"
    + loop(FENCE + product(256) + product(256, "d") + COMMIT + WAIT)
    + "for (int i = 0; i < 128; ++i) c[i] += d[i];\n"
)
CALLED = f"__device__ __noinline__ void other(float (&c)[32], unsigned long long b) {{\n{ONE}}}\n"
FAULTS = {
    "extern call": Fault(
        kernel(ONE + "other(out);\n" + WAIT + ONE + WAIT, before='extern "C" __device__ void other(float*);'),
        ("-rdc=true",),
        "serialized due to the presence of Extern calls",
    ),
    "call": Fault(kernel(ONE + "other(c, b);\n" + WAIT, before=CALLED), (), "pipeline crossing function boundary"),
    "registers": Fault(kernel(TWO_LARGE, 256), (), "serialized due to insufficient register resources"),
    "factor": Fault(
        kernel(
            loop(
                FENCE
                + product(64, registers="a")
                + "a[0] += j;\na[1] ^= j;\n"
                + product(64, registers="a")
                + COMMIT
                + WAIT
            )
        ),
        (),
        "non wgmma instructions defining input registers",
    ),
    "accumulator": Fault(
        kernel(loop(ONE + "out[j] = c[3];\n" + product(64) + COMMIT + WAIT)),
        (),
        "non wgmma instructions reading accumulator registers",
    ),
    "branch": Fault(kernel(loop("if (threadIdx.x > n) {\n" + ONE + "c[2] *= 2;\n}\n")), (), "in divergent path"),
    "wait": Fault(
        kernel(
            "float d[32];\n"
            + ONE
            + "for (int i = 0; i < 32; ++i) d[i] = c[i] * 2;\n"
            + FENCE
            + product(64, "d")
            + COMMIT
            + WAIT
            + "for (int i = 0; i < 32; ++i) c[i] += d[i];\n"
        ),
        (),
        "warpgroup.wait is injected",
    ),
    "no setmaxnreg": Fault(kernel(SET_REGISTERS + ONE + WAIT), ("-rdc=true",), "'setmaxnreg' ignored"),
    "no setmaxnreg without bounds": Fault(
        kernel(SET_REGISTERS + ONE + WAIT, bounds=""), (), "'setmaxnreg' ignored; unable to determine"
    ),
}
