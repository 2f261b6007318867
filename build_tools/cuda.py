"""Finds the CUDA compiler and the CUTLASS headers. Only asked when a GPU kernel is to be built, or by `doctor`."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .errors import BuildError, InputError
from .process import output_of

POLICIES = ("auto", "system", "pip")
_REMEDY = (
    "pip install 'gnaforge[cuda]' brings a whole CUDA compiler; or set CUDA_HOME to an installed toolkit; "
    "`gnaforge doctor` shows what is found"
)


_NO_CUTLASS = (
    "the CUTLASS sources are missing or not whole: pip install 'nvidia-cutlass>=4.2', or all of 'gnaforge[cuda]'"
)


@dataclass(frozen=True)
class Nvcc:
    """A CUDA compiler: the executable, its release and build number, and whether it came from pip or the system."""

    path: Path
    version: str
    source: str


def toolchain_policy() -> str:
    """``GNAFORGE_TOOLCHAIN``: ``auto`` (the default), ``system`` or ``pip``.

    Raises:
        InputError: it has another value.
    """
    policy = os.environ.get("GNAFORGE_TOOLCHAIN", "auto")
    if policy not in POLICIES:
        raise InputError(f"GNAFORGE_TOOLCHAIN is {policy!r}; it must be one of {', '.join(POLICIES)}")
    return policy


def _system_candidates() -> list[Path]:
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    found = [Path(home) / "bin" / "nvcc" for home in homes]
    if on_path := shutil.which("nvcc"):
        found.append(Path(on_path))
    return found


def _pip_candidate() -> Path | None:
    """nvcc of the wheel ``nvidia-cuda-nvcc``."""
    if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.pathfinder") is None:
        return None
    from cuda.pathfinder import find_nvidia_binary_utility

    found = find_nvidia_binary_utility("nvcc")
    # pathfinder also knows conda and CUDA_HOME; only a wheel's compiler is below site-packages/nvidia.
    return Path(found) if found and "nvidia" in Path(found).parts else None


@lru_cache(maxsize=8)
def _version_text(path: Path, changed: int, size: int) -> str:
    """A compiler's own words on its version: asked for once for each file, as several kernel families ask."""
    return output_of([str(path), "--version"])


def find_nvcc(at_least: tuple[int, int] = (0, 0)) -> Nvcc:
    """The CUDA compiler that `toolchain_policy` selects; ``auto`` prefers the system's, if its version is ``at_least``
    that (major, minor).

    Raises:
        BuildError: there is none, or it doesn't run; lists where was looked.
    """
    policy = toolchain_policy()
    looked = []
    candidates: list[tuple[Path, str]] = []
    if policy in ("auto", "system"):
        candidates += [(path, "system") for path in _system_candidates()]
        looked.append("CUDA_HOME, CUDA_PATH and PATH")
    if policy in ("auto", "pip"):
        if (pip := _pip_candidate()) is not None:
            candidates.append((pip, "pip"))
        looked.append("the pip wheel nvidia-cuda-nvcc")
    for path, source in candidates:
        if not path.is_file():
            looked.append(str(path))
            continue
        try:
            text = _version_text(path, path.stat().st_mtime_ns, path.stat().st_size)
        except (OSError, subprocess.CalledProcessError) as error:
            raise BuildError(f"{path} doesn't run: {error}") from error
        match = re.search(r"release [\d.]+, V((\d+)\.(\d+)[\d.]*)", text)
        if match and (int(match[2]), int(match[3])) < at_least:
            looked.append(f"{path}, which is {match[1]}: needs {at_least[0]}.{at_least[1]} or newer")
            continue
        return Nvcc(path, match[1] if match else text.strip().splitlines()[-1], source)
    raise BuildError(
        f"no CUDA compiler found with GNAFORGE_TOOLCHAIN={policy} (looked in {'; '.join(looked)}). {_REMEDY}"
    )


@dataclass(frozen=True)
class Cutlass:
    """The sources of the ``nvidia-cutlass`` package.

    Attributes:
        include: CUTLASS's and CuTe's headers.
        example: the example whose headers are compiled with them; None for none. One at a time: those of attention
            have headers of the same names.
    """

    include: Path
    example: Path | None = None

    @property
    def folders(self) -> tuple[Path, ...]:
        """What to compile with: ``-I``."""
        own = (self.example,) if self.example else ()
        return self.include, self.include.parent / "tools" / "util" / "include", *own


def find_cutlass(example: str = "") -> Cutlass:
    """Where the ``nvidia-cutlass`` package has its sources, and among them an example's, by its folder's name.

    Raises:
        BuildError: it isn't installed, or not whole.
    """
    spec = importlib.util.find_spec("cutlass_library")
    if spec is not None and spec.origin is not None:
        source = Path(spec.origin).parent / "source"
        found = Cutlass(source / "include", source / "examples" / example if example else None)
        whole = found.example is None or any(found.example.glob("collective/*.hpp"))
        if (found.include / "cutlass" / "version.h").is_file() and whole:
            return found
    raise BuildError(_NO_CUTLASS)


def cutlass_version() -> str:
    """Version of the ``nvidia-cutlass`` package: part of the key of every kernel that includes its headers.

    Raises:
        BuildError: it isn't installed.
    """
    try:
        return version("nvidia-cutlass")
    except PackageNotFoundError as error:
        raise BuildError(_NO_CUTLASS) from error
