"""Pages for a browser: what they hold, and that their script draws what the oracle says. Needs Node for the latter."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from itertools import product
from math import prod
from pathlib import Path
from random import Random
from typing import Any

import gnaforge
import oracle
import pytest
from gnaforge.build.identity import template_dir
from gnaforge.gna.counts import count_problem
from gnaforge.page.benchmark import benchmark_page
from gnaforge.page.page import Page, Table, render_page
from gnaforge.page.pattern import KINDS, MOST_CHOOSABLE, MOST_TOKENS, pattern_of
from gnaforge.runtime.problem import Problem
from gnaforge.simulator.cost import Tiles

NODE = shutil.which("node")
needs_node = pytest.mark.skipif(NODE is None, reason="no node on PATH")
HOSTILE = '</script><script>alert("x")</script>\x1b[2J'

PROBLEMS = {
    "line": (Problem(60, 13, 4), Tiles((8,), (8,))),
    "plane": (Problem((24, 20), (9, 8), (3, 1)), Tiles((4, 5), (4, 4))),
    "dilated": (Problem((25, 30), (4, 7), dilation=(5, 3), causal=(False, True)), Tiles((2, 4), (2, 4))),
    "volume": (Problem((6, 12, 11), (3, 6, 5), (2, 3, 1), causal=(True, False, False)), Tiles((2, 4, 4), (2, 4, 4))),
    "dilated volume": (Problem((8, 12, 9), (3, 4, 3), dilation=(2, 3, 1)), Tiles((2, 2, 4), (2, 2, 2))),
}


class Reader(HTMLParser):
    """Collects tags, and the texts of scripts and of everything else."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.scripts: list[str] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        elif not self.open or self.open[-1] != "style":
            self.words += data


def run_script(calls: list[list[Any]]) -> list[Any]:
    """Results of functions of page.js, by name and arguments."""
    script = template_dir() / "page" / "page.js"
    code = f"""
const page = require({json.dumps(str(script))});
const calls = JSON.parse(require("fs").readFileSync(0));
console.log(JSON.stringify(calls.map(([name, ...rest]) => page[name](...rest))));
"""
    assert NODE is not None
    done = subprocess.run([NODE, "-e", code], input=json.dumps(calls), capture_output=True, text=True, check=True)
    found: list[Any] = json.loads(done.stdout)
    return found


def queries(problem: Problem, number: int) -> list[tuple[int, ...]]:
    rng = Random(0)
    corners = list(product(*((0, n - 1) for n in problem.tokens)))
    return corners + [tuple(rng.randrange(n) for n in problem.tokens) for _ in range(number)]


def covered(boxes: list[dict[str, Any]], kinds: tuple[str, ...], shape: tuple[int, ...]) -> set[tuple[int, ...]]:
    """The tokens of the plane whose middle lies in a box of these kinds."""
    found = set()
    for token in product(*map(range, shape)):
        y, x = token if len(token) == 2 else (0, *token)
        for box in boxes:
            inside = box["y"] < y < box["y"] + box["height"] and box["x"] < x < box["x"] + box["width"]
            if box["kind"] in kinds and inside:
                found.add(token)
    return found


@needs_node
@pytest.mark.parametrize("name", PROBLEMS)
def test_the_script_draws_what_queries_see(name: str) -> None:
    problem, tiles = PROBLEMS[name]
    pattern = pattern_of(problem, tiles)
    plane = problem.tokens[-2:]
    asked = queries(problem, 6)
    slices: list[int | None] = [*range(problem.tokens[0])] if problem.rank == 3 else [None]
    drawn = iter(run_script([["boxes", pattern, query, at] for query in asked for at in slices]))
    for query in asked:
        keys = set(
            product(*(oracle.visible_keys(token, *axis) for token, axis in zip(query, problem.axes, strict=True)))
        )
        for at in slices:
            boxes = next(drawn)
            expected = {key[-2:] for key in keys if at is None or key[0] == at}
            assert covered(boxes, ("window", "key"), plane) == expected, (query, at)
            # Tiles of a dilated axis cover what lies between their tokens, too.
            assert expected <= covered(boxes, ("interior", "shell"), plane)
            assert sum(box["kind"] == "query" for box in boxes) == int(at is None or at == query[0])
            parts = [tiles_along(*each) for each in zip(problem.axes, query, tiles.q, tiles.kv, strict=True)]
            outer = [inner for keys, inner in parts[0] if at in keys] if at is not None else [True]
            inside = prod(sum(inner for _, inner in part) for part in parts[-2:]) if any(outer) else 0
            assert sum(box["kind"] == "interior" for box in boxes) == inside, (query, at)


