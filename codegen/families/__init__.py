"""Kernel families: one module each, found by what this package holds, and the hardware that they run on.

A module of this package that defines ``FAMILY`` is a family. More are read from the Python files that the environment
variable ``GNAFORGE_FAMILIES`` lists, separated as in PATH: each defines ``FAMILY``, and the folder that it is in holds
the family's template and headers. They are code that this process will run: list only files that you trust.
"""

from __future__ import annotations

import os
import pkgutil
from collections.abc import Callable, Collection, Mapping
from functools import lru_cache
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import NamedTuple

from ..build_tools.text import listed
from ..errors import InputError
from ..runtime.config import DIRECTIONS, OPS, KernelConfig
from ..runtime.problem import Problem
from ..runtime.problem_rules import ProblemError
from .family import Family as Family, Fault as Fault
from .target import TARGETS as TARGETS, machine_target as machine_target, require_target as require_target


def _files() -> str:
    return os.environ.get("GNAFORGE_FAMILIES", "")


def families() -> tuple[Family, ...]:
    """All families: by target, in the order of `TARGETS`, then op, the default one first, then variant.

    Raises:
        InputError: a file of ``GNAFORGE_FAMILIES`` can't be read, or two families have the same op, arch and variant.
    """
    return tuple(_table(_files()).by_identity.values())


def families_of(op: str, arch: str) -> tuple[Family, ...]:
    """The families of an op and arch, the default one first; none for an unknown arch."""
    return _table(_files()).by_arch.get((op, arch), ())


def find_family(config: KernelConfig) -> Family | None:
    """The family of a kernel; None where this version has no such family."""
    return _table(_files()).by_identity.get((config.op, config.arch, config.variant))


def family_of(config: KernelConfig) -> Family:
    """The family of a kernel.

    Raises:
        InputError: there is none; names the op, the arch or the variant that is unknown.
    """
    family = find_family(config)
    if family is None:
        raise InputError("\n".join(f"{config}: {name}: {reason}" for name, reason in faults_of(config)))
    return family


def require_family(op: str, arch: str, variant: str | None = None) -> Family:
    """The family of this variant; without one the default family.

    Raises:
        InputError: the arch is unknown, or has no such family.
    """
    require_target(arch)
    own = families_of(op, arch)
    for family in own:
        if variant is None or family.variant == variant:
            return family
    if not own:
        raise InputError(f"arch: {_lack_of(op, arch)}")
    raise InputError(f"variant: {_unknown_variant(variant, own)}")


def choose_family(op: str, arch: str, variant: str | None, config_of: Callable[[Family], KernelConfig]) -> Family:
    """The family to take for a kernel: the one of this variant; without one, of the arch's families that can have
    ``config_of(family)`` the first, default before others. If none can, the default one, whose faults say why.

    Raises:
        InputError: the arch is unknown, or has no such family.
    """
    first = require_family(op, arch, variant)
    own = families_of(op, arch)
    if variant is not None or len(own) == 1:
        return first
    return next((family for family in own if not family.faults(config_of(family))), first)


def faults_of(config: KernelConfig) -> list[Fault]:
    """Why there can be no such kernel, as (field, reason) pairs; empty if there can."""
    if (family := find_family(config)) is not None:
        return family.faults(config)
    if config.arch not in TARGETS:
        return [("arch", f"{config.arch!r} is unknown; there are {', '.join(TARGETS)}")]
    if own := families_of(config.op, config.arch):
        return [("variant", _unknown_variant(config.variant, own))]
    return [("op", _lack_of(config.op, config.arch))]


def _lack_of(op: str, arch: str) -> str:
    """Words for an op that an arch has no kernels of, and the archs that have some."""
    passes = [name for name in ("forward", "backward") if op in DIRECTIONS[name]]
    whole = [name for name in passes if not any(families_of(other, arch) for other in DIRECTIONS[name])]
    others = list(dict.fromkeys(family.arch for family in families() if family.op == op))
    have = f"; {listed(others)} {'have' if len(others) > 1 else 'has'} one" if others else ""
    return f"{arch} has no {f'{whole[0]} pass' if whole else f'kernel of {op}'}{have}"


