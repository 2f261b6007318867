"""The cpu kernels of Q's gradient: a Q tile at a time, any tile, any head dim, on all cores."""

from __future__ import annotations

from dataclasses import replace

from .cpu_forward import FAMILY as FORWARD

FAMILY = replace(
    FORWARD,
    op="gna_backward_q",
    features=("edge", "block_causal", "sink", "range", "kv_sink", "extra_keys", "accumulate", "delta", "deterministic"),
    time=replace(
        FORWARD.time_constants(),
        flop_per_cycle=143.0,
        score_cycles=0.0,
        mask_tile_cycles=191.0,
        key_cycles=0.52,
        q_tile_cycles=7340.0,
        source=(
            "24 runs of our kernels on one shared core, timed as gnaforge bench --calibrate does, fp32 and bf16, ranks "
            "1 to 3, head dims 32 to 256, the model off by 10 % (root mean square)"
        ),
    ),
)
