"""Fixtures: a cache of the test session's own, and ways to run code and the command line in fresh processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest_plugins = ["gnaforge.pytest_plugin", "long_tests"]


@pytest.fixture(scope="session", autouse=True)
def session_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Compiled kernels of this session; the user's own cache is neither read nor written."""
    # xdist workers share one: kernels are then compiled once, and the locks are used in earnest.
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    folder = root / "gnaforge-cache"
    os.environ["GNAFORGE_CACHE_DIR"] = str(folder)
    os.environ.pop("GNAFORGE_CACHE_PATH", None)
    # Graphs that torch kept of an operator know its schema of then.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(root / "inductor-cache")
    os.environ["GNAFORGE_JIT"] = "never"  # a test that misses a kernel shall fail, not build one
    yield folder


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache for one test."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("GNAFORGE_CACHE_DIR", str(folder))
    return folder


@pytest.fixture
def headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the headers, which kernels are compiled with until the test ends."""
    from gnaforge.build import kernels as building
    from gnaforge.build.identity import include_dir
    from gnaforge.build_tools import includes

    folder = tmp_path / "include"
    shutil.copytree(include_dir(), folder)
    monkeypatch.setattr(building, "include_dirs", lambda _: (folder,))
    includes.forget_headers()
    yield folder
    includes.forget_headers()


@pytest.fixture(scope="session")
def kernel_set(session_cache: Path) -> None:
    """All cpu kernels that tests of the operators use, compiled in one go."""
    from gnaforge.build.kernels import build_kernels
    from kernel_set import BACKWARD_CONFIGS, CONFIGS

    build_kernels([*CONFIGS, *BACKWARD_CONFIGS])


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Torch on one thread: for small tensors the others wait, which costs as much of a processor as computing."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def every_feature() -> Iterator[None]:
    """The default families of the cpu and of sm90 have all features: what tools say of a problem depends on what
    families claim, not on whether they run it."""
    from gnaforge.runtime.problem import FEATURES
    from kernel_set import FAMILIES

    own = {FAMILIES[arch]: FAMILIES[arch].features for arch in ("cpu", "sm90")}
    for family in own:
        object.__setattr__(family, "features", FEATURES)
    yield
    for family, features in own.items():
        object.__setattr__(family, "features", features)


@pytest.fixture
def plain_sm100() -> Iterator[None]:
    """sm100's default family computes plain windows only: there is an arch whose kernels lack something."""
    from kernel_set import FAMILIES

    family = FAMILIES["sm100"]
    own = family.features
    object.__setattr__(family, "features", ("deterministic",))
    yield
    object.__setattr__(family, "features", own)


