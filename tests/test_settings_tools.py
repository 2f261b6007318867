"""Simulator, fits and their command on settings beyond plain GNA, against the oracle and brute force."""

from __future__ import annotations

import json
from dataclasses import replace
from math import prod
from random import Random
from typing import Any

import gnaforge
import numpy as np
import oracle
import pytest
from gnaforge.errors import InputError
from gnaforge.families import families
from gnaforge.gna.counts import count_problem, seen_pairs
from gnaforge.runtime.problem import FEATURES, Problem
from gnaforge.runtime.reference import visited_pairs
from gnaforge.simulator.cost import Tiles
from gnaforge.simulator.fitting import Candidates, fit_problems
from gnaforge.simulator.natten import simulate_natten
from gnaforge.simulator.simulation import family_for, simulate_tiles
from gnaforge.simulator.sweep import sweep_strides
from gnaforge.verification.problems import with_settings
from kernel_set import FAMILIES

CPU, SM90 = FAMILIES["cpu"], FAMILIES["sm90"]


def random_settings(seed: int, rank: int) -> Problem:
    rng = Random(seed)
    problem = with_settings(oracle.random_problem(rng, rank=rank), rng, 300, FEATURES)
    pieces = rng.choice((0, 1, 2))
    return replace(problem, extra_tokens=tuple(rng.randint(1, 70) for _ in range(pieces)), batch=1)


def test_pairs_and_bounds_are_those_of_the_mask() -> None:
    for seed in range(120):
        problem = random_settings(seed, seed % 3 + 1)
        mask = oracle.mask(problem)
        extra = np.ones((problem.token_count, sum(problem.extra_tokens)), dtype=bool)
        whole = np.concatenate([mask, extra], axis=1)
        assert (seen_pairs(problem), problem.pair_count) == (whole.sum(), whole.size)
        found = simulate_tiles(problem, Tiles((4,) * problem.rank, (4,) * problem.rank), CPU)
        assert found.flop_speedup == pytest.approx(whole.size / whole.sum())
        assert found.sparsity == pytest.approx(1 - whole.mean())
        work = visited_pairs(problem, found.tiles.q, found.tiles.kv, CPU.padding)
        assert found.work_bound == pytest.approx(whole.size / work)
        assert found.work_bound <= found.flop_speedup * (1 + 1e-9)
        assert (found.paper_bound is None) == bool({*problem.features()} - {"extra_keys"})


@pytest.mark.usefixtures("every_feature")
def test_extra_keys_are_tiles_that_every_q_tile_visits() -> None:
    plain = Problem((20, 24), (7, 9), heads=2)
    tiles = Tiles((8, 8), (4, 8))
    alone = simulate_tiles(plain, tiles, SM90).counts
    for pieces, whole, partial in (((64,), 2, 0), ((77,), 2, 1), ((5,), 0, 1), ((64, 33), 3, 1), ((1, 1), 0, 2)):
        found = simulate_tiles(replace(plain, extra_tokens=pieces), tiles, SM90)
        counts = found.counts
        assert counts.q_tiles == alone.q_tiles
        assert counts.visited == alone.visited + alone.q_tiles * (whole + partial)
        assert counts.interior == alone.interior + alone.q_tiles * whole
        assert (counts.most, counts.most_interior) == (alone.most + whole + partial, alone.most_interior + whole)
        assert counts.seen == alone.seen + alone.q_tiles * sum(pieces)
        assert found.paper_bound is not None and found.as_json()["extra_tokens"] == list(pieces)
        assert found.dense_seconds > simulate_tiles(plain, tiles, SM90).dense_seconds or sum(pieces) < 32
        assert float(found.time.seconds) > float(simulate_tiles(plain, tiles, SM90).time.seconds) or sum(pieces) < 3


@pytest.mark.usefixtures("every_feature")
@pytest.mark.parametrize("family", [CPU, SM90], ids=str)
def test_fits_look_at_what_the_simulator_counts(family: Any) -> None:
    """Of some candidates the tables give the work and time that a simulation of each gives."""
    for seed in range(6):
        problem = replace(random_settings(seed, 2), dtype="bf16", head_dim=64, value_head_dim=64)
        candidates = Candidates.of_family(family, [problem])
        some = np.array(Random(seed).sample(range(len(candidates)), 12))
        seconds, work = candidates.subset(some).seconds_and_work(problem, "dynamic")
        for index, took, scores in zip(some.tolist(), seconds, work, strict=True):
            found = simulate_tiles(problem, candidates.tiles(index), family)
            assert took == pytest.approx(float(found.time.seconds))
            assert problem.pair_count / scores == pytest.approx(found.work_bound)
        best = fit_problems([problem], family, objective="work").tiles[0]
        _, every = candidates.seconds_and_work(problem, "dynamic")
        assert problem.pair_count / every.min() == pytest.approx(simulate_tiles(problem, best, family).work_bound)


