"""Whose code is compiled into a wheel, and the licences that have to go with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from ..errors import BuildError
from ..families import family_of
from ..runtime.config import KernelConfig

_CUDA_NOTE = """\
kernels.so contains the CUDA runtime library ({version}), linked statically (libcudart_static).
Copyright NVIDIA Corporation. It is distributed under the CUDA Toolkit End User License Agreement,
https://docs.nvidia.com/cuda/eula/, whose Attachment A lists it among the files that an application may redistribute.
"""


@dataclass(frozen=True)
class Licence:
    """A licence that goes with a wheel: its SPDX identifier, whose code it is for, the file's name and its text."""

    spdx: str
    covers: str
    file: str
    text: bytes


def licences(configs: Sequence[KernelConfig], cuda_runtime: str | None) -> list[Licence]:
    """The licences of what a wheel of these kernels contains.

    Args:
        configs: its kernels.
        cuda_runtime: version of the CUDA runtime that is linked in; None if there is none.

    Raises:
        BuildError: an installed package has no licence file, which must go with the wheel.
    """
    found = [
        Licence("MIT", "gnaforge: kernels, core and Python code", "gnaforge.txt", _text("gnaforge")),
        Licence("BSD-3-Clause", "PyTorch: headers compiled into core.so", "pytorch.txt", _text("torch")),
    ]
    if any(family_of(config).cutlass for config in configs):
        text = _text("nvidia-cutlass")
        found.append(Licence("BSD-3-Clause", "CUTLASS: headers compiled into kernels.so", "cutlass.txt", text))
    if cuda_runtime is not None:
        note = _CUDA_NOTE.format(version=cuda_runtime).encode()
        covers = "NVIDIA: the CUDA runtime in kernels.so"
        found.append(Licence("LicenseRef-NVIDIA-CUDA-Toolkit-EULA", covers, "nvidia-cuda-runtime.txt", note))
    return found


def expression(found: Sequence[Licence]) -> str:
    """The SPDX expression for all of them (PEP 639)."""
    return " AND ".join(dict.fromkeys(licence.spdx for licence in found))


def _text(package: str) -> bytes:
    """The licence file of an installed package."""
    try:
        files = distribution(package).files or []
    except PackageNotFoundError:
        raise BuildError(f"{package} is not installed, so that its licence can't be put into the wheel") from None
    names = ("LICENSE", "LICENSE.txt", "LICENSE.md", "License.txt")
    for file in files:
        # In .dist-info/ or its licenses/; at the top in a source tree. Deeper ones are of other people's code.
        own = len(file.parts) == 1 or (file.parts[0].endswith(".dist-info") and len(file.parts) <= 3)
        path = Path(str(file.locate()))
        if own and file.name in names and path.is_file():
            return path.read_bytes()
    raise BuildError(f"the installed {package} has no licence file, which must go with the wheel; reinstall it")
