"""The compile cache: what its key holds, how it is looked at and emptied, and what the clock has to do with it."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from gnaforge.build import identity as recipe
from gnaforge.build.cached import find_kernel
from gnaforge.build.identity import source_digest
from gnaforge.build.kernels import build_kernels, make_jobs
from gnaforge.build_tools import includes, toolchain
from gnaforge.build_tools.artifact import read_artifact
from gnaforge.build_tools.cache import Cache, user_cache
from gnaforge.build_tools.cache_care import remove, to_prune
from gnaforge.build_tools.toolchain import cxx_compiler
from gnaforge.families import family_of
from gnaforge.runtime.config import KernelConfig
from kernel_set import SMALL, cpu_config

DAY = 86400.0


@pytest.fixture
def filled(no_kernels: Path, fake_cxx, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with the core and `SMALL`, made by the stand-in compiler."""
    monkeypatch.setenv("CXX", f"'{fake_cxx()}'")
    cxx_compiler.cache_clear()
    build_kernels([SMALL])
    yield no_kernels
    cxx_compiler.cache_clear()


@pytest.fixture
def templates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the templates, in use, to edit."""
    copy = tmp_path / "templates"
    shutil.copytree(recipe.template_dir(), copy)
    monkeypatch.setattr(recipe, "template_dir", lambda: copy)
    includes.forget_headers()
    yield copy
    includes.forget_headers()


def digests() -> tuple[str, str]:
    """What names the artifact of `SMALL`, and what a lookup goes by."""
    includes.forget_headers()
    return make_jobs([SMALL], cxx_compiler())[0].digest, source_digest(SMALL)


def test_an_upgrade_changes_the_key_and_touching_does_not(templates: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = digests()
    for path in templates.rglob("*"):
        os.utime(path, (1, 1))
    assert digests() == before
    seen = {before}
    for name in ("include/gnaforge/cpu/forward/tile.h", "include/gnaforge/abi.h"):
        (templates / name).write_text((templates / name).read_text() + "// newer\n")
        seen.add(digests())
    monkeypatch.setattr("gnaforge.build.kernels.SOURCE_SCHEMA", 99)
    monkeypatch.setattr(recipe, "SOURCE_SCHEMA", 99)
    seen.add(digests())
    monkeypatch.setattr(toolchain, "CXX_FLAGS", (*toolchain.CXX_FLAGS, "-g"))
    monkeypatch.setattr(recipe, "CXX_FLAGS", toolchain.CXX_FLAGS)
    seen.add(digests())
    assert len({full for full, _ in seen}) == len({source for _, source in seen}) == 5
    # Where what is rendered stays the same, calls ask for the new source digest, so a build has to make it.
    for name in ("library/library.cpp.j2", "cpu_forward/kernel.cpp.j2"):
        before = digests()
        (templates / name).write_text((templates / name).read_text() + "// newer\n")
        assert all(new != old for new, old in zip(digests(), before, strict=True))


def test_the_table_of_a_kernels_library_is_part_of_its_key() -> None:
    from gnaforge.build.kernels import source_parts

    assert source_parts(SMALL, "a", "b") != source_parts(SMALL, "a", "c")


def test_cutlass_is_part_of_the_key_of_families_that_are_made_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others can't include it: their compiler isn't told where it is."""
    from gnaforge.build.kernels import source_parts

    made_of_it = KernelConfig.parse("gna_forward-sm100-r1-bf16-d64-q256-kv128-cutlass")
    found = []
    for version in ("4.2.0", "4.3.0"):
        monkeypatch.setattr("gnaforge.build.kernels.cutlass_version", lambda it=version: it)
        found.append([source_parts(config, "a", "b") for config in (made_of_it, SMALL)])
    assert found[0][0] != found[1][0] and found[0][1] == found[1][1]


def test_the_compiler_is_part_of_the_key_but_no_lookup_asks_for_it(filled: Path, fake_cxx, monkeypatch) -> None:
    first = find_kernel(SMALL)
    monkeypatch.setenv("CXX", f"'{fake_cxx(version='fake 2.0')}'")
    cxx_compiler.cache_clear()
    assert find_kernel(SMALL) == first
    assert build_kernels([SMALL])[1] == [SMALL]
    second = find_kernel(SMALL)  # of two that do, the one made later
    assert second not in (None, first)
    monkeypatch.setenv("CXX", f"'{fake_cxx(version='fake 1.0')}'")
    cxx_compiler.cache_clear()
    assert build_kernels([SMALL])[1] == [] and find_kernel(SMALL) == second