@pytest.mark.usefixtures("every_feature", "plain_sm100")
def test_families_that_lack_a_feature_say_who_has_it() -> None:
    wrap = Problem((20, 24), (7, 9), edge="wrap")
    assert family_for(wrap, None) is SM90 and family_for(wrap, None, "sm90") is SM90
    shape = {"tokens": (20, 24), "window": (7, 9), "edge": "wrap"}
    for call in (lambda: gnaforge.simulate(**shape, arch="sm100"), lambda: gnaforge.fit(shape, arch="sm100")):
        with pytest.raises(InputError, match="edge: sm100 doesn't have the feature edge; cpu and sm90 have it"):
            call()
    assert simulate_natten(wrap, SM90) is None
    text = Problem((64, 64), (21, 21), extra_tokens=(256,))
    theirs = simulate_natten(text, SM90)
    assert theirs is not None and theirs.counts.visited > theirs.counts.q_tiles * 2
    for tiling, box in (("static", (8, 8)), ("flat", (64,))):
        with pytest.raises(InputError, match=f"tiling: {tiling} tiles are for plain windows; 20x24, .* needs edge"):
            gnaforge.simulate(**shape, tiling=tiling, q_tile=box, kv_tile=box, arch="cpu")


def test_without_a_gpu_family_that_has_it_the_cpu_is_simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    of_gpus = [family for family in families() if family.target.is_gpu]
    features = [family.features for family in of_gpus]
    for family in of_gpus:
        object.__setattr__(family, "features", ())
    try:
        assert family_for(Problem(64, 9, sink=3), None) is CPU
        assert family_for(Problem(64, 9), None) is SM90
    finally:
        for family, own in zip(of_gpus, features, strict=True):
            object.__setattr__(family, "features", own)


def test_strides_of_frames_stay() -> None:
    """A block's tokens are no choice of a sweep; those of other dimensions are."""
    problem = Problem((24, 32), (12, 9), (4, 1), causal=("block", False), sink=(4, 0), head_dim=64)
    found = sweep_strides(problem, CPU, tiles=Tiles((4, 8), (4, 8)))
    assert {each.problem.stride[0] for each in found} == {4} and len(found) > 1
    assert all(each.counts == count_problem(each.problem, (4, 8), (4, 8)) for each in found)


SETTINGS = {
    "wrap": ("--edge", "shift,wrap"),
    "frames": ("--causal", "block,0", "--stride", "4,1", "--sink", "4,0"),
    "text": ("--extra-tokens", "77,9"),
    "a part": ("--grid", "60,60", "--q-offset", "20,30", "--kv-tokens", "34,38", "--kv-offset", "13,20"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_command_takes_every_setting(cli: Any, name: str) -> None:
    given = ("--tokens", "20,16", "--window", "12,9", "--arch", "cpu", "--head-dim", "64", *SETTINGS[name])
    done = cli("simulate", *given, "--json")
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    options = {key[2:].replace("-", "_"): text for key, text in zip(given[::2], given[1::2], strict=True)}
    problem = Problem.from_options({**options, "arch": None, "head_dim": 64})
    assert Problem.from_json({key: row[key] for key in problem.as_json()}) == problem
    tiles = Tiles(tuple(row["tiles"]["q"]), tuple(row["tiles"]["kv"]))
    counts = count_problem(problem, tiles.q, tiles.kv)
    assert (row["visited_tiles"], row["interior_tiles"], row["q_tiles"]) == (
        counts.visited, counts.interior, counts.q_tiles,
    )  # fmt: skip
    assert row["flop_speedup"] == pytest.approx(problem.pair_count / seen_pairs(problem))
    assert prod(tiles.q) <= 256
    said = cli("simulate", *given)
    assert said.returncode == 0 and ("paper bound" in said.stdout) == (name == "text")
    again = problem.options().split()
    assert json.loads(cli("simulate", *again, "--arch", "cpu", "--json").stdout) == row


def test_refusals_name_the_option(cli: Any) -> None:
    for given, said in (
        (("--edge", "warp"), "--edge: 'warp' is not one of shift, cut, wrap"),
        (("--sink", "x"), "--sink: 'x' is no list of whole numbers"),
        (("--edge", "wrap", "--sink", "3"), "--sink: 3 along dimension 0, which wraps"),
        (("--extra-tokens", "1,2,3"), "--extra-tokens: (1, 2, 3) has more than 2 entries"),
        (("--kv-tokens", "30"), "--kv-tokens: 30 key tokens and 20 query tokens along dimension 0 are parts of a grid"),
        (("--edge", "cut", "--arch", "sm90", "--variant", "cutlass"), "edge: sm90 cutlass doesn't have the feature"),
        (("--preset", "cosmos", "--edge", "cut"), "--edge: has no effect beside --preset"),
    ):
        window = () if "--preset" in given else ("--tokens", "20", "--window", "9")
        done = cli("simulate", *window, *given)
        assert done.returncode == 2 and said in done.stderr, (given, done.stderr)


def test_kernels_are_listed_with_what_they_take(cli: Any) -> None:
    rows = {row["arch"]: row for row in json.loads(cli("list", "stormscope", "--json").stdout)}
    assert {arch: {*row["features"]} for arch, row in rows.items()} == {
        arch: {*family.features} for arch, family in FAMILIES.items()
    }
    said = cli("list", "stormscope").stdout.splitlines()
    assert "beyond plain windows" in said[0]
    assert all(line.endswith("everything") for line in said if "gna_forward-" in line)
