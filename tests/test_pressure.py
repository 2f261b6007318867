"""Races, kills, full disks, foreign folders, damage, forks, ranks: what breaks other tools. All of it done for real."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from gnaforge.build.identity import source_digest
from gnaforge.build.kernels import build_kernels
from gnaforge.build_tools.artifact import read_artifact
from gnaforge.build_tools.cache import user_cache
from gnaforge.errors import BuildError
from gnaforge.runtime.config import KernelConfig
from kernel_set import SMALL

PRELUDE = f"""
import os, random, shutil, signal, sys, threading, time
from pathlib import Path
import torch, gnaforge, gnaforge.build.kernels, filelock
from gnaforge import register
KEY = {SMALL.key!r}
cache = Path(os.environ["GNAFORGE_CACHE_DIR"])
x = torch.arange(72.).reshape(1, 9, 1, 8).sin()
def right():
    out = gnaforge.na1d(x, x, x, 3)
    scores = x[0, :, 0] @ x[0, :, 0].T * 8**-0.5
    begin = (torch.arange(9) - 1).clamp(0, 6)
    for i, b in enumerate(begin.tolist()):
        scores[i, :b], scores[i, b + 3:] = -torch.inf, -torch.inf
    return torch.allclose(out[0, :, 0], scores.softmax(-1) @ x[0, :, 0], atol=1e-5)
def child(work):
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            status = 0 if work() else 3
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
        finally:
            os._exit(status)
    return pid
