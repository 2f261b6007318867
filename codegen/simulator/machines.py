"""What the time model knows of each arch: one row of constants per arch, with where they come from.

Cycles are those of one unit: a streaming multiprocessor (SM), or a processor core. A *score* is one element of Q K^T.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Machine:
    """Constants of the time model.

    Attributes:
        device: what they stand for.
        units: SMs, or cores.
        ghz: clock under load.
        flop_per_cycle: of the matrix units, per unit.
        score_cycles: softmax that matrix work does not hide, per score.
        solo_factor: times as much softmax shows where a Q tile has only one group of ``row_multiple`` rows, which has
            no other one to overlap with.
        tile_cycles: per visited KV tile: barriers, loop control.
        rescale_cycles: per visited KV tile and element of the Q tile's output.
        mask_cycles: per score of a tile that needs a mask.
        mask_tile_cycles: per tile that needs a mask.
        key_cycles: per channel of a key or value that a Q tile sees: converting it.
        q_tile_cycles: per Q tile: first loads, last stores, nothing to overlap with.
        load_bytes_per_cycle: K and V arriving at one unit, from the L2 cache.
        memory_gb_s: main memory.
        launch_us: a call's fixed cost.
        dense_rows: query rows of a tile of the dense kernel that times are compared with.
        source: where the constants come from.
    """

    device: str
    units: int
    ghz: float
    flop_per_cycle: float
    score_cycles: float
    solo_factor: float
    tile_cycles: float
    rescale_cycles: float
    mask_cycles: float
    mask_tile_cycles: float
    key_cycles: float
    q_tile_cycles: float
    load_bytes_per_cycle: float
    memory_gb_s: float
    launch_us: float
    dense_rows: int
    source: str


MACHINES: Mapping[str, Machine] = MappingProxyType(
    {
        "cpu": Machine(
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
        "sm90": Machine(
            device="H100 SXM",
            units=132,
            ghz=1.755,
            flop_per_cycle=4096.0,
            # 16k tokens, FlashAttention-3 at 1.83 GHz: 497, 648 and 756 TFLOP/s at head dims 64, 128 and 256 are 2048,
            # 3126 and 5358 cycles per 128x128 scores. Less 1024, 2048 and 4096 of matrix work and what rescaling the
            # output takes (one of 128 lanes per element and KV tile), about 0.05 per score and 128 per tile are left.
            score_cycles=0.05,
            solo_factor=2.0,
            tile_cycles=128.0,
            rescale_cycles=1 / 128,
            mask_cycles=0.02,
            mask_tile_cycles=300.0,
            key_cycles=0.0,
            q_tile_cycles=1000.0,
            load_bytes_per_cycle=24.0,
            memory_gb_s=3350.0,
            launch_us=2.0,
            dense_rows=128,
            source=(
                "softmax from FlashAttention-3's published dense times on H100; masks from instruction counts of a "
                "scratch kernel; solo_factor, loads and fixed costs estimated; no kernel of ours was run"
            ),
        ),
        "sm100": Machine(
            device="B200",
            units=148,
            ghz=1.85,
            flop_per_cycle=8192.0,
            # NATTEN 0.20, perfectly block-sparse: 13.01 ms (HunyuanVideo) and 4.114 ms (FLUX) are 3820 and 3670 cycles
            # per 256x128 tile pair, 2048 of them matrix work. Other warps than those of the softmax rescale the output.
            score_cycles=0.047,
            solo_factor=1.0,  # a Q tile always has two halves
            tile_cycles=200.0,
            rescale_cycles=0.0,
            mask_cycles=0.02,
            mask_tile_cycles=300.0,
            key_cycles=0.0,
            q_tile_cycles=2000.0,
            load_bytes_per_cycle=36.0,
            memory_gb_s=8000.0,
            launch_us=3.0,
            dense_rows=256,
            source=(
                "softmax from NATTEN's published block-sparse times on B200; masks, loads and fixed costs "
                "estimated; no kernel of ours was run"
            ),
        ),
    }
)
