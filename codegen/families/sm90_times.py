"""Cycles per tile of sm90's own kernels, fitted to what the time model of machine code says of
217 kernels: by rows, warpgroups that compute them, and thread blocks on a multiprocessor.
Written by tests/sm90_cycles.py; not to be edited.
"""

from __future__ import annotations

from .family import CodeTimes

FORWARD = {
    (64, 1, 1): CodeTimes(
        column=7.135,
        channel=0.0,
        tile=281.4,
        mask_column=1.574,
        mask_tile=120.5,
        overlap=1.55,
        q_tile=1732.0,
        q_tile_padded=0.0,
    ),
    (64, 1, 2): CodeTimes(
        column=6.969,
        channel=0.0,
        tile=1.0,
        mask_column=1.964,
        mask_tile=37.39,
        overlap=12.0,
        q_tile=616.1,
        q_tile_padded=0.0,
    ),
    (128, 2, 1): CodeTimes(
        column=9.971,
        channel=0.0,
        tile=183.6,
        mask_column=2.602,
        mask_tile=84.69,
        overlap=5.755,
        q_tile=1800.0,
        q_tile_padded=1.08,
    ),
    (192, 3, 1): CodeTimes(
        column=11.58,
        channel=3.198,
        tile=8.657,
        mask_column=3.317,
        mask_tile=0.0,
        overlap=12.0,
        q_tile=2087.0,
        q_tile_padded=1.157,
    ),
}

BACKWARD_Q = {
    (64, 1, 1): CodeTimes(
        column=6.716,
        channel=1.124,
        tile=136.0,
        mask_column=1.57,
        mask_tile=107.0,
        overlap=1.564,
        q_tile=1264.0,
        q_tile_padded=0.0,
    ),
    (128, 2, 1): CodeTimes(
        column=5.501,
        channel=2.217,
        tile=306.5,
        mask_column=0.9723,
        mask_tile=271.8,
        overlap=2.618,
        q_tile=755.8,
        q_tile_padded=0.8432,
    ),
    (192, 3, 1): CodeTimes(
        column=7.927,
        channel=2.566,
        tile=228.6,
        mask_column=1.562,
        mask_tile=190.4,
        overlap=5.386,
        q_tile=1095.0,
        q_tile_padded=0.0,
    ),
}

BACKWARD_KV = {
    (64, 1, 1): CodeTimes(
        column=7.259,
        channel=0.0,
        tile=360.9,
        mask_column=0.0,
        mask_tile=87.74,
        overlap=1.41,
        q_tile=574.8,
        q_tile_padded=0.0,
    ),
    (64, 2, 1): CodeTimes(
        column=0.0,
        channel=0.0,
        tile=757.9,
        mask_column=0.0,
        mask_tile=142.2,
        overlap=1.859,
        q_tile=1181.0,
        q_tile_padded=0.0,
    ),
    (128, 2, 1): CodeTimes(
        column=9.701,
        channel=0.9614,
        tile=380.1,
        mask_column=0.5553,
        mask_tile=208.9,
        overlap=2.523,
        q_tile=541.9,
        q_tile_padded=4.277,
    ),
}
