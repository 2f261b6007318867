"""Cycles per tile of sm90's own kernels, fitted to what the time model of machine code says of
217 kernels: by rows, warpgroups that compute them, and thread blocks on a multiprocessor.
Written by tests/sm90_cycles.py; not to be edited.
"""

from __future__ import annotations

from .family import CodeTimes

FORWARD = {
    (64, 1, 1): CodeTimes(
        column=7.131,
        channel=0.0,
        tile=288.2,
        mask_column=1.577,
        mask_tile=120.8,
        overlap=1.576,
        q_tile=1734.0,
        q_tile_padded=0.0,
    ),
    (64, 1, 2): CodeTimes(
        column=6.933,
        channel=0.0,
        tile=1.0,
        mask_column=2.008,
        mask_tile=36.42,
        overlap=12.0,
        q_tile=598.5,
        q_tile_padded=0.0,
    ),
    (128, 2, 1): CodeTimes(
        column=9.969,
        channel=0.0,
        tile=183.8,
        mask_column=2.616,
        mask_tile=84.6,
        overlap=5.765,
        q_tile=1799.0,
        q_tile_padded=1.089,
    ),
    (192, 3, 1): CodeTimes(
        column=11.64,
        channel=3.244,
        tile=1.0,
        mask_column=3.287,
        mask_tile=0.0,
        overlap=12.0,
        q_tile=2090.0,
        q_tile_padded=1.174,
    ),
}

BACKWARD_Q = {
    (64, 1, 1): CodeTimes(
        column=6.643,
        channel=1.045,
        tile=141.3,
        mask_column=1.566,
        mask_tile=107.3,
        overlap=1.541,
        q_tile=1313.0,
        q_tile_padded=0.0,
    ),
    (128, 2, 1): CodeTimes(
        column=5.349,
        channel=1.989,
        tile=314.1,
        mask_column=0.856,
        mask_tile=285.4,
        overlap=2.46,
        q_tile=723.4,
        q_tile_padded=0.883,
    ),
    (192, 3, 1): CodeTimes(
        column=6.979,
        channel=2.936,
        tile=243.0,
        mask_column=3.015,
        mask_tile=168.4,
        overlap=4.952,
        q_tile=1078.0,
        q_tile_padded=0.0,
    ),
}

BACKWARD_KV = {
    (64, 1, 1): CodeTimes(
        column=7.342,
        channel=0.0,
        tile=364.9,
        mask_column=0.0,
        mask_tile=86.5,
        overlap=1.431,
        q_tile=969.1,
        q_tile_padded=0.0,
    ),
    (64, 2, 1): CodeTimes(
        column=0.0,
        channel=0.0,
        tile=744.0,
        mask_column=0.0,
        mask_tile=119.3,
        overlap=1.795,
        q_tile=1860.0,
        q_tile_padded=0.0,
    ),
    (128, 2, 1): CodeTimes(
        column=9.691,
        channel=0.9397,
        tile=386.7,
        mask_column=0.1456,
        mask_tile=224.0,
        overlap=2.516,
        q_tile=980.4,
        q_tile_padded=1.745,
    ),
}
