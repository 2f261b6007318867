"""The core extension: loading libraries, choosing kernels, errors across the boundary, one core per process."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from gnaforge.build.library import read_library
from gnaforge.errors import InputError

TOY = "gna_forward-cpu-r2-fp32-d8-q{0}x8-kv8x8"


pytestmark = pytest.mark.usefixtures("no_kernels")


def toy_key(number: int) -> str:
    return TOY.format(number)


PREAMBLE = """
import sys, torch, gnaforge, threading
from gnaforge.runtime import core
x = torch.zeros(1, 8, 8, 2, 8)
def message(call):
    try:
        return f"returned {call()}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
"""


def lines(result) -> list[str]:
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_least_work_wins_and_a_key_pins(python, toy) -> None:
    slow = toy("slow", TOY_KEY=f'"{toy_key(1)}"', TOY_VALUE="1.f", TOY_WORK="2.0")
    fast = toy("fast", TOY_KEY=f'"{toy_key(2)}"', TOY_VALUE="2.f", TOY_WORK="1.0")
    out = lines(
        python(
            PREAMBLE
            + f"""
print(core.load_library({str(slow)!r}), gnaforge.na2d(x, x, x, 3).unique().item())
print(core.load_library({str(fast)!r}), gnaforge.na2d(x, x, x, 3).unique().item())
print(gnaforge.na2d(x, x, x, 3, kernel={toy_key(1)!r}).unique().item())
print(gnaforge.na2d(x, x, x, 3, q_tile_shape=(1, 8)).unique().item())
print(gnaforge.registry[{toy_key(1)!r}](x, x, x, 3).unique().item())
print(len(gnaforge.registry), [k.key for k in gnaforge.kernels()] == {[toy_key(1), toy_key(2)]!r})
"""
        )
    )
    assert out == ["1 1.0", "1 2.0", "1.0", "1.0", "1.0", "2 True"]


def test_loading_twice_and_from_many_threads_adds_once(python, toy) -> None:
    paths = [str(toy(f"many{i}", TOY_KEY=f'"{toy_key(10 + i)}"')) for i in range(4)]
    out = lines(
        python(
            PREAMBLE
            + f"""
added = []
go = threading.Barrier(8)
def load(i):
    go.wait()
    for path in {paths!r}[i % 4:] + {paths!r}[:i % 4]:
        added.append(gnaforge.load_library(path))
threads = [threading.Thread(target=load, args=(i,)) for i in range(8)]
[t.start() for t in threads]; [t.join() for t in threads]
print(sum(added), len(added), len(gnaforge.registry))
"""
        )
    )
    assert out == ["4 32 4"]


def test_overlapping_libraries_keep_the_first(python, toy) -> None:
    first = toy("first", TOY_KEY=f'"{toy_key(3)}"', TOY_VALUE="1.f")
    second = toy("second", TOY_KEY=f'"{toy_key(3)}"', TOY_VALUE="2.f")
    out = lines(
        python(
            PREAMBLE
            + f"""
print(core.load_library({str(first)!r}), core.load_library({str(second)!r}), gnaforge.na2d(x, x, x, 3).max().item())
"""
        )
    )
    assert out == ["1 0 1.0"]


def test_errors_keep_their_text(python, toy) -> None:
    path = toy("errors", TOY_KEY=f'"{toy_key(4)}"')
    out = python(
        PREAMBLE
        + f"""
core.load_library({str(path)!r})
print(message(lambda: gnaforge.na2d(x, x, x, 3, scale=0.5)))
print(message(lambda: gnaforge.na2d(x[..., :4], x[..., :4], x[..., :4], 3, kernel={toy_key(4)!r})))
y = torch.cat([x, x], -1)
print(message(lambda: gnaforge.na2d(y, y, y, 3)))
"""
    )
    text = "\n".join(lines(out))
    assert "RuntimeError: gnaforge: kernel " + toy_key(4) + ' failed: the toy fails at scale 0.5: "quoted" ü' in text
    assert (
        "NoKernelError: gnaforge: no kernel fits: " + toy_key(4) + " was asked for and can't run this problem" in text
    )
    assert "the toy takes fp32 and head_dim 8, got head_dim 4" in text
    assert "no kernel fits this problem: rank 2, fp32, head_dim 16, heads 2, tokens 8x8, window 3x3" in text


def test_a_choice_is_remembered_for_its_scale_only(python, toy) -> None:
    """Kernels may refuse a scale; a call that is like an earlier one but for that must not run unasked."""
    path = toy("scale", TOY_KEY=f'"{toy_key(7)}"')
    out = lines(
        python(
            PREAMBLE
            + f"""
core.load_library({str(path)!r})
for scale in (-1.0, 1.0, -1.0, 2.0, -2.0):
    print(message(lambda: gnaforge.na2d(x, x, x, 3, scale=scale, kernel={toy_key(7)!r}).max().item()))
"""
        )
    )
    refused, *rest = (line for line in out if line.startswith(("returned", "NoKernelError")))
    assert refused.endswith("the toy takes positive scales, got -1")
    assert rest == ["returned 1.0", refused, "returned 1.0", refused.replace("got -1", "got -2")]


def test_emulated_kernels_run_only_when_named(python, toy) -> None:
    path = toy("emulated", TOY_KEY=f'"{toy_key(5)}"', TOY_FLAGS="GNAFORGE_LIBRARY_EMULATED")
    out = "\n".join(
        lines(
            python(
                PREAMBLE
                + f"""
