"""Cycles per tile of sm100's own kernels, fitted to what the time model of machine code says of
55 kernels: by rows, warpgroups that compute them, and thread blocks on a multiprocessor, and whether P is apart.
Written by tests/sm100_cycles.py; not to be edited.
"""

from __future__ import annotations

from .family import CodeTimes

FORWARD: dict[tuple[int, ...], CodeTimes] = {
    (128, 1, 1, 0): CodeTimes(
        column=8.237,
        channel=0.01766,
        tile=396.1,
        mask_column=3.842,
        mask_tile=181.5,
        overlap=12.0,
        q_tile=654.7,
        q_tile_padded=0.0,
    ),
    (256, 2, 1, 0): CodeTimes(
        column=9.759,
        channel=0.0,
        tile=936.4,
        mask_column=6.529,
        mask_tile=0.0,
        overlap=4.953,
        q_tile=160.1,
        q_tile_padded=0.0,
    ),
    (256, 2, 1, 1): CodeTimes(
        column=12.24,
        channel=0.0,
        tile=417.3,
        mask_column=9.377,
        mask_tile=0.0,
        overlap=6.031,
        q_tile=530.8,
        q_tile_padded=0.0,
    ),
}