@needs_node
@pytest.mark.parametrize("name", PROBLEMS)
def test_the_script_counts_tiles_and_keys(name: str) -> None:
    problem, tiles = PROBLEMS[name]
    asked = queries(problem, 6)
    found = run_script([["facts", pattern_of(problem, tiles), query] for query in asked])
    for query, facts in zip(asked, found, strict=True):
        assert facts["keys"] == prod(
            len(oracle.visible_keys(token, *axis)) for token, axis in zip(query, problem.axes, strict=True)
        )
        parts = [tiles_along(*each) for each in zip(problem.axes, query, tiles.q, tiles.kv, strict=True)]
        counts = prod(map(len, parts)), prod(sum(inner for _, inner in part) for part in parts)
        assert (facts["tiles"], facts["interior"]) == counts and facts["shell"] == counts[0] - counts[1], query


def tiles_along(axis: Any, token: int, q: int, kv: int) -> list[tuple[set[int], bool]]:
    """The tokens of each KV tile of a query's Q tile along an axis, and whether all its queries see them all."""
    length, dilation = axis[0], axis[3]
    group = range(token % dilation, length, dilation)
    begin = group.index(token) // q * q
    rows = [set(oracle.visible_keys(at, *axis)) for at in group[begin : begin + q]]
    seen = [group.index(key) for key in set().union(*rows)]
    found = []
    for at in range(min(seen), max(seen) + 1, kv):
        keys = set(group[at : at + kv])
        found.append((keys, at + kv <= len(group) and all(keys <= row for row in rows)))
    return found


SETTINGS = {
    "wrapping plane": (Problem((12, 20), (5, 9), edge=("cut", "wrap"), extra_tokens=(77, 9)), Tiles((4, 8), (2, 4))),
    "frames": (Problem((10, 12), (4, 5), (2, 1), causal=("block", False), sink=(3, 0)), Tiles((4, 4), (2, 4))),
    "dilated": (Problem((24, 15), (3, 3), dilation=(4, 3), edge="wrap"), Tiles((2, 2), (2, 2))),
    "line with a sink": (Problem(40, 9, 2, sink=5), Tiles((8,), (4,))),
    "part of a grid": (Problem((6, 8), 5, grid=(20, 20), q_offset=(9, 12), kv_tokens=(12, 20), kv_offset=(6, 5),
                               edge=("shift", "wrap")), Tiles((4, 4), (3, 4))),
    "rolling cache": (Problem((2, 6, 5), (4, 6, 3), (2, 1, 1), causal=("block", False, False), sink=(2, 0, 0),
                              grid=(12, 6, 5), q_offset=(8, 0, 0), kv_tokens=(6, 6, 5), kv_offset=(6, 0, 0),
                              kv_sink=(2, 0, 0)), Tiles((2, 4, 4), (2, 2, 4))),
    "cross attention": (Problem((9, 10), (12, 3), kv_tokens=(12, 10)), Tiles((4, 4), (4, 4))),
}  # fmt: skip


def keys_of(problem: Problem, query: tuple[int, ...]) -> set[tuple[int, ...]]:
    """The places in the grid that a query sees."""
    along = []
    for dimension, token in zip(problem.dimensions, query, strict=True):
        keys = [*range(dimension.kv_sink), *range(dimension.kv_offset, dimension.kv_offset + dimension.keys)]
        row = oracle.dimension_mask(dimension)[token]
        along.append({keys[i] % dimension.length for i in row.nonzero()[0]})
    return set(product(*along))


