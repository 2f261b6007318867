"""The sm90 kernels of the tests: every rank and dtype, head dims 8 to 256, one to three warpgroups."""

from __future__ import annotations

from gnaforge.runtime.config import KernelConfig

KEYS = (
    "gna_forward-sm90-r3-bf16-d128-q8x4x4-kv6x4x4",
    "gna_forward-sm90-r3-bf16-d128-q2x8x8-kv1x6x24",
    "gna_forward-sm90-r3-bf16-d8-q3x5x4-kv4x4x6",
    "gna_forward-sm90-r3-bf16-d72-q2x4x8-kv2x4x8",
    "gna_forward-sm90-r2-bf16-d128-q8x16-kv8x16",
    "gna_forward-sm90-r2-fp16-d128-q9x14-kv8x20",
    "gna_forward-sm90-r2-bf16-d64-q12x16-kv8x16",
    "gna_forward-sm90-r2-bf16-d72-q8x8-kv7x16",
    "gna_forward-sm90-r2-bf16-d96v40-q8x16-kv4x20",
    "gna_forward-sm90-r1-bf16-d128-q128-kv128",
    "gna_forward-sm90-r1-fp16-d256-q128-kv64",
    "gna_forward-sm90-r1-bf16-d32v200-q100-kv48",
)
CONFIGS = [KernelConfig.parse(key) for key in KEYS]
