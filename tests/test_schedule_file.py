"""Whole models on paper: schedules in files and as objects, and what `gnaforge simulate --end-to-end` says of them."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import fields
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gnaforge
import pytest
import yaml
from gnaforge.errors import InputError
from gnaforge.models.schedule import Pattern, Schedule
from gnaforge.models.schedule_file import read_schedule
from gnaforge.simulator.end_to_end import end_to_end, published_rounding
from hypothesis import given, settings, strategies as st

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


def test_steps_and_layers_are_the_schedules_by_default() -> None:
    """All steps of a table count; what no schedule says must be given."""
    wide, narrow = Pattern((6, 8, 8)), Pattern((4, 8, 8))
    schedule = Schedule({(0, 0): wide, (1, 1): narrow, (2, 1): narrow}, dense_steps=1)
    found = gnaforge.simulate_schedule(schedule, GRID, 0.5, **TILES)
    assert (found.steps, found.layers) == (3, 2)
    assert {part.simulation.problem.window: part.share for part in found.parts} == {(4, 8, 8): pytest.approx(2 / 6)}
    assert found == gnaforge.simulate_schedule(schedule, GRID, 0.5, steps=3, layers=2, **TILES)
    assert gnaforge.simulate_schedule(schedule, GRID, 0.5, steps=2, layers=4, **TILES).dense_share == 7 / 8
    with pytest.raises(InputError, match="dense_steps: say how many steps there are"):
        gnaforge.simulate_schedule(Schedule(narrow, dense_steps=3), GRID, 0.5, **TILES)
    with pytest.raises(InputError, match="dense_layers: say how many layers there are"):
        gnaforge.simulate_schedule(Schedule(narrow, dense_layers=[3]), GRID, 0.5, **TILES)


def test_a_table_of_the_last_step_and_layer_takes_no_time() -> None:
    """Not one for each pair of a step and a layer, of which there are 10^12."""
    pattern = Pattern((4, 8, 8))
    schedule = Schedule({(999_999, 999_999): pattern, (999_998, 0): pattern})
    assert schedule.counts(1_000_000, 1_000_000) == [(pattern, 2), (None, 10**12 - 2)]


def test_whole_axes_of_a_cut_window() -> None:
    """A window of an axis' size is none where its edge cuts; of heads that differ each has its own edge."""
    pattern = Pattern([(-1, -1), (8, 6), (8, 6), (-1, 3)], edge="cut")
    found = gnaforge.simulate_schedule(Schedule(pattern), (8, 6), 0.5, heads=4)
    assert {(p.window, p.edge, p.heads) for p in (part.simulation.problem for part in found.parts)} == {
        ((8, 6), ("cut", "cut"), 2),
        ((8, 3), ("shift", "cut"), 1),
    }
    assert found.dense_share == 1 / 4


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


def test_keys_are_read_as_they_are_written(tmp_path: Path) -> None:
    """Not as YAML 1.1 has them, to which ``0_1`` is 1; and with plain values that a pattern's anchor repeats."""
    window = "{kernel_size: [4, 8, -1], edge: cut, skip_single: true, base_size: null}"
    run = read_schedule(written(tmp_path, f"patterns:\n  0_0: &own {window}\n  0_1: *own\n  1_12: *own\n"))
    pattern = Pattern([4, 8, -1], edge="cut", skip_single=True)
    assert run.schedule.patterns == {(0, 0): pattern, (0, 1): pattern, (1, 12): pattern}
    assert (run.steps, run.layers) == (2, 13)
    table = Schedule.from_mask_strategies(STRATEGIES)
    for head in ("", "mask_strategies:\n"):
        lines = "".join(f" {key}: {window}\n" for key, window in STRATEGIES.items())
        run = read_schedule(written(tmp_path, head + lines))
        assert _plain(run.schedule.patterns) == _plain(table.patterns) and (run.steps, run.layers) == (2, 2)


