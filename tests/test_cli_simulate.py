"""`gnaforge simulate`, as a user calls it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import gnaforge.build_tools
import pytest

HUNYUAN = ("--tokens", "30,48,80", "--window", "18,24,24")


def answer(cli, *arguments: str) -> dict | list:
    done = cli("simulate", *arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_published_numbers(cli) -> None:
    tiles = ("--q-tile", "4,8,8", "--kv-tile", "2,8,8")
    done = cli("simulate", *HUNYUAN, "--stride", "16,8,8", *tiles, "--end-to-end", "0.607")
    assert done.returncode == 0, done.stderr
    for line in (
        "30x48x80 tokens, window 18x24x24, stride 16x8x8; 1 head of 128, bf16",
        "FLOP bound    11.11x",
        "work bound    10.42x",
        "paper bound   11.11x",
        "block-sparse  perfectly: no tile needs a mask",
        "2.23x by the paper's (attention is 60.7% of the time)",
        "The model is no measurement.",
    ):
        assert line in done.stdout
    row = answer(cli, *HUNYUAN, *tiles, "--tiling", "static", "--end-to-end", "0.607", "--dense-steps", "15/50")
    assert round(row["paper_bound"], 1) == 3.3 and not row["perfectly_block_sparse"]
    assert round(row["end_to_end"]["paper_bound"], 2) == 1.42


def test_json_is_what_python_gives(cli) -> None:
    options = ("--heads", "8", "--kv-heads", "2", "--batch", "3", "--head-dim", "64", "--dtype", "fp16")
    row = answer(cli, "--tokens", "40x50", "--window", "9", "--dilation", "2,1", "--causal", "1,0", *options)
    found = gnaforge.simulate(
        (40, 50), 9, dilation=(2, 1), causal=(True, False), heads=8, kv_heads=2, batch=3, head_dim=64, dtype="fp16"
    )
    del row["natten"]
    assert row == json.loads(json.dumps(found.as_json()))
    assert row["tiles"]["fitted"] and row["arch"] == "sm90"


def test_objectives_and_archs(cli) -> None:
    bounds = [answer(cli, *HUNYUAN, "--objective", objective)["work_bound"] for objective in ("work", "time")]
    assert bounds[0] > bounds[1]
    assert answer(cli, *HUNYUAN, "--arch", "cpu")["model"]["device"].endswith("AVX-512")


def test_preset(cli) -> None:
    rows = answer(cli, "--preset", "cosmos", "--arch", "sm100")
    assert [row["stride"] for row in rows] == [[1, 1, 1], [1, 8, 16], [1, 8, 16]]
    assert {row["arch"] for row in rows} == {"sm100"} and {row["heads"] for row in rows} == {32}
    table = cli("simulate", "--preset", "hunyuan-video").stdout
    assert "30x48x80 w18x24x24 s16x8x8" in table and "no measurement" in table


def test_sweep(cli) -> None:
    tiles = ("--q-tile", "4,8,8", "--kv-tile", "2,8,8", "--tiling", "static")
    done = cli("simulate", *HUNYUAN, *tiles, "--sweep-stride")
    assert done.returncode == 0, done.stderr
    marked = [line for line in done.stdout.splitlines() if line.startswith("* ")]
    assert len(marked) == 1 and marked[0].startswith("* 16x8x8 ")
    rows = answer(cli, *HUNYUAN, *tiles, "--sweep-stride")
    by_stride = {tuple(row["stride"]): round(row["paper_bound"], 2) for row in rows}
    assert by_stride[1, 1, 1] == 3.27 and by_stride[2, 8, 8] == 10.0 and by_stride[16, 8, 8] == 11.11
    rows = answer(cli, "--preset", "flux-4k", "--sweep-stride")  # shapes that differ in their stride only are one
    assert [row["stride"] for row in rows if "extra_tokens" not in row].count([1, 1]) == 1
    assert [row["stride"] for row in rows if "extra_tokens" in row].count([1, 1]) == 1
    none = cli("simulate", "--tokens", "64", "--window", "7", "--q-tile", "8", "--kv-tile", "16", "--sweep-stride")
    assert "No stride makes this perfectly block-sparse with these tiles." in none.stdout


@pytest.mark.parametrize("extra", [(), ("--sweep-stride",)], ids=["tiles", "sweep"])
def test_plot(cli, tmp_path: Path, extra: tuple[str, ...]) -> None:
    done = cli("simulate", "--tokens", "56,56", "--window", "7", "--plot", "picture.png", *extra)
    assert done.returncode == 0, done.stderr
    png = (tmp_path / "picture.png").read_bytes()
    assert png.startswith(b"\x89PNG") and len(png) > 10_000
    assert done.stderr == "wrote picture.png\n"
    assert cli("simulate", "--tokens", "56,56", "--window", "7", "--plot", "p.png", "--json").stderr == "wrote p.png\n"


@pytest.mark.parametrize("causal", ["0", "1"])
def test_no_row_of_a_sweep_contradicts_what_is_said_below(cli, causal: str) -> None:
    for problem in (HUNYUAN, ("--tokens", "256,256", "--window", "80"), ("--tokens", "64", "--window", "64")):
        rows = answer(cli, *problem, "--causal", causal, "--sweep-stride")
        text = cli("simulate", *problem, "--causal", causal, "--sweep-stride").stdout
        said = re.search(r"No work bound exceeds the FLOP bound of (?:its stride, ([\d.]+)x to )?([\d.]+)x\.", text)
        assert said is not None
        low, high = (float(number) for number in (said[1] or said[2], said[2]))
        bounds = [row["flop_speedup"] for row in rows]
        assert (low, high) == (round(min(bounds), 2), round(max(bounds), 2))
        assert all(row["work_bound"] <= row["flop_speedup"] * (1 + 1e-9) for row in rows)
        above = any(row["model"]["speedup"] > row["flop_speedup"] for row in rows)
        assert above == ("The model may pass the bounds" in text)


def test_needs_no_torch(python) -> None:
    done = python(
        "import gnaforge, sys; gnaforge.simulate((8, 8), 3); gnaforge.fit({'tokens': (8,), 'window': 3});"
        "assert 'torch' not in sys.modules"
    )
    assert done.returncode == 0, done.stderr


def test_long_dimensions(cli) -> None:
    row = answer(
        cli, "--tokens", "1048576,1048576,1048576", "--window", "4096", "--q-tile", "4,4,4", "--kv-tile", "4,4,4"
    )
    assert row["q_tiles"] == 2**54 and row["visited_tiles"] > 2**63


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give either --preset, or --tokens and --window"),
        (("--tokens", "8"), "give either --preset, or --tokens and --window"),
        (("--preset", "cosmos", "--tokens", "8", "--window", "3"), "--tokens, --window: has no effect"),
        (("--preset", "cosmo"), "did you mean 'cosmos'?"),
        (("--preset", "no-shapes.yaml"), "no-shapes.yaml lists no shapes to simulate"),
        (("--preset", "cosmos", "--plot", "x.png"), "--plot draws one problem, cosmos has 3"),
        (("--tokens", "8,8", "--window", "3,3,3"), "window: (3, 3, 3) has 3 entries for 2 dimensions"),
        (("--tokens", "8,x,8", "--window", "3"), "--tokens: '8,x,8' is no list of whole numbers"),
        (("--tokens", "8", "--window", "9"), "--window: 9 is more than the 8 tokens of dimension 0; at most 8"),
        (
            ("--tokens", "8", "--window", "3", "--stride", "4"),
            "--stride: 4 is more than the window of dimension 0; at most 3",
        ),
        (("--tokens", "0", "--window", "3"), "tokens: 0 is not a positive integer"),
        (("--tokens", "2000000000", "--window", "3"), "tokens: 2000000000 is more than 1073741823"),
        (("--tokens", "8", "--window", "3", "--causal", "2"), "--causal: '2' is not 0, 1 (or token) or block"),
        (("--tokens", "8", "--window", "3", "--q-tile", "4"), "give both --q-tile and --kv-tile"),
        (("--tokens", "8", "--window", "3", "--q-tile-heads", "2"), "--q-tile-heads: has no effect without --q-tile"),
        (
            (
                "--tokens",
                "8",
                "--window",
                "3",
                "--q-tile",
                "4",
                "--kv-tile",
                "16",
                "--q-tile-heads",
                "2",
                "--heads",
                "3",
            ),
            "q_tile_heads: no query heads share keys; tiles of gna_forward-sm100-r1-bf16-d128-q4h2-kv16 have 2",
        ),
        (("--tokens", "8,8", "--window", "3", "--q-tile", "4", "--kv-tile", "4,4"), "rank 2 needs 2"),
        (("--tokens", "8,8", "--window", "3", "--q-tile", "99,99", "--kv-tile", "4,4"), "sm100 takes at most 256"),
        (("--tokens", "8", "--window", "3", "--tiling", "grid"), "tiling: 'grid' is not dynamic, static or flat"),
        (
            ("--tokens", "8,8", "--window", "3", "--tiling", "flat", "--sweep-stride"),
            "flat tiles can only be simulated",
        ),
        (("--tokens", "8,8", "--window", "3", "--tiling", "flat", "--plot", "x.png"), "flat tiles are not boxes"),
        (("--tokens", "8", "--window", "3", "--arch", "sm80"), "arch: 'sm80' is unknown"),
        (("--tokens", "8", "--window", "3", "--objective", "x"), "objective: 'x' is not time or work"),
        (("--tokens", "8", "--window", "3", "--head-dim", "70"), "head_dim: 70 must be a multiple of 8"),
        (("--tokens", "8", "--window", "3", "--heads", "0"), "heads: 0 is not a positive integer"),
        (("--tokens", "8", "--window", "3", "--end-to-end", "1.5"), "end-to-end: 1.5 is no share"),
        (
            ("--tokens", "8", "--window", "3", "--end-to-end", ".5", "--dense-steps", "9"),
            "--dense-steps: '9' is not K/N",
        ),
        (("--tokens", "8", "--window", "3", "--end-to-end", ".5", "--dense-steps", "9/8"), "dense-steps: 9/8"),
        (("--tokens", "8", "--window", "3", "--dense-steps", "1/2"), "--dense-steps: has no effect"),
        (("--tokens", "8", "--window", "3", "--stride", "2", "--sweep-stride"), "--stride: has no effect"),
        (("--preset", "cosmos", "--stride", "2", "--causal", "1"), "--stride, --causal: has no effect"),
        (("--tokens", "8", "--window", "3", "--plot", "x.pdf"), "--plot x.pdf: give the name of a .png or .svg file"),
        (("--tokens", "8", "--window", "3", "--plot", "none/x.png"), "none: No such file or directory"),
        (("--tokens", "8", "--window", "3", "--plot", "/proc/x.png"), "can't write to /proc"),
        (("--preset", "vit-56", "--window", "7"), "--window: has no effect beside --preset"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_input(cli, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    spec = "spec_version: 1\nlibrary: x\narch: cpu\nkernels:\n"
    (tmp_path / "no-shapes.yaml").write_text(
        spec + "  - {rank: 1, head_dim: 8, dtype: fp32, tiles: [{q: [8], kv: [8]}]}\n"
    )
    done = cli("simulate", *arguments)
    assert done.returncode == 2
    assert message in done.stderr and done.stderr.count("\n") == 1
    assert not done.stdout and [path.name for path in tmp_path.iterdir()] == ["no-shapes.yaml"]


def spec_of_shapes(folder: Path, shapes: list[str]) -> None:
    listed = "".join(f"      - {shape}\n" for shape in shapes)
    (folder / "many.yaml").write_text(
        "spec_version: 1\nlibrary: many\narch: cpu\nkernels:\n"
        "  - rank: 3\n    head_dim: any\n    dtype: bf16\n    tiles: [{q: [4, 4, 4], kv: [4, 4, 4]}]\n"
        f"    shapes:\n{listed}"
    )


@pytest.mark.parametrize(
    ("count", "options", "message"),
    [
        (3000, (), "tiles would be fitted to 3,000 problems"),
        (3000, ("--q-tile", "4,4,4", "--kv-tile", "4,4,4"), "there are 3,000 problems"),
        (41, ("--objective", "work"), "tiles would be fitted to 41 problems"),
        (12, ("--sweep-stride",), "--sweep-stride would look at "),
    ],
)
def test_a_spec_of_many_shapes_is_refused_at_once(
    cli, tmp_path: Path, count: int, options: tuple[str, ...], message: str
) -> None:
    spec_of_shapes(tmp_path, [f"{{tokens: [30, 48, {80 + i}], window: [18, 24, 24]}}" for i in range(count)])
    done = cli("simulate", "--preset", "many.yaml", *options)
    assert done.returncode == 2 and message in done.stderr
    assert "of one spec at most 40 problems are simulated, 1,000 with --q-tile" in done.stderr


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("verify", "many.yaml"), "many.yaml lists 101 different shapes, and of one spec at most 100 are verified"),
        (
            ("verify", "gna_forward-cpu-r3-bf16-dany-q4x4x4-kv4x4x4", "--preset", "many.yaml"),
            "many.yaml lists 101 different shapes, and of one spec at most 100 are verified",
        ),
        (
            ("bench", "--arch", "cpu", "--preset", "many.yaml"),
            "many.yaml lists 101 different problems, and of one spec at most 100 are timed",
        ),
    ],
    ids=["verify a spec", "verify", "bench"],
)
def test_other_commands_have_bounds_as_well(cli, tmp_path: Path, command: tuple[str, ...], message: str) -> None:
    """Of shapes that differ; nothing is compiled before."""
    shapes = [f"{{tokens: [30, 48, {80 + i}], window: [18, 24, 24]}}" for i in range(101)]
    spec_of_shapes(tmp_path, shapes * 3)
    done = cli(*command)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {message}: divide it"), done.stderr
    assert done.stderr.count("\n") == 1


def test_equal_shapes_are_simulated_once(cli, tmp_path: Path) -> None:
    spec_of_shapes(tmp_path, ["{tokens: [30, 48, 80], window: [18, 24, 24]}"] * 600)
    rows = answer(cli, "--preset", "many.yaml", "--arch", "sm90")
    assert len(rows) == 600 and all(row == rows[0] for row in rows)
    sweep = answer(cli, "--preset", "many.yaml", "--arch", "sm90", "--sweep-stride")
    assert [row["stride"] for row in sweep].count([1, 1, 1]) == 1


def test_the_limits_of_simulate_are_those_that_are_documented() -> None:
    from gnaforge.cli.simulate import _FEWER, MAX_SIMULATED, MAX_STRIDES
    from gnaforge.plan import MAX_FITTED

    text = (Path(gnaforge.build_tools.__file__).parent / "README.md").read_text()
    assert f"`simulate --preset` takes: {MAX_FITTED} problems, {MAX_SIMULATED:,} with tiles given" in text
    assert f"{MAX_STRIDES:,} strides of a sweep" in text and f"at most {MAX_FITTED} problems" in _FEWER
