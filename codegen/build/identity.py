"""Digests what a kernel is made of, from files alone: without rendering, and without asking any compiler.

A process that finds its kernels in the cache needs no more than this, so it imports hashing and nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ..build_tools.cache import digest_of
from ..build_tools.includes import include_closure
from ..build_tools.toolchain import CXX_FLAGS, LINK_FLAGS
from ..families import Family, family_of
from ..runtime.config import KernelConfig

SOURCE_SCHEMA = 2
LIBRARY_FILE = "kernel.so"
CUBIN_FILE = "kernel.cubin"  # machine code of a GPU kernel, for the time model
LIBRARY_TEMPLATE = "library/library.cpp.j2"
_NESTED = re.compile(r"{%-?\s*(?:include|import|from|extends)\s+[\"']([^\"']+)[\"']")


def template_dir() -> Path:
    """Folder of the templates; C++ headers are in its ``include/``."""
    from .. import templates

    return Path(templates.__file__).parent


def include_dir() -> Path:
    """The folder to compile kernels with: ``-I``."""
    return template_dir() / "include"


def include_dirs(family: Family) -> tuple[Path, ...]:
    """The folders to compile a family's kernels with: ``-I``. Its own comes first, where it has one."""
    return (*([family.root / "include"] if family.root else []), include_dir())


def template_dirs(family: Family) -> tuple[Path, ...]:
    """The folders that a family's templates are looked for in, in this order."""
    return (*([family.root] if family.root else []), template_dir())


def source_digest(config: KernelConfig) -> str:
    """Names what this version of gnaforge makes a kernel of, whatever compiles it.

    That is its key, its templates, the headers that they reach and the flags: a kernel in the cache with another
    digest was made by another version.
    """
    family = family_of(config)
    flags = [CXX_FLAGS, LINK_FLAGS]
    if family.target.compiler == "nvcc":
        from ..build_tools.cuda_compiler import CUTLASS_FLAGS, NVCC_FLAGS, NVCC_LINK_FLAGS

        flags += [NVCC_FLAGS, NVCC_LINK_FLAGS, (family.target.nvcc_target,)]
        if family.cutlass:
            flags.append(CUTLASS_FLAGS)
    templates = _template_closure(template_dirs(family), family.template, LIBRARY_TEMPLATE)
    return digest_of(
        {
            "schema": SOURCE_SCHEMA,
            "key": config.key,
            "facts": family.template_facts(config),
            "templates": {name: hashlib.sha256(text.encode()).hexdigest() for name, text in templates.items()},
            "headers": include_closure("\n".join(templates.values()), *include_dirs(family)),
            "flags": flags,
        }
    )


def installed_parts(config: KernelConfig) -> dict[str, str]:
    """What a kernel in the cache was made of besides, as far as this machine has another: the CUTLASS package.

    It is no part of `source_digest`, so that kernels that were made elsewhere serve where there is no CUTLASS.
    """
    if family_of(config).cutlass:
        with contextlib.suppress(PackageNotFoundError):
            return {"cutlass": version("nvidia-cutlass")}
    return {}


def _template_closure(folders: Sequence[Path], *names: str) -> dict[str, str]:
    """The texts of templates and of those that they bring in, by name, sorted."""
    texts: dict[str, str] = {}
    pending = list(names)
    while pending:
        name = pending.pop()
        if name not in texts:
            path = next((folder / name for folder in folders if (folder / name).is_file()), folders[0] / name)
            texts[name] = path.read_text()
            pending += _NESTED.findall(texts[name])
    return dict(sorted(texts.items()))