_SCALARS = st.none() | st.booleans() | st.integers(-2, 9) | st.integers() | st.floats() | st.text(max_size=3)
_KEYS = st.sampled_from(["0_0", "3_1", "0_0_0", "1_2_1", "0_999999", "1_-1", "01_0", "window_size", "a", ""])
_FIELDS = [field.name for field in fields(Pattern)]
_ANY = st.recursive(
    _SCALARS | st.sampled_from(["cut", "wrap", "block"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS | st.sampled_from(_FIELDS), inner, max_size=3),
    max_leaves=5,
)
_VALUE = st.integers(-1, 9) | st.lists(st.integers(-1, 9), min_size=2, max_size=2) | _ANY
_PATTERN = st.fixed_dictionaries(
    {"kernel_size": _VALUE},
    optional={
        "edge": st.sampled_from(["cut", "wrap"]) | _ANY,
        "skip_single": st.booleans() | _ANY,
        "in_tiles": st.booleans() | _ANY,
        **dict.fromkeys(("stride", "dilation", "base_size", "sink", "is_causal"), _VALUE),
    },
)
_ENTRY = st.fixed_dictionaries({"window_size": _VALUE}, optional=dict.fromkeys(("stride", "base_size", "a"), _VALUE))
_FILE = st.fixed_dictionaries(
    {},
    optional={
        "patterns": _PATTERN | st.lists(_PATTERN | st.none(), max_size=3) | st.dictionaries(_KEYS, _PATTERN) | _ANY,
        "layers": _VALUE,
        "steps": _VALUE,
        "dense_steps": _VALUE,
        "dense_layers": _VALUE,
    },
)
_TABLE = st.fixed_dictionaries({"mask_strategies": st.dictionaries(_KEYS, _VALUE) | _ANY}, optional={"tile": _VALUE})


@settings(max_examples=400, deadline=None)
@given(_FILE | _TABLE | st.lists(_ENTRY | st.none(), max_size=3) | st.dictionaries(_KEYS, _VALUE) | _ANY)
def test_random_structures_never_crash_the_reader(value: Any) -> None:
    with TemporaryDirectory() as folder:
        for text in (json.dumps(value), yaml.safe_dump(value)):
            _check_reader(Path(folder), text)


_SNIPPETS = st.sampled_from(["&a ", "*a", "!!int ", "!!set ", "!!timestamp ", "<<: ", "? ", "- ", ": ", "{", "}"])
_SNIPPETS |= st.sampled_from(
    ["[", "]", "'", '"', "#", "\n", "\t", "0x1", "1:30", "2001-99-99", "=", "~", ",", "%YAML 9"]
)
_SNIPPETS |= st.sampled_from(["  ", "0_0", '"\\U99999999"'])
_TEXT = "steps: 2\npatterns:\n  0_0: &own {kernel_size: [4, -1], edge: cut}\n  1_0: *own\n"


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(_TEXT)), st.integers(0, 6), _SNIPPETS | st.text(max_size=2)), max_size=4))
def test_spoiled_text_never_crashes_the_reader(cuts: list[tuple[int, int, str]]) -> None:
    text = _TEXT
    for start, length, snippet in cuts:
        text = text[:start] + snippet + text[start + length :]
    with TemporaryDirectory() as folder:
        _check_reader(Path(folder), text)