@pytest.fixture(scope="session")
def compile_library(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Compiles a C++ file of the tests to a shared library: ``compile_library("x.cpp", "name", "-O1", ...)``."""
    from gnaforge.build.identity import include_dir
    from gnaforge.build_tools.toolchain import cxx_compiler

    folder = tmp_path_factory.mktemp("libraries")
    compiler = [*cxx_compiler().command, "-std=c++17", "-shared", "-fPIC"]

    def make(source: str | Path, name: str, *options: str) -> Path:
        path = folder / f"{name}.so"
        command = [*compiler, *options, f"-I{include_dir()}", str(Path(__file__).parent / source), "-o", str(path)]
        subprocess.run(command, check=True)
        return path

    make.folder = folder  # type: ignore[attr-defined]
    return make


@pytest.fixture(scope="session")
def toy(compile_library: Callable[..., Path]) -> Callable[..., Path]:
    """Compiles toy_library.cpp with the given macros: ``toy("name", TOY_KEY='"..."', ...)``."""

    def make(name: str, *options: str, **macros: object) -> Path:
        return compile_library(
            "toy_library.cpp", name, *options, *(f"-D{key}={value}" for key, value in macros.items())
        )

    return make


@pytest.fixture(scope="session")
def compile_core(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Compiles the core in another way: ``compile_core("name", "-DX", include=folder, sources=folder)``."""
    from gnaforge.build import core
    from gnaforge.build.identity import include_dir, template_dir
    from gnaforge.build_tools.toolchain import cxx_compiler

    def make(name: str, *options: str, include: Path | None = None, sources: Path | None = None) -> Path:
        folder = tmp_path_factory.mktemp(name)
        compiler, torch = cxx_compiler(), core.torch_dir()
        source = (sources or template_dir() / "core") / "core.cpp"
        built = [str(folder / "core.o")]
        command = compiler.compile_command(str(source), built[0], include or include_dir())
        command += [*core._DEFINES, "-isystem", str(torch / "include"), *options]
        subprocess.run(command, check=True)
        subprocess.run(core.core_link_command(compiler, built, str(folder / "core.so")), check=True)
        return folder / "core.so"

    return make


@pytest.fixture(scope="session")
def compile_kernel(compile_library: Callable[..., Path]) -> Callable[..., Path]:
    """Compiles a library of one cpu kernel in another way than builds do: ``compile_kernel(config, "name", "-DX")``."""
    from gnaforge.build.render import render_kernel, render_library

    def make(config: object, name: str, *options: str, include: Path | None = None) -> Path:
        folder = compile_library.folder  # type: ignore[attr-defined]
        source = folder / f"{name}.cpp"
        source.write_text(render_kernel(config) + render_library("tests", [config]))
        return compile_library(source, name, *([f"-I{include}"] if include else []), *options)

    return make


@pytest.fixture
def no_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that holds the core extension and no kernel."""
    from gnaforge.build.core import core_path

    core = core_path().parent
    folder = tmp_path / "no-kernels"
    folder.mkdir(mode=0o700)
    shutil.copytree(core, folder / core.name)
    monkeypatch.setenv("GNAFORGE_CACHE_DIR", str(folder))
    return folder


Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def python(tmp_path: Path) -> Run:
    """Runs code in a fresh interpreter, in an empty folder."""

    def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, **environment},
            timeout=300,
        )

    return run


class ForkServer:
    """See fork_server.py. A job that hangs ends with the server and all that it started; the next job has a new one."""

    _process: subprocess.Popen[str] | None = None

    def run(self, job: dict[str, object]) -> int:
        """The exit status of a job, -9 after 5 minutes."""
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("fork_server.py"))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(job), file=self._process.stdin, flush=True)
        timer = threading.Timer(300, os.killpg, (self._process.pid, signal.SIGKILL))
        timer.start()
        answer = self._process.stdout.readline()
        timer.cancel()
        if not answer:
            self.kill()
        return int(answer or -9)

    def kill(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


@pytest.fixture(scope="session")
def fork_server() -> Iterator[ForkServer]:
    server = ForkServer()
    yield server
    server.kill()


@pytest.fixture
def forked(tmp_path: Path, fork_server: ForkServer) -> Run:
    """As `python`, with torch imported already, which saves its two seconds."""

    def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
        files = {name: str(tmp_path / f".{name}") for name in ("stdout", "stderr")}
        job = {"code": code, "cwd": str(tmp_path), "environment": {**os.environ, **environment}, **files}
        status = fork_server.run(job)
        printed = (Path(files[name]).read_text() for name in ("stdout", "stderr"))
        return subprocess.CompletedProcess(code, status, *printed)

    return run


@pytest.fixture
def cli(tmp_path: Path) -> Run:
    """Runs the gnaforge command line as a user does, in an empty folder."""

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", "from gnaforge.cli import main; main()", *arguments],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "COLUMNS": "200", **environment},
            timeout=300,
        )

    return run


@pytest.fixture(scope="session")
def small_kernel(session_cache: Path) -> Path:
    """The library of `kernel_set.SMALL`, compiled for real."""
    from gnaforge.build.kernels import find_libraries
    from kernel_set import SMALL

    return find_libraries([SMALL])[SMALL]


@pytest.fixture
def fake_cxx(tmp_path: Path, small_kernel: Path) -> Callable[..., Path]:
    """Makes a script that stands in for g++: it "compiles" `kernel_set.SMALL` by copying it, in ``seconds``.

    The file ``compiled`` beside it gets a line for each kernel source that it was given.
    """

    def make(seconds: float = 0.0, version: str = "fake 1.0") -> Path:
        folder = tmp_path / "fake compiler"
        folder.mkdir(exist_ok=True)
        script = folder / "g++"
        script.write_text(
            "#!/bin/sh\n"
            f'case "$*" in *--version*) echo "{version}"; exit;; *-dumpmachine*) echo fake; exit;; *-dM*) exit;; esac\n'
            f'case "$*" in *kernel.cpp*) echo x >> "{folder}/compiled"; sleep {seconds};; esac\n'
            'source="-"; for word; do case "$last" in -o) out=$word;; -c) source=$word;; esac; last=$word; done\n'
            f'case "$*" in *-shared*) cat "{small_kernel}" > "$out";; *) cat "$source" > "$out";; esac\n'
        )
        script.chmod(0o755)
        return script

    return make
