"""Libraries of kernels: `build` links what the cache holds, and writes the sources and how they compile beside it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..build_tools.artifact import Artifact
from ..build_tools.cache import digest_of, user_cache
from ..build_tools.compile import Step, run_steps
from ..build_tools.cuda_compiler import CudaCompiler
from ..build_tools.files import file_digest, holds, write_atomic
from ..build_tools.limits import RECORD_BYTES, parse_json, read_bounded
from ..build_tools.toolchain import Compiler, cxx_compiler
from ..errors import BuildError, InputError
from ..families import family_of
from ..runtime.config import KernelConfig
from .identity import include_dir, include_dirs
from .kernels import Listener, build_kernels, kernel_compiler
from .library import RECORD_FILE
from .render import Sources, render_sources
from .sources import kernel_file, source_dir, write_sources

if TYPE_CHECKING:
    from ..plan import Plan


@dataclass(frozen=True)
class BuildResult:
    """The result of a build. ``records`` holds the build record of every kernel of the library, by key."""

    library: Path
    compiled: list[KernelConfig]
    reused: list[KernelConfig]
    linked: bool
    seconds: float
    records: dict[str, dict[str, Any]]


def library_path(out: Path, library: str) -> Path:
    """Where the library of that name is written below the output folder."""
    return out / library / "lib" / f"{library}.so"


def build(plan: Plan, out: Path, *, jobs: int | None = None, listener: Listener | None = None) -> BuildResult:
    """Writes the sources to ``out/<library>/src``, compiles those whose kernels the cache lacks, and links
    ``out/<library>/lib/<library>.so``.

    Raises:
        InputError: ``out`` can't be written, or its folder of sources holds files that gnaforge did not write.
        BuildError: as `build_kernels`.
    """
    start = time.monotonic()
    sources = render_sources(plan.library, plan.configs)
    write_sources(sources, out)
    artifacts, compiled = build_kernels(plan.configs, sources=sources.kernels, jobs=jobs, listener=listener)
    path = library_path(out, plan.library)
    try:
        linked = _link(sources, artifacts, path)
        _write_compile_commands(plan, out)
    except OSError as error:
        raise InputError(f"can't write to {path.parent}: {error.strerror}") from error
    return BuildResult(
        library=path,
        compiled=compiled,
        reused=[config for config in plan.configs if config not in set(compiled)],
        linked=linked,
        seconds=time.monotonic() - start,
        records={config.key: artifacts[config].record for config in plan.configs},
    )


def library_linker(configs: Sequence[KernelConfig], host: Compiler) -> Compiler | CudaCompiler:
    """What links a library of these kernels: nvcc with one GPU kernel, since it knows where the CUDA runtime is. The
    newest, where archs have different ones."""
    gpu = [config for config in configs if family_of(config).target.is_gpu]
    return kernel_compiler(max(gpu, key=lambda config: family_of(config).target.nvcc), host) if gpu else host


def _link(sources: Sources, artifacts: Mapping[KernelConfig, Artifact], path: Path) -> bool:
    """Links the library unless it is there already, made of the same parts. Returns whether it linked."""
    host = cxx_compiler()
    configs = list(sources.kernels)
    linker = library_linker(configs, host)
    parts: dict[str, object] = {
        "objects": {config.key: artifacts[config].record["files"]["kernel.o"] for config in configs},
        "source": hashlib.sha256(sources.table.encode()).hexdigest(),
        **linker.identity(),
    }
    digest = digest_of(parts)
    record_path = path.parent / RECORD_FILE
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        record = parse_json(read_bounded(record_path, RECORD_BYTES), RECORD_BYTES)
        if record["digest"] == digest and record["sha256"] == file_digest(path):
            return False
    path.parent.mkdir(parents=True, exist_ok=True)

    def link() -> bytes:
        with user_cache().scratch() as scratch:
            (scratch / "library.cpp").write_text(sources.table)
            compiled = host.compile_command("library.cpp", "library.o", include_dir())
            objects = [str(artifacts[config].verified_path("kernel.o")) for config in configs]
            steps = [
                Step("library.o", ("library.cpp",), tuple(compiled)),
                Step("out.so", ("library.o",), tuple(linker.link_command(["library.o", *objects], "out.so"))),
            ]
            failures = run_steps(scratch, steps, 1)
            if failures:
                raise BuildError(f"linking {path.name} failed: {failures[0].cause}\n{failures[0].text}")
            return (scratch / "out.so").read_bytes()

    write_atomic(path, user_cache().retry_if_deleted(link))
    record = {
        "digest": digest,
        "sha256": file_digest(path),
        "library": sources.library,
        "kernels": [{name: artifacts[config].record.get(name) for name in _LISTED} for config in configs],
    }
    write_atomic(record_path, (json.dumps(record, indent=1) + "\n").encode())
    return True


_LISTED = ("key", "seconds", "library_bytes", "registers", "spill_bytes", "shared_memory", "code")


def _write_compile_commands(plan: Plan, out: Path) -> None:
    """For editors and clang tools: how each rendered source compiles."""
    folder = source_dir(out, plan.library).resolve()
    host = cxx_compiler()
    entries = []
    for config in plan.configs:
        source = kernel_file(config)
        entries.append(
            {
                "directory": str(folder),
                "file": source,
                "arguments": kernel_compiler(config, host).compile_command(
                    source, f"{config.key}.o", *include_dirs(family_of(config))
                ),
            }
        )
    data = (json.dumps(entries, indent=1) + "\n").encode()
    path = folder.parent / "compile_commands.json"
    if not holds(path, data):
        write_atomic(path, data)
