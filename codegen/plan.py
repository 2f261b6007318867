"""From a spec to the kernels to generate: every config once, in a fixed order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from .arch import ARCHES
from .errors import InputError
from .runtime.config import ANY_HEAD_DIM, KernelConfig
from .spec import Shape, Spec
from .spec_yaml import did_you_mean


@dataclass(frozen=True)
class Plan:
    """The kernels of one library.

    Attributes:
        library: names the torch library and the wheel.
        configs: the kernels, sorted, each once.
        duplicates: kernels that the spec asks for more than once, and how many times too often.
        notes: what the user may want to know about the choice of kernels, one sentence each.
        shapes: the problems that each kernel is for, in the order of the spec; a kernel without any is left out.
    """

    library: str
    configs: tuple[KernelConfig, ...]
    duplicates: tuple[tuple[KernelConfig, int], ...] = ()
    notes: tuple[str, ...] = ()
    shapes: Mapping[KernelConfig, tuple[Shape, ...]] = field(default_factory=dict)


def plan(spec: Spec, arches: Sequence[str] | None = None) -> Plan:
    """Expands ``spec``, for all its archs or for ``arches`` only.

    Raises:
        InputError: the spec lacks one of ``arches``.
    """
    chosen = _chosen(spec, arches)
    asked: Counter[KernelConfig] = Counter()
    shapes: dict[KernelConfig, dict[Shape, None]] = {}
    for arch in chosen:
        for entry in spec.kernels:
            of_rank = {rank: [s for s in entry.shapes if len(s.tokens) == rank] for rank in set(entry.rank)}
            for config, _ in entry.configs(arch):
                asked[config] += 1
                shapes.setdefault(_built(config), {}).update(dict.fromkeys(of_rank[config.rank]))

    served = Counter(map(_built, asked))
    extra: Counter[KernelConfig] = Counter()
    for config, times in asked.items():
        extra[_built(config)] += times - 1
    return Plan(
        library=spec.library,
        configs=tuple(sorted(served)),
        duplicates=tuple(sorted((config, times) for config, times in extra.items() if times)),
        notes=tuple(_notes(chosen, served)),
        shapes=MappingProxyType({config: tuple(shapes[config]) for config in sorted(served) if shapes[config]}),
    )


def _chosen(spec: Spec, arches: Sequence[str] | None) -> list[str]:
    own = list(dict.fromkeys(spec.arch))
    for arch in arches or ():
        if arch not in own:
            raise InputError(
                f"arch {arch!r} is not in the spec of {spec.library}, which has {', '.join(own)}"
                + did_you_mean(arch, own)
            )
    return [arch for arch in own if not arches or arch in arches]


def _built(config: KernelConfig) -> KernelConfig:
    """The kernel that serves ``config``: one for all head dims where the arch takes them at run time."""
    if not ARCHES[config.arch].head_dim_at_run_time:
        return config
    return replace(config, head_dim=ANY_HEAD_DIM, value_head_dim=0)


def _notes(arches: Sequence[str], served: Mapping[KernelConfig, int]) -> list[str]:
    notes = []
    for arch in arches:
        kernels = [config for config in served if config.arch == arch]
        asked = sum(served[config] for config in kernels)
        if asked > len(kernels):
            notes.append(
                f"{arch} kernels take the head dim at run time: {len(kernels)} of them serve the {asked} configs "
                "that the spec asks for"
            )
    return notes
