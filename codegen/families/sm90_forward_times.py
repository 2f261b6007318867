"""Cycles per tile of the sm90 forward kernels, fitted to what the time model of machine code says of
78 kernels. Written by tests/sm90_cycles.py; not to be edited.
"""

from __future__ import annotations

from .family import CodeTimes

CODE_TIMES = {  # by consumer warpgroups and thread blocks on a multiprocessor
    (1, 1): CodeTimes(
        column=7.135,
        channel=0.0,
        tile=281.4,
        mask_column=1.574,
        mask_tile=120.5,
        overlap=1.55,
        q_tile=1732.0,
        q_tile_padded=0.0,
    ),
    (1, 2): CodeTimes(
        column=6.969,
        channel=0.0,
        tile=1.0,
        mask_column=1.964,
        mask_tile=37.39,
        overlap=12.0,
        q_tile=616.1,
        q_tile_padded=0.0,
    ),
    (2, 1): CodeTimes(
        column=9.971,
        channel=0.0,
        tile=183.6,
        mask_column=2.602,
        mask_tile=84.69,
        overlap=5.755,
        q_tile=1800.0,
        q_tile_padded=1.08,
    ),
    (3, 1): CodeTimes(
        column=11.58,
        channel=3.198,
        tile=8.657,
        mask_column=3.317,
        mask_tile=0.0,
        overlap=12.0,
        q_tile=2087.0,
        q_tile_padded=1.157,
    ),
}