def test_kernels_made_with_another_cutlass_are_not_taken(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless there is none here: then they serve as they are."""
    (record,) = filled.glob(f"{SMALL.key}-*/record.json")
    content = json.loads(record.read_text())
    record.write_text(json.dumps({**content, "parts": {**content["parts"], "cutlass": "1.0"}}))
    assert find_kernel(SMALL) is not None  # SMALL itself has nothing to do with CUTLASS
    for installed, found in (("1.0", True), ("2.0", False)):
        monkeypatch.setattr("gnaforge.build.cached.installed_parts", lambda _, it=installed: {"cutlass": it})
        assert (find_kernel(SMALL) is not None) == found
    made_of_it = KernelConfig.parse("gna_forward-sm100-r1-bf16-d64-q256-kv128-cutlass")
    assert recipe.installed_parts(made_of_it).keys() <= {"cutlass"} and recipe.installed_parts(SMALL) == {}


def test_the_gpu_target_is_part_of_what_a_kernel_is_made_of(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = KernelConfig.parse("gna_forward-sm90-r2-bf16-d64-q8x16-kv8x16")
    before = source_digest(gpu)
    family = family_of(gpu)
    other = replace(family, target=replace(family.target, nvcc_target="90"))
    monkeypatch.setattr(recipe, "family_of", lambda _: other)
    assert source_digest(gpu) != before


def test_what_is_published_is_readable_by_all_and_writable_by_nobody(no_kernels: Path, fake_cxx, monkeypatch) -> None:
    monkeypatch.setenv("CXX", f"'{fake_cxx()}'")
    cxx_compiler.cache_clear()
    before = os.umask(0)
    try:
        build_kernels([SMALL])
    finally:
        os.umask(before)
        cxx_compiler.cache_clear()
    path = find_kernel(SMALL)
    assert path is not None
    assert {file.stat().st_mode & 0o777 for file in path.parent.iterdir()} == {0o644}
    assert path.parent.stat().st_mode & 0o777 == 0o755


def artifact_used(cache: Cache, name: str, now: float) -> Path:
    """Makes an artifact of 1,000 bytes that was last used at that time."""

    def make(scratch: Path, folder: Path) -> dict[str, str]:
        (folder / "file").write_bytes(b"x" * 1000)
        return {"key": name}

    clock, cache.clock = cache.clock, lambda: now
    artifact = cache.find_or_make(name, f"{abs(hash(name)):016x}"[:16] * 4, make)
    artifact.mark_used(now)
    cache.clock = clock
    return artifact.folder


def test_pruning_goes_by_the_last_use_and_survives_any_clock(tmp_path: Path) -> None:
    now = 1e9
    cache = Cache(tmp_path / "cache", clock=lambda: now)
    old, new, future = (
        artifact_used(cache, name, used)
        for name, used in (("old", now - 40 * DAY), ("new", now - DAY), ("future", now + 400 * DAY))
    )
    assert [item.folder for item in to_prune(cache, lambda _: False, older_than=30 * DAY)] == [old]
    doomed = to_prune(cache, lambda _: False, keep_bytes=2 * read_artifact(new).size() + 10)
    assert [item.folder for item in doomed] == [old]
    now -= 1000 * DAY  # the clock goes backwards: all was used in the future, nothing looks old
    assert to_prune(cache, lambda _: False, older_than=30 * DAY) == []
    assert cache.find("old", read_artifact(old).record["digest"]) is not None
    assert read_artifact(old).last_used() == now
    assert [item.folder for item in to_prune(cache, lambda a: a.folder == new)] == [new]
    doomed = to_prune(cache, lambda _: False, keep_bytes=0)
    assert {item.folder for item in doomed} == {old, new, future}
    remove(cache, doomed)
    assert list(cache.artifacts()) == [] and not list(cache.root.glob(".build-*"))


def test_only_what_is_ours_is_deleted(filled: Path, cli, fake_cxx) -> None:
    foreign = (
        "notes.txt",
        "my-folder/a.jpg",
        "my-photos-0123456789abcdef/a.jpg",
        "gna_forward-cpu-r1-fp32-dany-q8-kv9-0123456789abcdef/a.jpg",  # named like ours, without a record
        "my-data-0123456789abcdef/record.json",  # with a record that claims nothing
        ".build-cache/a.o",
        ".failed/mine/a.log",
    )
    for name in foreign:
        (filled / name).parent.mkdir(parents=True, exist_ok=True)
        (filled / name).write_text('{"schema": 1, "digest": "' + "f" * 64 + '"}')
    (filled / "linked-0123456789abcdef").symlink_to(filled / "my-folder")
    kept = user_cache().keep_failed("ours", fake_cxx().parent)
    assert kept is not None
    claimed = read_artifact(find_kernel(SMALL).parent)  # type: ignore[union-attr]
    damaged = filled / f"{SMALL.key}-{'0' * 16}"
    shutil.copytree(claimed.folder, damaged)
    record = json.dumps({**claimed.record, "digest": "0" * 64}, indent=1)
    (damaged / "record.json").write_text(record[:200])  # cut short: its head still says whose it is
    assert f"{damaged.name}: damaged" in cli("cache", "prune").stdout
    assert not damaged.exists() and find_kernel(SMALL) is not None and kept.exists()
    listed = cli("cache", "clear", "--dry-run").stdout
    assert "3 folders would be deleted" in listed and find_kernel(SMALL) is not None
    assert "3 folders deleted" in cli("cache", "clear").stdout
    assert find_kernel(SMALL) is None and not kept.exists()
    assert all((filled / name).is_file() for name in foreign)
    tops = {name.partition("/")[0] for name in foreign}
    assert {path.name for path in filled.iterdir()} == {*tops, "linked-0123456789abcdef", ".locks"}


def test_info_explain_and_prune(filled: Path, cli, templates: Path) -> None:
    rows = json.loads(cli("cache", "info", "--json").stdout)
    assert [rows[0][name]["count"] for name in ("kernels", "stale", "other", "damaged")] == [1, 0, 1, 0]
    assert rows[0]["folder"] == str(filled) and rows[0]["kernels"]["bytes"] > 10_000
    found = cli("cache", "explain", SMALL.key)
    folder = find_kernel(SMALL).parent  # type: ignore[union-attr]
    assert f"in the cache: {folder}" in found.stdout and "headers gnaforge/gna/window.h" in found.stdout
    other = cli("cache", "explain", SMALL.key, CXX="g++").stdout
    assert f"nearest entry: {folder}" in other and "not in the cache; calls take what another compiler made" in other
    assert "  compiler: there fake 1.0 [fake]\n            now   g++" in other
    differing = json.loads(cli("cache", "explain", SMALL.key, "--json", CXX="g++").stdout)["differences"]
    assert list(differing) == ["compiler"]
    blind = cli("cache", "explain", SMALL.key, CXX="/nonexistent").stdout
    assert "without a compiler only the sources' parts are known: no C++ compiler found" in blind
    away = cpu_config(1, "fp32", (8,), (80,)).key
    differing = json.loads(cli("cache", "explain", away, "--json").stdout)["differences"]
    assert list(differing) == ["key", "made_of", "source", "library"]
    record = json.loads((folder / "record.json").read_text())
    (folder / "record.json").write_text(json.dumps({**record, "source_digest": "0" * 64}))
    assert "1 made by another version" in cli("cache", "info").stdout
    assert f"{folder.name}: made by another version" in cli("cache", "prune").stdout and not folder.exists()


def test_bad_input_and_strange_caches(filled: Path, cli, tmp_path: Path) -> None:
    assert "is no kernel key" in cli("cache", "explain", "nonsense").stderr
    assert "not a variant of sm100" in cli("cache", "explain", "gna_forward-sm100-r2-bf16-d64-q8x8-kv8x8-x").stderr
    assert cli("cache", "prune", "--keep-mb", "-1").returncode == 2
    for command in (["info"], ["clear"], ["prune"]):
        done = cli("cache", *command, GNAFORGE_CACHE_DIR=str(tmp_path / "none"))
        assert done.returncode == 0 and not (tmp_path / "none").exists(), done.stderr
    strange = cli("cache", "info", GNAFORGE_CACHE_DIR="~no-such-user/x")
    assert strange.returncode == 1 and strange.stderr.startswith("error: the cache folder ~no-such-user/x: ")
    (tmp_path / "file").write_text("")
    for command in ("info", "clear", "prune"):
        done = cli("cache", command, GNAFORGE_CACHE_DIR=str(tmp_path / "file" / "x"))
        assert done.returncode == (0 if command == "info" else 1) and "Traceback" not in done.stderr, done.stderr
    filled.chmod(0o777)
    assert "NOT USED" in cli("cache", "info").stdout
    refused = cli("cache", "clear")
    assert refused.returncode == 1 and "can be written by others: chmod 700 it" in refused.stderr
    assert (filled / find_name(filled)).exists()


def find_name(cache: Path) -> str:
    return next(path.name for path in cache.glob("gna_*"))


def test_a_layer_serves_builds_and_is_not_written(filled: Path, tmp_path: Path, monkeypatch) -> None:
    layer = filled.with_name("layer")
    filled.rename(layer)
    before = sorted(path.name for path in layer.rglob("*"))
    monkeypatch.setenv("GNAFORGE_CACHE_PATH", str(layer))
    assert find_kernel(SMALL) is not None and build_kernels([SMALL])[1] == []
    assert sorted(path.name for path in layer.rglob("*")) == before
    layer.chmod(0o777)
    assert find_kernel(SMALL) is None
    monkeypatch.setenv("GNAFORGE_CACHE_PATH", "")
    assert user_cache().names() == [] and KernelConfig.parse(SMALL.key) == SMALL


def test_the_nearest_entry_is_the_one_most_alike(filled: Path) -> None:
    from gnaforge.build.cache_report import explain

    def nearest(*config: object) -> str:
        folder = explain(cpu_config(*config)).nearest  # type: ignore[arg-type]
        assert folder is not None
        return folder.name.rpartition("-")[0]

    same_kind = cpu_config(1, "bf16", (64,), (40,))
    others = [cpu_config(2, "fp32", (8, 8), (8, 8)), cpu_config(2, "bf16", (8, 8), (8, 8))]
    build_kernels([same_kind, *others])
    assert nearest(1, "bf16", (8,), (8,)) == same_kind.key
    assert nearest(1, "fp32", (64,), (40,)) == SMALL.key
    assert nearest(2, "fp32", (8, 4), (8, 4)) == others[0].key
    assert nearest(2, "bf16", (8, 4), (8, 8)) == others[1].key
    assert nearest(3, "bf16", (4, 4, 4), (4, 4, 4)).startswith("gna_forward-cpu-r1-bf16")
