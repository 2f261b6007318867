"""Compiled kernels in the cache: `build_kernels` compiles those that it lacks."""

from __future__ import annotations

import contextlib
import hashlib
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from ..build_tools.cache import ATTEMPTS, Artifact, Cache, digest_of, find_in_layers, user_cache
from ..build_tools.compile import Failure, Progress, Step, run_steps, step_seconds
from ..build_tools.cuda import cutlass_version
from ..build_tools.cuda_compiler import CudaCompiler, cubin_of, cuda_compiler
from ..build_tools.includes import include_closure
from ..build_tools.text import count_of
from ..build_tools.toolchain import Compiler, cxx_compiler, job_limit, launcher
from ..errors import BuildError
from ..families import TARGETS, Family, family_of
from ..runtime.config import KernelConfig
from .gpu_check import check_kernel
from .identity import (
    CUBIN_FILE,
    LIBRARY_FILE as LIBRARY_FILE,
    SOURCE_SCHEMA,
    include_dirs,
    source_digest as source_digest,
)
from .progress import Compilation, Listener as Listener, show_compilation
from .render import render_kernel, render_library, source_suffix

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


def source_parts(config: KernelConfig, source: str, library: str) -> dict[str, object]:
    """What of a kernel's sources decides its bytes: the rendered texts and the headers that they reach."""
    family = family_of(config)
    parts: dict[str, object] = {
        "schema": SOURCE_SCHEMA,
        "key": config.key,
        "made_of": source_digest(config),  # by which calls find it: other templates that render the same build it anew
        "source": hashlib.sha256(source.encode()).hexdigest(),
        "library": hashlib.sha256(library.encode()).hexdigest(),
        "headers": include_closure(source + library, *include_dirs(family)),
    }
    if family.cutlass:
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


def split_buildable(configs: Sequence[KernelConfig]) -> tuple[list[KernelConfig], dict[KernelConfig, str]]:
    """The configs that can be compiled here, and by config why the others can't: nvcc or CUTLASS is missing or too old.

    Raises:
        BuildError: there is no C++ compiler, without which none can be.
    """
    host = cxx_compiler()
    reasons: dict[Family, str] = {}
    for family, config in {family_of(config): config for config in configs}.items():
        try:
            kernel_compiler(config, host)
            if family.cutlass:
                cutlass_version()
        except BuildError as error:
            reasons[family] = str(error)
    missing = {config: reasons[family_of(config)] for config in configs if family_of(config) in reasons}
    return [config for config in configs if config not in missing], missing


def explain_missing(missing: Mapping[KernelConfig, str]) -> str:
    """Says of kernels that `split_buildable` found to be missing why they are: a line per reason."""
    by_reason: dict[str, list[KernelConfig]] = {}
    for config, reason in missing.items():
        by_reason.setdefault(reason, []).append(config)
    lines = []
    for reason, configs in by_reason.items():
        archs = ", ".join(arch for arch in TARGETS if any(config.arch == arch for config in configs))
        lines.append(f"{count_of(len(configs), 'kernel')} for {archs} can't be built here: {reason}")
    return "\n".join(lines)


def is_emulated(compiler: Compiler | CudaCompiler) -> bool:
    """Whether its kernels are to run in the emulator."""
    return isinstance(compiler, CudaCompiler) and compiler.stand_in is not None