def _check_reader(folder: Path, text: str) -> None:
    """There is a schedule, that goes with a grid or is refused by name; or the file is."""
    (folder / "windows.yaml").write_bytes(text.encode(errors="surrogatepass"))
    with suppress(InputError):
        run = read_schedule(folder / "windows.yaml")
        assert sum(times for _, times in run.schedule.counts(run.steps, run.layers or 1)) == run.steps * (
            run.layers or 1
        )
        gnaforge.simulate_schedule(run.schedule, (5, 4), 0.5, q_tile=(2, 2), kv_tile=(2, 2), heads=2)


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
        ("- 3", "natten_parameters of layer 0: 3 is no mapping"),
        ("hello", "a schedule is a mapping"),
        ("{}", "give one of patterns, natten_parameters, mask_strategies"),
        ("{patterns: {kernel_size: 3}, natten_parameters: []}", "not patterns and natten_parameters"),
        ("{patterns: {kernel_size: 3}, tile: [1]}", "tile: goes with mask_strategies"),
        ("{patterns: {kernel_size: 3}, dense_step: 1}", "a schedule has no field 'dense_step'"),
        ("{patterns: {kernel_size: 3, window: 4}}", "patterns: a pattern has no field 'window'"),
        ("{patterns: [{stride: 3}]}", "patterns, layer 0: a pattern needs kernel_size"),
        ("{patterns: {kernel_size: 0}}", "patterns: kernel_size is 0"),
        ("{patterns: 7}", "patterns: 7 is no mapping"),
        ("{patterns: {'0_0': 7}}", "patterns, 0_0: 7 is no mapping"),
        ("{patterns: {kernel_size: 3}, dense_layers: [1]}", "dense_layers: say how many layers there are"),
        ("{patterns: {kernel_size: 3}, dense_layers: 1}", "dense_layers: 1 is no list"),
        ("{patterns: {kernel_size: 3}, dense_steps: 1}", "dense_steps: say how many steps there are"),
        ("{patterns: {kernel_size: 3}, layers: 0}", "layers: 0 is no number from 1"),
        ("{patterns: {kernel_size: 3}, steps: true}", "steps: True is no number from 1"),
        ("{patterns: [null, null], layers: 3}", "the schedule is for 2 layers, and there are 3"),
        ("{mask_strategies: {'0_0_0': [1, 1, 1]}, steps: 2}", "the schedule has 1 steps, and the run 2"),
        ("{mask_strategies: {a: [1, 1, 1]}}", "mask strategy 'a'"),
        ("{steps: 1, steps: 2}", "'steps' is given twice"),
        ('{"steps": 1, "steps": 2}', "'steps' is given twice"),
        ("{steps: [", "not valid YAML"),
        ("[" * 5000, "nested too deep"),
        ("steps: !!python/object/apply:os.getcwd []", "line 1: the tag 'tag:yaml.org,"),
        ("\nsteps: !!int ''", "line 2: the tag 'tag:yaml.org,2002:int' is not supported"),
        ("a: &a [1]\nb: &b [*b]", "unconstructable recursive"),
        ("{patterns: {kernel_size: 3}, dense_layers: [1.5]}", "dense_layers is ['1.5']; it is a list"),
        ("{patterns: {kernel_size: 3}, steps: 1_0}", "steps: '1_0' is no number"),
        ("{patterns: {kernel_size: 3}, steps: 1:30}", "steps: '1:30' is no number"),
        ("{patterns: {kernel_size: 3}, steps: 0x" + "f" * 5000 + "}", "is no number"),
        ("{patterns: {kernel_size: 010}}", "patterns: kernel_size is '010'"),
        ("patterns:\n  [1, 2]: 3", "line 2: a key is a list or a mapping"),
        ("{? {a: 1} : 3}", "line 1: a key is a list or a mapping"),
        ("steps: 1\nsteps: 2", "line 2: 'steps' is given twice"),
        ("{mask_strategies: {1: [1, 1, 1]}}", "mask strategy '1': expected step_layer_head"),
        ("0_0_0: abc", "mask strategy 0_0_0 is 'abc'; it must be positive ints"),
        ("0_0_0: [a, b, c]", "mask strategy 0_0_0 is ['a', 'b', 'c']; it must be positive ints"),
        ("{mask_strategies: {0_0_0: [1, 1, 1]}, tile: [a, b, c]}", "tile is ['a', 'b', 'c']; it must be positive ints"),
        ("0_0_9000000: [1, 1, 1]", "mask strategy '0_0_9000000': heads count from 0, to 1,023"),
        ("0_0_99999999999: [1, 1, 1]", "mask strategy '0_0_99999999999': heads count"),
        ("0_1000000_0: [1, 1, 1]", "layers count from 0, to 999,999"),
        ("1000000_0_0: [1, 1, 1]", "steps count from 0, to 999,999"),
        ('{"' + "9" * 5000 + '_0_0": [1, 1, 1]}', "steps count from 0"),
        ("patterns: {0_1000000: {kernel_size: 3}}", "'0_1000000': layers count from 0, to 999,999"),
        ('{"patterns": {"' + "9" * 5000 + '_0": {"kernel_size": 3}}}', "steps count from 0"),
        ("{00_0_0: [1, 1, 1]}", "mask strategy '00_0_0': expected step_layer_head"),
        ("[{window_size: abc}]", "natten_parameters of layer 0: window_size is 'abc'"),
        ("[{window_size: [a, b, c]}]", "window_size is ['a', 'b', 'c']; it must be ints"),
        ("[{window_size: {a: 1}}]", "window_size is {'a': 1}; it must be ints"),
        ("[{window_size: [3, 3], 7: 1, a: 1}]", "have an unknown field '7'"),
        ("[{window_size: [3, 3], base_size: abc}]", "natten_parameters of layer 0: base_size is 'abc'"),
        ("patterns: {kernel_size: 3, base_size: [a, b, c]}", "base_size is ['a', 'b', 'c']; it must be positive ints"),
        ("patterns: {kernel_size: 3, base_size: {a: 1}}", "base_size is {'a': 1}"),
        ("patterns: {kernel_size: 3, base_size: true}", "base_size is True"),
        ("patterns: {kernel_size: 3, base_size: .nan}", "base_size is '.nan'"),
        ('{"patterns": {"kernel_size": 3, "base_size": NaN}}', "base_size is nan"),
        ("patterns: {kernel_size: 3, base_size: 0}", "base_size is 0"),
        ("patterns: {kernel_size: 3, skip_single: nope}", "skip_single is 'nope'; it must be true or false"),
        ("patterns: {kernel_size: 3, in_tiles: 1}", "in_tiles is 1; it must be true or false"),
        ("patterns: {kernel_size: 3, edge: {a: 1}}", "edge is {'a': 1}; it must be of shift, cut, wrap"),
        ("patterns: {kernel_size: 3, sink: [-1]}", "sink is [-1]; it must be ints, at least 0"),
        ("patterns: {kernel_size: 3, is_causal: 2}", "is_causal is 2; it must be bools"),
        ("patterns: {kernel_size: 1073741824}", "kernel_size is 1073741824; it must be positive ints"),
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
        ({"layers": 0}, "layers is 0"),
        ({"layers": "3"}, "layers is '3'"),
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
