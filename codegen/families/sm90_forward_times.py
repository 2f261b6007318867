"""Cycles per tile of the sm90 forward kernels, fitted to what the time model of machine code says of
78 kernels. Written by tests/sm90_cycles.py; not to be edited.
"""

from __future__ import annotations

from .family import CodeTimes

CODE_TIMES = {  # by consumer warpgroups and thread blocks on a multiprocessor
    (1, 1): CodeTimes(
        column=7.213,
        channel=0.79,
        tile=332.1,
        mask_column=1.6,
        mask_tile=69.39,
        overlap=1.706,
        q_tile=1934.0,
        q_tile_padded=0.0,
    ),
    (1, 2): CodeTimes(
        column=7.623,
        channel=0.7284,
        tile=1.0,
        mask_column=1.554,
        mask_tile=30.47,
        overlap=12.0,
        q_tile=724.0,
        q_tile_padded=0.0,
    ),
    (2, 1): CodeTimes(
        column=10.41,
        channel=0.7746,
        tile=228.1,
        mask_column=1.502,
        mask_tile=105.6,
        overlap=7.728,
        q_tile=2034.0,
        q_tile_padded=0.8937,
    ),
    (3, 1): CodeTimes(
        column=11.51,
        channel=4.809,
        tile=47.11,
        mask_column=2.181,
        mask_tile=37.65,
        overlap=12.0,
        q_tile=2243.0,
        q_tile_padded=1.654,
    ),
}
