"""Finds what gnaforge needs, and says how to get what is missing."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path

from .build.core import torch_dir
from .build_tools.cache import cache_layers, user_cache
from .build_tools.compile import find_ninja
from .build_tools.cuda import cutlass_version, find_cutlass, find_nvcc
from .build_tools.text import count_of
from .build_tools.toolchain import available_memory_gb, cxx_compiler, job_limit
from .build_tools.trust import mistrust_of_way
from .errors import GnaforgeError
from .families import TARGETS, families
from .runtime.core import CPU_ISAS

GROUPS = ("run", "run GPU kernels", "build cpu kernels", "build GPU kernels")
NEEDED = ("run", "build cpu kernels")
"""The groups without which nothing works."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked for.

    Attributes:
        name: what it is.
        group: what it is needed for, one of `GROUPS`.
        ok: whether it is there and usable.
        detail: what was found and where, or what is wrong and how to mend it.
    """

    name: str
    group: str
    ok: bool
    detail: str


def _find(name: str, group: str, probe: Callable[[], str]) -> Finding:
    try:
        return Finding(name, group, True, probe())
    except PackageNotFoundError as error:
        return Finding(name, group, False, f"not installed: pip install {error.name}")
    except (GnaforgeError, ImportError, OSError) as error:
        return Finding(name, group, False, str(error))


def _torch() -> str:
    return f"{version('torch')} in {torch_dir()}"


def _gpu() -> str:
    import torch

    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        raise OSError(f"none that torch can use (torch is {built}); only cpu kernels run here")
    names, known = [], False
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        names.append(f"{torch.cuda.get_device_name(i)} (sm{major}{minor})")
        known |= any((major, minor) in target.capabilities for target in TARGETS.values())
    if not known:
        served = "; ".join(f"{target.name} for {target.needs}" for target in TARGETS.values() if target.is_gpu)
        raise OSError(f"{', '.join(names)}: this version has no kernels for it, but {served}")
    return ", ".join(names)


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    flags: set[str] = set()
    if info.exists():
        line = next((line for line in info.read_text().splitlines() if line.startswith("flags")), "")
        flags = set(line.split(":", 1)[-1].split())
    if {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= flags:
        isa = "AVX-512"
    elif {"avx2", "fma", "f16c"} <= flags:
        isa = "AVX2"
    else:
        isa = "portable vectors"
    wanted = os.environ.get("GNAFORGE_CPU_ISA", "")
    if wanted not in CPU_ISAS:
        raise OSError(f"GNAFORGE_CPU_ISA is {wanted!r}; it must be one of {', '.join(CPU_ISAS[1:])}")
    if wanted == "portable" or (wanted == "avx2" and isa == "AVX-512"):
        isa = f"{wanted} vectors, by GNAFORGE_CPU_ISA ({isa} is there)"
    jobs = count_of(job_limit(1.0), "build job")
    return f"{platform.machine()}, kernels use {isa}; {available_memory_gb():.0f} GB free, {jobs}"


def _compiler() -> str:
    compiler = cxx_compiler()
    return f"{compiler.version}, {compiler.path}"


def _ninja() -> str:
    return f"{version('ninja')}, {find_ninja()}"


def _nvcc(at_least: tuple[int, int]) -> str:
    nvcc = find_nvcc(at_least)
    return f"{nvcc.version} ({nvcc.source}), {nvcc.path}"


def _nvccs(group: str) -> list[Finding]:
    """One for all targets that have the same CUDA compiler, or lack one for the same reason."""
    targets: dict[Finding, list[str]] = {}
    for target in TARGETS.values():
        if target.compiler == "nvcc":
            targets.setdefault(_find("", group, partial(_nvcc, target.nvcc)), []).append(target.name)
    policy = os.environ.get("GNAFORGE_TOOLCHAIN", "auto")
    return [
        replace(found, name=f"CUDA compiler for {', '.join(names)} (GNAFORGE_TOOLCHAIN={policy})")
        for found, names in targets.items()
    ]


def _cutlass() -> str:
    examples = {family.cutlass for family in families()} - {""}
    (folder,) = {find_cutlass(example).include for example in examples}
    return f"{cutlass_version()}, {folder}"


def _cache() -> str:
    cache = user_cache()
    if not cache.root.exists():
        if reason := mistrust_of_way(cache.root):
            raise OSError(f"{cache.root} {reason}")
        return f"{cache.root} (not there yet; the first build makes it)"
    cache.make_ready()
    artifacts = list(cache.artifacts())
    size = sum(path.stat().st_size for artifact in artifacts for path in artifact.folder.iterdir())
    return f"{cache.root}: {count_of(len(artifacts), 'artifact')}, {size / 1e6:.1f} MB"


def _layers() -> str:
    layers = cache_layers()[:-1]
    for layer in layers:
        if reason := layer.mistrust():
            raise OSError(f"{layer.root} in GNAFORGE_CACHE_PATH {reason}: not used")
    return ", ".join(str(layer.root) for layer in layers) or "none (GNAFORGE_CACHE_PATH is not set)"


def _packages() -> str:
    names = sorted(entry.name for entry in entry_points(group="gnaforge.libraries"))
    return ", ".join(names) or "none"


def examine() -> list[Finding]:
    """Looks at everything; takes a few seconds, because torch is imported to ask for GPUs."""
    run, run_gpu, cpu, gpu = GROUPS
    python = f"{platform.python_version()} in {sys.prefix} on {platform.platform()}"
    return [
        Finding("python", run, True, python),
        _find("torch", run, _torch),
        _find("processor", run, _cpu),
        _find("GPU", run_gpu, _gpu),
        _find("C++ compiler", cpu, _compiler),
        _find("ninja", cpu, _ninja),
        _find("cache", cpu, _cache),
        _find("cache layers", run, _layers),
        _find("kernel packages", run, _packages),
        *_nvccs(gpu),
        _find("CUTLASS headers", gpu, _cutlass),
    ]
