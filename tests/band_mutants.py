"""Headers of bands and rules, each broken in one place: the checks of band_cases.py must notice every one.

``python band_mutants.py [EVERY]`` tries all of them, or every so manieth, and prints those that nobody noticed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

from band_cases import load, quick_checks
from gnaforge.build.identity import include_dir
from gnaforge.build_tools.toolchain import cxx_compiler

BAND, TILES, PATTERN, RULES = "gna/band.h", "gna/band_tiles.h", "pattern.h", "rules.h"
RUNS = "gna/query_runs.h"


class Mutant(NamedTuple):
    """One change of one header below ``gnaforge/``: ``old``, which stands there once, becomes ``new``."""

    header: str
    old: str
    new: str

    def __str__(self) -> str:
        return f"{self.header}: {' '.join(self.old.split())} -> {' '.join(self.new.split()) or 'nothing'}"


CHOSEN = [
    Mutant(BAND, "const int at = query + band.phase;", "const int at = query;"),
    Mutant(BAND, "band.begin_min, band.begin_max)", "band.begin_min, far_away)"),
    Mutant(BAND, "band.end_min, band.end_max), at", "band.end_min, far_away), at"),
    Mutant(BAND, "band.end_min, band.end_max), at", "-far_away, band.end_max), at"),
    Mutant(BAND, "at + band.ahead", "query + band.ahead"),
    Mutant(BAND, "key - band.ahead + 1 - band.phase", "key - band.ahead + 1"),
    Mutant(BAND, "min_int(band.split, keys.end + band.low_slack)", "(keys.end + band.low_slack)"),
    Mutant(BAND, "return {min_int(keys.begin, ", "return {max_int(keys.begin, "),
    Mutant(BAND, "row + extent <= 0", "row < 0"),
    Mutant(BAND, "row >= band.split ? row - band.gap", "row > band.split ? row - band.gap"),
    Mutant(BAND, "if (band.ahead < far_away) begin", "if (false) begin"),
    Mutant(
        BAND, "(floor_div(key - band.first, band.stride.value) + 1)", "((key - band.first) / band.stride.value + 1)"
    ),
    Mutant(BAND, "key - band.window + 1 - band.first", "key - band.window - band.first"),
    Mutant(TILES, "max_int(first.begin, band.split)", "first.begin"),
    Mutant(TILES, "any.begin < 0 ? 0 : ", ""),
    Mutant(TILES, "last.end > band.split ? band.split : any.begin", "any.begin"),
    Mutant(TILES, "runs.turn = high.begin;", ""),
    Mutant(TILES, "if (index >= count) index -= count - low_count;", ""),
    Mutant(TILES, "all{min_int(last.begin, band.low_begin)", "all{min_int(first.begin, band.low_begin)"),
    Mutant(TILES, "min_int(band.split, first.end + band.low_slack)", "min_int(band.split, last.end + band.low_slack)"),
    Mutant(TILES, "any.end = band.queries;", ""),
    Mutant(TILES, "if (last_row >= band.split) all.end = transposed_window(band, band.split).end;", ""),
    Mutant(TILES, "all{last.begin, first.end};", "all{first.begin, last.end};"),
    Mutant(TILES, "k_begin + min_int(k_extent, k_end - k_begin) - 1", "k_begin + k_extent - 1"),
    Mutant(TILES, "if (all.end == band.queries) all.end = far_away;", ""),
    Mutant(RUNS, "return (1 - run) * band.gap;", "return (run - 1) * band.gap;"),
    Mutant(
        RUNS, "runs.interior.begin = runs.count + tiles.interior.begin;", "runs.interior.begin = tiles.interior.begin;"
    ),
    Mutant(RUNS, "(index >= end[0]) + (index >= end[1])", "(index >= end[0])"),
    Mutant(RUNS, "index < end[1] ? end[0] : end[1])) * extent", "end[0])) * extent"),
    Mutant(TILES, "index < list.interior ? TileKind::interior", "index <= list.interior ? TileKind::interior"),
    Mutant(PATTERN, "(length > axis.window ? length - axis.window : 0) + zero", "far"),
    Mutant(PATTERN, "first = lead - kv_begin,", "first = lead,"),
    Mutant(PATTERN, "ahead = 1 + zero;", "ahead = 1;"),
    Mutant(PATTERN, "low_slack = causal ? 0 : far;", "low_slack = far;"),
    Mutant(PATTERN, "split = (axis.sink < length ? axis.sink : length) + zero;", "split = axis.sink + zero;"),
    Mutant(PATTERN, "axis.kv_sink > 0 ? 0 : position", "position"),
    Mutant(PATTERN, "narrow(axis.kv_offset - axis.kv_sink)", "narrow(axis.kv_offset)"),
    Mutant(PATTERN, "window(band, band.queries - 1).end > axis.kv_sink", "true"),
    Mutant(PATTERN, "whole = axis.kv_offset == 0 && axis.kv_tokens == axis.length;", "whole = kv_begin == 0;"),
    Mutant(PATTERN, "distance / step + (distance % step > 0)", "distance / step"),
    Mutant(PATTERN, "return rest < 0 ? rest + dilation : rest;", "return rest;"),
    Mutant(PATTERN, "return remainder(group - kv_offset);", "return remainder(group);"),
    Mutant(PATTERN, "band[group >= long_groups]", "band[0]"),
    Mutant("pattern_counts.h", "(axis.q_offset + axis.q_tokens) % axis.dilation,", "axis.dilation,"),
    Mutant("pattern_counts.h", "{0, axis.q_offset % axis.dilation,", "{0,"),
]
"""Made by hand, one for each thing that is easily forgotten."""

# Part of a header that is mutated by rule: from the first text up to the second.
_PARTS = (
    (BAND, "constexpr int clamp_int", "}  // namespace"),
    (TILES, "/// First row of tile `index`.", "/// Bands as a tile source."),
    (RUNS, "/// Which run tile", "}  // namespace"),
    (PATTERN, "/// Every query sees every key", "}  // namespace"),
    (RULES, "inline Seen seen(", "  gnaforge_code refuse("),
    (RULES, "const std::int64_t ends[]", "return missing.refuse"),
)
_CHANGES = (
    (r"\bmin_int\b", "max_int"), (r"\bmax_int\b", "min_int"), (r"(?<=\w) < (?=\w)", " <= "), (r" <= ", " < "),
    (r" > ", " >= "), (r" >= ", " > "), (r" \+ 1\b", ""), (r" - 1\b", ""), (r" \+ (?=\w)", " - "),
    (r"(?<=[\w)]) - (?=\w)", " + "), (r" && ", " || "), (r" \|\| ", " && "), (r" == ", " != "), (r" != ", " == "),
    (r"\.begin\b", ".end"), (r"\.end\b", ".begin"),
)  # fmt: skip


def by_rule() -> Iterator[Mutant]:
    """Every operator, bound and end of an interval in what decides, turned into its neighbour."""
    for header, first, last in _PARTS:
        text = (include_dir() / "gnaforge" / header).read_text()
        begin = text.index(first)
        part = text[begin : text.index(last, begin)]
        code = re.sub(r"//.*", lambda comment: "/" * len(comment[0]), part)  # keeps places
        for pattern, new in _CHANGES:
            for match in re.finditer(pattern, code):
                at, end = begin + match.start(), begin + match.end()
                low, high = at, end  # widen until the text stands there once
                while text.count(text[low:high]) > 1:
                    low, high = max(low - 1, 0), high + 1
                yield Mutant(header, text[low:high], text[low:at] + new + text[end:high])


EQUAL = {
    "gna/band.h: d < f -> d <= f": "far_away less a row and a phase is below all rows",
    "gna/query_runs.h: runs.begin[run] = 0 -> runs.end[run] = 0": "no tile is of a run that is empty",
    "gna/band_tiles.h: m > a -> m >= a": "tiles that begin at the seam are laid from there either way",
    "gna/band_tiles.h: n < h -> n <= h": "without whole tiles the interior is empty, wherever that lies",
    "gna/band.h: if (key >= band.end_ -> if (key > band.end_": "nobody stores the row after the grid's last",
}
"""Mutants by rule that compute the same, with the reason."""


def is_noticed(mutant: Mutant, folder: Path) -> bool:
    """Whether it doesn't compile, or a check fails, hangs or crashes.

    Raises:
        ValueError: the header has changed, so that the mutant can't be made.
    """
    include = folder / "include"
    if not include.exists():
        shutil.copytree(include_dir(), include)
    path = include / "gnaforge" / mutant.header
    text = path.read_text()
    if text.count(mutant.old) != 1:
        raise ValueError(f"{mutant.header} has {text.count(mutant.old)} times {mutant.old!r}")
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".so") as library:
        path.write_text(text.replace(mutant.old, mutant.new))
        options = ["-std=c++17", "-O0", "-shared", "-fPIC", "-w", f"-I{include}", "-o", library.name]
        source = str(Path(__file__).with_name("bands.cpp"))
        compiled = subprocess.run([*cxx_compiler().command, *options, source], capture_output=True)
        path.write_text(text)
        return compiled.returncode != 0 or not _passes(Path(library.name))


def _passes(library: Path) -> bool:
    """Whether all checks pass, in a child of this process."""
    child = get_context("fork").Process(target=_check, args=(library,))
    child.start()
    child.join(60)
    if child.is_alive():
        child.kill()
        child.join()
    return child.exitcode == 0


def _check(library: Path) -> None:
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
        quick_checks(load(library))


def try_mutants(mutants: Sequence[Mutant]) -> list[Mutant]:
    """Those that nobody noticed. The headers as they are must pass."""
    left = []
    with tempfile.TemporaryDirectory() as folder:
        assert not is_noticed(Mutant(BAND, "#pragma once", "#pragma once"), Path(folder))
        for number, mutant in enumerate(mutants, 1):
            print(f"\r{number} of {len(mutants)}, {len(left)} not noticed", end="", file=sys.stderr, flush=True)
            if not is_noticed(mutant, Path(folder)):
                left.append(mutant)
                print(f"\nnot noticed: {mutant}", flush=True)
    return left


def main(every: int = 1) -> None:
    """Exits with 1 if a mutant isn't noticed that should be."""
    mutants = [mutant for mutant in [*CHOSEN, *by_rule()][::every] if str(mutant) not in EQUAL]
    left = try_mutants(mutants)
    print(f"\n{len(mutants) - len(left)} of {len(mutants)} noticed")
    sys.exit(bool(left))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
