"""Numbers and names in the documentation are what the code gives."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import gnaforge
import pytest
from gnaforge.cli import simulate as command
from gnaforge.families import families
from gnaforge.families.sm100_cutlass_forward import FAMILY as CUTLASS
from gnaforge.gna.words import describe
from gnaforge.runtime.problem import Problem
from gnaforge.simulator.cost import Tiles
from gnaforge.simulator.fitting import simulate_fitted
from gnaforge.simulator.natten import simulate_natten
from gnaforge.simulator.simulation import Simulation, refusal, simulate_tiles
from gnaforge.spec import json_schema, load_spec, presets
from gnaforge.spec.reference import reference_table
from kernel_set import FAMILIES

ROOT = Path(__file__).parent.parent
API = (ROOT / "codegen/README.md").read_text()
SIMULATOR = (ROOT / "codegen/simulator/README.md").read_text()


def box(extents: tuple[int, ...]) -> str:
    return "x".join(map(str, extents))


def name_of(preset: str, found: Simulation) -> str:
    """A problem, as tables of fitted tiles say it."""
    axes = found.axes
    problem = f"{preset} {box(tuple(axis.length for axis in axes))}, {box(tuple(axis.window for axis in axes))}"
    for name in ("stride", "dilation"):
        values = tuple(getattr(axis, name) for axis in axes)
        problem += f", {name} {box(values)}" if set(values) != {1} else ""
    return problem + "".join(f", {n} text tokens" for n in found.problem.extra_tokens)


def fitted_row(preset: str, found: Simulation) -> str:
    """A row of the table of fitted tiles."""
    natten = simulate_natten(found.problem, found.family)
    assert natten is not None
    ours, theirs = (f"{box(each.tiles.q)}, {box(each.tiles.kv)} | {each.work_bound:.2f}x" for each in (found, natten))
    return f"| {name_of(preset, found)} | {found.flop_speedup:.2f}x | {ours} | {theirs} |"


@pytest.mark.parametrize("preset", ["hunyuan-video", "flux-4k", "wan-720p", "cosmos", "vit-56"])
@pytest.mark.usefixtures("every_feature")
def test_fitted_tiles_beside_nattens(preset: str) -> None:
    for entry in load_spec(preset).kernels:
        for shape in entry.problems:
            problem = shape.problem(head_dim=entry.head_dim[0], dtype=entry.dtype[0])
            assert fitted_row(preset, simulate_fitted(problem, FAMILIES["sm90"])) in SIMULATOR


def sm100_row(preset: str, problem: Problem) -> str:
    """A row of the table of sm100's families."""
    own = simulate_fitted(problem, FAMILIES["sm100"])
    found = [own] if refusal(problem, CUTLASS) else [simulate_fitted(problem, CUTLASS), own]
    tiles = [f" {box(each.tiles.q)}, {box(each.tiles.kv)}: {each.work_bound:.2f}x " for each in found]
    times = [f" {float(each.time.seconds) * 1e3:.2f} " for each in found]
    none = [" "] * (2 - len(found))
    return "|".join([f"| {name_of(preset, own)} | {own.flop_speedup:.2f}x ", *none, *tiles, *none, *times, ""])


@pytest.mark.parametrize("preset", sorted({*presets()} - {"quickstart"}))
@pytest.mark.usefixtures("every_feature")
def test_fitted_tiles_of_sm100(preset: str) -> None:
    """Of all presets; of cosmos-predict2's two models, which differ in heads alone, the smaller one."""
    for entry in load_spec(preset).kernels:
        for shape in entry.problems:
            problem = shape.problem(head_dim=entry.head_dim[0], dtype=entry.dtype[0])
            if (preset, problem.heads) != ("cosmos-predict2", 40):
                assert sm100_row(preset, problem) in SIMULATOR


def preset_row(preset: str, found: Simulation) -> str:
    """A row of the table of presets that no paper of NATTEN's has."""
    counts, problem = found.counts, found.problem
    tiles = f"{box(found.tiles.q)}, {box(found.tiles.kv)}"
    share = counts.interior / counts.visited
    numbers = f"{found.sparsity:.1%} | {found.flop_speedup:.2f}x | {tiles} | {found.work_bound:.2f}x"
    tokens = f"{counts.visited / counts.q_tiles:.1f} | {share:.0%} |"
    return f"| {preset}: {describe(problem, stride=set(problem.stride) != {1})} | {numbers} | {tokens}"


@pytest.mark.parametrize("preset", ["stormscope", "atlas", "longlive", "cosmos-predict2", "hunyuan-video", "flux-4k"])
@pytest.mark.usefixtures("every_feature")
def test_counts_of_presets(preset: str) -> None:
    """One row for the shapes that differ in their heads only."""
    rows = {}
    for entry in load_spec(preset).kernels:
        for shape in entry.problems:
            problem = replace(shape.problem(head_dim=entry.head_dim[0], dtype=entry.dtype[0]), heads=16, kv_heads=16)
            if preset in ("hunyuan-video", "flux-4k") and not problem.extra_tokens:
                continue
            rows[preset_row(preset, simulate_fitted(problem, FAMILIES["sm90"]))] = None
    missing = [row for row in rows if row not in SIMULATOR]
    assert not missing, "\n".join(rows)
    assert len(set(rows)) == SIMULATOR.count(f"| {preset}: ")


