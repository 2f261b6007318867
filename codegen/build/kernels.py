"""From a plan to compiled kernels in the cache, and one library that holds them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..build_tools.cache import ATTEMPTS, Artifact, Cache, digest_of, find_in_layers, user_cache
from ..build_tools.compile import Failure, Step, run_steps, step_seconds
from ..build_tools.cuda import cutlass_version
from ..build_tools.cuda_compiler import CudaCompiler, cuda_compiler
from ..build_tools.files import file_digest, write_atomic
from ..build_tools.includes import include_closure, uses_cutlass
from ..build_tools.toolchain import Compiler, cxx_compiler, job_limit, launcher
from ..errors import BuildError, InputError
from ..families import family_of
from ..runtime.config import KernelConfig
from .gpu_check import check_kernel
from .identity import (
    LIBRARY_FILE as LIBRARY_FILE,
    SOURCE_SCHEMA,
    include_dir as include_dir,
    source_digest as source_digest,
)
from .render import render_kernel, render_library, source_suffix
from .sources import source_dir

if TYPE_CHECKING:
    from ..plan import Plan

RECORD_FILE = "build.json"
_BATCH = 200  # locks are held per batch: a process may have 1,024 files open


@dataclass(frozen=True)
class Job:
    """One kernel to have: its config, its sources, what compiles it, and the parts whose digest names its artifact."""

    config: KernelConfig
    source: str
    library: str
    parts: dict[str, object]
    compiler: Compiler | CudaCompiler

    @property
    def digest(self) -> str:
        """Of all parts: sources, headers, compiler and flags."""
        return digest_of(self.parts)

    @property
    def emulated(self) -> bool:
        """Whether the kernel is to run in the emulator."""
        return is_emulated(self.compiler)

    @property
    def name(self) -> str:
        """Of the artifact: no lookup takes an emulated kernel for one that runs on a GPU."""
        return f"emulated.{self.config.key}" if self.emulated else self.config.key


@dataclass(frozen=True)
class BuildResult:
    """What a build did. ``records`` holds the build record of every kernel of the library, by key."""

    library: Path
    compiled: list[KernelConfig]
    reused: list[KernelConfig]
    linked: bool
    seconds: float
    records: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Listener:
    """Who hears of a long build: steps finished of a total, and lines for the user."""

    progress: Callable[[int, int], None] = field(default=lambda done, total: None)
    note: Callable[[str], None] = field(default=lambda line: None)


def source_parts(config: KernelConfig, source: str, library: str) -> dict[str, object]:
    """What of a kernel's sources decides its bytes: the rendered texts and the headers that they reach."""
    parts: dict[str, object] = {
        "schema": SOURCE_SCHEMA,
        "key": config.key,
        "source": hashlib.sha256(source.encode()).hexdigest(),
        "library": hashlib.sha256(library.encode()).hexdigest(),
        "headers": include_closure(source + library, include_dir()),
    }
    if uses_cutlass(source, include_dir()):
        parts["cutlass"] = cutlass_version()
    return parts


def kernel_compiler(config: KernelConfig, host: Compiler, stand_in: Path | None = None) -> Compiler | CudaCompiler:
    """What compiles a kernel: ``host`` itself, or nvcc with it.

    Raises:
        BuildError: the kernel needs nvcc, and there is none.
    """
    family = family_of(config)
    target = family.target
    if target.compiler != "nvcc":
        return host
    return cuda_compiler(host, target.nvcc_target, stand_in, cutlass=family.cutlass, at_least=target.nvcc)


def is_emulated(compiler: Compiler | CudaCompiler) -> bool:
    """Whether its kernels are to run in the emulator."""
    return isinstance(compiler, CudaCompiler) and compiler.stand_in is not None


def make_jobs(configs: Sequence[KernelConfig], host: Compiler, stand_in: Path | None = None) -> list[Job]:
    """Sources and digests of configs; with ``stand_in``, of kernels that run in the emulator."""
    compilers = {family_of(config): kernel_compiler(config, host, stand_in) for config in configs}
    jobs = []
    for config in configs:
        compiler = compilers[family_of(config)]
        source = render_kernel(config)
        library = render_library(config.key, [config], emulated=is_emulated(compiler))
        parts = {**source_parts(config, source, library), **compiler.identity()}
        jobs.append(Job(config, source, library, parts, compiler))
    return jobs


def split_cached(jobs: Sequence[Job]) -> tuple[dict[KernelConfig, Artifact], list[Job]]:
    """Artifacts that the cache or one of its layers has, by config, and the jobs that must compile."""
    found = {job.config: find_in_layers(job.name, job.digest) for job in jobs}
    return (
        {config: artifact for config, artifact in found.items() if artifact is not None},
        [job for job in jobs if found[job.config] is None],
    )


