"""Cycles per tile of sm100's own kernels, fitted to what the time model of machine code says of
57 kernels: by rows, warpgroups that compute them, and thread blocks on a multiprocessor, and whether P is apart.
Written by tests/sm100_cycles.py; not to be edited.
"""

from __future__ import annotations

from .family import CodeTimes

FORWARD: dict[tuple[int, ...], CodeTimes] = {
    (128, 1, 1, 0): CodeTimes(
        column=8.78,
        channel=0.06204,
        tile=370.3,
        mask_column=3.19,
        mask_tile=194.7,
        overlap=12.0,
        q_tile=681.1,
        q_tile_padded=0.0,
    ),
    (256, 2, 1, 0): CodeTimes(
        column=10.85,
        channel=0.0,
        tile=844.2,
        mask_column=3.819,
        mask_tile=168.0,
        overlap=5.814,
        q_tile=115.2,
        q_tile_padded=0.0,
    ),
    (256, 2, 1, 1): CodeTimes(
        column=12.38,
        channel=0.0,
        tile=426.6,
        mask_column=7.31,
        mask_tile=1.9,
        overlap=12.0,
        q_tile=497.7,
        q_tile_padded=0.07269,
    ),
}
