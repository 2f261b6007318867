"""Budgets of sm100's own kernels: their modelled cycles stay what tests/data/sm100_cycles.json says, and that holds."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path

import numpy as np
import pytest
from fitted_times import errors_of, fit_all
from gnaforge.build_tools.cuda import find_nvcc
from gnaforge.errors import BuildError
from gnaforge.families.sm100_forward import FAMILY, tile_loop
from gnaforge.families.sm100_times import FORWARD
from gnaforge.runtime.config import KernelConfig
from gnaforge.simulator.code_times import product_cycles
from modelled_cycles import missed_budgets, result_of, rms
from sm100_cycles import FITTED, TESTED
from sm100_kernels import FOLDED

KERNELS = json.loads(result_of("sm100").read_text())["kernels"]


def test_modelled_cycles_are_within_their_budgets(tmp_path: Path) -> None:
    try:
        find_nvcc(FAMILY.target.nvcc)
    except BuildError as error:
        pytest.skip(str(error))
    lines = missed_budgets("sm100", TESTED, FITTED, tmp_path)
    assert not lines, "\n".join(lines)


def test_the_formulas_of_the_simulator_are_those_of_the_table() -> None:
    """Fitted again, and as near to the modelled cycles as the simulator's page says."""
    times = fit_all(KERNELS)
    assert times["gna_forward"].keys() == FORWARD.keys()
    refitted = errors_of(times, KERNELS)
    for (op, group), errors in errors_of({"gna_forward": FORWARD}, KERNELS).items():
        assert rms(errors) == pytest.approx(rms(refitted[op, group]), abs=1e-3), "run: python tests/sm100_cycles.py"
        apart = group[-1]  # shell tiles then take as long as two softmax warps that meet by chance
        assert rms(errors) < (0.06 if apart else 0.04), (group, errors)
        assert max(map(abs, errors.values())) < (0.13 if apart else 0.12), (group, errors)
        assert FORWARD[group].q_tile == pytest.approx(times[op][group].q_tile)


def test_instructions_of_a_row_of_scores() -> None:
    """Of 128 columns: at most 620 in an interior tile, and 260 more in a shell tile, with what comes before the scores.
    Boxes whose rows of keys lie across words of masks take more."""
    across = []
    for key, cycles in KERNELS.items():
        found = cycles["softmax_instructions"]
        box = KernelConfig.parse(key).kv_tile
        scale = 128 / prod(box)
        assert found["interior"] * scale <= 660 and found["interior"] <= 620, key
        assert 0 < found["shell_before_scores"] < found["shell"] - found["interior"], key
        if 32 % prod(box[-1:]) and len(box) > 1:
            across.append(found["shell"] - found["interior"])
        elif prod(box) == 128:
            assert found["shell"] - found["interior"] <= 260, key
    assert len(across) > 5 and max(across) < 340


def test_probabilities_and_shares_of_the_tensor_cores() -> None:
    """A warp's first probabilities come within the time that the other half's products take, but for its signals; the
    tensor cores of default tiles at head dim 128 are busy for 5/6 of an interior tile."""
    cycles = KERNELS[FOLDED]
    assert cycles["first_probabilities_cycles"]["interior"] < 1024
    busy = cycles["tensor_busy_share"]
    assert busy["interior"] > 5 / 6 and busy["shell"] > 2 / 3
    assert cycles["interior_tile_cycles"]["signal_100"] * busy["interior"] == pytest.approx(2048, rel=1e-3)


def test_products_of_a_tile_are_those_that_its_steps_issue() -> None:
    """The simulator's formula, of numbers and of arrays, beside the model's steps. Reading Q and K from shared memory
    takes longer than the product with fewer than 128 keys."""
    constants = FAMILY.time_constants()
    for key in KERNELS:
        config = KernelConfig.parse(key)
        steps = sum(step.products * step.cycles for step in tile_loop(config).steps)
        dims = config.head_dim, config.value_head_dim or config.head_dim
        rows = FAMILY.padding.padded_rows(config.q_rows)
        found = product_cycles(constants, np.array([rows, rows]), np.array(config.kv_columns), *dims)
        assert found == pytest.approx([steps, steps], rel=0.01), key
    assert product_cycles(constants, np.array(256), np.array(128), 128, 128) == 2048
    assert product_cycles(constants, np.array(256), np.array(64), 128, 128) == 2 * (8 * 48 + 4 * 64)
