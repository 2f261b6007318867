"""Caches that machines of several kinds share, and file systems whose locks are seen by one host only, or by none."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
from gnaforge.build.cached import find_kernel
from gnaforge.build.core import CORE_FILE, core_files
from gnaforge.build.kernels import build_kernels, make_jobs
from gnaforge.build_tools import machine, scratch
from gnaforge.build_tools.cache import Cache, user_cache
from gnaforge.build_tools.elf import read_elf
from gnaforge.build_tools.machine import instruction_sets, misfit, needs_of
from gnaforge.build_tools.toolchain import cxx_compiler
from kernel_set import SMALL


@pytest.fixture
def filled(no_kernels: Path, fake_cxx, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with the core and `SMALL`."""
    monkeypatch.setenv("CXX", f"'{fake_cxx()}'")
    cxx_compiler.cache_clear()
    build_kernels([SMALL])
    yield no_kernels
    cxx_compiler.cache_clear()


def foreign(folder: Path, file: str, change: Callable[[bytearray], None] | None = None, **record: object) -> Path:
    """Makes an artifact one that another machine made: changes the bytes of its library, its record, and its name."""
    path, data = folder / file, bytearray((folder / file).read_bytes())
    if change is not None:
        change(data)
        path.write_bytes(data)
    content = json.loads((folder / "record.json").read_text())
    digest = sha256(json.dumps([record, data.hex()[:99]]).encode()).hexdigest()
    files = {**content["files"], file: sha256(data).hexdigest()}
    content |= {"digest": digest, "serial": 9, **record, "files": files}
    (folder / "record.json").write_text(json.dumps(content))
    return folder.rename(folder.with_name(f"{content['key']}-{digest[:16]}"))


def as_arm(data: bytearray) -> None:
    data[18:20] = (183).to_bytes(2, "little")


def broken_for_the_loader(data: bytearray) -> None:
    """Asks for a library that is nowhere, in place of libc."""
    at = data.index(b"libc.so.6\0")
    data[at : at + 9] = b"libQ.so.6"


OTHERS: dict[str, tuple[Callable[[bytearray], None] | None, dict[str, object], str]] = {
    "architecture": (as_arm, {}, "was built for aarch64, this is x86_64"),
    "glibc": (None, {"needs": {"glibc": "9.99"}}, "needs glibc 9.99, this system has glibc "),
    "instructions": (None, {"parts": {"instruction_sets": ["avx9"]}}, "was compiled for processors with avx9"),
    "a library that is not here": (broken_for_the_loader, {}, "libQ.so.6: cannot open shared object file"),
}
pytestmark = pytest.mark.skipif(os.uname().machine != "x86_64", reason="the others are made out of x86_64 libraries")


@pytest.mark.parametrize("kind", OTHERS)
def test_a_kernel_for_another_machine_is_passed_over_and_made_anew(filled: Path, forked, kind: str) -> None:
    change, record, expected = OTHERS[kind]
    path = find_kernel(SMALL)
    assert path is not None
    theirs = foreign(path.parent, "kernel.so", change, **record)
    code = f"import gnaforge; print(gnaforge.register({SMALL.key!r}), gnaforge.registry[{SMALL.key!r}].origin)"
    done = forked(code)
    lines = [line for line in done.stderr.splitlines() if "passed over" in line]
    assert done.stdout.startswith(f"['{SMALL.key}'] {filled}"), done.stderr
    assert str(theirs) not in done.stdout and theirs.is_dir()
    assert len(lines) == 1 and expected in lines[0] and str(theirs) in lines[0]
    again = forked(code)
    assert again.stdout == done.stdout and "passed over" not in again.stderr


@pytest.mark.parametrize("kind", OTHERS)
def test_a_core_for_another_machine_is_passed_over_and_made_anew(filled: Path, forked, kind: str) -> None:
    change, record, expected = OTHERS[kind]
    (core,) = filled.glob("core-*")
    theirs = foreign(core, CORE_FILE, change, **record)
    done = forked("from gnaforge.runtime.core import core; print(core() is core())", CXX="g++")
    assert done.stdout == "True\n", done.stderr
    lines = [line for line in done.stderr.splitlines() if "passed over" in line]
    assert len(lines) == 1 and expected in lines[0] and str(theirs) in lines[0]
    again = forked("from gnaforge.runtime.core import core; print(core() is core())", CXX="/nonexistent")
    assert again.stdout == "True\n" and again.stderr == ""


