"""Cycles per tile of sm100's own kernels, fitted to what the time model of machine code says of
57 kernels: by rows, warpgroups that compute them, and thread blocks on a multiprocessor, and whether P is apart.
Written by tests/sm100_cycles.py; not to be edited.
"""

from __future__ import annotations

from .family import CodeTimes

FORWARD: dict[tuple[int, ...], CodeTimes] = {
    (128, 1, 1, 0): CodeTimes(
        column=8.778,
        channel=0.05537,
        tile=371.4,
        mask_column=3.191,
        mask_tile=195.4,
        overlap=12.0,
        q_tile=680.2,
        q_tile_padded=0.0,
    ),
    (256, 2, 1, 0): CodeTimes(
        column=10.67,
        channel=0.0,
        tile=869.4,
        mask_column=3.494,
        mask_tile=206.0,
        overlap=5.893,
        q_tile=121.7,
        q_tile_padded=0.0,
    ),
    (256, 2, 1, 1): CodeTimes(
        column=12.42,
        channel=0.0,
        tile=427.4,
        mask_column=7.437,
        mask_tile=0.0,
        overlap=12.0,
        q_tile=512.5,
        q_tile_padded=0.03462,
    ),
}
