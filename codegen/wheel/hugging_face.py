"""A repository of kernels as Hugging Face's `kernels` package loads them. Loaded so far by kernels 0.17.2.

``build/<variant>/`` holds one package for each backend: the Python code and libraries of a wheel, `metadata.json` as
that package reads it (https://github.com/huggingface/kernels), and what gnaforge knows of its own under another name.
"""

from __future__ import annotations

import base64
import hashlib
import json
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ..build.core import core_source_digest
from ..build.kernels import Listener, build_kernels
from ..build_tools.cache import digest_of
from ..errors import InputError
from ..families import TARGETS
from ..runtime.config import KernelConfig
from ..runtime.package import METADATA
from .build import Assembled, Source, assemble, package_source_digest
from .licences import expression

if TYPE_CHECKING:
    from ..plan import Plan

HUB_METADATA = "metadata.json"
_NAME = re.compile(r"[a-z][-a-z0-9]*[a-z0-9]")  # the package's own rule
_STABLE_ABI = "torch-stable-abi210"  # of torch 2.10 and later


@dataclass(frozen=True)
class Variant:
    """A written variant: its folder, its operators' torch namespace, the kernels that were compiled for it."""

    folder: Path
    namespace: str
    kernels: tuple[KernelConfig, ...]
    compiled: list[KernelConfig]
    bytes: int


def export(
    plan: Plan,
    out: Path,
    *,
    rebuild: str,
    source: Source = "file",
    name: str | None = None,
    version: int = 1,
    jobs: int | None = None,
    listener: Listener | None = None,
) -> list[Variant]:
    """Builds what the cache lacks and writes one variant for the CPU and one for CUDA, of those that the plan has.

    Args:
        plan: the kernels.
        out: folder of the repository; made if missing. A variant that is there is replaced.
        rebuild: the command that makes this export, for the messages of its package.
        source: whether that command names a spec file, a preset or a kernel's key.
        name: of the kernel; default ``gnaforge-<library>``, in lower case.
        version: of the kernel, a whole number.
        jobs: compilations at once.
        listener: hears of progress.

    Raises:
        InputError: the name, the version or the folder won't do, or a library would not run everywhere.
        BuildError: a compilation failed.
    """
    kernel = kernel_name(plan.library, name)
    if version < 1:
        raise InputError(f"--version {version}: give a whole number from 1 on")
    written = []
    for backend in ("cpu", "cuda"):
        if configs := tuple(c for c in plan.configs if _backend_of(c) == backend):
            part = replace(plan, configs=configs)
            artifacts, compiled = build_kernels(configs, jobs=jobs, listener=listener)
            digests = [artifacts[config].record["digest"] for config in configs]
            content = {"kernels": digests, "library": plan.library, "rebuild": rebuild}
            namespace = namespace_of(kernel, version, backend, content)
            made = assemble(
                part,
                kernel,
                str(version),
                rebuild=rebuild,
                source=source,
                kind="export",
                namespace=namespace,
                jobs=jobs,
            )
            files = _with_hub_metadata(made, kernel, version, namespace, backend)
            folder = out / "build" / variant_name(backend, made.facts["cuda_runtime"])
            _write(folder, files)
            size = sum(map(len, files.values()))
            written.append(Variant(folder, namespace, configs, compiled, size))
    return written


def kernel_name(library: str, given: str | None) -> str:
    """The kernel's name in a repository: the given one, or the library's.

    Raises:
        InputError: the package `kernels` would refuse it.
    """
    name = given or f"gnaforge-{library}".replace("_", "-").lower()
    if not _NAME.fullmatch(name):
        source = f"--name {name!r}" if given else f"{name!r}, after the library, is no name of a kernel, give --name"
        raise InputError(
            f"{source}: two characters or more, lower-case letters, digits and dashes, a letter first and no dash last"
        )
    return name


def namespace_of(kernel: str, version: int, backend: str, content: Mapping[str, object]) -> str:
    """The torch namespace of a variant: after the kernel's name, what it holds, and the code that it comes with."""
    code = {"core": core_source_digest(), "package": package_source_digest()}
    return f"{kernel.replace('-', '_')}_{backend}_{digest_of({**content, **code, 'version': version})[:10]}"


def _backend_of(config: KernelConfig) -> str:
    return "cpu" if config.arch == "cpu" else "cuda"


def variant_name(backend: str, cuda_runtime: str | None) -> str:
    """The name of a variant's folder, such as ``torch-stable-abi210-cu130-x86_64-linux``."""
    kind = backend if cuda_runtime is None else "cu" + "".join(cuda_runtime.split(".")[:2])
    return f"{_STABLE_ABI}-{kind}-{platform.machine()}-linux"


def _with_hub_metadata(made: Assembled, name: str, version: int, namespace: str, backend: str) -> dict[str, bytes]:
    """The files of a variant: those of the package, the licences, and the metadata that names them all."""
    files = dict(made.files)
    files |= {f"licenses/{licence.file}": licence.text for licence in made.licences}
    described: dict[str, Any] = {"type": backend}
    if backend == "cuda":
        targets = [TARGETS[arch] for arch in sorted({row["arch"] for row in made.facts["kernels"]})]
        described["archs"] = [
            f"{major}.{minor}{target.nvcc_target.lstrip('0123456789')}"
            for target in targets
            for major, minor in target.capabilities
        ]
    metadata = {
        "id": namespace,
        "name": name,
        "version": version,
        "license": expression(made.licences),
        "python-depends": [],
        "backend": described,
        "digest": {
            "algorithm": "sha256",
            "files": {
                path: base64.b64encode(hashlib.sha256(data).digest()).decode() for path, data in sorted(files.items())
            },
        },
    }
    files[HUB_METADATA] = (json.dumps(metadata, indent=1) + "\n").encode()
    return files


def _write(folder: Path, files: dict[str, bytes]) -> None:
    """Writes a variant, complete or not at all, in place of one that is there.

    Raises:
        InputError: the folder can't be written, or it is there and no variant of gnaforge's.
    """
    if folder.exists() and not (folder / METADATA).is_file():
        raise InputError(f"{folder} is there, and gnaforge didn't write it: it has no {METADATA}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder.parent, prefix=".writing-", ignore_cleanup_errors=True) as scratch:
            new = Path(scratch) / "new"
            for path, data in files.items():
                (new / path).parent.mkdir(parents=True, exist_ok=True)
                (new / path).write_bytes(data)
            if folder.exists():
                folder.rename(Path(scratch) / "old")
            new.rename(folder)
    except OSError as error:
        raise InputError(f"can't write {folder}: {error.strerror}") from error
