"""The cpu kernels of K's and V's gradients: a KV tile at a time, any tile, any head dim, on all cores."""

from __future__ import annotations

from dataclasses import replace

from .cpu_forward import FAMILY as FORWARD
from .family import Limits

FAMILY = replace(
    FORWARD,
    op="gna_backward_kv",
    features=("edge", "block_causal", "sink", "range", "kv_sink", "extra_keys", "accumulate", "delta", "deterministic"),
    limits=Limits(q_rows=512, kv_columns=256, kv_multiple=1),
    default_tiles={1: ((64,), (64,)), 2: ((8, 8), (8, 8)), 3: ((4, 8, 8), (4, 4, 4))},
    time=replace(
        FORWARD.time_constants(),
        flop_per_cycle=146.0,
        score_cycles=0.0,
        mask_tile_cycles=0.0,
        key_cycles=0.68,
        q_tile_cycles=9620.0,
        source=(
            "24 runs of our kernels on one shared core, timed as gnaforge bench --calibrate does, fp32 and bf16, ranks "
            "1 to 3, head dims 32 to 256, the model off by 9 % (root mean square)"
        ),
    ),
)
