"""Cycles per tile of the sm90 forward kernels, fitted to what the time model of machine code says of
78 kernels. Written by tests/sm90_cycles.py; not to be edited.
"""

from __future__ import annotations

from .family import CodeTimes

CODE_TIMES = {  # by consumer warpgroups and thread blocks on a multiprocessor
    (1, 1): CodeTimes(
        column=7.108,
        channel=0.0,
        tile=316.7,
        mask_column=1.604,
        mask_tile=70.64,
        overlap=1.684,
        q_tile=1768.0,
        q_tile_padded=0.0,
    ),
    (1, 2): CodeTimes(
        column=6.91,
        channel=0.342,
        tile=1.0,
        mask_column=1.724,
        mask_tile=37.31,
        overlap=12.0,
        q_tile=793.3,
        q_tile_padded=0.0,
    ),
    (2, 1): CodeTimes(
        column=10.52,
        channel=0.0,
        tile=179.5,
        mask_column=1.588,
        mask_tile=64.81,
        overlap=8.658,
        q_tile=1835.0,
        q_tile_padded=0.9149,
    ),
    (3, 1): CodeTimes(
        column=11.88,
        channel=3.165,
        tile=10.82,
        mask_column=2.194,
        mask_tile=0.0,
        overlap=12.0,
        q_tile=2130.0,
        q_tile_padded=1.188,
    ),
}