@needs_node
@pytest.mark.parametrize("name", SETTINGS)
def test_the_script_draws_every_setting(name: str) -> None:
    problem, tiles = SETTINGS[name]
    pattern = pattern_of(problem, tiles)
    grid = [dimension.length for dimension in problem.dimensions]
    asked = queries(problem, 6)
    slices: list[int | None] = [*range(grid[0])] if problem.rank == 3 else [None]
    drawn = iter(run_script([["boxes", pattern, query, at] for query in asked for at in slices]))
    said = run_script([["facts", pattern, query] for query in asked])
    for query, facts in zip(asked, said, strict=True):
        keys = keys_of(problem, query)
        assert (facts["keys"], facts["extra"]) == (len(keys), sum(problem.extra_tokens))
        offsets = [0 if d.dense else d.q_offset for d in problem.dimensions]
        for at in slices:
            boxes = next(drawn)
            expected = {key[-2:] for key in keys if at is None or key[0] == at}
            assert covered(boxes, ("window", "key"), tuple(grid[-2:])) == expected, (query, at)
            assert expected <= covered(boxes, ("interior", "shell"), tuple(grid[-2:]))
            (own,) = [box for box in boxes if box["kind"] == "query"] or [None]
            assert (own is None) == (at is not None and at != query[0] + offsets[0])
            assert own is None or own["x"] + 0.5 == query[-1] + offsets[-1]


def choices_of(name: str) -> list[tuple[Problem, list[Any]]]:
    """What the page lets axes of a pattern be: problems, and what is picked of each axis. Each choice of an axis is
    met, beside some of the others'."""
    problem, tiles = {**PROBLEMS, **SETTINGS}[name]
    rng, axes = Random(name), (pattern_of(problem, tiles) or {})["axes"]
    each = [[(kind, sink) for kind, sinks in axis["choices"].items() for sink in sinks] for axis in axes]
    found = []
    for i in range(max(map(len, each))):
        picks = [own[i] if i < len(own) else rng.choice(own) for own in each]
        settings = [{**KINDS[kind], "sink": int(sink)} for kind, sink in picks]
        columns = {field: tuple(own[field] for own in settings) for field in ("edge", "causal", "sink")}
        found.append((replace(problem, **columns), [list(pick) for pick in picks]))
    return found


@needs_node
@pytest.mark.parametrize("name", ["line", "plane", "dilated", "volume", "frames"])
def test_what_is_chosen_is_what_queries_see(name: str) -> None:
    """Every edge, causal kind and sink that an axis may have: keys, counts and boxes."""
    problem, tiles = {**PROBLEMS, **SETTINGS}[name]
    pattern, choices = pattern_of(problem, tiles), choices_of(name)
    kinds = {kind for _, picks in choices for kind, _ in picks}
    assert kinds >= set(KINDS) - ({"wrap"} if name == "frames" else set())
    patterns = run_script([["chosen", pattern, picks] for _, picks in choices])
    for (one, picks), chosen in zip(choices, patterns, strict=True):
        assert chosen["axes"] == [
            {**axis, "groups": own["groups"]}
            for axis, own in zip(
                json.loads(json.dumps(pattern))["axes"],
                json.loads(json.dumps(pattern_of(one, tiles)))["axes"],
                strict=True,
            )
        ], picks
        asked = queries(one, 3)
        slices = [*range(one.tokens[0])] if one.rank == 3 else [None]
        drawn = iter(run_script([["boxes", chosen, query, at] for query in asked for at in slices]))
        said = run_script([["facts", chosen, query] for query in asked])
        for query, facts in zip(asked, said, strict=True):
            keys = keys_of(one, query)
            assert facts["keys"] == len(keys), (picks, query)
            for at in slices:
                expected = {key[-2:] for key in keys if at is None or key[0] == at}
                assert covered(next(drawn), ("window", "key"), one.tokens[-2:]) == expected, (picks, query, at)


def test_parts_of_a_grid_and_long_axes_have_no_choices() -> None:
    problem, tiles = SETTINGS["part of a grid"]
    assert not any("choices" in axis for axis in (pattern_of(problem, tiles) or {})["axes"])
    (axis,) = (pattern_of(Problem(MOST_CHOOSABLE + 1, 7), Tiles((64,), (64,))) or {})["axes"]
    assert "choices" not in axis and "own" not in axis
    (axis,) = (pattern_of(Problem(12, 2, dilation=5), Tiles((4,), (4,))) or {})["axes"]
    assert set(axis["choices"]) == set(KINDS) - {"wrap"}  # groups of unequal length don't wrap
    assert all(list(sinks) == ["0"] for sinks in axis["choices"].values())  # and have no sinks


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_counts_as_the_simulator_does(name: str) -> None:
    problem, tiles = SETTINGS[name]
    pattern = json.loads(json.dumps(pattern_of(problem, tiles)))
    totals = [
        [sum(own[i] for group in axis["groups"] if group for own in group["tiles"]) for i in (0, 1)]
        for axis in pattern["axes"]
    ]
    counts = count_problem(problem, tiles.q, tiles.kv)
    extra = pattern["extra"]
    assert prod(total[0] for total in totals) + counts.q_tiles * extra["tiles"] == counts.visited
    assert prod(total[1] for total in totals) + counts.q_tiles * extra["interior"] == counts.interior


