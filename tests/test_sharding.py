"""Builds spread over machines: shards, moving the cache, compiler launchers. A wrapped compiler counts its runs."""

from __future__ import annotations

import json
import os
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from gnaforge.build_tools.cache import Cache
from gnaforge.build_tools.cache_archive import import_artifacts
from gnaforge.cli import app
from gnaforge.cli.cache_moving import needed_files
from gnaforge.errors import BuildError, InputError

SPEC = """\
spec_version: 1
library: three
arch: cpu
kernels:
  - rank: 1
    head_dim: 16
    dtype: fp32
    tiles: [{q: [8], kv: [8]}, {q: [8], kv: [16]}, {q: [8], kv: [24]}]
"""
KEYS = [f"gna_forward-cpu-r1-fp32-dany-q8-kv{kv}" for kv in (8, 16, 24)]


@pytest.fixture
def counted(tmp_path: Path) -> tuple[dict[str, str], Callable[[], list[str]]]:
    """An environment whose compiler notes what it compiles, and what it noted since it was last asked."""
    log = tmp_path / "compiled"
    wrapper = tmp_path / "noting-g++"
    wrapper.write_text(f'#!/bin/sh\ncase " $* " in *" -c "*) echo "$*" >> "{log}";; esac\nexec g++ "$@"\n')
    wrapper.chmod(0o755)

    def noted() -> list[str]:
        lines = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return [line.split(" -c ")[1].split()[0] for line in lines]

    (tmp_path / "three.yaml").write_text(SPEC)
    return {"CXX": str(wrapper)}, noted


def sources(names: list[str]) -> list[str]:
    """The kernels and the core among compiled files; tables of libraries are a few lines and always compiled."""
    return sorted(Path(name).parent.name or name for name in names if Path(name).name in ("kernel.cpp", "core.cpp"))


def test_shards_make_up_the_whole_and_nothing_is_compiled_twice(cli, counted, tmp_path: Path) -> None:
    environment, noted = counted

    def run(cache: str, *arguments: str) -> str:
        done = cli(*arguments, GNAFORGE_CACHE_DIR=str(tmp_path / cache), **environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    said = run("machine 1", "build", "three.yaml", "--shard", "1/2")
    assert "shard 1/2: 2 kernels and the core extension" in said
    assert sources(noted()) == sorted([KEYS[0], KEYS[2], "core"])
    assert not (tmp_path / "generated").exists()
    run("machine 2", "build", "three.yaml", "--shard", "2/2")
    assert sources(noted()) == [KEYS[1]]

    text = run("machine 1", "cache", "export", "part-1.zip", "--spec", "three.yaml")
    assert text.startswith("part-1.zip: 2 kernels and the core extension of the 3 of three.yaml")
    run("machine 2", "cache", "export", "part 2", "--spec", "three.yaml")
    text = run("home", "cache", "import", "part-1.zip", "part 2")
    assert text.splitlines() == [
        "part-1.zip: 2 kernels and the core extension imported, 0 there already",
        "part 2: 1 kernel imported, 0 there already",
    ]
    assert "1 kernel imported" not in run("home", "cache", "import", "part 2")
    noted()
    assert "0 of 3 kernels to compile" in run("home", "build", "three.yaml", "--dry-run")
    assert "0 compiled, 3 from the cache" in run("home", "build", "three.yaml")
    assert "0 compiled, 3 from the cache" in run("home", "wheel", "three.yaml")
    assert sources(noted()) == []

    # An exported folder is a cache layer as it is: also where there is no cache of one's own yet.
    layers = {"GNAFORGE_CACHE_DIR": str(tmp_path / "empty"), "GNAFORGE_CACHE_PATH": str(tmp_path / "part 2")}
    assert KEYS[1] in cli("list", **layers).stdout
    assert "0 compiled, 1 from the cache" in cli("build", KEYS[1], **layers, **environment).stdout
    exported = cli("cache", "export", "again.zip", "--spec", KEYS[1], **layers, **environment)
    assert "again.zip: 1 kernel" in exported.stdout, exported.stderr
    # Exporting again gives the same bytes.
    before = (tmp_path / "part-1.zip").read_bytes()
    run("machine 1", "cache", "export", "part-1.zip", "--spec", "three.yaml")
    assert (tmp_path / "part-1.zip").read_bytes() == before


@pytest.mark.parametrize("shard", ["0/2", "3/2", "2", "1/", "/2", "-1/2", "a/b", "1/0"])
def test_bad_shards(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, shard: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "three.yaml").write_text(SPEC)
    with pytest.raises(InputError, match="write I/N with 1 <= I <= N"):
        app(["build", "three.yaml", f"--shard={shard}"])
    assert [path.name for path in tmp_path.iterdir()] == ["three.yaml"]


def test_every_kernel_is_in_one_shard() -> None:
    from gnaforge.cli.options import shard_of
    from gnaforge.plan import Plan

    plan = Plan(library="x", configs=tuple(range(7)))  # type: ignore[arg-type]
    for parts in (1, 2, 3, 7, 9):
        shards = [shard_of(plan, f"{part + 1}/{parts}").configs for part in range(parts)]
        assert sorted(config for shard in shards for config in shard) == list(range(7))
        assert max(map(len, shards)) - min(map(len, shards)) <= 1


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, session_cache: Path) -> Path:
    """An export of one kernel."""
    from gnaforge.build.kernels import build_kernels
    from gnaforge.build_tools.cache_archive import export_artifacts
    from gnaforge.runtime.config import KernelConfig

    config = KernelConfig.parse(KEYS[2])
    path = tmp_path_factory.mktemp("exported") / "part.zip"
    export_artifacts([build_kernels([config])[0][config]], path)
    return path


