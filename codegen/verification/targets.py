"""From what a user names to kernels in libraries, and the problems to try each on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..build.kernels import Listener, find_libraries
from ..build.library import read_library
from ..errors import InputError
from ..families import family_of, find_family
from ..runtime.config import ANY_HEAD_DIM, KernelConfig
from .problems import Problem, with_head_dims

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
    """What there is to verify. ``skipped`` gives the kernels that can't be tried here, with the reason."""

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
    """Kernels by config, compiled if the cache has none: for the CPU, or in emulated form. ``head_dims`` are those of
    Q and K, and of V, for kernels that take any.

    Raises:
        InputError, BuildError: as `build_kernels`.
    """
    gpu = [config for config in configs if family_of(config).target.is_gpu]
    libraries = find_libraries(gpu, emulated=True, jobs=jobs, listener=listener) if gpu else {}
    native = [config for config in configs if config not in libraries]
    if native:
        libraries |= find_libraries(native, jobs=jobs, listener=listener)

    def problems(config: KernelConfig) -> tuple[Problem, ...]:
        return tuple(problem_of_shape(shape, config, head_dims) for shape in shapes.get(config, ()))

    return Targets(tuple(Target(config, libraries[config], problems(config)) for config in configs))


def targets_of_library(path: Path) -> Targets:
    """The kernels of a library, as they are there.

    Raises:
        InputError: it is no kernel library, or none of its kernels can run here.
    """
    found, skipped = [], {}
    for row in read_library(path):
        config = KernelConfig.parse(row["key"])
        family = find_family(config)
        if family is not None and family.target.is_gpu and not row["emulated"]:
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


def problem_of_shape(
    shape: Shape, config: KernelConfig, head_dims: tuple[int, int] = (FREE_HEAD_DIM, FREE_HEAD_DIM)
) -> Problem:
    """A spec's shape, with the head dims of a kernel, or with ``head_dims`` if the kernel takes any."""
    problem = Problem(
        tuple(shape.tokens),
        tuple(shape.window),
        tuple(shape.stride),
        tuple(shape.dilation),
        tuple(shape.causal),
        batch=shape.batch,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=head_dims[0],
        value_head_dim=head_dims[1],
    )
    return with_head_dims(problem, config)


def problem_of_options(given: Mapping[str, Any]) -> Problem:
    """The problem that options describe. Values of the pattern may be one number for all dimensions.

    Raises:
        InputError: they don't fit each other; names the field.
    """
    from ..gna.axes import axes

    tokens = tuple(given["tokens"])

    def per_dim(name: str) -> tuple[int, ...]:
        values = tuple(given[name])
        if len(values) not in (1, len(tokens)):
            raise InputError(f"--{name} has {len(values)} entries, --tokens {len(tokens)}")
        return values * len(tokens) if len(values) == 1 else values

    if not 1 <= len(tokens) <= 3:
        raise InputError(f"--tokens has {len(tokens)} entries; there are 1 to 3 token dimensions")
    columns = {name: per_dim(name) for name in ("window", "stride", "dilation", "causal")}
    if not set(columns["causal"]) <= {0, 1}:
        raise InputError("--causal is 0 or 1, once or per dimension")
    heads, kv_heads, head_dims = given["heads"], given["kv_heads"] or given["heads"], given["head_dims"]
    if min(heads, kv_heads, given["batch"]) < 1 or heads % kv_heads:
        raise InputError("--heads, --kv-heads and --batch are at least 1, and --kv-heads divides --heads")
    for option, dim in zip(("--head-dim", "--value-head-dim"), head_dims, strict=True):
        if dim % 8 or not 8 <= dim <= 256:
            raise InputError(f"{option} {dim} must be a multiple of 8, at most 256")
    causal = tuple(flag == 1 for flag in columns.pop("causal"))
    try:
        axes(tokens, columns["window"], columns["stride"], columns["dilation"], causal)
    except ValueError as error:
        raise InputError(str(error)) from error
    return Problem(
        tokens,
        columns["window"],
        columns["stride"],
        columns["dilation"],
        causal,
        batch=given["batch"],
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dims[0],
        value_head_dim=head_dims[1],
    )


def matches(
    config: KernelConfig,
    problem: Problem | None,
    head_dim: int | None,
    value_head_dim: int | None,
    dtype: str | None,
) -> bool:
    """Whether a kernel is one that the options mean."""
    if problem is not None and len(problem.tokens) != config.rank:
        return False
    if head_dim is not None and config.head_dim not in (ANY_HEAD_DIM, head_dim):
        return False
    own = config.value_head_dim or config.head_dim
    if value_head_dim is not None and own not in (ANY_HEAD_DIM, value_head_dim):
        return False
    return dtype in (None, config.dtype)
