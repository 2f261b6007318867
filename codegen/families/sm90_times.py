"""Cycles per tile of sm90's own kernels, fitted to what the time model of machine code says of
220 kernels: by rows, warpgroups that compute them, and thread blocks on a multiprocessor.
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
        q_tile=1263.0,
        q_tile_padded=0.0,
    ),
    (128, 2, 1): CodeTimes(
        column=5.498,
        channel=2.218,
        tile=306.7,
        mask_column=0.9749,
        mask_tile=271.7,
        overlap=2.62,
        q_tile=744.2,
        q_tile_padded=0.8687,
    ),
    (192, 3, 1): CodeTimes(
        column=8.489,
        channel=2.844,
        tile=204.4,
        mask_column=1.387,
        mask_tile=194.5,
        overlap=5.188,
        q_tile=1008.0,
        q_tile_padded=0.0,
    ),
}

BACKWARD_KV = {
    (64, 1, 1): CodeTimes(
        column=7.262,
        channel=0.0,
        tile=360.6,
        mask_column=0.0,
        mask_tile=87.85,
        overlap=1.409,
        q_tile=556.9,
        q_tile_padded=0.0,
    ),
    (64, 2, 1): CodeTimes(
        column=0.0,
        channel=0.01131,
        tile=752.0,
        mask_column=0.0,
        mask_tile=145.2,
        overlap=1.855,
        q_tile=1148.0,
        q_tile_padded=0.0,
    ),
    (128, 2, 1): CodeTimes(
        column=9.471,
        channel=0.5618,
        tile=402.5,
        mask_column=0.5172,
        mask_tile=204.8,
        overlap=2.373,
        q_tile=463.0,
        q_tile_padded=1.146,
    ),
}