def changed(source: Path, target: Path, change: Callable[[dict[str, bytes]], None]) -> Path:
    with zipfile.ZipFile(source) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    change(files)
    with zipfile.ZipFile(target, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return target


def rewrite(files: dict[str, bytes], /, **fields: object) -> None:
    (name,) = (name for name in files if name.endswith("/record.json"))
    files[name] = json.dumps({**json.loads(files[name]), **fields}).encode()


def flip(files: dict[str, bytes]) -> None:
    (name,) = (name for name in files if name.endswith("/kernel.so"))
    files[name] = files[name][:-1] + bytes([files[name][-1] ^ 1])


def escape(files: dict[str, bytes]) -> None:
    folder = next(iter(files)).partition("/")[0]
    files[f"{folder}/../../evil"] = b"x"
    rewrite(files, files={"../../evil": "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"})


def nest(files: dict[str, bytes]) -> None:
    (name,) = (name for name in files if name.endswith("/record.json"))
    files[name] = b'{"files": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"


def without_library(files: dict[str, bytes]) -> None:
    (name,) = (name for name in files if name.endswith("/kernel.so"))
    del files[name]
    (record,) = (name for name in files if name.endswith("/record.json"))
    rewrite(files, files={"kernel.o": json.loads(files[record])["files"]["kernel.o"]})


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (flip, "is damaged: kernel.so is not what its record says"),
        (escape, "is damaged"),
        (lambda files: rewrite(files, key="core"), "is no artifact of this version's cache"),
        (lambda files: rewrite(files, digest="0" * 64), "is no artifact of this version's cache"),
        (lambda files: rewrite(files, schema=99), "is no artifact of this version's cache"),
        (lambda files: files.pop(next(name for name in files if name.endswith("/kernel.o"))), "is incomplete"),
        (lambda files: files.clear(), "holds no artifact"),
        (lambda files: rewrite(files, files=3), "a record in it is damaged"),
        (lambda files: rewrite(files, files=["kernel.so"]), "its record is incomplete"),
        (lambda files: rewrite(files, parts="text"), "its record is incomplete"),
        (nest, "a record in it is damaged"),
        (without_library, "its record is incomplete"),
    ],
    ids=[
        "flipped",
        "escaping",
        "key",
        "digest",
        "schema",
        "lost",
        "empty",
        "record",
        "list",
        "parts",
        "deep",
        "partial",
    ],
)
def test_imports_that_must_not_be(exported: Path, tmp_path: Path, change, expected: str) -> None:
    cache = Cache(tmp_path / "cache")
    bad = changed(exported, tmp_path / "bad.zip", change)
    with pytest.raises(InputError, match=expected):
        import_artifacts(bad, cache, needed_files)
    assert list(cache.artifacts()) == [] and not list(tmp_path.rglob("evil"))
    assert [path.name for path in cache.root.iterdir() if path.name != ".locks"] == []
    assert len(import_artifacts(exported, cache)[0]) == 1


def test_an_encrypted_archive_is_refused(exported: Path, tmp_path: Path) -> None:
    data = bytearray(exported.read_bytes())
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):  # bit 0 of each entry's flags
        at = data.find(signature)
        while at >= 0:
            data[at + flags] |= 1
            at = data.find(signature, at + 4)
    (tmp_path / "locked.zip").write_bytes(data)
    with pytest.raises(InputError, match=r"is no zip file, or a damaged one: .*encrypted"):
        import_artifacts(tmp_path / "locked.zip", Cache(tmp_path / "cache"))


def test_a_folder_that_others_may_write_is_not_imported(exported: Path, tmp_path: Path) -> None:
    (artifact,), _ = import_artifacts(exported, Cache(tmp_path / "source"))
    for folder in (artifact.folder, tmp_path / "source"):
        folder.chmod(0o775)
        with pytest.raises(InputError, match=f"{folder} can be written by others"):
            import_artifacts(tmp_path / "source", Cache(tmp_path / "cache"))
        folder.chmod(0o755)
    (artifact.folder / "record.json").write_text("{")
    with pytest.raises(InputError, match="is damaged: it has no record that can be read"):
        import_artifacts(tmp_path / "source", Cache(tmp_path / "cache"))


