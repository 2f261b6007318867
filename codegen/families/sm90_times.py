"""Cycles per tile of sm90's own kernels, fitted to what the time model of machine code says of
217 kernels: by rows, warpgroups that compute them, and thread blocks on a multiprocessor.
Written by tests/sm90_cycles.py; not to be edited.
"""

from __future__ import annotations

from .family import CodeTimes

FORWARD: dict[tuple[int, ...], CodeTimes] = {
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

BACKWARD_Q: dict[tuple[int, ...], CodeTimes] = {
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
        column=7.597,
        channel=2.867,
        tile=159.2,
        mask_column=2.479,
        mask_tile=55.65,
        overlap=7.515,
        q_tile=1377.0,
        q_tile_padded=0.2966,
    ),
    (192, 3, 1): CodeTimes(
        column=4.426,
        channel=4.761,
        tile=387.5,
        mask_column=3.193,
        mask_tile=0.0,
        overlap=12.0,
        q_tile=1572.0,
        q_tile_padded=0.0,
    ),
}

BACKWARD_KV: dict[tuple[int, ...], CodeTimes] = {
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
        column=10.44,
        channel=0.537,
        tile=323.3,
        mask_column=1.045,
        mask_tile=177.0,
        overlap=2.994,
        q_tile=908.9,
        q_tile_padded=2.073,
    ),
}
