"""Kernels of sm100's own family that its tests run."""

from __future__ import annotations

from gnaforge.runtime.config import KernelConfig

# Two halves of rows: whole boxes; an odd Q box, whose halves share tokens, with padded rows, channels and last word of
# columns. One half: Q copied to tensor memory; Q in shared memory, for there is no room, and padded rows.
FOLDED = "gna_forward-sm100-r3-bf16-d128-q4x8x8-kv2x8x8"
APART = "gna_forward-sm100-r3-bf16-d72v40-q3x5x9-kv2x5x8"
PLANE = "gna_forward-sm100-r2-fp16-d64-q12x20-kv8x14"
LINE = "gna_forward-sm100-r1-bf16-d40v24-q256-kv96"
COPIED = "gna_forward-sm100-r2-fp16-d192-q8x16-kv8x8"
WIDE = "gna_forward-sm100-r1-bf16-d256-q96-kv128"
# Tiles of several heads: two halves that share tokens, of heads that would fold; one half, with padded rows.
PACKED = "gna_forward-sm100-r3-bf16-d64-q3x5x7h2-kv2x8x8"
SHARED = "gna_forward-sm100-r1-fp16-d192v72-q50h2-kv48"
KEYS = (FOLDED, APART, PLANE, LINE, COPIED, WIDE, PACKED, SHARED)
CONFIGS = [KernelConfig.parse(key) for key in KEYS]