def status(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
def have():
    return register(KEY) == [KEY] and right()
"""


@pytest.fixture
def real_cxx(tmp_path: Path) -> Path:
    """g++ itself, but for a line in a file for each kernel that it compiles."""
    folder = tmp_path / "real compiler"
    folder.mkdir()
    script = folder / "g++"
    count = f'case "$*" in *kernel.cpp*) echo x >> "{folder}/compiled";; esac'
    script.write_text(f'#!/bin/sh\n{count}\nexec g++ "$@"\n')
    script.chmod(0o755)
    return script


@pytest.fixture
def run(forked, no_kernels: Path):
    """Runs code after the prelude with a compiler; it must succeed. Returns the lines that it printed."""

    def call(code: str, compiler: Path | str = "g++", **environment: str) -> list[str]:
        done = forked(PRELUDE + code, **{"CXX": f"'{compiler}'", **environment})
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return call


def compiled(compiler: Path) -> int:
    """How many kernels a compiler compiled."""
    count = compiler.with_name("compiled")
    return len(count.read_text().splitlines()) if count.exists() else 0


@pytest.mark.parametrize("kind", ["fake", "real"])
def test_of_16_processes_that_miss_a_kernel_one_compiles_it(run, fake_cxx, real_cxx, kind: str) -> None:
    compiler = real_cxx if kind == "real" else fake_cxx(0.3)
    out = run("print([status(pid) for pid in [child(have) for _ in range(16)]])", compiler)
    assert out == [str([0] * 16)] and compiled(compiler) == 1


KILLS = """
def killed(seconds, whole_group):
    pid = child(lambda: (os.setsid(), have()))
    time.sleep(seconds)
    try:
        (os.killpg if whole_group else os.kill)(pid, signal.SIGKILL)
    except ProcessLookupError:  # before its setsid
        os.kill(pid, signal.SIGKILL)
    return status(pid)
def remains():
    return [path for path in cache.glob("*") if path.name.startswith(("gna_", ".build-"))]
"""


def test_a_build_killed_at_any_moment_leaves_nothing_wrong(run, fake_cxx, no_kernels: Path) -> None:
    """Only the process dies; what it started goes on writing for a moment."""
    out = run(
        KILLS
        + """
begin = time.monotonic()
assert status(child(have)) == 0
whole = time.monotonic() - begin
ends = []
for moment in range(20):
    for path in cache.glob("gna_*"):
        shutil.rmtree(path)
    ends.append(killed(random.Random(moment).uniform(0, whole), False))
    assert status(child(have)) == 0, moment
print(set(ends) <= {0, -9}, ends.count(-9) >= 5)
time.sleep(0.3)
from gnaforge.build_tools.cache import Cache
with Cache(cache).scratch():
    pass
print([path.name[:4] for path in remains()])
""",
        fake_cxx(0.05),
    )
    assert out == ["True True", "['gna_']"]
    (folder,) = no_kernels.glob("gna_*")
    artifact = read_artifact(folder)
    assert artifact is not None and artifact.intact()


def test_the_real_compiler_killed(run, real_cxx) -> None:
    out = run(
        KILLS
        + """
print([killed(random.Random(moment).uniform(0.1, 1.5), True) for moment in range(4)])
print(status(child(have)), [path.name[:4] for path in remains()])
""",
        real_cxx,
    )
    assert out == ["[-9, -9, -9, -9]", "0 ['gna_']"]


def test_a_lock_dies_with_its_holder_though_a_forked_child_lives_on(run, fake_cxx) -> None:
    out = run(
        """
def builds_and_forks():
    threading.Thread(target=lambda: register(KEY), daemon=True).start()
    while not list(cache.glob(".build-*")):
        time.sleep(0.01)
    worker = child(lambda: time.sleep(60))
    print(worker, flush=True)
    time.sleep(60)
reader, writer = os.pipe()
def redirected():
    os.dup2(writer, 1)
    builds_and_forks()
pid = child(redirected)
worker = int(os.read(reader, 100))
os.kill(pid, signal.SIGKILL)
status(pid)
print(status(child(have)))
os.kill(worker, 0)  # it lives
os.kill(worker, signal.SIGKILL)
""",
        fake_cxx(1),
    )
    assert out == ["0"]


def test_forks_of_a_process_that_has_registered_or_is_about_to(run, fake_cxx) -> None:
    compiler = fake_cxx(0.5)
    out = run(
        """
from torch.utils.data import DataLoader, Dataset
class Items(Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, index):
        return torch.tensor([have()])
thread = threading.Thread(target=lambda: register(KEY))
thread.start()
while not list(cache.glob(".build-*")):
    time.sleep(0.01)
first = child(have)  # while a thread of its parent builds, and holds locks that it doesn't have
thread.join()
print(status(first), all(torch.cat(list(DataLoader(Items(), num_workers=2)))), right())
""",
        compiler,
    )
    assert out == ["0 True True"] and compiled(compiler) == 1


def test_workers_register_for_themselves(run, fake_cxx) -> None:
    compiler = fake_cxx(0.2)
    code = """
from torch.utils.data import DataLoader, Dataset
class Items(Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, index):
        return torch.tensor([have()])
print(all(torch.cat(list(DataLoader(Items(), num_workers=2)))))
"""
    assert run(code, compiler) == ["True"] and compiled(compiler) == 1


def test_ranks_register_the_same_kernel(run, fake_cxx, tmp_path: Path) -> None:
    compiler = fake_cxx(0.3)
    out = run(
        f"""
import torch.distributed as dist
def rank(index):
    dist.init_process_group("gloo", init_method="file://{tmp_path}/store", rank=index, world_size=4)
    dist.barrier()
    ok = torch.tensor([have()], dtype=torch.int32)
    dist.all_reduce(ok)
    dist.destroy_process_group()
    return ok.item() == 4
print([status(pid) for pid in [child(lambda index=index: rank(index)) for index in range(4)]])
""",
        compiler,
    )
    assert out == ["[0, 0, 0, 0]"] and compiled(compiler) == 1


def test_the_cache_deleted_while_in_use(run, fake_cxx) -> None:
    compiler = fake_cxx(0.5)
    out = run(
        f"""
begun = Path({str(compiler.with_name("compiled"))!r})
def delete_during_a_build():
    while not begun.exists():
        time.sleep(0.01)
    kept = [path.rename(cache.parent / path.name) for path in cache.glob("core-*")]
    shutil.rmtree(cache)
    cache.mkdir(mode=0o700)
    [path.rename(cache / path.name) for path in kept]
thread = threading.Thread(target=delete_during_a_build)
thread.start()
print(have())
thread.join()
shutil.rmtree(cache)
print(right(), have(), cache.exists())
""",
        compiler,
    )
    assert out == ["True", "True True False"] and compiled(compiler) == 2


DAMAGES = {
    "flipped": "data = bytearray(library.read_bytes()); data[len(data) // 2] ^= 1; library.write_bytes(bytes(data))",
    "truncated": "os.truncate(library, library.stat().st_size // 2)",
    "empty": "os.truncate(library, 0)",
    "linked": "library.rename(cache / '.elsewhere'); library.symlink_to(cache / '.elsewhere')",
    "folder linked": "folder.rename(cache / '.elsewhere'); folder.symlink_to(cache / '.elsewhere')",
    "writable": "library.chmod(0o666)",
    "record writable": "(folder / 'record.json').chmod(0o666)",
    "record": "(folder / 'record.json').write_text('[]')",
    "deep record": "(folder / 'record.json').write_text('[' * 100000)",
    "no file": "library.unlink()",
    "a folder": "library.unlink(); library.mkdir()",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_fails_its_check_is_not_loaded_and_made_anew(run, fake_cxx, damage: str) -> None:
    compiler = fake_cxx()
    out = run(
        f"""
assert status(child(have)) == 0
(folder,) = cache.glob("gna_*")
library = folder / "kernel.so"
{DAMAGES[damage]}
from gnaforge.build.cached import find_kernel
print(find_kernel(gnaforge.KernelConfig.parse(KEY)), have(), find_kernel(gnaforge.KernelConfig.parse(KEY)) == library)
""",
        compiler,
    )
    assert out == ["None True True"] and compiled(compiler) == 2


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A file system of 64 kB."""
    folder = Path(tempfile.mkdtemp())
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", folder], capture_output=True, text=True)
    if mounted.returncode:
        folder.rmdir()
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)
    folder.rmdir()