@needs_node
def test_cells_are_sorted_as_numbers_with_empty_ones_last() -> None:
    values = ["10", "9", "", "1e3", "-2.5"]
    for down, expected in ((False, ["-2.5", "9", "10", "1e3", ""]), (True, ["1e3", "10", "9", "-2.5", ""])):
        pairs = [(a, b) for a in values for b in values if a != b]
        signs = dict(zip(pairs, run_script([["compare", a, b, down] for a, b in pairs]), strict=True))
        assert all(signs[a, b] < 0 for i, a in enumerate(expected) for b in expected[i + 1 :])
    assert run_script([["compare", "abc", "abd", False]])[0] < 0


def test_a_page_needs_nothing_else_and_runs_nothing_of_others() -> None:
    problem, tiles = PROBLEMS["plane"]
    pattern = {**(pattern_of(problem, tiles) or {}), "name": HOSTILE}
    table = Table(["a", HOSTILE], [[HOSTILE, 1.23456], [None, 3]])
    text = render_page(Page(HOSTILE, [HOSTILE], [table], {HOSTILE: pattern}, [HOSTILE]))
    found = Reader(text)
    assert found.open == [] and len(found.scripts) == 2
    assert json.loads(found.scripts[0]) == json.loads(json.dumps(pattern))
    assert found.scripts[1].strip() == (template_dir() / "page" / "page.js").read_text().strip()
    assert "\x1b" not in text and "alert" in found.words
    assert not any("src" in attributes or "href" in attributes for _, attributes in found.tags)
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org/2000/svg)", text)
    values = [attributes.get("data-value") for tag, attributes in found.tags if tag == "td"]
    assert values == [None, "1.23456", None, "3.0"] and "1.23" in found.words


def test_pages_of_commands(cli: Any, tmp_path: Path) -> None:
    done = cli("simulate", "--tokens", "30,48", "--window", "9,12", "--sweep-stride", "--html", "page.html")
    assert done.returncode == 0, done.stderr
    found = Reader((tmp_path / "page.html").read_text())
    assert "wrote page.html" in done.stderr and "no measurement" in found.words
    assert sum(tag == "tr" for tag, _ in found.tags) > 2 and len(found.scripts) > 1
    done = cli("simulate", "--tokens", "30,48", "--window", "9,12", "--html", "page.txt")
    assert done.returncode == 2 and "--html page.txt: give the name of a .html file" in done.stderr


@pytest.mark.parametrize("kernel", [None, "nonsense", 3, "gna_forward-cpu-r3-fp32-dany-q2x8x8-kv1x8x8"])
def test_reports_of_kernels_that_nobody_knows_have_a_page_without_a_pattern(kernel: object) -> None:
    row = {"problem": PROBLEMS["plane"][0].as_json(), "kernel": kernel, "flop_bound": 2.0, "timings": []}
    report = {"date": HOSTILE, "machine": {}, "complete": True, "problems": [row]}
    assert benchmark_page(report).patterns == {}
    own = benchmark_page({**report, "problems": [{**row, "kernel": "gna_forward-cpu-r2-fp32-dany-q8x8-kv8x8"}] * 2})
    assert len(own.patterns) == 1 and Reader(render_page(own)).open == []


def test_long_axes_have_no_pattern() -> None:
    tiles = Tiles((64,), (64,))
    assert pattern_of(Problem(MOST_TOKENS + 1, 7), tiles) is None and pattern_of(Problem(MOST_TOKENS, 7), tiles)


def test_tiles_of_the_middle_are_those_of_the_simulator() -> None:
    problem, tiles = PROBLEMS["plane"]
    pattern = pattern_of(problem, tiles)
    assert pattern is not None
    counts = gnaforge.simulate(
        problem.tokens, problem.window, problem.stride, q_tile=tiles.q, kv_tile=tiles.kv, arch="cpu"
    ).counts
    visited = [[own[0] for own in axis["groups"][0]["tiles"]] for axis in pattern["axes"]]
    assert sum(a * b for a, b in product(*visited)) == counts.visited
