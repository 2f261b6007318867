"""From what a user names to kernels in libraries, and the problems to try each on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..build.kernels import Listener, explain_missing, find_libraries, split_buildable
from ..build.library import read_library
from ..errors import BuildError, InputError
from ..families import family_of, find_family
from ..runtime.availability import why_not
from ..runtime.config import KernelConfig
from ..runtime.problem import Problem
from ..runtime.request import heads_misfit
from .problems import for_kernel

if TYPE_CHECKING:
    from ..spec import Shape

FREE_HEAD_DIM = 64  # of kernels that take any


@dataclass(frozen=True)
class Target:
    """A kernel to verify: its library, and the problems that it is for."""

    config: KernelConfig
    library: Path
    problems: tuple[Problem, ...] = ()


@dataclass(frozen=True)
class Targets:
    """The kernels to verify. ``skipped`` gives the kernels that can't be tried here, with the reason."""

    targets: tuple[Target, ...]
    skipped: Mapping[str, str] = field(default_factory=dict)


def targets_of_plan(
    configs: Sequence[KernelConfig],
    shapes: Mapping[KernelConfig, Sequence[Shape]],
    *,
    head_dims: tuple[int, int] = (FREE_HEAD_DIM, FREE_HEAD_DIM),
    jobs: int | None = None,
    listener: Listener | None = None,
) -> Targets:
    """Kernels by config, compiled if the cache has none: for the CPU, or in emulated form. Those whose compiler is
    missing are skipped. ``head_dims`` are those of Q and K, and of V, for kernels that take any.

    Raises:
        BuildError: as `build_kernels`, or all would be skipped.
    """
    wanted = configs
    configs, missing = split_buildable(wanted)
    if missing and not configs:
        raise BuildError(explain_missing(missing))
    gpu = [config for config in configs if family_of(config).target.is_gpu]
    libraries = find_libraries(gpu, emulated=True, jobs=jobs, listener=listener) if gpu else {}
    native = [config for config in configs if config not in libraries]
    if native:
        libraries |= find_libraries(native, jobs=jobs, listener=listener)

    def problems(config: KernelConfig) -> tuple[Problem, ...]:
        return problems_of_shapes(shapes.get(config, ()), config, head_dims)

    found = tuple(Target(config, libraries[config], problems(config)) for config in configs)
    return Targets(found, {config.key: reason for config, reason in missing.items()})


def targets_of_library(path: Path) -> Targets:
    """The kernels of a library, as they are there.

    Raises:
        InputError: it is no kernel library, or none of its kernels can run here.
    """
    found, skipped = [], {}
    for row in read_library(path):
        config = KernelConfig.parse(row["key"])
        family = find_family(config)
        if family is not None and family.target.is_gpu and not row["emulated"] and why_not(family.facts):
            skipped[config.key] = "linked for a real GPU: machine code without PTX, which the emulator can't run"
        else:
            found.append(Target(config, path))
    if not found:
        (first, reason), *_ = skipped.items()
        raise InputError(
            f"{path}: {first} is {reason}.\nIts key is enough to verify it: the same sources are then compiled for the "
            f"emulator:\n  gnaforge verify {first}"
        )
    return Targets(tuple(found), skipped)


def problems_of_shapes(
    shapes: Sequence[Shape], config: KernelConfig, head_dims: tuple[int, int] = (FREE_HEAD_DIM, FREE_HEAD_DIM)
) -> tuple[Problem, ...]:
    """Those of a spec's shapes that a kernel can be asked to compute: of its rank, and of heads that make whole tiles.
    With its head dims, or with ``head_dims`` if it takes any."""
    mine = (shape for shape in shapes if len(shape.tokens) == config.rank)
    found = (shape.problem(head_dim=head_dims[0], value_head_dim=head_dims[1]) for shape in mine)
    return tuple(for_kernel(problem, config) for problem in found if not heads_misfit(problem, config))
