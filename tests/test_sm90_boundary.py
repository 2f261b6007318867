"""Every tile that the sm90 family admits compiles: a sample of those at the boundary, and the result for more."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path

import gnaforge
import pytest
from gnaforge.build_tools.cuda import find_nvcc
from gnaforge.errors import BuildError
from gnaforge.families.sm90_forward import FAMILY
from gnaforge.runtime.config import KernelConfig
from sm90_boundary import boundary, compile_kernel, fullest

RESULT = Path(__file__).parent / "data" / "sm90_boundary.json"
SAMPLE = 12


@cache
def configs() -> list[KernelConfig]:
    return list(boundary())


@pytest.fixture
def nvcc() -> None:
    try:
        find_nvcc(FAMILY.target.nvcc)
    except BuildError as error:
        pytest.skip(str(error))


def test_the_result_is_of_this_boundary() -> None:
    """Limits that move make other kernels the outermost; then tests/sm90_boundary.py says whether they compile."""
    known = json.loads(RESULT.read_text())["registers"]
    assert known.keys() <= {config.key for config in configs()}
    for rank in (1, 2, 3):
        for warpgroups in (1, 2, 3):
            assert any(
                config.rank == rank and -(-config.q_rows // 64) == warpgroups
                for config in map(KernelConfig.parse, known)
            )
    assert max(known.values()) <= 255


def test_a_sample_of_the_boundary_compiles(nvcc: None, tmp_path: Path) -> None:
    sample = {*configs()[:: len(configs()) // SAMPLE], *fullest()}
    with ThreadPoolExecutor(2) as pool:
        assert min(pool.map(partial(compile_kernel, folder=tmp_path), sample)) > 0


@pytest.mark.parametrize(
    ("tokens", "window", "head_dim", "value_head_dim"),
    [((112, 55), (1, 18), 256, 256), ((98, 42), (15, 8), 64, 256), ((40, 12), (24, 12), 200, 200)],
)
def test_fitted_tiles_of_large_heads_compile(
    nvcc: None, tokens: tuple[int, ...], window: tuple[int, ...], head_dim: int, value_head_dim: int, tmp_path: Path
) -> None:
    problem = {"tokens": tokens, "window": window}
    (tile,) = gnaforge.fit([problem], arch="sm90", head_dim=head_dim, value_head_dim=value_head_dim).tiles
    value = value_head_dim if value_head_dim != head_dim else 0
    compile_kernel(KernelConfig("gna_forward", "sm90", 2, "bf16", head_dim, tile.q, tile.kv, value), tmp_path)


def test_head_dim_256_takes_80_keys_at_ranks_1_and_2(nvcc: None, tmp_path: Path) -> None:
    for key in ("r1-bf16-d256-q128-kv80", "r2-bf16-d256-q9x14-kv2x40"):
        config = KernelConfig.parse(f"gna_forward-sm90-{key}")
        assert not FAMILY.faults(config)
        compile_kernel(config, tmp_path)
    assert FAMILY.faults(KernelConfig.parse("gna_forward-sm90-r3-bf16-d256-q2x8x8-kv2x4x10"))
    dense = {"tokens": (16384,), "window": (16384,), "heads": 16}
    (tile,) = gnaforge.fit([dense], arch="sm90", head_dim=256).tiles
    assert (tile.q, tile.kv) == ((128,), (80,))


def test_two_blocks_share_a_multiprocessor_only_where_products_fit(nvcc: None, tmp_path: Path) -> None:
    """Two blocks leave a thread 128 registers at launch, less than a product with 256 value channels takes."""
    shared = compile_kernel(KernelConfig.parse("gna_forward-sm90-r1-bf16-d192-q64-kv16"), tmp_path)
    alone = compile_kernel(KernelConfig.parse("gna_forward-sm90-r1-bf16-d256-q64-kv16"), tmp_path)
    assert shared <= 128 < alone


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("d64v200-q192-kv16", "132 registers a thread for one product, of which there are 128 at launch"),
        ("d200-q192-kv32", "124 accumulator registers a thread, of which there are 112"),
    ],
)
def test_three_warpgroups_have_no_room_for_large_products(key: str, reason: str) -> None:
    faults = FAMILY.faults(KernelConfig.parse(f"gna_forward-sm90-r1-bf16-{key}"))
    assert faults == [("kv_tile", f"beside 192 query tokens needs {reason}")]
