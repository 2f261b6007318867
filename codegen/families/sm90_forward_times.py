"""Cycles per tile of the sm90 forward kernels, fitted to what the time model of machine code says of
78 kernels. Written by tests/sm90_cycles.py; not to be edited.
"""

from __future__ import annotations

from .family import CodeTimes

CODE_TIMES = {  # by consumer warpgroups and thread blocks on a multiprocessor
    (1, 1): CodeTimes(
        column=7.111,
        channel=0.0,
        tile=297.4,
        mask_column=1.563,
        mask_tile=109.0,
        overlap=1.627,
        q_tile=1768.0,
        q_tile_padded=0.0,
    ),
    (1, 2): CodeTimes(
        column=6.94,
        channel=0.1936,
        tile=1.0,
        mask_column=1.491,
        mask_tile=67.47,
        overlap=12.0,
        q_tile=793.3,
        q_tile_padded=0.0,
    ),
    (2, 1): CodeTimes(
        column=10.04,
        channel=0.0,
        tile=179.8,
        mask_column=2.714,
        mask_tile=57.31,
        overlap=5.968,
        q_tile=1835.0,
        q_tile_padded=0.9149,
    ),
    (3, 1): CodeTimes(
        column=11.5,
        channel=3.149,
        tile=13.93,
        mask_column=3.044,
        mask_tile=0.0,
        overlap=12.0,
        q_tile=2130.0,
        q_tile_padded=1.188,
    ),
}
