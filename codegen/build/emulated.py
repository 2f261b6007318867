"""GPU kernels as libraries that run in the emulator, on machines without a GPU. For tests: it is slow."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..build_tools.emulator import stand_in
from ..runtime.config import KernelConfig
from .kernels import LIBRARY_FILE, Listener, build_kernels


def emulated_libraries(
    configs: Sequence[KernelConfig], *, jobs: int | None = None, listener: Listener | None = None
) -> dict[KernelConfig, Path]:
    """One library per kernel, compiled if the cache has none.

    They take CPU tensors, and only in a process where ``GNAFORGE_EMULATOR_MEMORY`` is ``mapped``. A call must name its
    kernel. Other variables ``GNAFORGE_EMULATOR_*`` set the schedule. `verification` does without these variables.

    Raises:
        InputError, BuildError: as `build.build_kernels`.
    """
    artifacts, _ = build_kernels(configs, jobs=jobs, listener=listener, stand_in=stand_in().path)
    return {config: artifact.verified(LIBRARY_FILE) for config, artifact in artifacts.items()}
