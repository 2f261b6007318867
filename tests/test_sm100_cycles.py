"""Budgets of sm100's own kernels: their modelled cycles stay what tests/data/sm100_cycles.json says, and that holds."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path

import numpy as np
import pytest
from fitted_times import code_of, errors_of, fit_all
from gnaforge.build_tools.cuda import find_nvcc
from gnaforge.errors import BuildError
from gnaforge.families.sm100_forward import FAMILY, tile_loop
from gnaforge.families.sm100_times import FORWARD
from gnaforge.runtime.config import KernelConfig
from gnaforge.simulator.code_times import product_cycles
from modelled_cycles import missed_budgets, model_all, modelled, result_of, rms
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
        assert rms(errors) < 0.04 and max(map(abs, errors.values())) < 0.08, (group, errors)
        assert FORWARD[group].q_tile == pytest.approx(times[op][group].q_tile)


# P of bytes lies apart where P of 16 bits has no room; then in either case; then in none.
NARROW = (
    "d176-q4x8x8-kv4x4x4",
    "d128-q4x8x8-kv2x6x8",
    "d96-q4x8x8-kv2x8x8",
    "d64-q4x8x8-kv2x8x8",
    "d128-q2x8x8-kv2x8x8",
)


@pytest.mark.parametrize("sizes", [NARROW[0], *(pytest.param(sizes, marks=pytest.mark.survey) for sizes in NARROW[1:])])
def test_the_formulas_are_those_of_kernels_of_8_bits_as_well(sizes: str, tmp_path: Path) -> None:
    """They were fitted to none of these: within 8 % of what the model says of each."""
    try:
        find_nvcc(FAMILY.target.nvcc)
    except BuildError as error:
        pytest.skip(str(error))
    key = f"gna_forward-sm100-r3-e4m3-obf16-{sizes}"
    kernels = {key: modelled(KernelConfig.parse(key), tmp_path)}
    (errors,) = errors_of({"gna_forward": FORWARD}, kernels).values()
    assert len(errors) == 2 and max(map(abs, errors.values())) < 0.08, errors


def test_short_tiles_take_what_the_simulator_says() -> None:
    """Tiles of which fewer columns are computed, by the model of their own code."""
    errors = {}
    for key, cycles in KERNELS.items():
        config = KernelConfig.parse(key)
        short = FAMILY.padding.short_tiles(config.kv_tile)
        assert cycles["short_tile_cycles"].keys() == {*map(str, short)}, "run: python tests/sm100_cycles.py"
        code = code_of(config, FORWARD)
        for columns in short:
            formula = float(code.shell - (config.kv_columns - columns) * code.spared)
            errors[key, columns] = formula / cycles["short_tile_cycles"][str(columns)] - 1
            assert cycles["short_tile_cycles"][str(columns)] < 0.95 * cycles["shell_tile_cycles"]["signal_100"]
    assert len(errors) > 40 and rms(errors) < 0.05
    assert max(map(abs, errors.values())) < 0.1, errors


def test_instructions_of_a_row_of_scores() -> None:
    """At most 620 in an interior tile, and 260 more in a shell tile, with what comes before the scores."""
    for key, cycles in KERNELS.items():
        found = cycles["softmax_instructions"]
        columns = prod(KernelConfig.parse(key).kv_tile)
        assert found["interior"] <= min(620, 660 * columns / 128), key
        check_mask(key, found)


def check_mask(key: str, found: dict[str, int]) -> None:
    """A shell tile takes at most 260 instructions more than an interior one, and 275 for 128 columns if it has 64 or
    more: what doesn't depend on columns weighs more on fewer."""
    more, columns = found["shell"] - found["interior"], prod(KernelConfig.parse(key).kv_tile)
    assert 0 < found["shell_before_scores"] < more <= 260, key
    assert columns < 64 or more <= 275 * columns / 128, key


def test_instructions_of_masks_of_all_kinds_of_boxes(tmp_path: Path) -> None:
    """Of the boxes of up to 128 keys those that take most: rows or planes of keys that lie across words of 32, or fill
    them, or are many."""
    try:
        find_nvcc(FAMILY.target.nvcc)
    except BuildError as error:
        pytest.skip(str(error))
    boxes = ((8, 2, 8), (4, 4, 7), (2, 4, 14), (2, 2, 28), (20, 2, 2), (16, 2, 3), (8, 14), (4, 28))
    q_tiles = {2: (16, 16), 3: (4, 8, 8)}
    configs = [KernelConfig("gna_forward", "sm100", len(box), "bf16", 128, q_tiles[len(box)], box) for box in boxes]
    for key, cycles in model_all(configs, tmp_path).items():
        check_mask(key, cycles["softmax_instructions"])


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
