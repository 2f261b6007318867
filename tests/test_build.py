"""Building with the real compiler: cache, incremental builds, errors, processes that race."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from gnaforge.build import identity as recipe, kernels as building, link as linking, render
from gnaforge.build.identity import source_digest
from gnaforge.build.kernels import build_kernels, make_jobs
from gnaforge.build.library import read_library
from gnaforge.build.link import build, library_path
from gnaforge.build_tools import includes, toolchain
from gnaforge.build_tools.cache import Cache, cache_layers, read_artifact, user_cache
from gnaforge.build_tools.compile import Step, run_steps
from gnaforge.build_tools.toolchain import cxx_compiler
from gnaforge.errors import BuildError
from gnaforge.plan import Plan
from gnaforge.runtime.config import KernelConfig
from kernel_set import cpu_config

ONE = cpu_config(1, "fp32", (8,), (8,))
TWO = cpu_config(1, "fp32", (8,), (16,))


@pytest.fixture(scope="module")
def warm_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that holds ONE and TWO, for tests to copy."""
    folder = tmp_path_factory.mktemp("warm") / "cache"
    before = os.environ["GNAFORGE_CACHE_DIR"]
    os.environ["GNAFORGE_CACHE_DIR"] = str(folder)
    try:
        build_kernels([ONE, TWO])
    finally:
        os.environ["GNAFORGE_CACHE_DIR"] = before
    return folder


@pytest.fixture
def copied_cache(warm_cache: Path, own_cache: Path) -> Path:
    shutil.copytree(warm_cache, own_cache)
    own_cache.chmod(0o700)
    return own_cache


def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes any further compilation fail loudly."""

    def refuse(*_: object) -> None:
        raise AssertionError("ninja was started")

    for module in (building, linking):
        monkeypatch.setattr(module, "run_steps", refuse)


def test_build_writes_library_record_and_commands(copied_cache: Path, tmp_path: Path, monkeypatch) -> None:
    plan = Plan(library="pair", configs=(ONE, TWO))
    result = build(plan, tmp_path)
    assert result.library == library_path(tmp_path, "pair") and result.linked
    assert result.compiled == [] and result.reused == [ONE, TWO]
    assert [row["key"] for row in read_library(result.library)] == [ONE.key, TWO.key]
    assert read_library(result.library)[0]["library_bytes"] > 10_000
    commands = json.loads((tmp_path / "pair" / "compile_commands.json").read_text())
    assert [entry["file"] for entry in commands] == [ONE.key + ".cpp", TWO.key + ".cpp"]
    assert all(Path(entry["directory"], entry["file"]).is_file() for entry in commands)
    no_compiler(monkeypatch)
    stamp = result.library.stat().st_mtime_ns
    again = build(plan, tmp_path)
    assert not again.linked and again.library.stat().st_mtime_ns == stamp


def test_the_compiler_reads_what_the_folder_of_sources_shows(own_cache: Path, tmp_path: Path, monkeypatch) -> None:
    """Rendered once per build: the files that a person reads and those that are compiled can't differ."""
    rendered: list[KernelConfig] = []
    render_kernel = render.render_kernel

    def counting(config: KernelConfig) -> str:
        rendered.append(config)
        return render_kernel(config) + f"// rendering {len(rendered)}\n"

    for module in (building, render):
        monkeypatch.setattr(module, "render_kernel", counting)
    build(Plan(library="pair", configs=(ONE, TWO)), tmp_path)
    assert rendered == [ONE, TWO]
    for config in (ONE, TWO):
        shown = tmp_path / "pair" / "src" / f"{config.key}.cpp"
        (compiled,) = own_cache.glob(f"{config.key}-*/kernel.cpp")
        assert compiled.read_bytes() == shown.read_bytes()


def test_a_damaged_library_is_linked_again(copied_cache: Path, tmp_path: Path) -> None:
    plan = Plan(library="one", configs=(ONE,))
    path = build(plan, tmp_path).library
    good = path.read_bytes()
    path.write_bytes(good[:-1] + b"x")
    assert build(plan, tmp_path).linked
    assert path.read_bytes() == good


def test_record_says_how_it_was_made(copied_cache: Path) -> None:
    artifact = read_artifact(next(copied_cache.glob(f"{ONE.key}-*")))
    assert artifact is not None and artifact.intact()
    record = artifact.record
    assert record["key"] == ONE.key and record["seconds"] > 0
    assert set(record["files"]) == {"kernel.cpp", "kernel.o", "kernel.so", "library.cpp", "library.o"}
    assert "gnaforge/gna/window.h" in record["parts"]["headers"]
    assert record["parts"]["compiler"] == cxx_compiler().version
    assert str(copied_cache) not in json.dumps(record)


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "record"])
def test_a_damaged_artifact_is_not_used_and_made_anew(copied_cache: Path, damage: str) -> None:
    folder = next(copied_cache.glob(f"{ONE.key}-*"))
    library = folder / "kernel.so"
    good = library.read_bytes()
    if damage == "flip":
        library.write_bytes(good[:1000] + bytes([good[1000] ^ 1]) + good[1001:])
    elif damage == "truncate":
        library.write_bytes(good[:1000])
    elif damage == "remove":
        library.unlink()
    else:
        (folder / "record.json").write_text('{"schema": 1')
    artifacts, compiled = build_kernels([ONE, TWO])
    assert compiled == [ONE]
    assert artifacts[ONE].verified_path("kernel.so").read_bytes() == good  # the build is reproducible, too


