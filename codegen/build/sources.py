"""Writing rendered sources to a folder, and checking a folder against them."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..build_tools.files import holds, write_atomic
from ..build_tools.limits import RECORD_BYTES, parse_json, read_bounded
from ..errors import InputError
from ..runtime.config import KernelConfig
from .render import Sources, render_sources, source_suffix

if TYPE_CHECKING:
    from ..plan import Plan

MANIFEST = "manifest.json"
_SCHEMA = 1
_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,254}")


@dataclass(frozen=True)
class Drift:
    """The differences of a folder from what rendering gives: file names, each list sorted."""

    missing: list[str]
    changed: list[str]
    orphans: list[str]

    def __bool__(self) -> bool:
        return bool(self.missing or self.changed or self.orphans)


def source_dir(out: Path, library: str) -> Path:
    """Where the sources of ``library`` go below the output folder."""
    return out / library / "src"


def kernel_file(config: KernelConfig) -> str:
    """Name of the file that holds a kernel's source."""
    return config.key + source_suffix(config)


def _contents(sources: Sources) -> dict[str, bytes]:
    files = {kernel_file(config): text.encode() for config, text in sources.kernels.items()}
    files["library.cpp"] = sources.table.encode()
    manifest = {
        "made_by": "gnaforge",
        "schema": _SCHEMA,
        "library": sources.library,
        "kernels": {config.key: kernel_file(config) for config in sources.kernels},
        "files": {name: hashlib.sha256(data).hexdigest() for name, data in sorted(files.items())},
    }
    files[MANIFEST] = (json.dumps(manifest, indent=1) + "\n").encode()
    return files


def _own_files(folder: Path) -> set[str]:
    """Names of the files that an earlier run wrote.

    Raises:
        InputError: the folder has files but no manifest of ours.
    """
    if not folder.exists():
        return set()
    if not folder.is_dir():
        raise InputError(f"{folder} is a file; give another output folder with -o")
    if not any(folder.iterdir()):
        return set()
    try:
        manifest = parse_json(read_bounded(folder / MANIFEST, RECORD_BYTES), RECORD_BYTES)
        if manifest["made_by"] != "gnaforge":
            raise ValueError("foreign manifest")
        names = manifest["files"].keys()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{folder} was not made by gnaforge (no readable {MANIFEST}): nothing is written there; "
            "empty it or give another output folder with -o"
        ) from error
    # A manifest is a file anyone may edit: only plain names in this very folder are ever removed.
    return set(filter(_PLAIN.fullmatch, names))


def write_sources(sources: Sources, out: Path) -> Path:
    """Writes sources to ``out/<library>/src`` and removes those that an earlier run left over.

    Files that already hold the right bytes are not touched. Returns the folder.

    Raises:
        InputError: the folder holds files that gnaforge did not write, or can't be written.
    """
    folder = source_dir(out, sources.library)
    contents = _contents(sources)
    stale = _own_files(folder) - contents.keys()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in contents.items():  # the manifest comes last
            path = folder / name
            if not holds(path, data):
                write_atomic(path, data)
        for name in stale:
            if not (folder / name).is_dir():
                (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"can't write to {folder}: {error.strerror}") from error
    return folder


def generate(plan: Plan, out: Path) -> Path:
    """Renders a plan's sources and writes them: see `write_sources`."""
    return write_sources(render_sources(plan.library, plan.configs), out)


def check(plan: Plan, out: Path) -> Drift:
    """Compares ``out/<library>/src`` with what `generate` would write; writes nothing."""
    folder = source_dir(out, plan.library)
    contents = _contents(render_sources(plan.library, plan.configs))
    present = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    return Drift(
        missing=sorted(contents.keys() - present),
        changed=sorted(n for n in contents.keys() & present if not holds(folder / n, contents[n])),
        orphans=sorted(present - contents.keys()),
    )