@pytest.mark.parametrize("row", ["8192, window 1024", "128x160, window 31x31", "256x256, window 80x80, stride 16x16"])
def test_tiles_of_heads_that_share_keys(row: str) -> None:
    sizes = [tuple(map(int, text.split()[-1].split("x"))) for text in row.split(", ")]
    found = [
        simulate_fitted(Problem(*sizes, heads=16, kv_heads=16 // group, head_dim=128), FAMILIES["sm100"])
        for group in (1, 2, 4, 8)
    ]
    bounds = " | ".join(f"{one.work_bound:.2f}x" for one in found)
    more = float(found[-1].time.seconds / found[0].time.seconds) - 1
    assert f"| {row} | {bounds} | {100 * more:.0f} % |" in SIMULATOR


def test_worked_example() -> None:
    for stride, tiling, counts, bounds in (
        (1, "static", (7, 0), ("1.29", "1.00")),
        (1, "dynamic", (6, 0), ("1.50", "1.00")),
        (128, "static", (3, 3), ("3.00", "3.00")),
        (128, "dynamic", (3, 3), ("3.00", "3.00")),
    ):
        found = gnaforge.simulate((384,), 128, stride, q_tile=(128,), kv_tile=(128,), tiling=tiling, arch="sm90")
        assert (found.counts.visited, found.counts.interior) == counts
        assert (f"{found.work_bound:.2f}", f"{found.paper_bound:.2f}") == bounds
        assert all(f"{bound}x" in SIMULATOR for bound in bounds)


def test_bounds_that_the_explanation_names() -> None:
    problem = {"tokens": (30, 48, 80), "window": (18, 24, 24), "q_tile": (4, 8, 8), "kv_tile": (2, 8, 8)}
    plain = gnaforge.simulate(**problem, tiling="static")
    strided = gnaforge.simulate(**problem, stride=(16, 8, 8), tiling="static")
    for bound in (plain.paper_bound, plain.work_bound, strided.paper_bound, strided.work_bound):
        assert f"{bound:.2f}x" in SIMULATOR


def test_model_beside_published_times() -> None:
    hunyuan = Problem((30, 48, 80), (18, 24, 24), (16, 8, 8), heads=24)
    flux = Problem((256, 256), (80, 80), (16, 16), heads=24)
    for problem, tiles, family in (
        (hunyuan, Tiles((2, 8, 8), (2, 8, 8)), FAMILIES["sm90"]),
        (flux, Tiles((16, 8), (16, 8)), FAMILIES["sm90"]),
        (hunyuan, Tiles((4, 8, 8), (2, 8, 8)), CUTLASS),
        (flux, Tiles((16, 16), (16, 8)), CUTLASS),
        (hunyuan, Tiles((4, 8, 8), (2, 8, 8)), FAMILIES["sm100"]),
        (flux, Tiles((16, 16), (16, 8)), FAMILIES["sm100"]),
    ):
        seconds = float(simulate_tiles(problem, tiles, family, "static").time.seconds)
        assert f"| {seconds * 1e3:.2f} ms |" in SIMULATOR


def test_every_json_key_is_documented() -> None:
    found = gnaforge.simulate((30, 48, 80), (18, 24, 24))
    row = command._as_json(found, (0.607, 15, 50))
    assert {"natten", "end_to_end", "model"} <= row.keys()
    keys = set(row) | {key for value in row.values() if isinstance(value, dict) for key in value}
    documented = set(re.findall(r"`(\w+)`", SIMULATOR[SIMULATOR.index("## JSON") :]))
    assert keys <= documented


def test_every_public_name_and_variable_is_documented() -> None:
    modules = {f"NeighborhoodAttention{rank}D" for rank in "123"} | {"Kernel", "KernelConfig"}
    assert all(f"`{name}" in API for name in set(gnaforge.__all__) - modules)
    sources = [path.read_text() for folder in ("codegen", "build_tools") for path in (ROOT / folder).rglob("*.py")]
    read = set(re.findall(r"(?:environ\.get\(|environ\[|getenv\()\"(GNAFORGE_\w+)\"", "\n".join(sources)))
    emulator = {name for name in read if name.startswith("GNAFORGE_EMULATOR_")}
    assert {"GNAFORGE_JIT", "GNAFORGE_CACHE_DIR"} <= read
    assert all(f"| `{name}` |" in API for name in read - emulator)


def test_the_fields_of_specs_are_those_of_the_schema() -> None:
    assert reference_table(json_schema()) in API


def test_bounds_that_the_readme_begins_with() -> None:
    readme = (ROOT / "README.md").read_text()
    problem = Problem((30, 48, 80), (18, 24, 24), heads=24)
    ours = simulate_fitted(problem, FAMILIES["sm90"])
    theirs = simulate_natten(problem, FAMILIES["sm90"])
    flat = gnaforge.simulate((30, 48, 80), (18, 24, 24), q_tile=(128,), kv_tile=(128,), tiling="flat", arch="sm90")
    assert theirs is not None
    for bound in (ours.flop_speedup, ours.work_bound, theirs.work_bound, flat.work_bound):
        assert f"{bound:.2f}" in readme


def test_no_page_misses_a_model_of_times() -> None:
    """Pages say of families in general what becomes of those without one; none of ours is, and no page says so."""
    pages = [*ROOT.glob("*.md"), *(page for name in ("codegen", "templates") for page in (ROOT / name).rglob("*.md"))]
    claims = [page.name for page in pages if re.search(r"no (time )?model of (their|its) times", page.read_text())]
    untimed = [str(family) for family in families() if family.time is None]
    assert untimed == [] and claims == []
