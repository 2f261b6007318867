"""A kernel family outside of the package: plain loops over the visible keys. With its template and headers beside it,
it is all that a family takes."""

from __future__ import annotations

from gnaforge.families.family import Family, Limits, TimeConstants
from gnaforge.families.target import TARGETS
from gnaforge.runtime.family import Padding

FAMILY = Family(
    op="gna_forward",
    target=TARGETS["cpu"],
    variant="toy",
    dtypes=("fp32",),
    features=("deterministic",),
    limits=Limits(q_rows=1024, kv_columns=1024, kv_multiple=1),
    padding=Padding(rows=1, clips=True),
    default_tiles={1: ((32,), (32,)), 2: ((4, 8), (4, 8)), 3: ((2, 4, 4), (2, 4, 4))},
    head_dim_at_run_time=True,
    time=TimeConstants(
        device="one core of any machine",
        units=1,
        ghz=1.0,
        flop_per_cycle=1.0,
        score_cycles=10.0,
        solo_factor=1.0,
        tile_cycles=0.0,
        rescale_cycles=0.0,
        mask_cycles=0.0,
        mask_tile_cycles=0.0,
        key_cycles=0.0,
        q_tile_cycles=100.0,
        load_bytes_per_cycle=float("inf"),
        memory_gb_s=10.0,
        launch_us=10.0,
        dense_rows=32,
        source="made up",
    ),
)