def test_what_changes_the_digest_and_what_does_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = cxx_compiler()
    (before,) = make_jobs([ONE], compiler)
    source = source_digest(ONE)
    copy = tmp_path / "templates"
    shutil.copytree(recipe.template_dir(), copy)  # new time stamps, new place
    monkeypatch.setattr(recipe, "template_dir", lambda: copy)
    includes.forget_headers()
    assert make_jobs([ONE], compiler)[0].digest == before.digest and source_digest(ONE) == source

    unrelated = copy / "include" / "gnaforge" / "sm90"
    unrelated.mkdir(exist_ok=True)
    (unrelated / "forward.h").write_text("// a header of another arch\n")
    includes.forget_headers()
    assert make_jobs([ONE], compiler)[0].digest == before.digest

    window = copy / "include" / "gnaforge" / "gna" / "window.h"
    window.write_text(window.read_text() + "// changed\n")
    includes.forget_headers()
    changed = make_jobs([ONE], compiler)[0]
    assert changed.digest != before.digest and source_digest(ONE) != source
    includes.forget_headers()

    monkeypatch.undo()
    newer = toolchain.Compiler(compiler.command, compiler.path, compiler.version + " newer")
    other = make_jobs([ONE], newer)[0]
    assert other.digest != before.digest and source_digest(ONE) == source
    moved = toolchain.Compiler(("/elsewhere/g++",), Path("/elsewhere/g++"), compiler.version)
    assert make_jobs([ONE], moved)[0].digest == before.digest
    told = toolchain.Compiler((*compiler.command, "-march=native"), compiler.path, compiler.version)
    assert make_jobs([ONE], told)[0].digest != before.digest


def test_options_from_the_environment_do_not_reach_compilers(own_cache: Path, tmp_path: Path, monkeypatch) -> None:
    """They are in no digest."""
    (tmp_path / "cmath").write_text("#error found\n")
    for name in ("CPATH", "CPLUS_INCLUDE_PATH"):
        monkeypatch.setenv(name, str(tmp_path))
    assert build_kernels([ONE])[1] == [ONE]


