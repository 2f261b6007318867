"""From a plan to a wheel that holds just its kernels: needs torch, and no gnaforge, compiler or Python of its own."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..build.core import NAMESPACE, core_link_command, core_object
from ..build.identity import include_dir, template_dir
from ..build.kernels import Listener, build_kernels
from ..build.library import is_emulated
from ..build.link import library_linker
from ..build.render import render_library, render_wheel, wheel_package_templates
from ..build_tools.cache import Artifact, digest_of, user_cache
from ..build_tools.cuda_compiler import CudaCompiler
from ..build_tools.elf import Elf, read_elf
from ..build_tools.files import write_atomic
from ..build_tools.text import count_of, listed
from ..build_tools.toolchain import cxx_compiler
from ..build_tools.wheel_abi import Tag, check_abi, platform_tag
from ..build_tools.wheel_file import check_version, file_time, package_name, wheel_bytes
from ..build_tools.wheel_link import Older, link_for_wheel, run_in
from ..errors import InputError
from ..families import family_of
from ..runtime.config import KernelConfig
from ..runtime.package import CORE, LIBRARY, METADATA
from .licences import Licence, expression, licences

if TYPE_CHECKING:
    from ..plan import Plan

METADATA_SCHEMA = 2
Source = Literal["file", "preset", "key"]
EXPORTS = {CORE: ("gnaforge_core_abi", "gnaforge_core_init", "gnaforge_core_load"), LIBRARY: ("gnaforge_library_v1",)}
"""What the libraries of a wheel must export."""
_LISTED_OVER_BUDGET = 10


@dataclass(frozen=True)
class Wheel:
    """A written wheel. ``sizes`` is what each kernel adds to the library, in bytes, by key."""

    path: Path
    tag: Tag
    bytes: int
    library_bytes: int
    core_bytes: int
    sizes: dict[str, int]
    compiled: list[KernelConfig]


@dataclass(frozen=True)
class _Linked:
    """The libraries of a package: their content, and what the dynamic linker sees of them."""

    files: dict[str, bytes]
    elves: dict[str, Elf]


@dataclass(frozen=True)
class Assembled:
    """All that a package of kernels is made of: what is known of it, its files by their paths in it, its licences.
    ``sizes`` is what each kernel adds to the library, in bytes, by key."""

    facts: dict[str, Any]
    files: dict[str, bytes]
    licences: list[Licence]
    tag: Tag
    sizes: dict[str, int]
    compiled: list[KernelConfig]


def build_wheel(
    plan: Plan,
    out: Path,
    *,
    rebuild: str,
    source: Source = "file",
    name: str | None = None,
    version: str = "1.0",
    budget_mb: float | None = None,
    jobs: int | None = None,
    listener: Listener | None = None,
) -> Wheel:
    """Builds what the cache lacks and writes one wheel to the folder ``out``, complete or not at all.

    Args:
        plan: the kernels.
        out: folder for the wheel; made if missing.
        rebuild: the command that builds this wheel, for the messages of its package.
        source: whether that command names a spec file, a preset or a kernel's key.
        name: of the distribution; default ``gnaforge_<library>``.
        version: of the wheel.
        budget_mb: refuse a wheel of more megabytes (1e6 bytes).
        jobs: compilations at once.
        listener: hears of progress.

    Raises:
        InputError: the name, the version, the budget or the folder won't do, or a library would not run everywhere.
        BuildError: a compilation failed.
    """
    distribution = package_name(name or f"gnaforge_{plan.library}")
    check_version(version)
    file_time()
    if budget_mb is not None and not budget_mb > 0:  # NaN is neither
        raise InputError(f"--budget-mb {budget_mb}: give a number of megabytes above 0")
    _check_writable(out)
    made = assemble(plan, distribution, version, rebuild=rebuild, source=source, jobs=jobs, listener=listener)
    package = {f"{distribution}/{file}": content for file, content in made.files.items()}
    info = _info(made.facts, made.licences)
    data = wheel_bytes(distribution, version, made.tag.platform, package, info)
    if budget_mb is not None and len(data) > budget_mb * 1e6:
        raise InputError(_over_budget(len(data), budget_mb, made.sizes))
    path = out / f"{distribution}-{version}-py3-none-{made.tag.platform}.whl"
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_atomic(path, data)
    except OSError as error:
        raise InputError(f"can't write {path}: {error.strerror}") from error
    sizes_of = {file: len(made.files[file]) for file in (LIBRARY, CORE)}
    return Wheel(path, made.tag, len(data), sizes_of[LIBRARY], sizes_of[CORE], made.sizes, made.compiled)


def assemble(
    plan: Plan,
    name: str,
    version: str,
    *,
    rebuild: str,
    source: Source = "file",
    kind: Literal["wheel", "export"] = "wheel",
    namespace: str = NAMESPACE,
    jobs: int | None = None,
    listener: Listener | None = None,
) -> Assembled:
    """Builds what the cache lacks, links the libraries, and makes the package of a plan's kernels.

    Args:
        plan: the kernels.
        name, version: of the package.
        rebuild, source: as `build_wheel` has them.
        kind: what is made of the package.
        namespace: the torch namespace of its operators. One of its own shares neither core nor kernels with others.
        jobs: compilations at once.
        listener: hears of progress.

    Raises:
        InputError: a library would not run everywhere, or is for the emulator.
        BuildError: a compilation failed.
    """
    artifacts, compiled = build_kernels(plan.configs, jobs=jobs, listener=listener)
    linked = user_cache().retry_if_deleted(lambda: _link_both(plan, artifacts, namespace))
    check_abi({file: (elf, EXPORTS[file]) for file, elf in linked.elves.items()})
    tag = platform_tag(linked.elves)
    sizes = {config.key: read_elf(artifacts[config].verified_path("kernel.o")).loaded_bytes for config in plan.configs}
    runtime = _cuda_runtime(plan.configs)
    found = licences(plan.configs, runtime)
    facts = {
        "schema": METADATA_SCHEMA,
        "name": name,
        "version": version,
        "library": plan.library,
        "gnaforge": _own_version(),
        "platform": tag.platform,
        "torch": ">=2.10",
        "rebuild": rebuild,
        "source": source,
        "kind": kind,
        "cuda_runtime": runtime,
        "cutlass": installed_version("nvidia-cutlass") if any(family_of(c).cutlass for c in plan.configs) else None,
        "families": {family.name: family.facts.as_json() for family in dict.fromkeys(map(family_of, plan.configs))},
        "kernels": [_kernel_row(config, artifacts[config], sizes[config.key]) for config in plan.configs],
        "files": {file: hashlib.sha256(data).hexdigest() for file, data in linked.files.items()},
        "licences": [{"spdx": x.spdx, "covers": x.covers, "file": f"licenses/{x.file}"} for x in found],
    }
    files = _package(facts, linked.files, namespace)
    return Assembled(facts, files, found, tag, sizes, compiled)


def _check_writable(out: Path) -> None:
    """Refuses a folder that can't be written before anything is compiled for it."""
    try:
        existing = next(path for path in (out, *out.absolute().parents) if path.exists() or path.is_symlink())
    except OSError as error:
        raise InputError(f"can't write to {out}: {error.strerror}") from error
    if not existing.is_dir():
        raise InputError(f"can't write to {out}: {existing} is not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"can't write to {out}: no permission for {existing}")


def _link_both(plan: Plan, artifacts: Mapping[KernelConfig, Artifact], namespace: str) -> _Linked:
    """Links the kernel library and the core.

    Raises:
        InputError: the library is for the emulator.
        BuildError: a link failed.
    """
    host = cxx_compiler()
    core = core_object(namespace)
    linker = library_linker(plan.configs, host)
    with user_cache().scratch() as scratch:
        run = run_in(scratch, f"the wheel of {plan.library}")
        (scratch / "library.cpp").write_text(render_library(plan.library, plan.configs))
        run(host.compile_command("library.cpp", "library.o", include_dir()))
        objects = ["library.o", *(str(artifacts[config].verified_path("kernel.o")) for config in plan.configs)]

        def link_core(parts: list[str], output: str) -> list[str]:
            return core_link_command(host, parts, output)

        def link(output: str, parts: Sequence[str], exports: str, how: Any) -> Elf:
            return link_for_wheel(scratch, output, parts, exports, host=host, link=how, render=_older_source, run=run)

        elves = {
            CORE: link(CORE, [str(core)], "gnaforge_core_*", link_core),
            LIBRARY: link(LIBRARY, objects, "gnaforge_library_v1", linker.link_command),
        }
        if is_emulated(scratch / LIBRARY):
            raise InputError(f"the library of {plan.library} is built for the emulator: it can't go into a wheel")
        return _Linked({file: (scratch / file).read_bytes() for file in elves}, elves)


def _older_source(older: Older) -> str:
    return render_wheel("older_symbols.cpp", moved=older.moved, written=older.written)


def _cuda_runtime(configs: Sequence[KernelConfig]) -> str | None:
    """The version of the CUDA runtime that a library of these kernels contains."""
    linker = library_linker(configs, cxx_compiler())
    return linker.nvcc.version if isinstance(linker, CudaCompiler) else None


def _kernel_row(config: KernelConfig, artifact: Artifact, size: int) -> dict[str, Any]:
    parts = artifact.record["parts"]
    row = {
        "key": config.key,
        "arch": config.arch,
        "family": family_of(config).name,
        "digest": artifact.record["digest"],
        "source_digest": artifact.record["source_digest"],
        "bytes": size,
        "registers": artifact.record["registers"],
        "shared_memory": artifact.record["shared_memory"],
        "compiler": parts["compiler"],
    }
    return {**row, "host_compiler": parts["host_compiler"]} if "host_compiler" in parts else row


def _own_version() -> str:
    from .. import __version__

    return __version__


def _package(facts: Mapping[str, Any], libraries: Mapping[str, bytes], namespace: str) -> dict[str, bytes]:
    """The files of the package: the runtime inside it, the libraries and what is known of them."""
    values = {**facts, "package": facts["name"], "summary": _summary(facts)}
    files = {name: render_wheel(f"package/{name}", **values).encode() for name in wheel_package_templates()}
    for path in _runtime_files():
        text = path.read_bytes()
        files[f"_runtime/{path.name}"] = text if namespace == NAMESPACE else in_namespace(text.decode(), namespace)
    files[METADATA] = (json.dumps(facts, indent=1) + "\n").encode()
    return {**files, **libraries}


def _runtime_files() -> list[Path]:
    from .. import runtime

    return sorted(Path(str(runtime.__file__)).parent.glob("*.py"))


def package_source_digest() -> str:
    """Names what this version makes a package's Python code of."""
    templates = [template_dir() / "wheel" / "package" / f"{name}.j2" for name in wheel_package_templates()]
    sources = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (*templates, *_runtime_files())}
    return digest_of({"sources": sources, "gnaforge": _own_version()})


