"""Reports what is in the compile cache, and why a kernel is, or isn't, found there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..build_tools.cache import Artifact, Cache, cache_layers, find_in_layers, user_cache
from ..build_tools.cache_care import broken_artifacts
from ..build_tools.toolchain import cxx_compiler
from ..errors import BuildError
from ..families import find_family
from ..runtime.config import KernelConfig
from .core import CORE_NAME, core_source_digest
from .identity import installed_parts, source_digest
from .kernels import make_jobs, source_parts
from .render import render_kernel, render_library


def is_stale(artifact: Artifact) -> bool:
    """Whether no call of this version would take the artifact; parts of the emulator never count as stale."""
    key = str(artifact.record.get("key", ""))
    if key == CORE_NAME:
        return not artifact.is_made_of(core_source_digest(), {})
    config = _config(key.removeprefix("emulated."))
    if config is None:
        return key.startswith("gna_")
    return find_family(config) is None or not artifact.is_made_of(source_digest(config), installed_parts(config))


def _config(key: str) -> KernelConfig | None:
    try:
        return KernelConfig.parse(key)
    except ValueError:
        return None


def summary(cache: Cache) -> dict[str, Any]:
    """Counts and bytes of a cache: kernels that calls take, those of other versions, and what else is there."""
    mistrusted = cache.mistrust() if cache.exists() else ""
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for artifact in cache.artifacts():
        if _config(str(artifact.record.get("key"))) is None:
            kind = "stale" if is_stale(artifact) else "other"
        else:
            kind = "stale" if is_stale(artifact) else "kernels"
        counts[kind] += 1
        sizes[kind] += artifact.size()
    damaged = broken_artifacts(cache) if cache.is_trusted() else []
    return {
        "folder": str(cache.root),
        "exists": cache.exists(),
        "trusted": not mistrusted,
        "mistrusted": mistrusted,
        **{kind: {"count": counts[kind], "bytes": sizes[kind]} for kind in ("kernels", "stale", "other")},
        "damaged": {"count": len(damaged), "bytes": sum(item.size for item in damaged)},
    }


def summaries() -> list[dict[str, Any]]:
    """`summary` of each layer and, last, of the user cache."""
    return [summary(cache) for cache in cache_layers()]


@dataclass(frozen=True)
class Explanation:
    """The reasons for which a kernel is found in the cache, or not.

    Attributes:
        parts: every part of its cache key, by name.
        digest: their digest; empty if there is no compiler, whose version is a part.
        found: the artifact that a build would take.
        usable: the library that a call would take, whatever compiled it.
        nearest: the artifact that is most alike; None if it was found, or there is none.
        differences: by part, what ``nearest`` has and what is wanted; a part that one lacks is empty.
        notes: what else there is to say, a sentence each.
    """

    parts: dict[str, str]
    digest: str
    found: Path | None
    usable: Path | None
    nearest: Path | None
    differences: dict[str, tuple[str, str]]
    notes: tuple[str, ...]


def explain(config: KernelConfig) -> Explanation:
    """Explains a kernel's cache key."""
    from .cached import find_kernel

    notes = []
    try:
        (job,) = make_jobs([config], cxx_compiler())
        parts, digest = flat(job.parts), job.digest
    except BuildError as error:
        notes.append(f"without a compiler only the sources' parts are known: {error}")
        parts, digest = flat(source_parts(config, render_kernel(config), render_library(config.key, [config]))), ""
    found = find_in_layers(config.key, digest) if digest else None
    if digest and found is None and (folder := user_cache().folder(config.key, digest)).is_dir():
        notes.append(f"{folder} is damaged, or others could have written it; the next build replaces it")
    nearest = None if found else _nearest(config, parts)
    return Explanation(
        parts=parts,
        digest=digest,
        found=found.folder if found else None,
        usable=find_kernel(config),
        nearest=nearest.folder if nearest else None,
        differences=_differences(nearest, parts, known_only=not digest) if nearest else {},
        notes=tuple(notes),
    )


def flat(parts: Mapping[str, object]) -> dict[str, str]:
    """Parts of a key as text, one level deep: ``headers gnaforge/abi.h`` for each header."""
    rows: dict[str, str] = {}
    for name, value in parts.items():
        if isinstance(value, Mapping):
            rows.update({f"{name} {inner}": str(text) for inner, text in value.items()})
        else:
            rows[name] = " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return rows


def _differences(
    artifact: Artifact, parts: Mapping[str, str], *, known_only: bool = False
) -> dict[str, tuple[str, str]]:
    theirs = flat(artifact.record.get("parts") or {})
    names = [*parts, *(name for name in theirs if name not in parts and not known_only)]
    pairs = {name: (theirs.get(name, ""), parts.get(name, "")) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


_FIELDS = (
    "op",
    "arch",
    "variant",
    "rank",
    "dtype",
    "head_dim",
    "value_head_dim",
    "out_dtype",
    "q_tile",
    "kv_tile",
    "q_tile_heads",
)


def _nearest(config: KernelConfig, parts: Mapping[str, str]) -> Artifact | None:
    """The entry of this key with the fewest differing parts; else one that differs in less important fields."""
    layers = [cache for cache in cache_layers() if cache.is_trusted()]
    own = [artifact for cache in layers for artifact in cache.artifacts_named(config.key)]
    candidates = own or [artifact for cache in layers for artifact in cache.artifacts()]

    def distance(artifact: Artifact, other: KernelConfig) -> tuple[object, ...]:
        fields = [getattr(other, name) != getattr(config, name) for name in _FIELDS]
        return (*fields, len(_differences(artifact, parts)), artifact.folder.name)

    kernels = [(artifact, _config(str(artifact.record.get("key")))) for artifact in candidates]
    near = [(distance(artifact, other), artifact) for artifact, other in kernels if other is not None]
    return min(near, key=lambda pair: pair[0])[1] if near else None