def feature_fault(problem: Problem, op: str, who: str, has: Collection[str]) -> tuple[str, str] | None:
    """The field of a problem that needs a feature which ``who`` lacks, that has these ones, and words for it that name
    the archs whose kernels of the op can compute the problem; None if it lacks none."""
    try:
        problem.require_features(has, who)
    except ProblemError as error:
        needed = set(problem.features())
        able = (family for family in families() if family.op == op and needed <= set(family.features))
        others = list(dict.fromkeys(family.arch for family in able))
        who = f"; {listed(others)} {'have' if len(others) > 1 else 'has'} it" if others else ", nor has another"
        return error.field, error.text + who
    return None


def require_features(problem: Problem, op: str, arch: str, has: Collection[str]) -> None:
    """Refuses a problem for an op's kernels of ``arch`` that have these features; names the archs that can compute it.

    Raises:
        InputError: it needs another one.
    """
    if found := feature_fault(problem, op, arch, has):
        raise InputError(": ".join(found))


def require_config(config: KernelConfig | str) -> KernelConfig:
    """``config``, or the config of that key, if there can be such a kernel.

    Raises:
        InputError: it is no key, or no family has such kernels; a line for each reason.
    """
    try:
        config = KernelConfig.parse(config) if isinstance(config, str) else config
    except ValueError as error:
        raise InputError(str(error)) from error
    if faults := faults_of(config):
        raise InputError("\n".join(f"{config}: {name}: {reason}" for name, reason in faults))
    return config


def is_key(text: str) -> bool:
    """Whether ``text`` is meant as a kernel's key, in place of a spec's name."""
    return text.startswith(tuple(op + "-" for op in OPS))


def _unknown_variant(variant: str | None, own: tuple[Family, ...]) -> str:
    op, arch = own[0].op, own[0].arch
    what = arch if op == OPS[0] else f"the {op} kernels of {arch}"
    return f"{variant!r} is not a variant of {what}; {'it has' if op == OPS[0] else 'they have'} " + ", ".join(
        repr(family.variant) for family in own
    )


class _Table(NamedTuple):
    """All families, by (op, arch, variant) and by (op, arch)."""

    by_identity: Mapping[tuple[str, str, str], Family]
    by_arch: Mapping[tuple[str, str], tuple[Family, ...]]


@lru_cache(maxsize=8)
def _table(files: str) -> _Table:
    found = [*_own_families(), *(_family_in(Path(name)) for name in files.split(os.pathsep) if name)]
    archs = list(TARGETS)
    found.sort(key=lambda family: (archs.index(family.arch), OPS.index(family.op), not family.default, family.variant))
    table: dict[tuple[str, str, str], Family] = {}
    groups: dict[tuple[str, str], tuple[Family, ...]] = {}
    for family in found:
        groups[family.op, family.arch] = (*groups.get((family.op, family.arch), ()), family)
        if table.setdefault((family.op, family.arch, family.variant), family) is not family:
            raise InputError(f"GNAFORGE_FAMILIES: there are two kernel families {family.name}")
    for (op, arch), own in groups.items():
        if (number := sum(family.default for family in own)) > 1:
            raise InputError(
                f"GNAFORGE_FAMILIES: {number} kernel families say that they are the default of {op} on {arch}"
            )
    return _Table(table, groups)


def _own_families() -> list[Family]:
    modules = [import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
    return [module.FAMILY for module in modules if hasattr(module, "FAMILY")]


def _family_in(path: Path) -> Family:
    """The family that a Python file outside of the package defines."""
    from dataclasses import replace

    spec = spec_from_file_location(f"gnaforge_family_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise InputError(f"GNAFORGE_FAMILIES: {path} is no Python file")
    module = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        family = module.FAMILY
    except Exception as error:  # somebody's code
        raise InputError(f"GNAFORGE_FAMILIES: {path}: {type(error).__name__}: {error}") from error
    if not isinstance(family, Family):
        raise InputError(f"GNAFORGE_FAMILIES: {path}: FAMILY is no gnaforge.families.Family")
    return replace(family, root=family.root or path.absolute().parent)
