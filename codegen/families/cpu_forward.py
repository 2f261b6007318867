"""The cpu forward kernels: any tile, any head dim, on all cores."""

from __future__ import annotations

from ..runtime.family import Padding
from .family import Family, Limits, TimeConstants
from .target import TARGETS

FAMILY = Family(
    op="gna_forward",
    target=TARGETS["cpu"],
    default=True,
    dtypes=("fp32", "bf16", "fp16"),
    features=("edge", "block_causal", "sink", "range", "kv_sink", "extra_keys", "deterministic"),
    limits=Limits(q_rows=256, kv_columns=512, kv_multiple=1),
    padding=Padding(rows=32, clips=True),
    default_tiles={1: ((64,), (64,)), 2: ((8, 8), (8, 8)), 3: ((4, 4, 4), (4, 8, 8))},
    head_dim_at_run_time=True,
    time=TimeConstants(
        device="2 cores of an x86-64 cloud machine with AVX-512",
        units=2,
        ghz=1.0,  # a cycle is a nanosecond: this machine's clock drifts
        flop_per_cycle=173.0,
        score_cycles=0.147,
        solo_factor=1.0,
        tile_cycles=0.0,
        rescale_cycles=0.0,
        mask_cycles=0.0,
        mask_tile_cycles=260.0,
        key_cycles=0.53,
        q_tile_cycles=2600.0,
        load_bytes_per_cycle=float("inf"),
        memory_gb_s=20.0,
        launch_us=10.0,
        dense_rows=64,
        source=(
            "gnaforge bench --calibrate: 72 runs of our kernels on one shared core, fp32 and bf16, ranks 1 to 3, "
            "head dims 32 to 256, the model off by 13 % (root mean square)"
        ),
    ),
)
