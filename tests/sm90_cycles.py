"""Models sm90 kernels, and keeps what that gives: budgets of the tests' kernels, and the simulator's constants.

Use: ``python tests/sm90_cycles.py [PART]`` compiles 217 kernels, which takes minutes; with PART only those that have it
in their keys. It writes tests/data/sm90_cycles.json, to which test_sm90_cycles.py holds the tests' kernels, and
codegen/families/sm90_times.py, the formulas that are fitted to all of them.
"""

from __future__ import annotations

import sys

from modelled_cycles import write
from sm90_backward_kernels import KV_CONFIGS, Q_CONFIGS
from sm90_kernels import CONFIGS
from sm90_times import FITTED

TESTED = [*CONFIGS, *Q_CONFIGS, *KV_CONFIGS]
"""The tests' kernels, which have budgets."""

if __name__ == "__main__":
    write("sm90", TESTED, FITTED, "".join(sys.argv[1:]))