def leave(folder: Path, free: int) -> Path:
    """Fills a file system but for so many bytes."""
    disk = os.statvfs(folder)
    filling = folder / "filling"
    filling.write_bytes(b"x" * max(0, disk.f_bavail * disk.f_frsize - free))
    return filling


def test_a_full_disk_is_an_error_and_no_more(small_disk: Path, fake_cxx, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GNAFORGE_CACHE_DIR", str(small_disk / "cache"))
    monkeypatch.setenv("CXX", f"'{fake_cxx()}'")
    from gnaforge.build_tools.toolchain import cxx_compiler

    cxx_compiler.cache_clear()
    try:
        for free in (0, 4096, 8192, 16384, 32768, 65536):
            filling = leave(small_disk, free)
            with pytest.raises(BuildError, match=r"No space left|can't (create|write)"):
                build_kernels([SMALL])
            filling.unlink()
            assert list(user_cache().artifacts()) == [] and not list((small_disk / "cache").glob(".build-*"))
        subprocess.run(["mount", "-o", "remount,size=8m", small_disk], check=True)
        assert build_kernels([SMALL])[1] == [SMALL]
    finally:
        cxx_compiler.cache_clear()


def test_a_limit_on_file_sizes(run, fake_cxx) -> None:
    """What a full disk does, where none can be mounted."""
    out = run(
        """
import resource
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
found = []  # the limit holds for what is printed, too
for limit in (0, 100, 20_000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        register(KEY)
    except gnaforge.BuildError as error:
        named = "File too large" in str(error) or "File size limit exceeded" in str(error)
        found.append((named, list(cache.glob(".build-*")), list(cache.glob("gna_*"))))
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(found, have())
""",
        fake_cxx(),
    )
    assert out == [f"{[(True, [], [])] * 3} True"]


AS_NOBODY = """
import ninja, jinja2, platformdirs, gnaforge.build.cache_report
gnaforge.na1d
b"x".decode("unicode-escape")  # what Python and jinja2 import late may be out of reach afterwards
def drop():
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
def said(call):
    try:
        return str(call())
    except Exception as error:
        return f"{type(error).__name__}: {error}"
"""


@pytest.fixture
def open_cache(no_kernels: Path, fake_cxx) -> Iterator[Path]:
    """A cache that holds `SMALL`, where every user can read it."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    cache = folder / "cache"
    shutil.copytree(no_kernels, cache)
    before = {name: os.environ.get(name) for name in ("GNAFORGE_CACHE_DIR", "CXX")}
    os.environ["GNAFORGE_CACHE_DIR"] = str(cache)
    build_kernels([SMALL])
    cache.chmod(0o755)
    os.environ["GNAFORGE_CACHE_DIR"] = str(before["GNAFORGE_CACHE_DIR"])
    yield cache
    cache.chmod(0o755)
    shutil.rmtree(folder)


def test_a_cache_that_only_can_be_read(run, open_cache: Path) -> None:
    """Its kernels run; to build another one is an error that says what to do."""
    owner = "belongs to user 0, not to you" if os.getuid() == 0 else "is read-only"
    out = run(
        AS_NOBODY
        + """
if os.getuid():
    cache.chmod(0o500)
drop()
try:
    (cache / "mine").write_text("x")
    print("the condition does not bite")
except PermissionError:
    print("read-only")
print(have())
print(said(lambda: register(KEY.replace("q8", "q16"))))
""",
        GNAFORGE_CACHE_DIR=str(open_cache),
    )
    assert out[:2] == ["read-only", "True"]
    assert out[2].startswith(f"BuildError: the cache folder {open_cache} {owner}; set GNAFORGE_CACHE_DIR")


def test_a_layer_that_only_can_be_read(run, open_cache: Path, tmp_path: Path) -> None:
    layer = open_cache.parent
    out = run(
        AS_NOBODY
        + f"""
own = Path({str(layer)!r}) / "own"
own.mkdir(mode=0o700)
if os.getuid() == 0:
    os.chown(own, 65534, 65534)
drop()
print(have(), list(own.iterdir()))
""",
        GNAFORGE_CACHE_PATH=str(open_cache),
        GNAFORGE_CACHE_DIR=str(layer / "own"),
        CXX="/nonexistent",
    )
    assert out == ["True []"]


def test_an_unreadable_cache(run, open_cache: Path) -> None:
    open_cache.chmod(0o700 if os.getuid() == 0 else 0)
    out = run(
        AS_NOBODY
        + """
drop()
try:
    list(cache.iterdir())
    print("the condition does not bite")
except PermissionError:
    print("unreadable")
print(said(lambda: register(KEY)))
""",
        GNAFORGE_CACHE_DIR=str(open_cache),
    )
    assert out[0] == "unreadable" and out[1].startswith("BuildError: the cache folder"), out


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
def test_what_belongs_to_somebody_else_is_not_loaded(no_kernels: Path, fake_cxx, monkeypatch) -> None:
    from gnaforge.build.cached import find_kernel
    from gnaforge.build_tools.cache import Cache

    build_kernels([SMALL])
    path = find_kernel(SMALL)
    assert path is not None
    for stolen in (path, path.parent, path.with_name("record.json"), no_kernels):
        os.chown(stolen, 12345, 12345)
        assert find_kernel(SMALL) is None
        os.chown(stolen, 0, 0)
    assert find_kernel(SMALL) == path
    os.chown(no_kernels, 12345, 12345)
    with pytest.raises(BuildError, match="belongs to user 12345, not to you; set GNAFORGE_CACHE_DIR"):
        Cache(no_kernels).make_ready()
    os.chown(no_kernels, 0, 0)


def test_odd_paths(run, fake_cxx, tmp_path: Path, no_kernels: Path) -> None:
    odd = tmp_path / "Über $cache' \"x"
    shutil.copytree(no_kernels, odd)
    odd.chmod(0o700)
    assert run("print(have())", fake_cxx(), GNAFORGE_CACHE_DIR=str(odd)) == ["True"]


def test_a_thousand_registrations_leak_nothing(run, toy, no_kernels: Path) -> None:
    """Libraries that differ in their key only, so that nothing has to be compiled."""
    base = "gna_forward-cpu-r1-fp32-dany-q100-kv100"
    library = toy("thousand", TOY_KEY=f'"{base}"').read_bytes()
    assert library.count(base.encode()) == 1
    from hashlib import sha256

    keys = [f"gna_forward-cpu-r1-fp32-dany-q{100 + i // 100}-kv{100 + i % 100}" for i in range(1000)]
    for i, key in enumerate(keys):
        data = library.replace(base.encode(), key.encode())
        folder = no_kernels / f"{key}-{i:016x}"
        folder.mkdir(mode=0o755)
        (folder / "kernel.so").write_bytes(data)
        record = {"schema": 1, "source_digest": source_digest(KernelConfig.parse(key)), "key": key}
        record["files"] = {"kernel.so": sha256(data).hexdigest()}
        (folder / "record.json").write_text(json.dumps(record))
    out = run(
        f"""
keys = {keys!r}
def state():
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    return len(os.listdir("/proc/self/fd")), resident
for key in keys[:10]:
    register(key)
begin = state()
for key in keys:
    register(key)
loaded = state()
for key in keys:
    register(key)
end = state()
print(loaded[0] - begin[0], end[0] - begin[0], len(gnaforge.registry))
print((loaded[1] - begin[1]) // 990, end[1] - loaded[1])
"""
    )
    assert out[0] == "0 0 1000"
    per_library, again = map(int, out[1].split())
    assert per_library < len(library) + 50_000 and again < 2_000_000


def test_threads_of_one_process_build_different_kernels(own_cache: Path, fake_cxx, monkeypatch) -> None:
    """The stand-in makes the same library of every source, which doesn't matter for the cache."""
    from gnaforge.build_tools.toolchain import cxx_compiler

    compiler = fake_cxx(0.1)
    monkeypatch.setenv("CXX", f"'{compiler}'")
    cxx_compiler.cache_clear()
    configs = [KernelConfig.parse(SMALL.key.replace("kv8", f"kv{n}")) for n in (8, 16, 24, 32)]
    try:
        threads = [threading.Thread(target=build_kernels, args=([configs[i % 4]],)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        cxx_compiler.cache_clear()
    assert compiled(compiler) == 4 and len(list(user_cache().artifacts())) == 4