def test_a_part_without_kernels_has_nothing_to_export(cli, counted, tmp_path: Path) -> None:
    done = cli("build", "three.yaml", "--shard", "4/4", GNAFORGE_CACHE_DIR=str(tmp_path / "cache"), **counted[0])
    assert done.returncode == 0 and "next:" not in done.stdout and "nothing to export" in done.stdout


def test_bad_sources_and_targets_are_explained(own_cache: Path, exported: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.zip").write_text("no zip")
    (tmp_path / "cut.zip").write_bytes(exported.read_bytes()[:2000])
    (tmp_path / "empty").mkdir()
    for arguments, expected in (
        (("import", "text.zip"), "is no zip file, or a damaged one"),
        (("import", "cut.zip"), "is no zip file, or a damaged one"),
        (("import", "absent.zip"), "can't read absent.zip: No such file"),
        (("import", "empty"), "holds no artifact of a gnaforge cache"),
        (("export", "all.zip"), "holds no kernel: nothing was written"),
        (("export", "all.zip", "--spec", "vit-56", "--arch", "cpu"), "holds no kernel of vit-56: nothing was written"),
        (("export", "all.zip", "--arch", "cpu"), "give --spec too"),
        (("export", "all.zip", "--spec", "no-such"), "no-such"),
        (("import", "text.zip/x.zip"), "can't read text.zip/x.zip: Not a directory"),
    ):
        with pytest.raises(InputError, match=re.escape(expected)):
            app(["cache", *arguments])
    app(["cache", "import", str(exported)], standalone_mode=False)
    (tmp_path / "file").write_text("")
    for target in ("all.tar.gz", "file", "file/all.zip"):
        with pytest.raises(
            InputError, match=r"name a \.zip file|can't export to file, which is not a folder|can't write"
        ):
            app(["cache", "export", target])
    assert not (tmp_path / "all.zip").exists() and (tmp_path / "file").read_text() == ""


def test_an_import_says_what_will_not_be_used(cli, own_cache: Path, exported: Path, tmp_path: Path) -> None:
    def older(files: dict[str, bytes]) -> None:
        parts = {"compiler": "nvcc 9", "host_compiler": "g++ 4.0", "cutlass": "1.0"}
        rewrite(files, source_digest="0" * 64, parts=parts)

    changed(exported, tmp_path / "older.zip", older)
    text = cli("cache", "import", "older.zip").stdout
    assert "1 of the kernels imported come from another gnaforge version's sources: they will not be used" in text
    assert "compiled by or with CUTLASS 1.0; g++ 4.0; nvcc 9, which this machine lacks" in text


def test_a_full_disk_stops_an_export_cleanly(exported: Path, tmp_path: Path) -> None:
    import subprocess

    from gnaforge.build_tools.cache_archive import export_artifacts

    small = tmp_path / "small"
    small.mkdir()
    if os.getuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(small)]).returncode:
        pytest.skip("can't mount a small tmpfs here")
    try:
        source = Cache(tmp_path / "cache")
        (artifact,), _ = import_artifacts(exported, source)
        with pytest.raises(InputError, match=r"can't write .*: No space left on device"):
            export_artifacts([artifact], small / "all.zip")
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_launcher_runs_every_compilation_and_changes_no_digest(cli, counted, tmp_path: Path) -> None:
    environment, noted = counted
    log = tmp_path / "launched"
    launcher = tmp_path / "launch er"
    launcher.write_text(f'#!/bin/sh\necho "$*" >> "{log}"\nexec "$@"\n')
    launcher.chmod(0o755)
    cache = {"GNAFORGE_CACHE_DIR": str(tmp_path / "cache"), **environment}
    done = cli("build", "three.yaml", "--shard", "2/3", "--launcher", f"'{launcher}'", **cache)
    assert done.returncode == 0, done.stderr
    lines = log.read_text().splitlines()
    assert len(lines) == 2 and all(line.startswith(environment["CXX"]) and " -c " in line for line in lines)
    assert len(noted()) == 2
    again = cli("build", "three.yaml", "--shard", "2/3", **cache)  # without it, the kernel is the same
    assert "0 compiled, 1 from the cache" in again.stdout and noted() == []


def test_a_missing_launcher_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    from gnaforge.build_tools.toolchain import launcher

    assert launcher() == ()
    monkeypatch.setenv("GNAFORGE_COMPILER_LAUNCHER", "no-such-sccache --flag")
    with pytest.raises(BuildError, match=r"'no-such-sccache' .* is no program on PATH; install it"):
        launcher()
    monkeypatch.setenv("GNAFORGE_COMPILER_LAUNCHER", "'open")
    with pytest.raises(BuildError, match="No closing quotation"):
        launcher()
    monkeypatch.chdir("/")  # compilations run elsewhere
    monkeypatch.setenv("GNAFORGE_COMPILER_LAUNCHER", f"./{str(shutil.which('env'))[1:]}")
    assert launcher() == (shutil.which("env"),)
    monkeypatch.setenv("GNAFORGE_COMPILER_LAUNCHER", f"{shutil.which('env')} A=b")
    assert launcher()[1:] == ("A=b",)
