"""Cycles per tile of sm100's own kernels, fitted to what the time model of machine code says of
57 kernels: by rows, warpgroups that compute them, and thread blocks on a multiprocessor, and whether P is apart.
Written by tests/sm100_cycles.py; not to be edited.
"""

from __future__ import annotations

from .family import CodeTimes

FORWARD: dict[tuple[int, ...], CodeTimes] = {
    (128, 1, 1, 0): CodeTimes(
        column=8.237,
        channel=0.0273,
        tile=395.3,
        mask_column=3.234,
        mask_tile=197.8,
        overlap=12.0,
        q_tile=672.2,
        q_tile_padded=0.0,
    ),
    (256, 2, 1, 0): CodeTimes(
        column=12.34,
        channel=0.0,
        tile=701.0,
        mask_column=2.44,
        mask_tile=305.1,
        overlap=6.495,
        q_tile=36.36,
        q_tile_padded=0.0,
    ),
    (256, 2, 1, 1): CodeTimes(
        column=11.71,
        channel=0.0,
        tile=464.0,
        mask_column=7.488,
        mask_tile=0.0,
        overlap=12.0,
        q_tile=494.1,
        q_tile_padded=0.01324,
    ),
}
