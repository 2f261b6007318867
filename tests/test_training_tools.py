"""Specs, fits, simulations and registrations of the kernels that training takes."""

from __future__ import annotations

import json
import zipfile
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from random import Random

import gnaforge
import numpy as np
import oracle
import pytest
import torch
from gnaforge.build.kernels import find_libraries
from gnaforge.errors import InputError
from gnaforge.families import families, families_of, require_family
from gnaforge.gna.counts import count_problem
from gnaforge.plan import plan
from gnaforge.runtime import bench
from gnaforge.runtime.config import KernelConfig
from gnaforge.runtime.op_table import OPS
from gnaforge.runtime.problem import Problem
from gnaforge.simulator.cost import Tiles
from gnaforge.simulator.fitting import Candidates, fit_problems
from gnaforge.simulator.simulation import simulate_tiles
from gnaforge.spec import parse_spec
from gnaforge.verification.problems import with_settings
from gnaforge.wheel.build import build_wheel

BACKWARD_Q, BACKWARD_KV = (require_family(op, "cpu") for op in ("gna_backward_q", "gna_backward_kv"))
SETTINGS = ("edge", "block_causal", "sink", "range", "extra_keys")


def random_problem(rng: Random, rank: int) -> Problem:
    """Of any kind, with shared heads at times."""
    heads = rng.choice((1, 2, 4))
    plain = Problem((1,) * rank, 1, heads=heads, kv_heads=rng.choice((1, heads)), head_dim=16, dtype="fp32")
    return with_settings(plain, rng, 300, SETTINGS)