def build_kernels(
    configs: Sequence[KernelConfig],
    *,
    jobs: int | None = None,
    listener: Listener | None = None,
    stand_in: Path | None = None,
) -> tuple[dict[KernelConfig, Artifact], list[KernelConfig]]:
    """Has every kernel compiled and in the user cache.

    Args:
        configs: the kernels.
        jobs: compilations at once; default: as many as processors and memory allow.
        listener: hears of progress.
        stand_in: the emulator's stand-in for the CUDA runtime, for kernels that run in the emulator.

    Returns:
        The artifact of each config, and the configs that were compiled now.

    Raises:
        BuildError: no compiler, an unusable cache folder, or a compilation failed; other kernels are kept.
    """
    listener = listener or Listener()
    cache = user_cache()
    all_jobs = make_jobs(sorted(configs), cxx_compiler(), stand_in)
    artifacts, pending = split_cached(all_jobs)
    compiled: dict[KernelConfig, None] = {}

    def have(batch: Sequence[Job], start: int) -> None:
        with _locked(cache, batch):
            found, missing = split_cached(batch)  # another process may have been faster
            artifacts.update(found)
            if missing:
                artifacts.update(_compile(missing, cache, jobs, listener, start, len(pending)))
                compiled.update(dict.fromkeys(job.config for job in missing))

    for _ in range(ATTEMPTS):
        for start in range(0, len(pending), _BATCH):
            cache.making(partial(have, pending[start : start + _BATCH], start))
        pending = [job for job in all_jobs if not artifacts[job.config].folder.is_dir()]
        if not pending:  # else the cache was deleted meanwhile
            break
    return artifacts, list(compiled)


