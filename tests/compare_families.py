"""Warp instructions of PTX that a Q tile, an interior and a shell KV tile take, of each kernel family of sm90.

Of all warps together, as the emulator counts them: by least squares over problems that differ in tiles, for CUTLASS's
loops can't be marked; of all families alike.

``python compare_families.py [KEY...]``; needs the CUDA compiler and CUTLASS's sources.
"""

from __future__ import annotations

import sys
from collections import Counter
from math import prod

import numpy as np
import torch
from gnaforge.runtime.dtypes import DTYPES
from gnaforge.verification.counters import WorkCounters
from gnaforge.verification.emulated_kernel import EmulatedKernel

KEYS = (
    "gna_forward-sm90-r1-fp16-d128-q128-kv128",
    "gna_forward-sm90-r1-fp16-d128-q128-kv128-cutlass",
    "gna_forward-sm90-r3-bf16-d128-q2x8x8-kv2x8x8",
    "gna_forward-sm90-r3-bf16-d128-q2x8x8-kv2x8x8-cutlass",
)
PROBLEMS = {  # tokens, window, stride
    1: (
        *(((512,), (256,), (256,)), ((512,), (512,), (512,)), ((768,), (384,), (384,))),
        *(((640,), (200,), (1,)), ((640,), (130,), (1,)), ((768,), (500,), (1,))),
    ),
    3: (
        *(((4, 16, 16), (2, 16, 16), (2, 16, 16)), ((4, 16, 16), (4, 16, 16), (4, 16, 16))),
        *(((4, 16, 16), (4, 8, 16), (4, 8, 16)), ((4, 16, 16), (3, 9, 9), (1, 1, 1))),
        *(((4, 16, 16), (2, 5, 5), (1, 1, 1)), ((4, 16, 24), (4, 12, 20), (1, 1, 1))),
    ),
}
ROWS = ("all", "matrix", "exp2", "float", "integer and logic", "move", "conversion", "load and store", "warp")
TILES = ("Q tile", "interior tile", "shell tile")


def counts(found: WorkCounters) -> Counter[str]:
    """Instructions by class, without waits: how many these are is the schedule's doing."""
    waits = sum(count for opcode, count in found.opcodes.items() if opcode.startswith("mbarrier.try_wait"))
    return Counter({"all": found.instructions - waits, **found.classes})


def per_tile(key: str) -> dict[str, list[float]]:
    """Of each row of the table what a Q tile, an interior and a shell tile take."""
    kernel = EmulatedKernel(key)
    config, tiles, counted = kernel.config, [], []
    for tokens, window, stride in PROBLEMS[config.rank]:
        torch.manual_seed(0)
        x = torch.randn(1, *tokens, 1, config.head_dim).to(DTYPES[config.dtype].torch)
        kernel(x, x, x, window, stride)
        assert kernel.counters is not None
        q_tiles = prod(-(-length // extent) for length, extent in zip(tokens, config.q_tile, strict=True))
        tiles.append((q_tiles, kernel.counters.interior_tiles, kernel.counters.shell_tiles))
        counted.append(counts(kernel.counters))
    kernel.close()
    matrix = np.array(tiles, float)
    return {row: list(np.linalg.lstsq(matrix, np.array([c[row] for c in counted], float))[0]) for row in ROWS}


def main(keys: list[str]) -> None:
    print("| | " + " | ".join(TILES) + " |\n|" + "---|" * 4)
    for key in keys or KEYS:
        found = per_tile(key)
        print(f"| **{key}** | | | |")
        for row, of_tiles in found.items():
            print(f"| {row} | " + " | ".join(f"{count:,.0f}" for count in of_tiles) + " |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
