"""Whose files are loaded as code: the whole way to a cache, rights of what is made, and that what was hashed runs."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

import pytest
from gnaforge.build.cached import find_kernel, open_kernel
from gnaforge.build.core import CORE_NAME, core_files
from gnaforge.build.kernels import build_kernels
from gnaforge.build_tools.cache import Cache
from gnaforge.build_tools.errors import BuildError
from gnaforge.build_tools.toolchain import cxx_compiler
from gnaforge.build_tools.trust import make_private, mistrust_of_way
from kernel_set import SMALL

root_only = pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")


@pytest.fixture
def filled(no_kernels: Path, fake_cxx, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with the core and `SMALL`."""
    monkeypatch.setenv("CXX", f"'{fake_cxx()}'")
    cxx_compiler.cache_clear()
    build_kernels([SMALL])
    yield no_kernels
    cxx_compiler.cache_clear()


@pytest.fixture
def deep(tmp_path: Path) -> Path:
    """A path three private folders down."""
    way = tmp_path / "a" / "b" / "c"
    make_private(way)
    return way / "cache"


def give(path: Path, user: int = 12345) -> None:
    os.chown(path, user, user, follow_symlinks=False)


def test_every_folder_above_counts(deep: Path) -> None:
    assert mistrust_of_way(deep) == ""
    for folder in (deep.parent, deep.parents[1], deep.parents[2]):
        for mode, expected in ((0o777, "can be written by others"), (0o772, "can be written by others"), (0o1777, "")):
            folder.chmod(mode)
            found = mistrust_of_way(deep)
            assert found == (f"is in {folder}, which {expected}" if expected else ""), oct(mode)
        folder.chmod(0o700)
    assert mistrust_of_way(deep / "not" / "there" / "yet") == ""


@root_only
def test_the_owner_of_every_folder_above_counts(deep: Path) -> None:
    for folder in (deep.parent, deep.parents[2]):
        for mode in (0o700, 0o1777):  # sticky folders bind everybody but their owner
            give(folder)
            folder.chmod(mode)
            assert mistrust_of_way(deep) == f"is in {folder}, which belongs to user 12345, not to you"
        os.chown(folder, 0, 0)
        folder.chmod(0o700)


def test_a_group_of_ones_own_may_write_above_and_no_other(deep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import grp
    import pwd

    user = pwd.getpwuid(os.getuid())
    deep.parent.chmod(0o770)
    own = grp.struct_group((user.pw_name, "x", user.pw_gid, []))
    monkeypatch.setattr(grp, "getgrgid", lambda _: own)
    assert mistrust_of_way(deep) == ""
    for group in ((user.pw_name, "x", user.pw_gid, ["mallory"]), ("staff", "x", user.pw_gid, [])):
        monkeypatch.setattr(grp, "getgrgid", lambda _, group=group: grp.struct_group(group))
        assert "can be written by others" in mistrust_of_way(deep)


def test_the_way_leads_through_symbolic_links(deep: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(deep.parent)
    assert mistrust_of_way(link / "cache") == ""
    deep.parents[1].chmod(0o777)  # only the link's target is in it
    assert "can be written by others" in mistrust_of_way(link / "cache")
    deep.parents[1].chmod(0o700)
    relative = tmp_path / "a" / "relative"
    relative.symlink_to("../a/b/../b/c")
    assert mistrust_of_way(relative / "cache") == ""
    deep.parent.chmod(0o777)
    assert "can be written by others" in mistrust_of_way(relative / "cache")
    round_about = tmp_path / "round"
    round_about.symlink_to(round_about)
    assert "too many symbolic links" in mistrust_of_way(round_about / "cache")
    if os.getuid() == 0:
        deep.parent.chmod(0o700)
        give(link)
        assert f"leads through {link}, a symbolic link that belongs to user 12345" in mistrust_of_way(link / "cache")


def test_a_cache_in_a_folder_of_others_is_neither_read_nor_made(filled: Path, cli, monkeypatch) -> None:
    above = filled.parent
    monkeypatch.setenv("GNAFORGE_CACHE_PATH", str(filled))
    assert find_kernel(SMALL) is not None
    above.chmod(0o777)
    assert find_kernel(SMALL) is None and list(core_files_found()) == []
    with pytest.raises(
        BuildError, match=f"the cache folder {filled} is in {above}, which can be written by others; set"
    ):
        Cache(filled).make_ready()
    with pytest.raises(BuildError, match="can be written by others"):
        Cache(above / "new" / "cache").make_ready()
    assert not (above / "new").exists()
    assert f"NOT USED, it is in {above}, which can be written by others" in cli("cache", "info").stdout
    above.chmod(0o1777)
    assert find_kernel(SMALL) is not None


def core_files_found() -> list[Path]:
    from gnaforge.build.core import CORE_FILE, core_source_digest
    from gnaforge.build_tools.cache import open_in_layers

    return [Path(file.name) for file in open_in_layers(CORE_NAME, core_source_digest(), CORE_FILE)]


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o077, 0o277, 0o777])
def test_folders_are_made_for_their_owner_alone_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    cache = Cache(tmp_path / "x" / "y" / "cache")
    before = os.umask(umask)
    try:
        cache.make_ready()
        with cache.lock("a", "0" * 64), cache.scratch() as scratch:
            (scratch / "inside").write_text("x")
            cache.keep_failed("a", scratch)
            made = [cache.root, *cache.root.parents[:2], scratch, cache.root / ".locks", cache.root / ".failed"]
            assert [oct(stat.S_IMODE(path.stat().st_mode)) for path in made] == ["0o700"] * len(made)
    finally:
        os.umask(before)


