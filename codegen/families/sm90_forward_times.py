"""Cycles per tile of the sm90 forward kernels, fitted to what the time model of machine code says of
78 kernels. Written by tests/sm90_cycles.py; not to be edited.
"""

from __future__ import annotations

from .family import CodeTimes

CODE_TIMES = {  # by consumer warpgroups and thread blocks on a multiprocessor
    (1, 1): CodeTimes(
        column=7.146,
        channel=0.0,
        tile=278.8,
        mask_column=1.581,
        mask_tile=119.9,
        overlap=1.539,
        q_tile=1711.0,
        q_tile_padded=0.0,
    ),
    (1, 2): CodeTimes(
        column=6.816,
        channel=0.0,
        tile=1.0,
        mask_column=2.156,
        mask_tile=33.17,
        overlap=12.0,
        q_tile=549.5,
        q_tile_padded=0.0,
    ),
    (2, 1): CodeTimes(
        column=9.974,
        channel=0.0,
        tile=184.3,
        mask_column=2.56,
        mask_tile=86.1,
        overlap=5.725,
        q_tile=1812.0,
        q_tile_padded=1.09,
    ),
    (3, 1): CodeTimes(
        column=11.14,
        channel=2.919,
        tile=55.93,
        mask_column=3.253,
        mask_tile=0.0,
        overlap=12.0,
        q_tile=2088.0,
        q_tile_padded=1.356,
    ),
}