def test_work_bounds_are_those_of_a_walk_over_all_tiles() -> None:
    """The cpu kernel of K's and V's gradients computes its lanes' keys with all queries that one of them sees."""
    rng = Random(0)
    for _ in range(100):
        problem = random_problem(rng, rng.randint(1, 2))
        q_tile, kv_tile = (tuple(rng.randint(1, 6) for _ in range(problem.rank)) for _ in range(2))
        ones = (1,) * problem.rank
        plain = replace(problem, extra_tokens=())
        _, seen, _ = oracle.count_key_tiles(plain, ones, kv_tile)
        extra = sum(-(-n // prod(kv_tile)) for n in problem.extra_tokens)
        rows = -(-prod(kv_tile) // 32) * 32
        found = simulate_tiles(problem, Tiles(q_tile, kv_tile), BACKWARD_KV)
        assert found.work_bound == pytest.approx(problem.pair_count / (rows * (seen + extra * problem.token_count)))
        assert found.paper_bound is None
        forward, of_q = (
            simulate_tiles(problem, Tiles(q_tile, kv_tile), family)
            for family in (require_family("gna_forward", "cpu"), BACKWARD_Q)
        )
        assert of_q.counts == forward.counts


def test_fits_agree_with_simulations_of_each_candidate() -> None:
    rng = Random(1)
    for rank in (1, 2, 1, 2):
        problem = random_problem(rng, rank)
        for family in (BACKWARD_Q, BACKWARD_KV):
            candidates = Candidates.of_family(family, [problem])
            some = np.sort(rng.sample(range(len(candidates)), min(40, len(candidates))))
            seconds, work = candidates.subset(some).seconds_and_work(problem, "dynamic")
            for at, index in enumerate(some):
                found = simulate_tiles(problem, candidates.tiles(index), family)
                assert float(found.time.seconds) == pytest.approx(seconds[at])
                assert found.work_bound == pytest.approx(problem.pair_count / work[at])
            every, _ = candidates.seconds_and_work(problem, "dynamic")
            best = fit_problems([problem], family, objective="time").tiles[0]
            assert float(simulate_tiles(problem, best, family).time.seconds) <= every.min() * 1.01
            searched, _ = candidates.search(problem, "dynamic", "time", 0.1)
            near = every <= every.min() * 1.1
            np.testing.assert_allclose(searched[near], every[near])


def test_a_kv_tile_meets_the_queries_of_all_its_heads() -> None:
    """As many scores, in fewer and longer KV tiles."""
    tiles = Tiles((8, 8), (8, 8))
    apart = Problem((32, 32), 9, heads=8, head_dim=64)
    shared = replace(apart, kv_heads=1)
    found, grouped = (simulate_tiles(problem, tiles, BACKWARD_KV) for problem in (apart, shared))
    assert found.counts == grouped.counts
    assert float(grouped.time.waves) == pytest.approx(float(found.time.waves) / 8)
    fixed = BACKWARD_KV.time_constants().q_tile_cycles * 7 * found.counts.q_tiles / BACKWARD_KV.time_constants().units
    assert float(found.time.seconds - grouped.time.seconds) == pytest.approx(fixed * 1e-9, rel=0.05)


def test_each_kernel_is_fitted_for_itself() -> None:
    shape = {"tokens": (96, 96), "window": (27, 27)}
    fits = gnaforge.fit(shape, direction="training", arch="cpu", head_dim=64)
    assert list(fits) == ["gna_forward", "gna_backward_q", "gna_backward_kv"]
    problem = Problem(**shape, head_dim=64)
    for op, found in fits.items():
        assert found == fit_problems([problem], require_family(op, "cpu"))
    backward = gnaforge.fit(shape, direction="backward", head_dim=64)  # of the first GPU that has a model of it
    assert backward == {op: fit_problems([problem], require_family(op, "sm90")) for op in list(fits)[1:]}
    assert gnaforge.fit(shape, arch="cpu", head_dim=64) == fits["gna_forward"]


def test_a_training_step_is_the_sum_of_its_kernels() -> None:
    found = gnaforge.simulate((64, 64), 13, direction="training", arch="cpu", head_dim=32, value_head_dim=64, heads=2)
    kernels = list(found.kernels.values())
    assert found.seconds == sum(float(each.time.seconds) for each in kernels)
    assert found.dense_seconds == sum(each.dense_seconds for each in kernels)
    assert (found.products, found.fused_products) == (9, 7)
    assert found.flop_speedup == kernels[0].flop_speedup > found.work_bound
    flop = [2 * (32 + 64), 2 * (2 * 32 + 64), 2 * (2 * 32 + 2 * 64)]
    computed = sum(a / each.work_bound for a, each in zip(flop, kernels, strict=True))
    assert found.work_bound == pytest.approx(sum(flop) / computed)
    assert [each.op.flop(found.problem) / 2 for each in kernels] == flop
    backward = gnaforge.simulate(
        (64, 64), 13, direction="backward", arch="cpu", head_dim=32, value_head_dim=64, heads=2
    )
    assert (backward.products, backward.fused_products) == (7, 5)
    assert backward.seconds == pytest.approx(sum(float(each.time.seconds) for each in kernels[1:]))


def test_wrong_arguments() -> None:
    with pytest.raises(InputError, match="direction: 'back' is not one of forward, backward, training"):
        gnaforge.simulate((8,), 3, direction="back")
    with pytest.raises(InputError, match="direction: \\['forward'\\] is not one of"):
        gnaforge.simulate((8,), 3, direction=["forward"])
    with pytest.raises(InputError, match="tiling: static tiles are those of other forward kernels"):
        gnaforge.simulate((8,), 3, direction="backward", tiling="static")
    with pytest.raises(InputError, match=r"^arch: sm100 has no backward pass; cpu and sm90 have one$"):
        gnaforge.fit({"tokens": (8,), "window": 3}, direction="backward", arch="sm100")
    with pytest.raises(InputError, match=r"^direction: 'none' is not one of"):
        gnaforge.fit({"tokens": (8,), "window": 3}, direction="none")


def test_a_family_without_a_time_model_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for family in (family for family in families() if family.op != "gna_forward"):
        monkeypatch.setitem(family.__dict__, "time", None)
    with pytest.raises(InputError, match="the kernel family cpu_backward_kv has no time constants, which simulating"):
        gnaforge.fit({"tokens": (8,), "window": 3}, direction="backward", arch="cpu")
    made = plan(parse_spec(spec_text("auto\n    shapes: [{tokens: [64, 64], window: [9, 9]}]"), "f.yaml"))
    boxes = {config.op: (config.q_tile, config.kv_tile) for config in made.configs}
    assert all(boxes[family.op] == family.default_boxes(2) for family in (BACKWARD_Q, BACKWARD_KV))
    assert sum("no time model to fit by" in note for note in made.notes) == 2
    with pytest.raises(InputError, match="direction: no arch has kernels of gna_backward_kv with time constants"):
        gnaforge.fit({"tokens": (8,), "window": 3}, direction="backward")


def test_sm90_is_what_a_training_step_is_simulated_on_and_fitted_for() -> None:
    """Its kernels of large heads compute scores twice in one of the three, which bounds don't count."""
    shape = {"tokens": (30, 48, 80), "window": (18, 24, 24), "heads": 24}
    for head_dim, bound in ((64, 6.9), (128, 7.3), (256, 7.5)):
        passes = gnaforge.simulate(**shape, direction="training", head_dim=head_dim)
        assert [found.arch for found in passes.kernels.values()] == ["sm90"] * 3
        assert passes.work_bound > bound and 0.85 < passes.model_speedup / passes.work_bound < 1.05
        for found in passes.kernels.values():
            assert not found.family.faults(
                KernelConfig(found.op.name, "sm90", 3, "bf16", head_dim, found.tiles.q, found.tiles.kv)
            )
    spec = spec_text("auto\n    shapes: [{tokens: [96, 96], window: [27, 27]}]").decode()
    spec = spec.replace("arch: cpu", "arch: sm90").replace("head_dim: any", "head_dim: 128").replace("fp32", "bf16")
    made = plan(parse_spec(spec.encode(), "f.yaml"))
    fits = gnaforge.fit({"tokens": (96, 96), "window": (27, 27)}, direction="training", arch="sm90")
    assert {config.op: (config.q_tile, config.kv_tile) for config in made.configs} == {
        op: (fit.tiles[0].q, fit.tiles[0].kv) for op, fit in fits.items()
    }
    assert not any("no time model" in note for note in made.notes)


def test_the_table_of_fitted_gradients_is_true() -> None:
    text = (Path(gnaforge.__file__).parent / "simulator" / "README.md").read_text()
    rows = text.partition("| training step |\n")[2].partition("\n\n")[0].splitlines()[1:]
    assert len(rows) == 5
    for row in rows:
        said, q_tiles, q_bound, kv_tiles, kv_bound, bound = (cell.strip() for cell in row.strip("|").split("|"))
        tokens, window, *stride = (
            tuple(map(int, part.removeprefix("stride ").split("x"))) for part in said.split(", ")
        )
        passes = gnaforge.simulate(tokens, window, *stride, direction="training", arch="sm90", heads=24)
        of_q, of_kv = (passes.kernels[f"gna_backward_{side}"] for side in ("q", "kv"))
        boxes = [str(found.tiles).replace("q ", "").replace("kv ", "") for found in (of_q, of_kv)]
        bounds = [f"{found.work_bound:.2f}x" for found in (of_q, of_kv, passes)]
        assert [q_tiles, q_bound, kv_tiles, kv_bound, bound] == [boxes[0], bounds[0], boxes[1], bounds[1], bounds[2]]


# The command line


def run(cli, *arguments: str) -> str:
    done = cli("simulate", *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


PROBLEM = ("--tokens", "64,64", "--window", "13", "--arch", "cpu", "--head-dim", "64")


def test_simulate_prints_each_kernel_and_the_sum(cli, tmp_path: Path) -> None:
    text = run(cli, *PROBLEM, "--direction", "training", "--html", str(tmp_path / "page.html"))
    passes = gnaforge.simulate((64, 64), 13, direction="training", arch="cpu", head_dim=64)
    for name in ("forward", "backward_q", "backward_kv", "together"):
        assert sum(line.startswith(f"{name} ") for line in text.splitlines()) == 1
    assert f"{passes.work_bound:,.2f}x" in text and "9 matrix products a pair" in text and "take 7, and" in text
    assert "backward_kv" in (tmp_path / "page.html").read_text()
    data = json.loads(run(cli, *PROBLEM, "--direction", "backward", "--json"))
    assert [row["op"] for row in data["kernels"]] == ["gna_backward_q", "gna_backward_kv"]
    assert data["seconds"] == sum(row["model"]["seconds"] for row in data["kernels"])
    assert (data["products"], data["fused_products"], data["direction"]) == (7, 5, "backward")


def test_a_table_has_the_kernels_of_every_shape(cli, tmp_path: Path) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_bytes(
        spec_text(
            "auto\n    shapes: [{tokens: [64, 64], window: [9, 9]}, {tokens: [20, 30], window: 7}]".replace(
                "7}", "[7, 7]}"
            )
        )
    )
    text = run(cli, "--preset", str(spec), "--arch", "cpu", "--direction", "backward")
    assert text.count("together") == 2 and text.count("20x30 w7x7") == 3


@pytest.mark.parametrize("option", ["--sweep-stride", "--plot=x.png", "--end-to-end=0.5", "--tiling=static"])
def test_what_is_for_the_forward_pass_alone(cli, option: str) -> None:
    done = cli("simulate", *PROBLEM, "--direction", "backward", option)
    assert done.returncode != 0 and "has no effect beside --direction backward" in done.stderr


# Specs


def spec_text(tiles: str, direction: str = "training") -> bytes:
    return (
        "spec_version: 1\nlibrary: mine\narch: cpu\nkernels:\n"
        f"  - rank: 2\n    head_dim: any\n    dtype: fp32\n    direction: {direction}\n    tiles: {tiles}\n"
    ).encode()


def tiles_of(text: bytes) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    return {config.op: (config.q_tile, config.kv_tile) for config in plan(parse_spec(text, "f.yaml")).configs}


def test_tiles_fit_each_op() -> None:
    shapes = "auto\n    shapes: [{tokens: [96, 96], window: [27, 27]}]"
    found = tiles_of(spec_text(shapes))
    fits = gnaforge.fit(
        {"tokens": (96, 96), "window": (27, 27)}, direction="training", arch="cpu", head_dim=64, dtype="fp32"
    )
    assert found == {op: (fit.tiles[0].q, fit.tiles[0].kv) for op, fit in fits.items()}
    assert tiles_of(spec_text(shapes, "[forward, backward]")) == found


def test_backward_kernels_may_have_boxes_of_their_own() -> None:
    same = ((8, 8), (4, 8))
    assert tiles_of(spec_text("[{q: [8, 8], kv: [4, 8]}]")) == dict.fromkeys(OPS, same)
    own = "[{q: [8, 8], kv: [4, 8], backward_kv: {q: [4, 4], kv: [8, 4]}}]"
    assert tiles_of(spec_text(own)) == {**dict.fromkeys(OPS, same), "gna_backward_kv": ((4, 4), (8, 4))}


def test_what_is_wrong_with_tiles_is_said_where_they_are() -> None:
    def fault(tiles: str, direction: str = "training") -> str:
        with pytest.raises(InputError) as caught:
            parse_spec(spec_text(tiles, direction), "f.yaml")
        return str(caught.value)

    own = "backward_q: {q: [8], kv: [8, 8]}"
    assert "tiles[0].backward_q.q: [8] has 1 entry; rank 2 needs 2" in fault(f"[{{q: [8, 8], kv: [8, 8], {own}}}]")
    own = "backward_q: {q: [8, 8], kv: [8, 8]}"
    assert "backward_q: says something only with direction backward" in fault(
        f"[{{q: [8, 8], kv: [8, 8], {own}}}]", "forward"
    )
    text = fault("[{q: [8, 8], kv: [16, 32]}]")
    assert "tiles[0].kv: holds 512 key tokens; cpu takes at most 256; give the tile backward_kv: {q: [...], kv" in text
    assert "backward_q" not in text
    own = "backward_kv: {q: [8, 8], kv: [16, 32]}"
    text = fault(f"[{{q: [8, 8], kv: [8, 8], {own}}}]")
    assert "tiles[0].backward_kv.kv: holds 512 key tokens" in text and "give the tile" not in text


# Registration


def test_register_and_warm_up_both_passes(python, own_cache: Path) -> None:
    done = python(
        "import gnaforge\n"
        "calls = []\n"
        "from gnaforge import first_runs as module\n"
        "whole = module.gradient_call\n"
        "module.gradient_call = lambda *given: calls.append(given[2]) or whole(*given)\n"
        "print(gnaforge.warmup(rank=3, head_dim=8, dtype='fp32', arch='cpu', direction='training'))\n"
        "print(sorted(calls, key=str))\n"
    )
    assert done.returncode == 0, done.stderr
    keys, calls = map(eval, done.stdout.splitlines())
    defaults = {f"{f.op}-cpu-r3-fp32-dany": f.default_tiles[3] for op in OPS for f in families_of(op, "cpu")}
    assert keys == sorted(
        f"{name}-q{'x'.join(map(str, q))}-kv{'x'.join(map(str, kv))}" for name, (q, kv) in defaults.items()
    )
    assert calls == [{key.partition("-")[0]: key} for key in keys[:2]]


def test_every_family_is_fitted_or_says_that_it_cannot_be() -> None:
    problem = Problem((32, 32), 9, head_dim=64, heads=2)
    for family in families():
        if family.op == "gna_forward":
            continue
        if family.time is None:
            with pytest.raises(InputError, match=f"the kernel family {family.name} has no time constants"):
                fit_problems([replace(problem, dtype=family.dtypes[0])], family)
            continue
        found = fit_problems([replace(problem, dtype=family.dtypes[0])], family).tiles[0]
        counts = count_problem(problem, found.q, found.kv, held=OPS[family.op].held)
        assert counts.visited >= counts.q_tiles


# NATTEN's tuning arguments


@pytest.fixture(scope="module")
def step(session_cache: Path) -> dict[str, Path]:
    """The kernels of a training step, loaded; their libraries by key."""
    configs = [KernelConfig(op, "cpu", 2, "fp32", 0, (8, 8), (8, 8)) for op in OPS]
    libraries = {config.key: library for config, library in find_libraries(configs).items()}
    for library in libraries.values():
        gnaforge.load_library(library)
    return libraries


def test_tiles_of_the_backward_pass_choose_its_kernels(monkeypatch: pytest.MonkeyPatch, step) -> None:
    """Whatever their work is; results are those of any others."""
    from gnaforge.runtime import pinned_gradients

    keys: list[str] = []
    backward = torch.ops.gnaforge.backward.default

    class Recorded:
        class backward:
            @staticmethod
            def default(*call):
                keys.extend(call[10:12])
                return backward(*call)

        forward_no_grad = torch.ops.gnaforge.forward_no_grad

    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 9, 14, 2, 16, generator=generator) for _ in range(3))
    text = torch.randn(2, 5, 2, 16, generator=generator)

    def gradients(call, *tensors):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        out, lse = call(*leaves)
        return [out, lse, *torch.autograd.grad(out.square().sum() + lse.sum(), leaves)]

    chosen = {"backward_q_tile_shape": (8, 8), "backward_kv_tile_shape": (8, 8)}
    calls = [
        lambda q, k, v, **tiles: gnaforge.na2d(q, k, v, 5, stride=2, return_lse=True, **tiles),
        lambda q, k, v, **tiles: gnaforge.neighborhood_attention(q, k, v, 5, edge="wrap", return_lse=True, **tiles),
        lambda q, k, v, **tiles: gnaforge.na2d(
            q, k, v, 3, additional_keys=text, additional_values=text, return_lse=True, **tiles
        ),
    ]
    wanted = [gradients(call, q, k, v) for call in calls]
    monkeypatch.setattr(pinned_gradients.torch.ops, "gnaforge", Recorded)
    for call, results in zip(calls, wanted, strict=True):
        keys.clear()
        found = gradients(partial(call, **chosen), q, k, v)
        assert [*dict.fromkeys(keys)] == [f"gna_backward_{side}-cpu-r2-fp32-dany-q8x8-kv8x8" for side in ("q", "kv")]
        for one, other in zip(found, results, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    keys.clear()
    gradients(lambda q: calls[0](q, k, v, backward_kv_tile_shape=(8, 8)), q)  # nobody wants the others
    assert {*keys} == {"gna_backward_q-cpu-r2-fp32-dany-q8x8-kv8x8", ""}


def test_tiles_of_the_backward_pass_matter_to_gradients_alone(step) -> None:
    x = torch.randn(1, 9, 14, 1, 8)
    none = {"backward_q_tile_shape": (3, 1), "backward_kv_tile_shape": (1, 7)}
    with torch.no_grad():
        gnaforge.na2d(x, x, x, 3, **none)
    leaf = x.clone().requires_grad_()
    compiled = torch.compile(lambda x: gnaforge.na2d(x, x, x, 3, **none), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(leaf), gnaforge.na2d(x, x, x, 3))
    torch.func.vmap(lambda x: gnaforge.na2d(x, x, x, 3, **none))(leaf[None])
    with pytest.raises(ValueError, match="backward_q_tile_shape"):
        gnaforge.na2d(leaf, x, x, 3, backward_q_tile_shape=(1, 2, 3))
    with pytest.raises(TypeError, match="unexpected keyword argument 'backward_tile'"):
        gnaforge.na2d(x, x, x, 3, backward_tile=3)
    gnaforge.register(policy="never")
    try:
        with pytest.raises(gnaforge.NoKernelError, match=r"no kernel of gna_backward_q with q_tile_shape \(3, 1\)"):
            gnaforge.na2d(leaf, x, x, 3, **none)
    finally:
        gnaforge.register(policy="warn")


# bench


@pytest.mark.parametrize("direction", ["backward", "training"])
def test_gradients_are_timed_beside_sdpas(step, direction) -> None:
    problem = Problem((12, 10), 5, heads=4, kv_heads=2, head_dim=16, dtype="fp32", extra_tokens=(7,))
    row = bench.measure(problem, ("gnaforge", "sdpa", "gnaforge dense"), 0.2, None, "cpu", direction)
    timed = {timing["contender"]: timing for timing in row["timings"]}
    assert timed.keys() == {"gnaforge", "sdpa", "gnaforge dense"} and row["notes"] == {}
    assert row["direction"] == direction and 0 <= timed["sdpa"]["difference"] < 1e-5  # of Q's gradient
    products = {"backward": 5, "training": 7}[direction]  # of a fused kernel, and the forward pass's two
    flop = 2 * 4 * products * 16 * bench.visible_pairs(problem)
    assert timed["gnaforge"]["useful_gflops"] == pytest.approx(flop / timed["gnaforge"]["seconds"] / 1e9)


def test_bench_builds_and_times_a_training_step(cli, step) -> None:
    arguments = ("--tokens", "12,10", "--window", "5", "--head-dim", "16", "--dtype", "fp32", "--against", "sdpa")
    done = cli("bench", *arguments, "--direction", "training", "--seconds", "0.1", "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [(row["contender"], row["direction"]) for row in rows] == [("gnaforge", "training"), ("sdpa", "training")]
    refused = cli("bench", *arguments, "--direction", "training", "--arch", "sm100", "--dtype", "bf16")
    assert refused.returncode != 0 and "sm100 has no backward pass; cpu and sm90 have one" in refused.stderr
    refused = cli("bench", "--overhead", "--direction", "training")
    assert refused.returncode != 0 and "--direction: has no effect beside --overhead" in refused.stderr


# Wheels


def test_a_wheel_trains(step, python, tmp_path: Path) -> None:
    """With the kernels of both passes, and nothing to compile with."""
    spec = spec_text("[{q: [8, 8], kv: [8, 8]}]").replace(b"library: mine", b"library: trained")
    wheel = build_wheel(plan(parse_spec(spec, "f.yaml")), tmp_path / "dist", rebuild="gnaforge wheel my.yaml")
    with zipfile.ZipFile(wheel.path) as archive:
        archive.extractall(tmp_path / "site")
    code = (
        "import sys\n"
        "for name in ('gnaforge', 'jinja2', 'numpy', 'pydantic'):\n    sys.modules[name] = None\n"
        "import torch, gnaforge_trained as package\n"
        "print(sorted(kernel.key for kernel in package.kernels()))\n"
        "x = torch.randn(1, 9, 9, 1, 8, requires_grad=True)\n"
        "tiles = {'backward_q_tile_shape': (8, 8), 'backward_kv_tile_shape': (8, 8)}\n"
        "found = []\n"
        "for more in ({}, tiles):\n"
        "    found += torch.autograd.grad(package.na2d(x, x, x, 3, **more).square().sum(), x)\n"
        "print(torch.equal(*found), bool(found[0].abs().sum() > 0))\n"
    )
    nowhere = dict.fromkeys(("PATH", "HOME", "GNAFORGE_CACHE_DIR", "GNAFORGE_CACHE_PATH"), "/nonexistent")
    done = python(code, PYTHONPATH=str(tmp_path / "site"), **nowhere)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(sorted(step)), "True True"]


def test_list_shows_the_ops(step, cli) -> None:
    library = step["gna_backward_kv-cpu-r2-fp32-dany-q8x8-kv8x8"]
    done = cli("list", str(library), "--json")
    assert [row["op"] for row in json.loads(done.stdout)] == ["gna_backward_kv"]
    assert "gna_backward_kv-cpu-r2" in cli("list", str(library)).stdout
