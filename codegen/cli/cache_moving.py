"""`gnaforge cache export` and `import`: compiled kernels between machines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import ArchOption, plan_of

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
    """Copy compiled kernels out of the cache, for [bold]gnaforge cache import[/] on another machine.

    A folder can also be used as it is, as a read-only layer: name it in GNAFORGE_CACHE_PATH. With --spec the core
    extension goes along, if the cache has the current one.

    Example: [bold]gnaforge cache export part-1-of-3.zip --spec hunyuan-video[/]
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
    export_artifacts(artifacts, target)
    size = sum(path.stat().st_size for artifact in artifacts for path in artifact.folder.iterdir())
    print(f"{target}: {_counted(artifacts)}{wanted}, {size / 1e6:.1f} MB unpacked")


def import_(
    sources: Annotated[
        list[Path],
        typer.Argument(metavar="FILE|DIR...", help="What gnaforge cache export wrote.", show_default=False),
    ],
) -> None:
    """Bring exported kernels into the cache. Every file is compared with its digest; what is there already stays.

    Import only what you made yourself or trust: kernels are code that your processes will run, and a digest shows
    damage, not malice.

    Example: [bold]gnaforge cache import part-1-of-3.zip part-2-of-3.zip part-3-of-3.zip[/]
    """
    from ..build_tools.cache import user_cache
    from ..build_tools.cache_archive import import_artifacts

    new: list[Artifact] = []
    for source in sources:
        found, known = import_artifacts(source, user_cache())
        print(f"{source}: {_counted(found)} imported, {known} there already")
        new += found
    for note in _misfits([artifact.record for artifact in new]):
        print(f"note: {note}")


def _counted(artifacts: Sequence[Artifact]) -> str:
    kernels = sum(artifact.record["key"] != "core" for artifact in artifacts)
    text = f"{kernels} kernel{'' if kernels == 1 else 's'}"
    return text if kernels == len(artifacts) else text + " and the core extension"


def _config(record: dict[str, Any]) -> Any:
    """The config of a kernel's record; None of any other artifact's."""
    from ..arch import ARCHES
    from ..runtime.config import KernelConfig

    try:
        config = KernelConfig.parse(record["key"])
    except (ValueError, KeyError):
        return None
    return config if config.arch in ARCHES else None


def _portable() -> list[Artifact]:
    """The intact kernels and cores of the user cache."""
    from ..build_tools.cache import user_cache

    return [
        artifact
        for artifact in user_cache().artifacts()
        if (artifact.record.get("key") == "core" or _config(artifact.record) is not None) and artifact.intact()
    ]


def _of_spec(spec: str, arch: list[str] | None) -> tuple[list[Artifact], str]:
    """The artifacts of a spec's kernels, with the core for this torch, and how many kernels the spec has."""
    from importlib.metadata import version

    from ..build import make_jobs
    from ..build_tools.cache import user_cache
    from ..build_tools.toolchain import cxx_compiler

    cache, plan = user_cache(), plan_of(spec, arch)
    found = [cache.find(job.name, job.digest) for job in make_jobs(plan.configs, cxx_compiler())]
    kernels = [artifact for artifact in found if artifact is not None]
    cores = [artifact for artifact in _portable() if artifact.record.get("torch") == version("torch")]
    return kernels + (cores if kernels else []), f" of the {len(plan.configs)} of {spec}"


def _misfits(records: Sequence[dict[str, Any]]) -> list[str]:
    """What keeps imported kernels from being used here."""
    from ..arch import ARCHES
    from ..build import source_digest
    from ..build_tools.cuda import find_nvcc
    from ..build_tools.toolchain import cxx_compiler
    from ..errors import GnaforgeError

    stale, foreign, own = 0, set(), set()
    try:
        own.add(cxx_compiler().version)
        own.update(f"nvcc {find_nvcc(arch.nvcc).version}" for arch in ARCHES.values() if arch.compiler == "nvcc")
    except GnaforgeError:
        pass
    for record in records:
        config = _config(record)
        if config is not None:
            stale += record.get("source_digest") != source_digest(config)
            foreign.add(record["parts"]["compiler"])
    notes = []
    if stale:
        notes.append(
            f"{stale} of the kernels imported come from another gnaforge version's sources: they will not be used"
        )
    if others := sorted(foreign - own):
        notes.append(
            f"compiled by {'; '.join(others)}, which this machine lacks: calls use these kernels, "
            "but build and wheel here compile their own"
        )
    return notes