core.load_library({str(path)!r})
print(message(lambda: gnaforge.na2d(x, x, x, 3)))
print(gnaforge.na2d(x, x, x, 3, kernel={toy_key(5)!r}).max().item())
"""
            )
        )
    )
    assert "emulated, runs only when named" in out
    assert out.endswith("1.0")


MISSING = {
    "no key": "TOY_KEY",
    "no function": "TOY_RUN",
    "no entry": "TOY_ENTRY",
    "no entries": "TOY_ENTRIES",
    "no table": "TOY_LIBRARY",
}
"""Macros of toy_library.cpp for what a library lacks."""


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        ("missing", "can't be opened: No such file"),
        ("text", "not a shared library"),
        ("truncated", "truncated: it needs"),
        ("foreign", "exports no gnaforge_library_v1"),
        ("abi", "built for gnaforge ABI 2.0, this core speaks 1.2; rebuild the library"),
        ("entry", "holds an incomplete kernel entry"),
        ("no key", "holds an incomplete kernel entry"),
        ("no function", "holds an incomplete kernel entry"),
        ("no entry", "holds an incomplete kernel entry"),
        ("no entries", "its table of kernels is incomplete"),
        ("no table", "its table of kernels is incomplete"),
    ],
)
def test_libraries_that_must_not_load(python, toy, tmp_path: Path, damage: str, expected: str) -> None:
    path = tmp_path / "bad.so"
    good = toy(f"good_{damage}", TOY_KEY=f'"{toy_key(6)}"')
    if damage == "text":
        path.write_text("no library")
    elif damage == "truncated":
        path.write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    elif damage == "foreign":
        import _ctypes

        shutil.copy(_ctypes.__file__, path)
    elif damage == "abi":
        path = toy("abi", TOY_KEY=f'"{toy_key(6)}"', TOY_ABI="(2u<<16)")
    elif damage == "entry":
        path = toy("entry", TOY_KEY=f'"{toy_key(6)}"', TOY_ENTRY_SIZE=16)
    elif damage in MISSING:
        path = toy(damage.replace(" ", "_"), **{"TOY_KEY": f'"{toy_key(6)}"', MISSING[damage]: "nullptr"})
    out = lines(python(PREAMBLE + f"print(message(lambda: gnaforge.load_library({str(path)!r})))"))
    assert out[0].startswith("LibraryError: ")
    assert expected in out[0]
    assert str(path) in out[0]
    with pytest.raises(InputError, match=re.escape(str(path))):  # `gnaforge list` and `verify` refuse them too
        read_library(path)


@pytest.fixture
def two_packages(tmp_path: Path) -> Path:
    """Two packages in the manner of slim wheels: each with its own copy of the runtime and of the core."""
    import gnaforge.runtime
    from gnaforge.build.core import core_path

    for name in ("pack_a", "pack_b"):
        package = tmp_path / name
        shutil.copytree(Path(gnaforge.runtime.__file__).parent, package / "_runtime")
        shutil.copy(core_path(), package / "core.so")
        (package / "__init__.py").write_text("from ._runtime import core\n")
        (package / "api.py").write_text(
            "from pathlib import Path\n"
            "from ._runtime import core\n"
            "def connect():\n"
            "    core.set_core_files(lambda: [Path(__file__).with_name('core.so')])\n"
        )
    return tmp_path


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_two_packages_share_one_core(python, toy, two_packages: Path, order: str) -> None:
    libraries = {name: str(toy(f"pack_{name}", TOY_KEY=f'"{TOY.format(ord(name))}"')) for name in "ab"}
    code = f"""
import sys, threading
sys.path.insert(0, {str(two_packages)!r})
import torch
libraries, order = {libraries!r}, {order!r}
go = threading.Barrier(8)
seen, errors = [], []
def work(i):
    try:
        name = order[i % 2]
        go.wait()
        package = __import__("pack_" + name)
        package.core.load_library(libraries[name])
        seen.append(package.core.core()._handle)
    except BaseException as error:
        errors.append(repr(error))
threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
[t.start() for t in threads]; [t.join() for t in threads]
import pack_a._runtime.ops, pack_b._runtime.kernels
x = torch.zeros(1, 8, 8, 2, 8)
print(errors, len(set(seen)), len(pack_b._runtime.kernels.registry), pack_a._runtime.ops.na2d(x, x, x, 3).max().item())
"""
    assert lines(python(code)) == ["[] 1 2 1.0"]


def test_the_core_needs_no_python_symbols_and_no_newer_torch() -> None:
    """Built for 2.10: of the shims that came later, none; of CUDA, only the weak stream getter."""
    import subprocess

    from gnaforge.build.core import core_path

    listing = subprocess.run(
        ["nm", "-D", "--undefined-only", core_path()], capture_output=True, text=True, check=True
    ).stdout.split("\n")
    symbols = {line.split()[-1]: line.split()[-2] for line in listing if line}
    assert not [name for name in symbols if name.startswith(("Py", "_Py"))]
    assert not [name for name in symbols if name.startswith("cuda")]
    assert symbols["aoti_torch_get_current_cuda_stream"] == "w"
    newer = {"torch_from_blob", "torch_library_def_with_tags", "torch_exception_get_what", "torch_stream_native_handle"}
    assert not newer & symbols.keys()