def test_what_this_machine_would_make_and_can_not_load_is_made_anew(filled: Path, forked, monkeypatch) -> None:
    """The digest is that of an own build, and the content what the record says: only the loader knows better."""
    for folder, file in ((find_kernel(SMALL).parent, "kernel.so"), (next(filled.glob("core-*")), CORE_FILE)):
        data = bytearray((folder / file).read_bytes())
        broken_for_the_loader(data)
        (folder / file).write_bytes(data)
        record = json.loads((folder / "record.json").read_text())
        record["files"][file] = sha256(data).hexdigest()
        (folder / "record.json").write_text(json.dumps(record))
    monkeypatch.setenv("CXX", "g++")  # which made the core, too
    cxx_compiler.cache_clear()
    found = next(core_files())
    assert Path(found.name).parent == next(filled.glob("core-*"))
    cxx_compiler.cache_clear()
    done = forked(f"import gnaforge; print(gnaforge.register({SMALL.key!r}))")
    assert done.stdout == f"['{SMALL.key}']\n", done.stderr
    assert done.stderr.count("which can't be loaded here: ") == 2
    assert forked(f"import gnaforge; print(gnaforge.register({SMALL.key!r}))").stderr == ""


def test_a_layer_for_another_machine_does_not_hide_ones_own_kernel(filled: Path, tmp_path: Path, monkeypatch) -> None:
    own = find_kernel(SMALL)
    assert own is not None
    layer = tmp_path / "layer"
    layer.mkdir(mode=0o700)
    shutil.copytree(own.parent, layer / own.parent.name)
    foreign(layer / own.parent.name, "kernel.so", as_arm)
    monkeypatch.setenv("GNAFORGE_CACHE_PATH", str(layer))
    assert find_kernel(SMALL) == own


def test_what_machines_differ_in_is_part_of_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    def digest() -> str:
        cxx_compiler.cache_clear()
        return make_jobs([SMALL], cxx_compiler())[0].digest

    plain = digest()
    monkeypatch.setattr("gnaforge.build_tools.toolchain.own_libc", lambda: "glibc 2.17")
    assert digest() != plain
    monkeypatch.undo()
    monkeypatch.setenv("CXX", "g++ -mavx2")
    with_avx2 = cxx_compiler.__wrapped__()
    assert {"avx", "avx2"} <= set(with_avx2.instruction_sets)
    assert make_jobs([SMALL], with_avx2)[0].parts["instruction_sets"] == list(with_avx2.instruction_sets)
    monkeypatch.setenv("CXX", "g++ -march=native")
    native = cxx_compiler.__wrapped__()
    assert set(native.instruction_sets) <= machine.own_instruction_sets()
    monkeypatch.setenv("CXX", "g++")
    cxx_compiler.cache_clear()
    assert cxx_compiler().instruction_sets == () and digest() == plain


def test_what_a_library_needs_is_read_from_its_symbols(small_kernel: Path) -> None:
    needs = needs_of([read_elf(small_kernel)])
    assert (
        needs["glibc"].startswith("2.")
        and json.loads((small_kernel.parent / "record.json").read_text())["needs"] == needs
    )
    head = small_kernel.read_bytes()[:64]
    assert misfit({"needs": needs}, head) == "" and misfit({}, b"text") == ""
    assert "needs glibc" in misfit({"needs": {"glibc": "2.999"}}, head)
    assert misfit({"needs": [], "parts": 3}, head) == ""


def test_macros_of_compilers_are_known_by_the_kernels_names() -> None:
    assert instruction_sets("#define __SSE2__ 1\n#define __AVX512F__ 1\n#define __LZCNT__ 1\n") == ["abm", "avx512f"]
    assert instruction_sets("#define __ARM_FEATURE_SVE 1\n#define __aarch64__ 1\n") == ["sve"]


