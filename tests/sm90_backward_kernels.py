"""The sm90 backward kernels of the tests: every rank and dtype, head dims 8 to 256, one to three warpgroups."""

from __future__ import annotations

from gnaforge.runtime.config import KernelConfig

Q_KEYS = (
    "gna_backward_q-sm90-r3-bf16-d128-q2x8x8-kv2x6x8",
    "gna_backward_q-sm90-r3-bf16-d8-q3x5x4-kv4x4x6",
    "gna_backward_q-sm90-r2-fp16-d64-q8x16-kv8x16",
    "gna_backward_q-sm90-r2-bf16-d96v40-q9x14-kv4x20",
    "gna_backward_q-sm90-r2-bf16-d64-q12x16-kv8x8",
    "gna_backward_q-sm90-r2-bf16-d72-q8x8-kv7x16",
    "gna_backward_q-sm90-r1-bf16-d256-q128-kv48",
    "gna_backward_q-sm90-r1-fp16-d32v200-q100-kv48",
)
Q_CONFIGS = [KernelConfig.parse(key) for key in Q_KEYS]

KV_KEYS = tuple(
    f"gna_backward_kv-sm90-{rest}"
    for rest in (
        "r3-bf16-d128-q2x4x8-kv2x8x8",
        "r3-bf16-d40v72-q2x4x4-kv3x5x7",  # one that fills no warpgroup
        "r3-fp16-d136v48-q2x4x4-kv4x4x4",
        "r2-bf16-d128-q8x8-kv8x16",
        "r2-fp16-d64-q8x16-kv8x8",
        "r2-bf16-d256-q8x8-kv7x9",
        "r2-bf16-d72v8-q8x8-kv9x14",
        "r1-bf16-d8-q16-kv100",
        "r1-fp16-d64-q128-kv128",
    )
)
KV_CONFIGS = [KernelConfig.parse(key) for key in KV_KEYS]
