"""Models sm100 kernels, and keeps what that gives: budgets of the tests' kernels, and the simulator's constants.

Use: ``python tests/sm100_cycles.py [PART]``; as sm90_cycles.py, whose files have sm90 in their names.
"""

from __future__ import annotations

import sys
from itertools import product

from gnaforge.families import family_of
from gnaforge.runtime.config import KernelConfig
from modelled_cycles import write
from sm100_kernels import APART, COPIED, FOLDED, LINE, PLANE, WIDE

_Q_BOXES = ((4, 8, 8), (2, 8, 8))
_KV_BOXES = ((2, 4, 4), (4, 4, 4), (2, 4, 10), (2, 6, 8), (2, 4, 14), (2, 8, 8))
_DIMS = ((32, 0), (64, 0), (96, 0), (128, 0), (192, 0), (192, 128), (256, 0))


def _fitted() -> list[KernelConfig]:
    """Of these sizes those that the family admits, but one half of rows only where two are rare or have no room."""
    configs = (
        KernelConfig("gna_forward", "sm100", 3, "bf16", dim, q, kv, value_dim)
        for (dim, value_dim), q, kv in product(_DIMS, _Q_BOXES, _KV_BOXES)
        if q == _Q_BOXES[0] or (dim >= 64 and dim != 96 and kv not in (_KV_BOXES[2], _KV_BOXES[4]))
    )
    return [config for config in configs if not family_of(config).faults(config)]


FITTED = _fitted()
"""Kernels that the formulas are fitted to, beside those that have budgets."""
TESTED = [KernelConfig.parse(key) for key in (FOLDED, APART, PLANE, LINE, COPIED, WIDE)]
"""Kernels that have budgets."""


if __name__ == "__main__":
    write("sm100", TESTED, FITTED, "".join(sys.argv[1:]))
