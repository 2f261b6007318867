"""From a spec to the kernels to generate: every config once, in a fixed order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import product
from types import MappingProxyType

from .build_tools.text import count_of, printable
from .errors import InputError
from .families import Family, family_of, require_target
from .runtime.config import DIRECTIONS, KernelConfig
from .runtime.dtypes import DTYPES
from .simulator.cost import Tiles
from .simulator.fitting import Fit, fit_problems
from .spec import KernelEntry, Shape, Spec
from .spec.yaml import did_you_mean

_ANY_STANDS_FOR = 64  # the head dim to fit tiles for where the spec leaves it open
MAX_FITTED = 40
"""Problems that tiles are fitted to in one plan, which takes ten seconds; a third of them if `within` is above 10."""
MAX_TRIED = 100
"""Different shapes of one spec that `verify` tries, and problems that `bench` times: minutes, or hours, of work."""
_WALK = 1 << 22  # tokens of windows, and 128ths of a token of strides, whose tiles take some seconds to count


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
        InputError: the spec lacks one of ``arches``, or has more shapes, or shapes of longer windows and strides, than
            tiles can be fitted to in a few seconds.
    """
    chosen = _choose_archs(spec, arches)
    _check_fits(spec, chosen)
    asked: Counter[KernelConfig] = Counter()
    shapes: dict[KernelConfig, dict[Shape, None]] = {}
    fits: dict[str, None] = {}
    for arch in chosen:
        for _, entry in spec.entries(arch):
            for probe, _ in entry.configs(arch):
                own = [shape for shape in entry.problems if len(shape.tokens) == probe.rank]
                if entry.tiles:
                    served = [(probe, own)]
                else:
                    served, note = _fit_tiles(entry, probe, tuple(own))
                    fits[note] = None
                for config, problems in served:
                    asked[config] += 1
                    shapes.setdefault(_serving_config(config), {}).update(dict.fromkeys(problems))

    built = Counter(map(_serving_config, asked))
    extra: Counter[KernelConfig] = Counter()
    for config, times in asked.items():
        extra[_serving_config(config)] += times - 1
    return Plan(
        library=spec.library,
        configs=tuple(sorted(built)),
        duplicates=tuple(sorted((config, times) for config, times in extra.items() if times)),
        notes=(*fits, *_notes(chosen, built)),
        shapes=MappingProxyType({config: tuple(shapes[config]) for config in sorted(built) if shapes[config]}),
    )


def require_few(source: str, given: Iterable[Hashable], what: str, done: str) -> None:
    """Refuses more shapes or problems of one spec than a command gets through.

    Args:
        source: the spec, as the user names it.
        given: the shapes or problems; equal ones are one.
        what, done: for the message, as in ``shape`` and ``verified``.

    Raises:
        InputError: there are more than `MAX_TRIED`.
    """
    if (count := len(set(given))) > MAX_TRIED:
        raise InputError(
            f"{printable(source)} lists {count_of(count, f'different {what}')}, and of one spec at most {MAX_TRIED} "
            f"are {done}: divide it, or give one problem by --tokens and --window"
        )


def _check_fits(spec: Spec, arches: Sequence[str]) -> None:
    problems = fitted = walked = 0
    for entry in spec.kernels:
        if not entry.tiles:
            # Head dims, element sizes and ops are what else a fit depends on.
            times = len({*arches} & {*(entry.arch or arches)}) * len(
                {*product(entry.head_dim, entry.value_head_dim or (0,))}
            )
            times *= len({DTYPES[dtype].bytes for dtype in entry.dtype})
            times *= len({op for direction in entry.direction for op in DIRECTIONS[direction]})
            problems += times * len(entry.problems)
            fitted += times * len(entry.problems) * (1 if entry.within <= 10 else 3)
            walked += times * sum(sum(shape.window) + 128 * sum(shape.stride) for shape in entry.problems)
    if fitted > MAX_FITTED or walked > _WALK:
        raise InputError(
            f"tiles: auto would have to fit tiles to {count_of(problems, 'problem')} (shapes by "
            f"archs, ops, head dims and element sizes); at most {MAX_FITTED}, a third of that if within is above 10, "
            "and fewer where windows are beyond 100,000 or strides beyond 1,000: list tiles, or make several libraries"
        )


