"""Cycles per tile of the sm90 forward kernels, fitted to what the time model of machine code says of
78 kernels. Written by tests/sm90_cycles.py; not to be edited.
"""

from __future__ import annotations

from .family import CodeTimes

CODE_TIMES = {  # by consumer warpgroups and thread blocks on a multiprocessor
    (1, 1): CodeTimes(
        column=6.929,
        channel=0.06666,
        tile=348.2,
        mask_column=1.59,
        mask_tile=119.1,
        overlap=1.647,
        q_tile=1719.0,
        q_tile_padded=0.0,
    ),
    (1, 2): CodeTimes(
        column=6.955,
        channel=0.0,
        tile=1.0,
        mask_column=2.112,
        mask_tile=21.47,
        overlap=12.0,
        q_tile=630.7,
        q_tile_padded=0.0,
    ),
    (2, 1): CodeTimes(
        column=10.03,
        channel=0.0,
        tile=181.6,
        mask_column=2.54,
        mask_tile=92.97,
        overlap=5.748,
        q_tile=1774.0,
        q_tile_padded=1.083,
    ),
    (3, 1): CodeTimes(
        column=11.51,
        channel=3.165,
        tile=19.77,
        mask_column=3.314,
        mask_tile=0.0,
        overlap=12.0,
        q_tile=2070.0,
        q_tile_padded=1.078,
    ),
}