def test_what_was_hashed_is_loaded_whatever_its_path_names_by_then(filled: Path, forked, toy) -> None:
    """The library is swapped between its check and its load, by a longer way than any race would leave."""
    other = toy("swapped", TOY_KEY=f'"{SMALL.key.replace("q8", "q16")}"')
    out = forked(
        f"""
import os, shutil, gnaforge
from pathlib import Path
from gnaforge.build.cached import open_kernel
from gnaforge.runtime import core
config = gnaforge.KernelConfig.parse({SMALL.key!r})
file = next(found := open_kernel(config))
path = Path(file.name)
os.replace(shutil.copy({str(other)!r}, path.with_suffix(".new")), path)
print(core.load_file(file), [row["key"] for row in core.table()], core.table()[0]["origin"] == str(path))
file = Path({str(other)!r}).open("rb")
print(core.load_file(file), core.load_library({str(other)!r}), core.table()[0]["origin"] == {str(other)!r})
"""
    )
    assert out.stdout.splitlines() == [f"1 ['{SMALL.key}'] True", "1 0 True"], out.stderr


def test_a_number_of_a_descriptor_that_comes_again_names_another_library(forked, toy) -> None:
    keys = [SMALL.key.replace("kv8", f"kv{n}") for n in (8, 16, 24, 32)]
    libraries = [str(toy(f"number{i}", TOY_KEY=f'"{key}"')) for i, key in enumerate(keys)]
    out = forked(
        f"""
from gnaforge.runtime import core
core.core()
numbers = set()
for path in {libraries!r}:
    with open(path, "rb") as file:
        numbers.add(file.fileno())
        print(core.load_file(file), end=" ")
print(len(numbers), sorted(row["key"] for row in core.table()) == {sorted(keys)!r})
"""
    )
    assert out.stdout.split() == ["1"] * 4 + ["1", "True"], out.stderr


def test_where_proc_can_not_be_entered_the_path_is_loaded(forked, toy) -> None:
    library = str(toy("without_proc", TOY_KEY=f'"{SMALL.key}"'))
    out = forked(
        f"""
from pathlib import Path
from gnaforge.runtime import core
core.core()
exists = Path.exists
Path.exists = lambda path: False if str(path).startswith("/proc/self/fd/") else exists(path)
with open({library!r}, "rb") as file:
    print(core.load_file(file), core.table()[0]["origin"])
with open(__file__ if "__file__" in globals() else "/etc/passwd", "rb") as file:
    try:
        core.load_file(file)
    except core.LibraryError as error:
        print(error)
"""
    )
    assert out.stdout.splitlines()[0] == f"1 {library}", out.stderr
    assert "/etc/passwd: not a shared library" in out.stdout


def test_messages_name_the_path_and_not_the_descriptor(forked, tmp_path: Path) -> None:
    (tmp_path / "text.so").write_text("no library")
    out = forked(
        f"""
from gnaforge.runtime import core
with open({str(tmp_path / "text.so")!r}, "rb") as file:
    try:
        core.load_file(file)
    except core.LibraryError as error:
        print(error)
"""
    )
    assert out.stdout.startswith(f"{tmp_path / 'text.so'}: not a shared library"), out.stdout + out.stderr


def test_a_file_that_is_no_file_is_refused_at_once(filled: Path) -> None:
    (file,) = [Path(file.name) for file in open_kernel(SMALL)]
    file.unlink()
    os.mkfifo(file)
    assert find_kernel(SMALL) is None
    (file.parent / "record.json").unlink()
    os.mkfifo(file.parent / "record.json")
    assert find_kernel(SMALL) is None
    assert next(core_files()).name.endswith("core.so")


@root_only
def test_others_see_nothing_of_what_they_swap(filled: Path, forked) -> None:
    """As the folder above is another user's, a kernel there is not used; a copy below a trusted one is."""
    above = filled.parent / "others"
    above.mkdir(mode=0o777)
    shutil.move(filled, above / "cache")
    give(above)
    code = f"""
from gnaforge.build.cached import find_kernel
from gnaforge.runtime.config import KernelConfig
print(find_kernel(KernelConfig.parse({SMALL.key!r})))
"""
    assert forked(code, GNAFORGE_CACHE_DIR=str(above / "cache")).stdout == "None\n"
    os.chown(above, 0, 0)
    above.chmod(0o755)
    assert forked(code, GNAFORGE_CACHE_DIR=str(above / "cache")).stdout.startswith(str(above))
