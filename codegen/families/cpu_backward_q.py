"""The cpu kernels of Q's gradient: a Q tile at a time, any tile, any head dim, on all cores."""

from __future__ import annotations

from dataclasses import replace

from .cpu_forward import FAMILY as FORWARD

FAMILY = replace(
    FORWARD,
    op="gna_backward_q",
    features=("edge", "block_causal", "sink", "range", "kv_sink", "extra_keys", "accumulate", "delta", "deterministic"),
    time=None,
)
