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
    time=None,
)