# What becomes of locks: none holds anybody up, as across hosts, or the file system has none at all.
LOCKS = {
    "always granted": "fcntl.flock = lambda *_: None",
    "not there": f"""
def none(*_):
    raise OSError({errno.ENOSYS}, "no locks")
fcntl.flock = none""",
    "no lock daemon": f"""
def none(*_):
    raise OSError({errno.ENOLCK}, "no locks")
fcntl.flock = none""",
}
BUILDER = """
import fcntl, sys, time
{locks}
from pathlib import Path
from gnaforge.build_tools import artifact, cache
made = []
meeting, least = Path(sys.argv[2]), int(sys.argv[3])
def make(scratch, folder):
    (meeting / sys.argv[1]).touch()
    end = time.monotonic() + 100
    while len(list(meeting.iterdir())) < least and time.monotonic() < end:
        time.sleep(0.01)
    for name in ("a.bin", "b.bin"):
        (folder / name).write_bytes(bytes([int(sys.argv[1])]) * 300_000)
    made.append(1)
    return {{"key": "thing"}}
found = cache.user_cache().find_or_make("thing", "ab" * 32, make)
assert found.intact(), "not whole"
assert len({{found.folder.joinpath(name).read_bytes() for name in ("a.bin", "b.bin")}}) == 1, "of two builders"
print(len(made))
"""


@pytest.mark.parametrize("kind", LOCKS)
def test_builders_whose_locks_hold_nobody_up_publish_whole_artifacts(
    own_cache: Path, tmp_path: Path, kind: str
) -> None:
    for round_ in range(3):
        meeting = tmp_path / f"meeting {round_}"
        meeting.mkdir()
        code = BUILDER.format(locks=LOCKS[kind])
        children = [
            subprocess.Popen(
                [sys.executable, "-c", code, str(i), meeting, "2"],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for i in range(6)
        ]
        out = [child.communicate(timeout=120) for child in children]
        assert [child.returncode for child in children] == [0] * 6, out
        assert sum(int(printed) for printed, _ in out) > 1  # they did meet
        assert all(said == "" for _, said in out)
        (artifact,) = user_cache().artifacts()
        assert artifact.intact() and not list(own_cache.glob(".build-*"))
        if round_ < 2:
            shutil.rmtree(artifact.folder)


def test_kernels_are_built_and_called_without_locks(filled: Path, forked) -> None:
    key = SMALL.key.replace("kv8", "kv16")
    done = forked(
        LOCKS["not there"].join(("import fcntl", f"\nimport gnaforge; print(gnaforge.register({key!r}))")), CXX="g++"
    )
    assert done.stdout == f"['{key}']\n", done.stderr


def test_private_folders_of_others_stay(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(own_cache)
    cache.make_ready()
    dead = subprocess.Popen([sys.executable, "-c", "pass"])
    dead.wait()
    own = scratch.make_scratch(own_cache)
    _, boot, space, *_ = own.name.split("-")

    def left_by(boot: str, space: str, pid: int) -> Path:
        folder = own_cache / f".build-{boot}-{space}-{pid}-1-x"
        folder.mkdir()
        return folder

    left_by(boot, space, dead.pid)
    left_by(boot, space, os.getpid())  # a number that came again: this process began at another time
    other_host, other_container = left_by("0" * len(boot), space, dead.pid), left_by(boot, "1", dead.pid)
    old_host = left_by("1" * len(boot), space, 7)
    os.utime(old_host, (0, own.stat().st_mtime - 8 * 86400))
    monkeypatch.setattr("time.time", lambda: 0.0)  # this host's clock is wrong, which doesn't matter
    with cache.scratch():
        pass
    assert {path.name for path in own_cache.glob(".build-*")} == {own.name, other_host.name, other_container.name}


def test_waiting_for_a_lock_goes_on_where_there_are_locks(own_cache: Path, tmp_path: Path, forked) -> None:
    """A lock that somebody holds is not taken for one that the file system lacks."""
    cache = Cache(own_cache)
    cache.make_ready()
    (own_cache / ".locks").mkdir(mode=0o700)
    held = os.open(own_cache / ".locks" / ("thing-" + "ab" * 8), os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(held, fcntl.LOCK_EX)
    child = subprocess.Popen(
        [sys.executable, "-c", BUILDER.format(locks=""), "1", tmp_path, "0"], stdout=subprocess.PIPE, text=True
    )
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(1.5)
    os.close(held)
    assert child.communicate(timeout=60)[0] == "1\n"