@contextlib.contextmanager
def _locked(cache: Cache, jobs: Sequence[Job]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for job in jobs:  # sorted by config, so two builds never wait for each other
            stack.enter_context(cache.lock(job.name, job.digest))
        yield


def _compile(
    jobs: Sequence[Job], cache: Cache, limit: int | None, listener: Listener, done_before: int, total: int
) -> dict[KernelConfig, Artifact]:
    with cache.scratch() as scratch:
        steps = [step for job in jobs for step in _steps(job, scratch)]
        per_kernel = len(steps) // len(jobs)
        failures = run_steps(
            scratch,
            steps,
            limit or job_limit(max(family_of(job.config).target.job_memory_gb for job in jobs)),
            lambda done, _: listener.progress(done_before + done // per_kernel, total),
            listener.note,
        )
        seconds = step_seconds(scratch)
        failed = {failure.step.output.split("/")[0]: failure for failure in failures}
        artifacts = {}
        refused: list[BuildError] = []
        for job in jobs:
            if job.config.key in failed:
                continue
            try:
                record = _record(job, seconds, scratch)
            except BuildError as error:
                refused.append(_keep(job.config.key, str(error), cache, scratch))
                continue
            artifacts[job.config] = cache.publish(job.name, job.digest, scratch / job.config.key, record)
        if failed:
            compiler = next(job.compiler for job in jobs if job.config.key in failed)
            raise _explain(failed, cache, scratch, compiler)
        if refused:
            raise refused[0]
        return artifacts


def _steps(job: Job, scratch: Path) -> list[Step]:
    name = job.config.key
    kernel = "kernel" + source_suffix(job.config)
    folder = scratch / name
    folder.mkdir()
    (folder / kernel).write_text(job.source)
    (folder / "library.cpp").write_text(job.library)

    def compile_step(compiler: Compiler | CudaCompiler, source: str) -> Step:
        output = f"{name}/{Path(source).stem}.o"
        return Step(
            output,
            (f"{name}/{source}",),
            (*launcher(), *compiler.compile_command(f"{name}/{source}", output, include_dir())),
        )

    host = job.compiler.host if isinstance(job.compiler, CudaCompiler) else job.compiler
    objects = [compile_step(job.compiler, kernel), compile_step(host, "library.cpp")]
    names = [step.output for step in objects]
    library = f"{name}/{LIBRARY_FILE}"
    return [*objects, Step(library, tuple(names), tuple(job.compiler.link_command(names, library)))]


def _record(job: Job, seconds: dict[str, float], scratch: Path) -> dict[str, Any]:
    """The build record of a kernel, after the checks of its machine code. Removes what the compiler left over.

    Raises:
        BuildError: the machine code is not as it must be.
    """
    name = job.config.key
    folder = scratch / name
    facts: dict[str, Any] = {"registers": None, "spill_bytes": None, "shared_memory": None, "code": {}}  # of GPUs
    if isinstance(job.compiler, CudaCompiler):
        facts = check_kernel(job.config, folder)
    keep = {"kernel" + source_suffix(job.config), "kernel.o", "library.cpp", "library.o", LIBRARY_FILE}
    for path in folder.iterdir():
        if path.name not in keep:
            path.unlink()
    return {
        "key": job.name,
        "source_digest": source_digest(job.config),
        "parts": job.parts,
        "seconds": round(sum(took for output, took in seconds.items() if output.startswith(name + "/")), 3),
        "library_bytes": (folder / LIBRARY_FILE).stat().st_size,
        **facts,
    }


def _keep(name: str, reason: str, cache: Cache, scratch: Path) -> BuildError:
    """Keeps the folder of a kernel that compiled to machine code that it must not have."""
    kept = cache.keep_failed(name, scratch / name)
    return BuildError(f"{name}: {reason}" + (f"\n  compiled in: {kept}" if kept else ""))


def _explain(failed: dict[str, Failure], cache: Cache, scratch: Path, compiler: Compiler | CudaCompiler) -> BuildError:
    """Keeps the first failed kernel's folder and says how to run its compilation again."""
    name, failure = next(iter(failed.items()))
    more = f" ({len(failed) - 1} more failed)" if len(failed) > 1 else ""
    text = f"{name} did not compile{more}: {failure.cause}\n  compiler: {compiler.version}"
    kept = cache.keep_failed(name, scratch / name)
    if kept is None:
        return BuildError(text)
    command = [part.removeprefix(name + "/") for part in failure.step.command]
    log = kept / failure.step.log.removeprefix(name + "/")
    return BuildError(f"{text}\n  full log: {log}\n  again:    cd {shlex.quote(str(kept))} && {shlex.join(command)}")


def library_path(out: Path, library: str) -> Path:
    """Where the library of that name is written below the output folder."""
    return out / library / "lib" / f"{library}.so"


def build(plan: Plan, out: Path, *, jobs: int | None = None, listener: Listener | None = None) -> BuildResult:
    """Compiles what the cache lacks and links ``out/<library>/lib/<library>.so``.

    Expects the sources in ``out/<library>/src`` (see `generate.generate`), for ``compile_commands.json`` only.

    Raises:
        InputError, BuildError: as `build_kernels`; also if ``out`` can't be written.
    """
    start = time.monotonic()
    artifacts, compiled = build_kernels(plan.configs, jobs=jobs, listener=listener)
    path = library_path(out, plan.library)
    try:
        linked = _link(plan, artifacts, path)
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


def _link(plan: Plan, artifacts: dict[KernelConfig, Artifact], path: Path) -> bool:
    """Links the library unless it is there already, made of the same parts. Returns whether it linked."""
    host = cxx_compiler()
    linker = library_linker(plan.configs, host)
    source = render_library(plan.library, plan.configs)
    parts: dict[str, object] = {
        "objects": {config.key: artifacts[config].record["files"]["kernel.o"] for config in plan.configs},
        "source": hashlib.sha256(source.encode()).hexdigest(),
        **linker.identity(),
    }
    digest = digest_of(parts)
    record_path = path.parent / RECORD_FILE
    with contextlib.suppress(OSError, ValueError, KeyError):
        record = json.loads(record_path.read_text())
        if record["digest"] == digest and record["sha256"] == file_digest(path):
            return False
    path.parent.mkdir(parents=True, exist_ok=True)

    def linked() -> bytes:
        with user_cache().scratch() as scratch:
            (scratch / "library.cpp").write_text(source)
            compiled = host.compile_command("library.cpp", "library.o", include_dir())
            objects = [str(artifacts[config].verified("kernel.o")) for config in plan.configs]
            steps = [
                Step("library.o", ("library.cpp",), tuple(compiled)),
                Step("out.so", ("library.o",), tuple(linker.link_command(["library.o", *objects], "out.so"))),
            ]
            failures = run_steps(scratch, steps, 1, lambda *_: None, lambda _: None)
            if failures:
                raise BuildError(f"linking {path.name} failed: {failures[0].cause}\n{failures[0].text}")
            return (scratch / "out.so").read_bytes()

    write_atomic(path, user_cache().making(linked))
    record = {
        "digest": digest,
        "sha256": file_digest(path),
        "library": plan.library,
        "kernels": [{name: artifacts[config].record.get(name) for name in _LISTED} for config in plan.configs],
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
        source = config.key + source_suffix(config)
        entries.append(
            {
                "directory": str(folder),
                "file": source,
                "arguments": kernel_compiler(config, host).compile_command(source, f"{config.key}.o", include_dir()),
            }
        )
    data = (json.dumps(entries, indent=1) + "\n").encode()
    path = folder.parent / "compile_commands.json"
    if not path.is_file() or path.read_bytes() != data:
        write_atomic(path, data)
