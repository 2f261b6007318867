"""Builds the core extension into the cache, once per torch and compiler; later processes take it from there."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import BinaryIO

from ..build_tools.cache import (
    Artifact,
    current_in_layers,
    digest_of,
    open_in_layers,
    read_artifact,
    user_cache,
)
from ..build_tools.includes import include_closure
from ..build_tools.toolchain import CXX_FLAGS, LINK_FLAGS, Compiler, cxx_compiler, launcher
from ..errors import BuildError
from .identity import include_dir, template_dir

CORE_FILE = "core.so"
CORE_NAME = "core"
NAMESPACE = "gnaforge"
"""The torch namespace of the operators; an export has another one."""
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


def torch_version() -> str:
    """The installed torch's version, read from its own file: package metadata takes longer to parse."""
    found = re.search(r"^__version__ = ['\"](.+)['\"]", (torch_dir() / "version.py").read_text(), re.MULTILINE)
    return found[1] if found else version("torch")


def _sources() -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted((template_dir() / "core").iterdir()) if path.is_file()}


def _defines(namespace: str) -> tuple[str, ...]:
    return _DEFINES if namespace == NAMESPACE else (*_DEFINES, f"-DGNAFORGE_NAMESPACE={namespace}")


def core_source_digest(namespace: str = NAMESPACE) -> str:
    """Names what this version makes the core of, for the installed torch, whatever compiles it.

    Raises:
        BuildError: torch is not installed.
    """
    sources = _sources()
    return digest_of(
        {
            "sources": {name: hashlib.sha256(text.encode()).hexdigest() for name, text in sources.items()},
            "headers": include_closure("".join(sources.values()), include_dir()),
            "torch": torch_version(),
            "options": [*_defines(namespace), *_LIBRARIES, _PREFIX_MAP, *CXX_FLAGS, *LINK_FLAGS],
        }
    )


def core_link_command(compiler: Compiler, objects: list[str], output: str) -> list[str]:
    """Links the core's object, and what comes with it, to a stripped shared library."""
    return [*compiler.link_command(objects, output), f"-L{torch_dir() / 'lib'}", *_LIBRARIES]


def core_object(namespace: str = NAMESPACE) -> Path:
    """The object file of the core extension, compiled if no cache has one, and compared with its digest."""
    folder = core_path(namespace).parent
    artifact = read_artifact(folder)
    if artifact is None:
        raise BuildError(f"{folder} is no complete artifact; delete it")
    return artifact.verified_path("core.o")


def core_path(namespace: str = NAMESPACE) -> Path:
    """The core extension for the installed torch, compiled if no cache has one (a few seconds).

    Raises:
        BuildError: no compiler or no torch, or the compilation failed.
    """
    source_digest = core_source_digest(namespace)
    found = current_in_layers(CORE_NAME, source_digest, CORE_FILE)
    return found or _build(source_digest, namespace).folder / CORE_FILE


def core_files() -> Iterator[BinaryIO]:
    """The core extensions that fit this machine, open, the best first; whoever asks for another couldn't load the one
    before. The last was compiled now.

    Raises:
        BuildError: as `core_path`.
    """
    source_digest = core_source_digest()
    tried = set()
    for file in open_in_layers(CORE_NAME, source_digest, CORE_FILE):
        tried.add(Path(file.name).parent)
        yield file
    artifact = _build(source_digest)
    if artifact.folder in tried:  # as this machine would make it, and yet it can't be loaded
        user_cache().discard(artifact.folder)
        artifact = _build(source_digest)
    with artifact.open_verified(CORE_FILE) as file:
        yield file


def _build(source_digest: str, namespace: str = NAMESPACE) -> Artifact:
    torch = torch_dir()
    compiler = cxx_compiler()

    def make(scratch: Path, folder: Path) -> dict[str, object]:
        from ..build_tools.compile import Step, run_steps

        print(
            "gnaforge: building its torch extension, once for this torch: a few seconds ...",
            file=sys.stderr,
            flush=True,
        )
        for name, text in _sources().items():
            (folder / name).write_text(text)
        source, built, linked = (f"{CORE_NAME}/{file}" for file in ("core.cpp", "core.o", CORE_FILE))
        compile_command = compiler.compile_command(source, built, include_dir())
        compile_command += [*_defines(namespace), "-isystem", str(torch / "include"), _PREFIX_MAP.format(torch)]
        steps = [
            Step(built, (source,), (*launcher(), *compile_command)),
            Step(linked, (built,), tuple(core_link_command(compiler, [built], linked))),
        ]
        failures = run_steps(scratch, steps, 1)
        if failures:
            raise BuildError(f"gnaforge's torch extension did not compile: {failures[0].cause}\n{failures[0].text}")
        for step in steps:
            (scratch / step.log).unlink()
        return {
            "key": CORE_NAME,
            "torch": torch_version(),
            "compiler": compiler.version,
            "source_digest": source_digest,
            "parts": compiler.identity(),
        }

    digest = digest_of({"source_digest": source_digest, **compiler.identity()})
    return user_cache().find_or_make(CORE_NAME, digest, make)
