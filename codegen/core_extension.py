"""Builds the core extension into the cache, once per torch and compiler; later processes take it from there."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from importlib.metadata import version
from pathlib import Path

from .build import include_dir
from .build_tools.cache import digest_of, read_artifact, user_cache
from .build_tools.compile import Step, run_steps
from .build_tools.includes import include_closure
from .build_tools.toolchain import Compiler, cxx_compiler, launcher
from .errors import BuildError
from .render import template_dir

CORE_FILE = "core.so"
_NAME = "core"
_SOURCES = ("core.cpp", "table.h")
_DEFINES = ("-DTORCH_TARGET_VERSION=0x020a000000000000",)  # runs on torch 2.10 and later
# Messages name torch's headers: under this name, wherever they are, so that every machine makes equal bytes.
_PREFIX_MAP = "-ffile-prefix-map={}=torch"
# Without --no-as-needed the linker drops libtorch, and with it the way to libtorch_cuda's current stream.
_LIBRARIES = ("-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu")


def torch_dir() -> Path:
    """The installed torch package's folder, found without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise BuildError("torch is not installed: pip install 'torch>=2.10'")
    return Path(spec.origin).parent


def core_link_command(compiler: Compiler, objects: list[str], output: str) -> list[str]:
    """Links the core's object, and what comes with it, to a stripped shared library."""
    return [*compiler.link_command(objects, output), f"-L{torch_dir() / 'lib'}", *_LIBRARIES]


def core_object() -> Path:
    """The object file of the core extension, compiled if the cache has none, and compared with its digest."""
    folder = core_path().parent
    artifact = read_artifact(folder)
    if artifact is None:
        raise BuildError(f"{folder} is no complete artifact; delete it")
    return artifact.verified("core.o")


def core_path() -> Path:
    """The core extension for the installed torch, compiled if the cache has none (a few seconds).

    Raises:
        BuildError: no compiler or no torch, or the compilation failed.
    """
    sources = {name: (template_dir() / "core" / name).read_text() for name in _SOURCES}
    torch = torch_dir()
    compiler = cxx_compiler()
    digest = digest_of(
        {
            "sources": {name: hashlib.sha256(text.encode()).hexdigest() for name, text in sources.items()},
            "headers": include_closure("".join(sources.values()), include_dir()),
            "torch": version("torch"),
            "options": [*_DEFINES, *_LIBRARIES, _PREFIX_MAP],
            **compiler.identity(),
        }
    )

    def make(scratch: Path, folder: Path) -> dict[str, str]:
        print("gnaforge: building its torch extension, once for this torch ...", file=sys.stderr, flush=True)
        for name, text in sources.items():
            (folder / name).write_text(text)
        compile_command = compiler.compile_command(f"{_NAME}/core.cpp", f"{_NAME}/core.o", include_dir())
        compile_command += [*_DEFINES, "-isystem", str(torch / "include"), _PREFIX_MAP.format(torch)]
        link_command = core_link_command(compiler, [f"{_NAME}/core.o"], f"{_NAME}/{CORE_FILE}")
        steps = [
            Step(f"{_NAME}/core.o", (f"{_NAME}/core.cpp",), (*launcher(), *compile_command)),
            Step(f"{_NAME}/{CORE_FILE}", (f"{_NAME}/core.o",), tuple(link_command)),
        ]
        failures = run_steps(scratch, steps, 1, lambda *_: None, lambda _: None)
        if failures:
            raise BuildError(f"gnaforge's torch extension did not compile: {failures[0].cause}\n{failures[0].text}")
        for step in steps:
            (scratch / step.log).unlink()
        return {"key": _NAME, "torch": version("torch"), "compiler": compiler.version}

    return user_cache().find_or_make(_NAME, digest, make).folder / CORE_FILE