# Operators and their registrations, and the state that copies of the runtime share.
_NAMES = re.compile(
    r'(?<=torch\.ops\.)gnaforge\b|(?<=")gnaforge(?=::)|(?<=Library\(")gnaforge(?=")|(?<="_)gnaforge(?=_)'
)


def in_namespace(source: str, namespace: str) -> bytes:
    """Python code of the runtime, with the operators of another torch namespace."""
    return _NAMES.sub(namespace, source).encode()


def _info(facts: Mapping[str, Any], found: Sequence[Licence]) -> dict[str, bytes]:
    """The files of ``.dist-info`` but for WHEEL and RECORD."""
    kernels = [
        {"key": row["key"], "rank": KernelConfig.parse(row["key"]).rank, "size": f"{row['bytes'] / 1e3:.0f} KB"}
        for row in facts["kernels"]
    ]
    values = {**facts, "package": facts["name"], "summary": _summary(facts), "kernels": kernels}
    values |= {"licence_expression": expression(found), "licence_files": [licence.file for licence in found]}
    entry = f"[gnaforge.libraries]\n{facts['library']} = {facts['name']}:libraries\n"
    return {
        "METADATA": render_wheel("METADATA", **values).encode(),
        "entry_points.txt": entry.encode(),
        **{f"licenses/{licence.file}": licence.text for licence in found},
    }


def _summary(facts: Mapping[str, Any]) -> str:
    count, arches = len(facts["kernels"]), sorted({row["arch"] for row in facts["kernels"]})
    what = count_of(count, "neighborhood attention kernel")
    return f"{what} for {listed(arches)}: {facts['library']}"


def _over_budget(size: int, budget_mb: float, sizes: Mapping[str, int]) -> str:
    biggest = sorted(sizes.items(), key=lambda item: (-item[1], item[0]))[:_LISTED_OVER_BUDGET]
    listing = "".join(f"\n  {bytes_ / 1e6:7.2f} MB  {key}" for key, bytes_ in biggest)
    what = "its kernels" if len(sizes) == len(biggest) else f"the biggest of its {count_of(len(sizes), 'kernel')}"
    return (
        f"the wheel takes {size / 1e6:.2f} MB, over the budget of {budget_mb:g} MB; nothing was written. "
        f"Of {what}, before compression:{listing}"
    )
