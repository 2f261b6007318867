"""Whole models on paper: schedules in files and as objects, and what `gnaforge simulate --end-to-end` says of them."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

import gnaforge
import pytest
import yaml
from gnaforge.errors import InputError
from gnaforge.models.schedule import Pattern, Schedule
from gnaforge.models.schedule_file import read_schedule
from gnaforge.simulator.end_to_end import end_to_end, published_rounding

PUBLISHED = json.loads((Path(__file__).parent / "data" / "published_bounds.json").read_text())
GRID = (12, 16, 16)
TILES = {"q_tile": (3, 4, 8), "kv_tile": (3, 4, 8)}
NATTEN = [{"window_size": [-1, 8, 8], "stride": [1, 4, 8], "base_size": [-1, 16, 16]}, None]
STRATEGIES = {"0_0_0": [1, 1, 1], "0_0_1": [3, 2, 2], "1_0_0": [1, 1, 2], "1_1_1": [1, 2, 1]}


def written(tmp_path: Path, value: Any, name: str = "windows.yaml") -> Path:
    path = tmp_path / name
    path.write_text(value if isinstance(value, str) else yaml.safe_dump(value))
    return path


def work(window: Any, stride: Any = 1) -> float:
    return gnaforge.simulate(GRID, window, stride, **TILES).work_bound


def test_the_papers_cells_by_a_schedule() -> None:
    """All 44, as a schedule of 60 layers, beside the formula for one window; and beside what was published."""
    different = []
    for row in PUBLISHED["end_to_end"]:
        share = prod(PUBLISHED["attention_share"][row["case"]])
        schedule = Schedule(Pattern(row["window"], row["stride"]), dense_steps=row["dense_steps"])
        tiles = {"q_tile": row["q_tile"], "kv_tile": row["kv_tile"]}
        found = gnaforge.simulate_schedule(schedule, row["tokens"], share, steps=row["steps"], layers=60, **tiles)
        one = gnaforge.simulate(row["tokens"], row["window"], row["stride"], **tiles)
        steps = row["dense_steps"], row["steps"]
        assert found.work_bound == pytest.approx(end_to_end(one.work_bound, share, *steps), rel=1e-12)
        bound = published_rounding(one.paper_bound or 0)
        assert found.paper_bound == pytest.approx(end_to_end(bound, share, *steps), rel=1e-12)
        if round(found.paper_bound or 0, 2) != row["speedup"]:
            different.append((row["window"], row["stride"], row["speedup"]))
    assert len(PUBLISHED["end_to_end"]) == 44
    assert different == [([18, 24, 24], [18, 24, 24], 2.06)]  # 0.01 below what its own formula gives


def test_layers_steps_and_heads_by_hand() -> None:
    """Each share by counting: layers that differ, dense ones, dense steps, windows per head."""
    a, b = Pattern((4, 8, 8)), Pattern(((4, 8, 8), (-1, -1, -1), (6, 8, 8), (4, 8, 8)))
    schedule = Schedule([a, b, None, a, a], dense_steps=3, dense_layers=[4])
    found = gnaforge.simulate_schedule(schedule, GRID, 0.5, steps=10, heads=4, **TILES)
    # Of 10 steps, 5 layers and 4 heads: 7 steps of two layers, and in one layer two heads and one.
    shares = {((4, 8, 8), 4): 7 * 2 * 4 / 200, ((4, 8, 8), 2): 7 * 2 / 200, ((6, 8, 8), 1): 7 / 200}
    own = {(part.simulation.problem.window, part.simulation.problem.heads): part.share for part in found.parts}
    assert own == {key: pytest.approx(share) for key, share in shares.items()}
    left = 1 - 77 / 200 + sum(share / work(window) for (window, _), share in shares.items())
    assert found.work_bound == pytest.approx(1 / (0.5 + 0.5 * left))
    assert found.dense_share == pytest.approx(1 - 77 / 200)
    assert found.flop_bound > found.work_bound > 1


def test_a_table_of_sliding_tiles(tmp_path: Path) -> None:
    path = written(tmp_path, json.dumps({"mask_strategies": STRATEGIES, "tile": [4, 8, 8]}), "strategies.json")
    run = read_schedule(path)
    assert (run.steps, run.layers) == (2, 2)
    found = gnaforge.simulate_schedule(run.schedule, GRID, 1.0, steps=2, layers=2, heads=2, **TILES)
    kept = {(4, 8, 8): 1 / 8, (4, 8, 16): 1 / 8, (4, 16, 8): 1 / 8}  # 3x2x2 tiles and heads that aren't named: all
    assert {part.simulation.problem.window: part.share for part in found.parts} == kept
    tiles = {window: tuple(min(w, t) for w, t in zip(window, (4, 8, 8), strict=True)) for window in kept}
    left = 1 - 3 / 8 + sum(share / work(window, tiles[window]) for window, share in kept.items())
    assert found.work_bound == pytest.approx(1 / left)


def test_files_hold_what_objects_say(tmp_path: Path) -> None:
    """Each form, in YAML and JSON, published lists and tables alone too."""
    window = {"kernel_size": [4, 8, 8], "stride": [1, 4, 8], "edge": ["shift", "wrap", "cut"], "sink": [1, 0, 0]}
    by_list = Schedule.from_natten_parameters(NATTEN)  # type: ignore[arg-type]
    by_table = Schedule.from_mask_strategies(STRATEGIES)
    forms: list[tuple[Any, Schedule, int, int | None]] = [
        ({"patterns": window}, Schedule(Pattern(**window)), 1, None),
        ({"patterns": [window, None]}, Schedule([Pattern(**window), None]), 1, 2),
        ({"patterns": {"1_0": window}, "layers": 3}, Schedule({(1, 0): Pattern(**window)}), 2, 3),
        (NATTEN, by_list, 1, 2),
        ({"natten_parameters": NATTEN, "dense_steps": 2, "steps": 9}, Schedule(by_list.patterns, 2), 9, 2),
        (STRATEGIES, by_table, 2, 2),
        ({"mask_strategies": STRATEGIES, "layers": 4}, by_table, 2, 4),
    ]
    for value, schedule, steps, layers in forms:
        for text in (yaml.safe_dump(value), json.dumps(value), json.dumps(value, indent=1)):
            run = read_schedule(written(tmp_path, text))
            assert (run.steps, run.layers) == (steps, layers)
            assert _plain(run.schedule.patterns) == _plain(schedule.patterns)
            assert run.schedule.dense_steps == schedule.dense_steps


def _plain(patterns: Any) -> str:
    return repr(patterns).replace("[", "(").replace("]", ")")


def test_the_command(cli: Any, tmp_path: Path) -> None:
    dense = {"patterns": {"kernel_size": [18, 24, 24], "stride": [16, 8, 8]}, "steps": 50, "dense_steps": 15}
    path = str(written(tmp_path, dense))
    done = cli("simulate", "--preset", "hunyuan-video", "--end-to-end", "0.607", "--schedule", path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("  end to end: 1.63x by the work bound") == 2  # with and without text
    assert "30x48x80 tokens and 256 extra keys; 24 heads of 128, bf16" in done.stdout
    assert "50 steps of 1 layer; of all heads, layers and steps 30.0% are dense" in done.stdout
    done = cli("simulate", "--preset", "hunyuan-video", "--end-to-end", "0.607", "--schedule", path, "--json")
    rows = json.loads(done.stdout)
    single = cli("simulate", "--preset", "hunyuan-video", "--end-to-end", "0.607", "--dense-steps", "15/50", "--json")
    strided = [row for row in json.loads(single.stdout) if row["stride"] == [16, 8, 8]]
    assert [row["work_bound"] for row in rows] == pytest.approx([row["end_to_end"]["work_bound"] for row in strided])
    assert [row["paper_bound"] for row in rows] == pytest.approx([row["end_to_end"]["paper_bound"] for row in strided])
    page = (Path(__file__).parents[1] / "codegen" / "simulator" / "README.md").read_text()
    assert all(f"`{key}`" in page for row in rows for key in row)
    # Python gives the same.
    run = read_schedule(Path(path))
    found = gnaforge.simulate_schedule(run.schedule, (30, 48, 80), 0.607, steps=run.steps, heads=24)
    assert json.loads(json.dumps(found.as_json())) == rows[0]


def test_a_dense_run_gains_nothing(cli: Any, tmp_path: Path) -> None:
    path = str(written(tmp_path, {"patterns": [None, {"kernel_size": -1}]}))
    done = cli("simulate", "--tokens", "8,8", "--end-to-end", "0.5", "--schedule", path)
    assert done.returncode == 0, done.stderr
    assert "100.0% are dense" in done.stdout and "end to end: 1.00x" in done.stdout


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 3", "natten_parameters of layer 0: '3' is no mapping"),
        ("hello", "a schedule is a mapping"),
        ("{}", "give one of patterns, natten_parameters, mask_strategies"),
        ("{patterns: {kernel_size: 3}, natten_parameters: []}", "not patterns and natten_parameters"),
        ("{patterns: {kernel_size: 3}, tile: [1]}", "tile: goes with mask_strategies"),
        ("{patterns: {kernel_size: 3}, dense_step: 1}", "a schedule has no field 'dense_step'"),
        ("{patterns: {kernel_size: 3, window: 4}}", "patterns: a pattern has no field 'window'"),
        ("{patterns: [{stride: 3}]}", "patterns, layer 0: a pattern needs kernel_size"),
        ("{patterns: {kernel_size: 0}}", "patterns: kernel_size is 0"),
        ("{patterns: 7}", "patterns: '7' is no mapping"),
        ("{patterns: {'0_0': 7}}", "patterns, 0_0: '7' is no mapping"),
        ("{patterns: {kernel_size: 3}, dense_layers: [1]}", "dense_layers: say how many layers there are"),
        ("{patterns: {kernel_size: 3}, dense_layers: 1}", "dense_layers: '1' is no list"),
        ("{patterns: {kernel_size: 3}, dense_steps: 1}", "dense_steps: say how many steps there are"),
        ("{patterns: {kernel_size: 3}, layers: 0}", "layers: '0' is no number from 1"),
        ("{patterns: {kernel_size: 3}, steps: true}", "steps: 'True' is no number from 1"),
        ("{patterns: [null, null], layers: 3}", "the schedule is for 2 layers, and there are 3"),
        ("{mask_strategies: {'0_0_0': [1, 1, 1]}, steps: 2}", "the schedule has 1 steps, and the run 2"),
        ("{mask_strategies: {a: [1, 1, 1]}}", "mask strategy 'a'"),
        ("{steps: 1, steps: 2}", "'steps' is given twice"),
        ('{"steps": 1, "steps": 2}', "'steps' is given twice"),
        ("{steps: [", "not valid YAML"),
        ("[" * 5000, "nested too deep"),
        ("steps: !!python/object/apply:os.getcwd []", "not valid YAML"),
        ("\ufffe", "not valid YAML"),
    ],
)
def test_what_is_no_schedule_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(InputError) as error:
        read_schedule(path)
    assert str(error.value).startswith(f"{path}: ") and message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, None),
        ({"heads": 2}, "windows of 3 heads, and there are 2"),
        ({"layers": 2}, "the schedule is for 3 layers, and there are 2"),
        ({"steps": 0}, "steps is 0"),
        ({"attention_share": 2.0}, "end-to-end: 2.0 is no share"),
        ({"tokens": (16, 16)}, "kernel_size has 3 axes, and the grid 2"),
        ({"q_tile": (4, 4, 4)}, "q_tile and kv_tile: give both"),
        ({"heads": 0}, "heads"),
    ],
)
def test_what_does_not_go_with_a_schedule_is_refused(options: dict[str, Any], message: str | None) -> None:
    schedule = Schedule([Pattern(((4, 8, 8), (4, 8, 8), (6, 8, 8))), None, Pattern((4, 8, 8))])
    given: dict[str, Any] = {"tokens": GRID, "attention_share": 0.5, "heads": 3, **options}
    if message is None:
        assert gnaforge.simulate_schedule(schedule, **given).layers == 3
        return
    with pytest.raises(InputError) as error:
        gnaforge.simulate_schedule(schedule, **given)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tokens", "8,8"), "--schedule: has no effect without --end-to-end"),
        (("--tokens", "8,8", "--window", "3", "--end-to-end", ".5"), "--window: has no effect beside --schedule"),
        (("--tokens", "8,8", "--end-to-end", ".5", "--dense-steps", "1/2"), "--dense-steps: has no effect beside"),
        (
            (
                "--end-to-end",
                ".5",
            ),
            "give either --preset, or --tokens and --schedule",
        ),
        (("--tokens", "8,8,8", "--end-to-end", ".5"), "kernel_size has 2 axes, and the grid 3"),
        (("--preset", "longlive", "--end-to-end", ".5"), "its windows lie in all tokens"),
    ],
)
def test_what_the_command_refuses(cli: Any, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    path = str(written(tmp_path, {"patterns": {"kernel_size": [3, 3]}}))
    done = cli("simulate", *arguments, "--schedule", path)
    assert done.returncode != 0 and message in done.stderr, done.stderr


def test_needs_no_torch(python: Any) -> None:
    done = python(
        "import gnaforge, sys; from gnaforge.models.schedule import Pattern, Schedule;"
        "gnaforge.simulate_schedule(Schedule(Pattern(3)), (8, 8), 0.5); assert 'torch' not in sys.modules"
    )
    assert done.returncode == 0, done.stderr