def test_kernels_that_vanish_during_a_build_are_made_again(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_kernels([ONE])
    compile_ = building._compile

    def delete_first(*arguments: Any) -> Any:
        monkeypatch.setattr(building, "_compile", compile_)
        shutil.rmtree(next(own_cache.glob(f"{ONE.key}-*")))
        return compile_(*arguments)

    monkeypatch.setattr(building, "_compile", delete_first)
    artifacts, compiled = build_kernels([ONE, TWO])
    assert compiled == [TWO, ONE] and all(artifact.intact() for artifact in artifacts.values())


def test_the_first_error_comes_with_log_and_command(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = building.render_kernel
    monkeypatch.setattr(building, "render_kernel", lambda config: good(config) + "\nint broken = undeclared_name;\n")
    with pytest.raises(BuildError) as caught:
        build_kernels([ONE])
    text = str(caught.value)
    assert text.startswith(f"{ONE.key} did not compile: ") and "undeclared_name" in text.splitlines()[0]
    log = Path(text.split("full log: ")[1].splitlines()[0])
    assert "undeclared_name" in log.read_text()
    command = text.split("again:    ")[1]
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.returncode != 0 and "undeclared_name" in done.stderr
    assert not list(own_cache.glob(f"{ONE.key}-*")) and not list(own_cache.glob(".build-*"))
    monkeypatch.setattr(building, "render_kernel", good)
    assert build_kernels([ONE])[1] == [ONE]


def test_one_failure_keeps_the_others(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = building.render_kernel

    def breaking(config: KernelConfig) -> str:
        return good(config) + ("#error on purpose\n" if config == TWO else "")

    monkeypatch.setattr(building, "render_kernel", breaking)
    with pytest.raises(BuildError, match=f"{TWO.key} did not compile: .*on purpose"):
        build_kernels([ONE, TWO])
    monkeypatch.setattr(building, "render_kernel", good)
    no_compiler(monkeypatch)
    assert build_kernels([ONE])[1] == []


def test_killed_compilers_run_once_more_alone(tmp_path: Path) -> None:
    notes: list[str] = []
    script = "test -e {0}.seen && cp in {0} || {{ touch {0}.seen; echo 'Killed signal terminated cc1plus'; exit 1; }}"
    (tmp_path / "in").write_text("x")
    steps = [Step(name, ("in",), ("sh", "-c", script.format(name))) for name in ("a", "b")]
    assert run_steps(tmp_path, steps, 2, note=notes.append) == []
    assert len(notes) == 1 and "one at a time" in notes[0]


def test_no_compiler_is_explained(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.delenv("CXX", raising=False)
    toolchain.cxx_compiler.cache_clear()
    try:
        with pytest.raises(
            BuildError, match=r"no C\+\+ compiler found \(looked for g\+\+, c\+\+ and clang\+\+ on PATH\)"
        ):
            build_kernels([ONE])
        monkeypatch.setenv("CXX", "no-such-compiler -m64")
        toolchain.cxx_compiler.cache_clear()
        with pytest.raises(BuildError, match="CXX=no-such-compiler"):
            build_kernels([ONE])
        monkeypatch.setenv("CXX", '"g++')
        toolchain.cxx_compiler.cache_clear()
        with pytest.raises(BuildError, match="CXX is '\"g\\+\\+': No closing quotation"):
            build_kernels([ONE])
    finally:
        toolchain.cxx_compiler.cache_clear()


@pytest.mark.parametrize("kind", ["link", "file", "world-writable"])
def test_cache_folders_that_cannot_be_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    folder = tmp_path / "cache"
    real = tmp_path / "real"
    real.mkdir()
    if kind == "link":
        folder.symlink_to(real)
    elif kind == "file":
        folder.write_text("")
    else:
        folder.mkdir()
        folder.chmod(0o777)
    monkeypatch.setenv("GNAFORGE_CACHE_DIR", str(folder))
    expected = {
        "link": "is a symbolic link",
        "file": "is not a folder",
        "world-writable": "can be written by others: chmod 700 it",
    }[kind]
    with pytest.raises(BuildError, match=expected):
        build_kernels([ONE])
    assert not Cache(folder).is_trusted()


def test_a_relative_cache_with_odd_letters_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GNAFORGE_CACHE_DIR", "ein Über $cache'")
    plan = Plan(library="odd", configs=(ONE,))
    assert build(plan, Path("o ü")).library.is_file()
    assert build_kernels([ONE])[1] == []


def test_new_caches_are_private(own_cache: Path) -> None:
    user_cache().make_ready()
    assert own_cache.stat().st_mode & 0o777 == 0o700


def test_layers_come_before_the_user_cache(monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    monkeypatch.setenv("GNAFORGE_CACHE_PATH", f"/a{os.pathsep}/b")
    assert [cache.root for cache in cache_layers()] == [Path("/a"), Path("/b"), own_cache]


def test_kernels_in_a_cache_layer_are_found_without_a_compiler(python, copied_cache: Path, own_cache: Path) -> None:
    layer = own_cache.with_name("layer")
    copied_cache.rename(layer)
    done = python(
        "import torch, gnaforge\n"
        "x = torch.randn(1, 9, 1, 8)\n"
        "print(gnaforge.na1d(x, x, x, 3).shape, sorted(c.kv_tile for c in gnaforge.registry))\n",
        GNAFORGE_CACHE_PATH=str(layer),
    )
    assert done.stdout == "torch.Size([1, 9, 1, 8]) [(8,), (16,)]\n", done.stderr


def test_a_kernel_built_after_a_miss_is_found(python, own_cache: Path) -> None:
    done = python(
        "import torch, gnaforge\n"
        "from gnaforge.build.kernels import build_kernels\n"
        "x = torch.randn(1, 9, 1, 8)\n"
        "for _ in range(2):\n"
        "    try:\n"
        "        print(gnaforge.na1d(x, x, x, 3).shape)\n"
        "    except gnaforge.NoKernelError:\n"
        f"        build_kernels([gnaforge.KernelConfig.parse({ONE.key!r})])\n"
    )
    assert done.stdout == "torch.Size([1, 9, 1, 8])\n", done.stderr


def test_stale_kernels_are_not_loaded(python, copied_cache: Path) -> None:
    for record in copied_cache.glob("gna_*/record.json"):
        data = json.loads(record.read_text())
        data["source_digest"] = "0" * 64
        record.write_text(json.dumps(data))
    done = python("import torch, gnaforge\nx = torch.randn(1, 9, 1, 8)\ngnaforge.na1d(x, x, x, 3)")
    assert "NoKernelError" in done.stderr and "no kernel is loaded" in done.stderr


def test_damaged_kernels_in_the_cache_are_not_loaded(python, copied_cache: Path) -> None:
    for library in copied_cache.glob("gna_*/kernel.so"):
        library.write_bytes(library.read_bytes()[:-8] + b"attacker")
    done = python("import torch, gnaforge\nx = torch.randn(1, 9, 1, 8)\ngnaforge.na1d(x, x, x, 3)")
    assert "NoKernelError" in done.stderr and "no kernel is loaded" in done.stderr
