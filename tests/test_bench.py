"""Reports of `gnaforge bench`, and what is fitted to them. Times themselves are nobody's matter here."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "gpu"))

import oracle
import prepare
import pytest
import torch
from gnaforge.bench.run import config_of, explain_missing
from gnaforge.errors import InputError
from gnaforge.families import TARGETS, faults_of
from gnaforge.gna.axes import axes_of
from gnaforge.gna.counts import count_problem, count_tiles, seen_pairs
from gnaforge.runtime import bench
from gnaforge.runtime.bench import computed_pairs
from gnaforge.runtime.bench_contenders import CONTENDERS, Unavailable, flex_mask, heads_first
from gnaforge.runtime.config import KernelConfig
from gnaforge.runtime.core import load_library
from gnaforge.runtime.family import facts_of
from gnaforge.runtime.op_table import FORWARD
from gnaforge.runtime.problem import FEATURES, Problem
from gnaforge.runtime.reference import ExtraKeys, attention, mask_rows, visible_pairs
from gnaforge.simulator.calibration import calibrate_report
from gnaforge.simulator.cost import Tiles, tile_costs
from gnaforge.simulator.simulation import simulate_tiles
from gnaforge.simulator.time import model_time
from gnaforge.verification.problems import with_settings
from kernel_set import FAMILIES, SMALL
from torch.nn.attention.flex_attention import create_block_mask

CONFIG = "gna_forward-cpu-r1-fp32-dany-q8-kv8"
SM90 = FAMILIES["sm90"]
CONFIGS = {
    1: ("r1-bf16-d128-q128-kv128", "r1-bf16-d64-q64-kv112"),
    2: ("r2-bf16-d128-q8x16-kv8x16", "r2-bf16-d64-q7x9-kv4x8"),
    3: ("r3-bf16-d128-q2x8x8-kv2x8x8", "r3-bf16-d72-q3x5x4-kv2x4x8"),
}


@pytest.mark.parametrize("arch", list(TARGETS))
def test_the_bound_of_a_report_is_the_simulators(arch: str) -> None:
    rng = Random(1)
    for seed in range(60):
        problem = oracle.random_problem(rng, rank=seed % 3 + 1, max_tokens=400)
        key = CONFIGS[len(problem.tokens)][seed % 2]
        config = KernelConfig.parse(f"gna_forward-{arch}-{key}")
        config = replace(config, variant=FAMILIES[arch].variant)
        problem = replace(problem, head_dim=config.head_dim, value_head_dim=config.head_dim)
        found = simulate_tiles(problem, Tiles(config.q_tile, config.kv_tile), FAMILIES[arch])
        pairs = problem.token_count**2
        assert pairs / computed_pairs(problem, config) == pytest.approx(found.work_bound)
        assert pairs / visible_pairs(problem) == pytest.approx(found.flop_speedup)


def test_computed_pairs_of_tiles_of_several_heads() -> None:
    config = KernelConfig.parse("gna_forward-sm100-r2-bf16-d64-q4x5h6-kv4x8")
    problem = oracle.Problem((20, 21), (9, 7), heads=6, kv_heads=1, head_dim=64, value_head_dim=64)
    found = simulate_tiles(problem, Tiles(config.q_tile, config.kv_tile, config.q_tile_heads), FAMILIES["sm100"])
    assert problem.token_count**2 / computed_pairs(problem, config) == pytest.approx(found.work_bound, rel=1e-3)


def test_computed_pairs_of_every_setting() -> None:
    """Beside the simulator's counts, which are held to the kernels' own."""
    rng = Random(2)
    for seed in range(300):
        rank = seed % 3 + 1
        problem = with_settings(oracle.random_problem(rng, rank=rank), rng, 400, FEATURES)
        config = KernelConfig.parse(f"gna_forward-{('cpu', 'sm90')[seed % 2]}-{CONFIGS[rank][seed % 2]}")
        padding = facts_of(config).padding
        counts = count_problem(problem, config.q_tile, config.kv_tile)
        rows = padding.padded_rows(config.q_rows)
        columns = counts.seen if padding.clips else counts.visited * padding.padded_columns(config.kv_columns)
        assert computed_pairs(problem, config) == columns * rows, problem
        assert visible_pairs(problem) == seen_pairs(problem)
        assert problem.dense().features() == tuple(f for f in problem.features() if f in ("range", "extra_keys")) or (
            problem.dense().kv_tokens is None
        )
        assert visible_pairs(problem.dense()) == problem.pair_count


SETTINGS = {
    "edges": Problem((10, 12), 5, edge=("cut", "wrap"), heads=2, head_dim=16, dtype="fp32"),
    "frames": Problem((8, 9), (4, 3), (2, 1), causal=("block", False), sink=(3, 0), head_dim=16, dtype="fp32"),
    "a part": Problem((4, 6), 5, grid=(20, 20), q_offset=(9, 12), kv_tokens=(10, 20), kv_offset=(5, 5), head_dim=16,
                      edge=("shift", "wrap"), dtype="fp32"),
    "text": Problem((9, 8), 3, dilation=(2, 1), heads=4, kv_heads=2, head_dim=16, dtype="fp32", extra_tokens=(13, 5)),
    "text and edges": Problem(40, 9, edge="cut", head_dim=16, dtype="fp32", extra_tokens=(7,)),
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_contenders_compute_the_problem(name: str) -> None:
    """What they are timed on, with the same mask."""
    problem = SETTINGS[name]
    tensors = bench._inputs(problem, "cpu")
    q, k, v, *extra = tensors
    pieces = [ExtraKeys(*extra[i : i + 2]) for i in range(0, len(extra), 2)]
    exact, _ = attention(problem, q, k, v, *pieces)
    out = CONTENDERS["sdpa"](problem, None, heads_first(tensors))(heads_first(tensors))
    assert out.shape == q.shape and float((out - exact).abs().max()) < 1e-5
    # Compiling FlexAttention takes a minute; what it is given says whether it computes the same.
    count, keys = problem.token_count, problem.pair_count // problem.token_count
    query, key = torch.arange(count)[:, None].expand(count, keys), torch.arange(keys).expand(count, keys)
    mask = flex_mask(problem, torch.device("cpu"))(0, 0, query, key)
    assert torch.equal(mask[:, : keys - sum(problem.extra_tokens)], mask_rows(problem, 0, count))
    assert mask[:, keys - sum(problem.extra_tokens) :].all()
    assert create_block_mask(flex_mask(problem, torch.device("cpu")), None, None, count, keys, device="cpu")
    query, key = torch.arange(count)[:, None].expand(count, keys + 9), torch.arange(keys + 9).expand(count, keys + 9)
    longer = flex_mask(problem, torch.device("cpu"), 9)(0, 0, query, key)
    assert torch.equal(longer[:, :keys], mask) and not longer[:, keys:].any()
    with pytest.raises(Unavailable, match=r"natten can't be imported|kernels don't have (edge|block|extra|range)"):
        CONTENDERS["natten"](problem, None, tensors)


TIMED = (
    Problem(90, 21, edge="cut", heads=2, head_dim=16, dtype="fp32"),
    Problem(90, 24, 4, causal="block", sink=9, head_dim=16, dtype="fp32"),
    Problem(30, 21, grid=90, q_offset=55, kv_tokens=60, kv_offset=40, edge="wrap", head_dim=16, dtype="fp32"),
)


@pytest.mark.parametrize("problem", TIMED, ids=lambda problem: "+".join(problem.features()))
def test_every_setting_is_timed(problem: Problem, small_kernel: Path) -> None:
    load_library(small_kernel)
    row = bench.measure(problem, ("gnaforge", "sdpa"), 0.1, SMALL.key, "cpu")
    timed = {timing["contender"]: timing for timing in row["timings"]}
    assert timed.keys() == {"gnaforge", "sdpa"} and row["error_units"] < 50 and row["notes"] == {}
    assert timed["sdpa"]["difference"] < 1e-5
    assert 0 < row["work_bound"] <= row["flop_bound"] == problem.pair_count / visible_pairs(problem)
    assert Problem.from_json(row["problem"]) == problem


def scores(tokens: Sequence[int], pattern: Sequence[Any], config: KernelConfig) -> int:
    """Elements of Q K^T that an sm90 kernel computes, padding included, by the oracle's tiles."""
    problem = Problem(tokens, *pattern)
    _, visited, _ = oracle.count_tiles(problem, config.q_tile, config.kv_tile)
    return visited * -(-config.q_rows // 64) * 64 * config.kv_columns


@pytest.mark.parametrize("stride", [(1, 1, 1), (16, 8, 8)])
def test_all_that_the_work_bound_promises(stride: tuple[int, ...]) -> None:
    """Where time is that of the computed scores, padding included, a kernel reaches its bound: not more, not less."""
    config = KernelConfig.parse("gna_forward-sm90-r3-bf16-d128-q2x8x8-kv2x8x8")
    tokens, one, no = (15, 20, 21), (1,) * 3, (False,) * 3
    window = (16, 8, 8) if stride[0] > 1 else (5, 9, 6)
    window, stride = tuple(map(min, window, tokens)), tuple(map(min, stride, tokens))
    dense = scores(tokens, (tokens, one, one, no), config)
    assert dense > 1.2 * prod(tokens) ** 2
    problem = Problem(tokens, window, stride)
    found = bench.share_of_work_bound(
        problem, config, scores(tokens, (window, stride, one, no), config) / 1e9, dense / 1e9
    )
    assert found == pytest.approx(1)


def test_problems_that_pin_their_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As the hardware suite's do: each dense kernel has a row of its own, though all compute the same problem."""
    given = prepare._problems()
    assert Counter(row["kernel"] for row in given if row.get("tokens") == [16384]) == Counter(prepare.DENSE_KERNELS)
    measured = []

    def measure(
        problem: Any, contenders: Any, budget_seconds: float, kernel: str | None, device: str, direction: str
    ) -> dict[str, Any]:
        measured.append((problem.head_dim, kernel))
        return {"problem": {}, "kernel": None}

    monkeypatch.setattr(bench, "measure", measure)
    monkeypatch.setattr(bench, "machine", lambda device: {})
    monkeypatch.setattr(bench, "registry", {})
    (tmp_path / "problems.json").write_text(json.dumps(given))
    options = [f"--problems={tmp_path / 'problems.json'}", f"--report={tmp_path / 'report.json'}", "--device=cpu"]
    bench.main([*options, "--kernel=default"])
    assert measured == [(row["head_dim"], row.get("kernel", "default")) for row in given]
    assert all(f"-d{head_dim}-" in kernel for head_dim, kernel in measured if kernel != "default")


def test_a_gpu_that_is_lost_between_problems(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What was measured is in the file, and why there is no more."""
    path = tmp_path / "report.json"
    seen = []

    def synchronize() -> None:
        seen.append(json.loads(path.read_text())["problems"])
        if len(seen) == 2:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(bench, "machine", lambda device: {})
    monkeypatch.setattr(bench, "overhead", lambda *arguments: pytest.fail("the GPU is lost"))
    monkeypatch.setattr(bench, "measure", lambda problem, *arguments: {"problem": problem.as_json(), "kernel": CONFIG})
    monkeypatch.setattr(bench, "registry", {})
    problems = [Problem((8,), (3,))] * 3
    bench.report(problems, ["gnaforge"], 9, [None] * 3, "cuda", path)
    found = json.loads(path.read_text())
    assert [len(rows) for rows in seen] == [1, 2]
    assert "fault" not in found["problems"][0] and "illegal memory access" in found["problems"][1]["fault"]
    assert len(found["problems"]) == 2 and not found["complete"]
    (line,) = explain_missing(found)
    assert line.startswith("failed: 8, window 3: the GPU can't be used any more: CUDA error")


def test_a_gpu_that_is_lost_at_the_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def overhead(*arguments: Any) -> dict[str, float]:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(bench, "overhead", overhead)
    monkeypatch.setattr(bench, "machine", lambda device: {})
    monkeypatch.setattr(bench, "measure", lambda *arguments: {"kernel": CONFIG})
    monkeypatch.setattr(bench, "registry", {})
    bench.report([Problem((8,), (3,))], ["gnaforge"], 9, [None], "cpu", tmp_path / "report.json")
    found = json.loads((tmp_path / "report.json").read_text())
    assert "illegal memory access" in found["overhead_error"] and found["problems"] == [{"kernel": CONFIG}]


def test_flex_attention_is_compiled_for_each_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many there were before: dynamo gives up on functions that it has compiled a few times."""
    from torch._dynamo import config
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    with config.patch(recompile_limit=1), torch.no_grad():
        for number, length in enumerate((256, 120), 1):
            problem = Problem((length,), (9,), head_dim=16, dtype="fp32")
            inputs = FORWARD.random_inputs(problem).values()
            tensors = heads_first(tuple(inputs))
            found = CONTENDERS["flex"](problem, None, tensors)(tensors)
            assert counter.frame_count == number
    exact, _ = attention(problem, *inputs)
    assert float((found - exact).abs().max()) < 1e-4
    torch.compiler.reset()


@pytest.mark.parametrize("arch", list(TARGETS))
def test_the_kernel_that_is_timed_can_be_built(arch: str) -> None:
    for tokens, window, head_dim in (((4096,), (100,), 64), ((64, 64), (9, 9), 128), ((30, 48, 80), (18, 24, 24), 128)):
        assert faults_of(config_of(Problem(tokens, window, head_dim=head_dim), arch)) == []


PROBLEMS = (
    ((16384,), (16384,), (1,)),
    ((16384,), (2048,), (1,)),
    ((16384,), (2048,), (256,)),
    ((128, 128), (40, 40), (1, 1)),
    ((128, 128), (40, 40), (8, 8)),
    ((96, 96), (13, 13), (1, 1)),
    ((30, 48, 80), (18, 24, 24), (1, 1, 1)),
    ((30, 48, 80), (18, 24, 24), (16, 8, 8)),
)


def synthetic(machine: Any, noise: float) -> dict[str, Any]:
    """The report that a GPU would give whose times are the model's, each off by up to ``noise``."""
    rng = Random(0)
    rows = []
    for tokens, window, stride in PROBLEMS:
        for key in CONFIGS[len(tokens)]:
            config = KernelConfig.parse(f"gna_forward-sm90-{key}")
            problem = Problem(tokens, window, stride, heads=24, kv_heads=24, head_dim=config.head_dim)
            problem = problem
            cost = tile_costs(
                SM90.padding,
                Tiles(config.q_tile, config.kv_tile),
                count_tiles(axes_of(problem), config.q_tile, config.kv_tile),
            )
            seconds = float(model_time(machine, SM90.padding, problem, FORWARD, cost).seconds) * rng.uniform(
                1 - noise, 1 + noise
            )
            timing = {"contender": "gnaforge", "seconds": seconds}
            rows.append(
                {"problem": problem.as_json(), "kernel": config.key, "timings": [timing, {"contender": "flex"}]}
            )
    return json.loads(json.dumps({"machine": {"processors": machine.units}, "problems": rows}))


def test_constants_are_found_again_in_times_that_the_model_gives() -> None:
    truth = replace(
        SM90.time_constants(), units=120, flop_per_cycle=3600.0, score_cycles=0.08, tile_cycles=200.0, mask_cycles=0.03,
        mask_tile_cycles=400.0, q_tile_cycles=3000.0, load_bytes_per_cycle=1e9, code={},
    )  # fmt: skip
    exact = calibrate_report(synthetic(truth, 0), SM90)
    assert exact.runs == 16 and exact.largest_error < 1e-3
    assert all(value == pytest.approx(getattr(truth, name), rel=0.01) for name, value in exact.constants.items())
    noisy = calibrate_report(synthetic(truth, 0.03), SM90)
    assert 0.005 < noisy.rms_error < 0.03
    assert noisy.constants["flop_per_cycle"] == pytest.approx(3600, rel=0.1)


def test_too_few_runs() -> None:
    found = synthetic(SM90.time_constants(), 0)
    found["problems"] = found["problems"][:4]
    with pytest.raises(InputError, match="the report holds 4 runs of sm90 kernels; 6 constants"):
        calibrate_report(found, SM90)
    with pytest.raises(InputError, match="0 runs of sm100 kernels"):
        calibrate_report(found, FAMILIES["sm100"])


def test_a_report_says_all_by_itself(cli: Callable[..., Any], tmp_path: Path) -> None:
    problem = ["--tokens", "12,10", "--window", "5,3", "--head-dim", "16", "--dtype", "fp32", "--seconds", "0.1"]
    done = cli("bench", *problem, "--against", "gnaforge dense,natten", "--report", "report.json")
    assert done.returncode == 0, done.stderr
    assert "not timed: natten" in done.stderr and "wrote report.json\n" in done.stderr
    found = json.loads((tmp_path / "report.json").read_text())
    (row,) = found["problems"]
    assert found["complete"] and found["machine"]["torch"] and found["overhead_us"]["call"] > 0
    assert row["kernel"] == "gna_forward-cpu-r2-fp32-dany-q8x8-kv8x8"
    assert 0 < row["error_units"] < 20 and row["flop_bound"] == 8
    assert [timing["contender"] for timing in row["timings"]] == ["gnaforge", "gnaforge dense"]
    again = cli("bench", "--from", "report.json", "--json", "--plot", "bars.png")
    assert [each["contender"] for each in json.loads(again.stdout)] == ["gnaforge", "gnaforge dense"]
    assert (tmp_path / "bars.png").stat().st_size > 1000 and again.stderr.endswith("wrote bars.png\n")


def test_a_report_with_holes_shows_the_rest_and_says_what_is_missing(cli: Callable[..., Any], tmp_path: Path) -> None:
    assert cli("bench", *ONE, "--seconds", "0.01", "--against", "", "--report", "good.json").returncode == 0
    good = json.loads((tmp_path / "good.json").read_text())
    assert good["machine"]["matmul_gflops"] > 0
    (row,) = good["problems"]
    failed = {"problem": row["problem"], "error": "OutOfMemoryError: 3 GiB"}
    for problems, complete, code, said in (
        ([row, failed], True, 1, "failed: 8, window 3: OutOfMemoryError: 3 GiB"),
        ([row], False, 0, "incomplete: time ran out after 1 problem; raise --seconds"),
    ):
        (tmp_path / "holes.json").write_text(json.dumps({**good, "problems": problems, "complete": complete}))
        done = cli("bench", "--from", "holes.json")
        assert done.returncode == code and said in done.stderr and "8, window 3" in done.stdout
    (tmp_path / "holes.json").write_text(json.dumps({**good, "problems": [failed], "complete": True}))
    done = cli("bench", "--from", "holes.json", "--plot", "none.png")
    assert done.returncode == 1 and "none.png was not written: no problem was timed" in done.stderr
    assert not (tmp_path / "none.png").exists()
    for problems, said in (([], "holds no problem that was measured"), ([{"problem": 1}], "is no report of")):
        (tmp_path / "holes.json").write_text(json.dumps({**good, "problems": problems}))
        done = cli("bench", "--from", "holes.json")
        assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


ONE = ("--tokens", "8", "--window", "3")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--calibrate", "--arch", "sm90"], "needs --from FILE"),
        (["--from", "absent.json"], "can't read absent.json: No such file"),
        ([*ONE, "--report", "no/where.json"], "/no: No such file or directory"),
        ([*ONE, "--report", "."], "--report . is a folder"),
        ([*ONE, "--plot", "/proc/x.png"], "can't write to /proc"),
        ([*ONE, "--seconds", "0"], "--seconds 0.0: give a number above 0"),
        ([*ONE, "--batch", "0"], "--batch: 0 is not a positive integer"),
        ([*ONE, "--heads", "-1"], "--heads: -1 is not a positive integer"),
        ([*ONE, "--kernel", "nosuch"], "is no kernel key"),
        ([*ONE, "--kernel", "gna_forward-sm90-r1-bf16-d64-q128-kv128"], "is for sm90, not for --arch cpu"),
        (["--preset", "vit-56", "--stride", "2", "--heads", "8"], "--stride, --heads: has no effect beside --preset"),
        (["--preset", "vit-56", "--window", "7"], "--window: has no effect beside --preset"),
        (["--tools", "--report", "x.json"], "--report: has no effect beside --tools"),
        (["--overhead", "--tools"], "give one of --overhead, --tools"),
        (["--from", "x.json", "--tokens", "8"], "--tokens: has no effect beside --from"),
        (["--arch", "sm90", "--tokens", "8", "--window", "3"], "torch sees no GPU here"),
        (["--arch", "sm91", "--tokens", "8", "--window", "3"], "'sm91' is unknown"),
    ],
)
def test_bad_input(cli: Callable[..., Any], arguments: list[str], message: str) -> None:
    done = cli("bench", *arguments)
    assert done.returncode != 0 and message in done.stderr and "Traceback" not in done.stderr