def _choose_archs(spec: Spec, arches: Sequence[str] | None) -> list[str]:
    own = list(dict.fromkeys(spec.arch))
    for arch in arches or ():
        if arch not in own:
            require_target(arch)
            raise InputError(
                f"arch {arch!r} is not in the spec of {spec.library}, which has {', '.join(own)}"
                + did_you_mean(arch, own)
            )
    return [arch for arch in own if not arches or arch in arches]


def _fit_tiles(
    entry: KernelEntry, probe: KernelConfig, shapes: tuple[Shape, ...]
) -> tuple[list[tuple[KernelConfig, list[Shape]]], str]:
    """``probe`` with each of the tiles that fit the shapes, the shapes that each is for, and what was chosen."""
    family = family_of(probe)
    who = str(family) if family.op == DIRECTIONS["forward"][0] else f"{family} {family.op.removeprefix('gna_')}"
    if family.time is None:
        q_tile, kv_tile = family.default_boxes(probe.rank, probe.head_dim, probe.value_head_dim)
        told = f"{who} has no time model to fit by, so its tiles are the default ones: {Tiles(q_tile, kv_tile)}"
        return [(replace(probe, q_tile=q_tile, kv_tile=kv_tile), [*shapes])], told
    dims = [(probe.head_dim, probe.value_head_dim)]
    if family.head_dim_at_run_time:  # one kernel for all of them: its tiles have to suit each
        dims = list(product(entry.head_dim, entry.value_head_dim or (0,)))
    dims = [(head_dim or _ANY_STANDS_FOR, value or head_dim or _ANY_STANDS_FOR) for head_dim, value in dims]
    found = _fit(shapes, family, tuple(dims), DTYPES[probe.dtype].bytes, entry.within / 100)
    served = [
        (
            replace(probe, q_tile=tiles.q, kv_tile=tiles.kv, q_tile_heads=tiles.q_heads),
            [shape for shape, chosen in zip(shapes * len(dims), found.chosen, strict=True) if chosen == index],
        )
        for index, tiles in enumerate(found.tiles)
    ]
    heads = "" if family.head_dim_at_run_time else f" of head dim {probe.head_dim}"
    what = count_of(len(shapes), "shape")
    return served, who + f" tiles fitted to {what}{heads}: {'; '.join(map(str, found.tiles))}"


@lru_cache(maxsize=64)
def _fit(
    shapes: tuple[Shape, ...], family: Family, dims: tuple[tuple[int, int], ...], element_bytes: int, within: float
) -> Fit:
    """Tiles for these shapes with each of these head dims, in that order. Types of equal size fit alike."""
    dtype = next(name for name in family.dtypes if DTYPES[name].bytes == element_bytes)
    problems = [
        shape.problem(head_dim=head_dim, value_head_dim=value, dtype=dtype)
        for head_dim, value in dims
        for shape in shapes
    ]
    return fit_problems(problems, family, within=within)


def _serving_config(config: KernelConfig) -> KernelConfig:
    return family_of(config).serving_config(config)


def _notes(arches: Sequence[str], served: Mapping[KernelConfig, int]) -> list[str]:
    notes = []
    for arch in arches:
        kernels = [config for config in served if config.arch == arch]
        asked = sum(served[config] for config in kernels)
        if asked > len(kernels):
            notes.append(
                f"{arch} kernels take the head dim at run time: {len(kernels)} of them "
                f"{'serves' if len(kernels) == 1 else 'serve'} the {count_of(asked, 'config')} that the spec asks for"
            )
    return notes
