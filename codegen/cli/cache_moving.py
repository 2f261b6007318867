"""`gnaforge cache export` and `import`: compiled kernels between machines."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..build_tools.text import count_of
from .options import ArchOption, plan_of
from .tables import say
from .waiting import waiting

if TYPE_CHECKING:
    from ..build_tools.cache import Artifact


def export(
    target: Annotated[
        Path, typer.Argument(metavar="FILE|DIR", help="A .zip file to write, or a folder.", show_default=False)
    ],
    spec: Annotated[
        str | None,
        typer.Option(metavar="SPEC", help="Only the kernels of a spec that this machine's compilers made."),
    ] = None,
    arch: ArchOption = None,
) -> None:
    """Copy compiled kernels out of the cache.

    `gnaforge cache import` brings them into another machine's.

    A folder can also be used as it is, as a read-only layer: name it in GNAFORGE_CACHE_PATH. With --spec the core
    extension goes along, if the cache has the current one.

    Examples:
        gnaforge cache export part-1-of-3.zip --spec hunyuan-video
        gnaforge cache export /opt/kernels --arch sm90  # A folder to name in GNAFORGE_CACHE_PATH.
    """
    from ..build_tools.cache import user_cache
    from ..build_tools.cache_archive import export_artifacts
    from ..errors import InputError

    if spec is None and arch:
        raise InputError("--arch selects kernels of a spec: give --spec too")
    if spec is not None:
        artifacts, wanted = _of_spec(spec, arch)
    else:
        artifacts, wanted = _portable(), ""
    if not artifacts:
        raise InputError(f"{user_cache().root} holds no kernel{f' of {spec}' if spec else ''}: nothing was written")
    with waiting(f"writing {_count_text(artifacts)} to {target}"):
        export_artifacts(artifacts, target)
    size = sum(path.stat().st_size for artifact in artifacts for path in artifact.folder.iterdir())
    say(f"{target}: {_count_text(artifacts)}{wanted}, {size / 1e6:.1f} MB unpacked")


def import_(
    sources: Annotated[
        list[Path],
        typer.Argument(metavar="FILE|DIR...", help="What gnaforge cache export wrote.", show_default=False),
    ],
) -> None:
    """Bring exported kernels into the cache.

    Every file is compared with its digest; what is there already stays. Import only what you made yourself or trust:
    kernels are code that your processes will run, and a digest shows damage, not malice.

    Examples:
        gnaforge cache import part-1-of-3.zip part-2-of-3.zip part-3-of-3.zip
        gnaforge cache import /mnt/kernels
    """
    from ..build_tools.cache import user_cache
    from ..build_tools.cache_archive import import_artifacts

    new: list[Artifact] = []
    for source in sources:
        with waiting(f"reading {source}"):
            found, known = import_artifacts(source, user_cache(), needed_files)
        say(f"{source}: {_count_text(found)} imported, {known} there already")
        new += found
    for note in _misfits([artifact.record for artifact in new]):
        say(f"note: {note}")


def needed_files(name: str) -> set[str]:
    """The files without which an artifact is of no use."""
    from ..build.core import CORE_FILE, CORE_NAME
    from ..build.identity import LIBRARY_FILE

    if name == CORE_NAME:
        return {CORE_FILE, "core.o"}
    return {LIBRARY_FILE, "kernel.o"} if _config(name.removeprefix("emulated.")) else set()


def _count_text(artifacts: Sequence[Artifact]) -> str:
    kernels = sum(artifact.record["key"] != "core" for artifact in artifacts)
    text = count_of(kernels, "kernel")
    return text if kernels == len(artifacts) else text + " and the core extension"


def _config(key: object) -> Any:
    """The config of a kernel's key; None of any other artifact's."""
    from ..families import find_family
    from ..runtime.config import KernelConfig

    try:
        config = KernelConfig.parse(str(key))
    except ValueError:
        return None
    return config if find_family(config) else None


def _portable() -> list[Artifact]:
    """The intact kernels and cores of the user cache."""
    from ..build_tools.cache import user_cache

    def portable(key: object) -> bool:
        return key == "core" or _config(key) is not None

    return [each for each in user_cache().artifacts() if portable(each.record.get("key")) and each.intact()]


def _of_spec(spec: str, arch: list[str] | None) -> tuple[list[Artifact], str]:
    """The artifacts of a spec's kernels, with the core for this torch, and how many kernels the spec has."""
    from importlib.metadata import version

    from ..build.kernels import explain_missing, make_jobs, split_buildable, split_cached
    from ..build_tools.toolchain import cxx_compiler

    plan = plan_of(spec, arch)
    ready, missing = split_buildable(plan.configs)
    if missing:  # what compiled them is part of their names
        say(f"note: {explain_missing(missing)}: not exported", file=sys.stderr)
    found, _ = split_cached(make_jobs(ready, cxx_compiler()))
    kernels = [found[config] for config in plan.configs if config in found]
    cores = [artifact for artifact in _portable() if artifact.record.get("torch") == version("torch")]
    return kernels + (cores if kernels else []), f" of the {len(plan.configs)} of {spec}"


def _misfits(records: Sequence[dict[str, Any]]) -> list[str]:
    """What keeps imported kernels from being used here."""
    from ..build.identity import source_digest
    from ..build_tools.cuda import cutlass_version, find_nvcc
    from ..build_tools.toolchain import cxx_compiler
    from ..errors import GnaforgeError
    from ..families import TARGETS

    def own_compiler() -> str:
        return cxx_compiler().version

    def own_nvcc(at_least: tuple[int, int]) -> str:
        return f"nvcc {find_nvcc(at_least).version}"

    def own_cutlass() -> str:
        return f"CUTLASS {cutlass_version()}"

    stale, foreign, own = 0, set(), set()
    finders: list[Callable[[], str]] = [own_compiler, own_cutlass]
    finders += [partial(own_nvcc, target.nvcc) for target in TARGETS.values() if target.compiler == "nvcc"]
    for find in finders:
        with contextlib.suppress(GnaforgeError):
            own.add(find())
    for record in records:
        config = _config(record.get("key"))
        if config is not None:
            stale += record.get("source_digest") != source_digest(config)
            parts = record.get("parts", {})
            foreign |= {str(parts[name]) for name in ("compiler", "host_compiler") if name in parts}
            foreign |= {f"CUTLASS {parts['cutlass']}"} if "cutlass" in parts else set()
    notes = []
    if stale:
        notes.append(
            f"{stale} of the kernels imported come from another gnaforge version's sources: they will not be used"
        )
    if others := sorted(foreign - own):
        notes.append(
            f"compiled by or with {'; '.join(others)}, which this machine lacks: build and wheel here compile their own"
        )
    return notes
