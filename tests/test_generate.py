"""Rendering, and the folders it goes to."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest
from gnaforge.build.render import render_kernel, render_sources
from gnaforge.build.sources import MANIFEST, check, generate, source_dir
from gnaforge.errors import InputError
from gnaforge.plan import Plan
from kernel_set import CONFIGS, cpu_config

PLAN = Plan(library="mine", configs=tuple(sorted(CONFIGS[:3])))
SMALLER = Plan(library="mine", configs=PLAN.configs[:1])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_rendering_is_pure_and_names_the_kernel() -> None:
    assert render_sources("mine", PLAN.configs) == render_sources("mine", reversed(PLAN.configs))
    for config in CONFIGS:
        text = render_kernel(config)
        assert config.symbol in text and config.key in text
        assert text.endswith("\n") and "\t" not in text and "{{" not in text


def test_generate_is_stable_prunes_its_own_and_touches_nothing_twice(tmp_path: Path) -> None:
    folder = generate(PLAN, tmp_path)
    assert folder == source_dir(tmp_path, "mine")
    first = contents(folder)
    assert set(first) == {c.key + ".cpp" for c in PLAN.configs} | {"library.cpp", MANIFEST}
    assert json.loads(first[MANIFEST])["kernels"].keys() == {c.key for c in PLAN.configs}
    stamps = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    generate(PLAN, tmp_path)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == stamps
    (folder / "notes.txt").write_text("mine")
    generate(SMALLER, tmp_path)
    assert set(contents(folder)) == {SMALLER.configs[0].key + ".cpp", "library.cpp", MANIFEST, "notes.txt"}


def test_check_sees_every_kind_of_drift(tmp_path: Path) -> None:
    assert check(PLAN, tmp_path).missing
    folder = generate(PLAN, tmp_path)
    assert not check(PLAN, tmp_path)
    a, b, c = (folder / f"{config.key}.cpp" for config in PLAN.configs)
    a.unlink()
    b.write_text(b.read_text() + "\n")
    (folder / "orphan.cpp").write_text("")
    drift = check(PLAN, tmp_path)
    assert (drift.missing, drift.changed, drift.orphans) == ([a.name], [b.name], ["orphan.cpp"])
    assert c.exists()


def test_foreign_folders_are_refused_untouched(tmp_path: Path) -> None:
    folder = source_dir(tmp_path, "mine")
    folder.mkdir(parents=True)
    for name, text in (("thesis.txt", "years of work"), (MANIFEST, '{"files": {}}'), (MANIFEST, "[]")):
        (folder / name).write_text(text)
        before = contents(folder)
        with pytest.raises(InputError, match="was not made by gnaforge"):
            generate(PLAN, tmp_path)
        assert contents(folder) == before


def test_a_forged_manifest_removes_nothing_outside(tmp_path: Path) -> None:
    folder = generate(PLAN, tmp_path)
    victim = tmp_path / "victim"
    victim.write_text("keep")
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"]["../../victim"] = ""
    (folder / MANIFEST).write_text(json.dumps(manifest))
    generate(PLAN, tmp_path)
    assert victim.read_text() == "keep"


def test_an_output_path_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("")
    with pytest.raises(InputError, match=r"can't write to|is a file"):
        generate(PLAN, tmp_path)


def test_a_thousand_configs_take_little_memory() -> None:
    """The time is a benchmark's matter (`gnaforge bench --tools`); the memory does not depend on the machine."""
    configs = [cpu_config(2, "fp32", (a, b), (c, 8)) for a in range(1, 17) for b in range(1, 17) for c in (1, 2, 4, 8)]
    tracemalloc.start()
    assert len(render_sources("thousand", configs).kernels) == 1024
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6
