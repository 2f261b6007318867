"""Cycles per tile of sm100's own kernels, fitted to what the time model of machine code says of
57 kernels: by rows, warpgroups that compute them, and thread blocks on a multiprocessor, and whether P is apart.
Written by tests/sm100_cycles.py; not to be edited.
"""

from __future__ import annotations

from .family import CodeTimes

FORWARD: dict[tuple[int, ...], CodeTimes] = {
    (128, 1, 1, 0): CodeTimes(
        column=8.524,
        channel=0.0661,
        tile=380.3,
        mask_column=3.202,
        mask_tile=195.6,
        overlap=12.0,
        q_tile=677.4,
        q_tile_padded=0.0,
    ),
    (256, 2, 1, 0): CodeTimes(
        column=11.47,
        channel=0.0,
        tile=815.6,
        mask_column=3.044,
        mask_tile=239.9,
        overlap=6.22,
        q_tile=65.18,
        q_tile_padded=0.0,
    ),
    (256, 2, 1, 1): CodeTimes(
        column=12.33,
        channel=0.0,
        tile=437.4,
        mask_column=7.412,
        mask_tile=0.0,
        overlap=12.0,
        q_tile=459.6,
        q_tile_padded=0.1205,
    ),
}