def make_jobs(
    configs: Sequence[KernelConfig],
    host: Compiler,
    sources: Mapping[KernelConfig, str] | None = None,
    *,
    emulated: bool = False,
) -> list[Job]:
    """Sources and digests of configs, in order. Arguments as those of `build_kernels`."""
    stand_in = find_stand_in() if emulated else None
    compilers = {family_of(config): kernel_compiler(config, host, stand_in) for config in configs}
    jobs = []
    for config in configs:
        compiler = compilers[family_of(config)]
        source = render_kernel(config) if sources is None else sources[config]
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
    sources: Mapping[KernelConfig, str] | None = None,
    emulated: bool = False,
    jobs: int | None = None,
    listener: Listener | None = None,
) -> tuple[dict[KernelConfig, Artifact], list[KernelConfig]]:
    """Compiles the kernels that the user cache lacks.

    Args:
        configs: the kernels.
        sources: what `render_kernel` gives for each, where it is rendered already.
        emulated: GPU kernels for the emulator, linked to its stand-in for the CUDA runtime. They take CPU tensors, and
            only in a process where ``GNAFORGE_EMULATOR_MEMORY`` is ``mapped``; a call must name its kernel. Other
            variables ``GNAFORGE_EMULATOR_*`` set the schedule. `verification` does without these variables.
        jobs: compilations at once; default: as many as processors and memory allow.
        listener: hears of progress.

    Returns:
        The artifact of each config, and the configs that were compiled now.

    Raises:
        BuildError: no compiler, an unusable cache folder, or a compilation failed; other kernels are kept.
    """
    listener = listener or Listener()
    cache = user_cache()
    all_jobs = make_jobs(sorted(configs), cxx_compiler(), sources, emulated=emulated)
    artifacts, pending = split_cached(all_jobs)
    compiled: dict[KernelConfig, None] = {}

    def have(batch: Sequence[Job], start: int) -> None:
        with _lock_all(cache, batch):
            found, missing = split_cached(batch)  # another process may have been faster
            artifacts.update(found)
            if missing:
                artifacts.update(_compile(missing, cache, jobs, listener, start, len(pending)))
                compiled.update(dict.fromkeys(job.config for job in missing))

    for _ in range(ATTEMPTS):
        for start in range(0, len(pending), _BATCH):
            cache.retry_if_deleted(partial(have, pending[start : start + _BATCH], start))
        pending = [job for job in all_jobs if not artifacts[job.config].folder.is_dir()]
        if not pending:  # else the cache was deleted meanwhile
            break
    return artifacts, list(compiled)


def find_libraries(
    configs: Sequence[KernelConfig],
    *,
    emulated: bool = False,
    jobs: int | None = None,
    listener: Listener | None = None,
) -> dict[KernelConfig, Path]:
    """One library per kernel, compiled if the cache has none. Arguments and errors as those of `build_kernels`."""
    artifacts, _ = build_kernels(configs, emulated=emulated, jobs=jobs, listener=listener)
    return {config: artifact.verified_path(LIBRARY_FILE) for config, artifact in artifacts.items()}


def open_libraries(configs: Sequence[KernelConfig]) -> Iterator[BinaryIO]:
    """One library per kernel, compiled if the cache has none, open until the next is asked for: to load what was
    compared with its digest. Says what it compiles. Errors as those of `build_kernels`."""
    with show_compilation([config.key for config in configs]) as listener:
        artifacts, _ = build_kernels(configs, listener=listener)
    for artifact in artifacts.values():
        with artifact.open_verified(LIBRARY_FILE) as file:
            yield file


def find_stand_in() -> Path:
    """The emulator's stand-in for the CUDA runtime, compiled if the cache has none."""
    from ..build_tools.emulator import stand_in  # imports NumPy

    return stand_in().path


@contextlib.contextmanager
def _lock_all(cache: Cache, jobs: Sequence[Job]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for job in jobs:  # sorted by config, so two builds never wait for each other
            stack.enter_context(cache.lock(job.name, job.digest))
        yield


def _compile(
    jobs: Sequence[Job], cache: Cache, limit: int | None, listener: Listener, done_before: int, total: int
) -> dict[KernelConfig, Artifact]:
    with cache.scratch() as scratch:
        steps = [step for job in jobs for step in _steps(job, scratch)]
        done: set[str] = set()

        def progress(now: Progress) -> None:
            # A kernel counts as finished with its object: ninja links when it has nothing to compile.
            key, _, file = now.finished.partition("/")
            finished = key if file == "kernel.o" else ""
            done.update({finished} - {""})

            def running() -> list[str]:
                return list(dict.fromkeys(output.partition("/")[0] for output in now.running()))

            if finished or not now.finished:
                state = Compilation(done_before + len(done), total, finished, now.good, now.seconds, running)
                listener.progress(state)

        failures = run_steps(
            scratch,
            steps,
            limit or job_limit(max(family_of(job.config).target.job_memory_gb for job in jobs)),
            progress,
            listener.note,
        )
        for family in dict.fromkeys(family_of(job.config) for job in jobs):
            if family.target.is_gpu and family.machine_code is None:
                listener.note(f"the kernel family {family.name} demands nothing of its machine code but no spills")
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

    folders = include_dirs(family_of(job.config))

    def compile_step(compiler: Compiler | CudaCompiler, source: str) -> Step:
        output = f"{name}/{Path(source).stem}.o"
        return Step(
            output,
            (f"{name}/{source}",),
            (*launcher(), *compiler.compile_command(f"{name}/{source}", output, *folders)),
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
    if isinstance(job.compiler, CudaCompiler) and not job.emulated:
        cubin_of(folder).rename(folder / CUBIN_FILE)
        keep.add(CUBIN_FILE)
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
