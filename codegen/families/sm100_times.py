"""Cycles per tile of sm100's own kernels, fitted to what the time model of machine code says of
55 kernels: by rows, warpgroups that compute them, and thread blocks on a multiprocessor.
Written by tests/sm100_cycles.py; not to be edited.
"""

from __future__ import annotations

from .family import CodeTimes

FORWARD = {
    (128, 1, 1): CodeTimes(
        column=8.232,
        channel=0.01567,
        tile=396.3,
        mask_column=3.846,
        mask_tile=181.5,
        overlap=12.0,
        q_tile=653.0,
        q_tile_padded=0.0,
    ),
    (256, 2, 1): CodeTimes(
        column=11.67,
        channel=1.044,
        tile=690.3,
        mask_column=6.033,
        mask_tile=0.0,
        overlap=5.402,
        q_tile=288.1,
        q_tile_padded=0.1472,
    ),
}
