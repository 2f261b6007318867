"""Kernel specs as pydantic models, which check them against the kernel families."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import product
from math import prod
from typing import Annotated, Any

from pydantic import Field, ModelWrapValidatorHandler, model_validator

from ..families import Family, families_of, faults_of, feature_fault, find_family
from ..runtime.config import ANY_HEAD_DIM, DIRECTIONS, KernelConfig
from ..runtime.dtypes import takes_out_dtype
from .fields import (
    SHAPE_EXAMPLES,
    Arch,
    AxisOf,
    CausalKind,
    Count,
    Direction,
    DtypeName,
    Fault,
    HeadDim,
    Library,
    ListOf,
    Model,
    OrAuto,
    Rank,
    Variant,
    Version,
    causal_kinds,
    refuse,
)
from .shape import DEFAULT_CAUSAL, OF_RANGE, OF_WINDOW, Shape
from .yaml import YamlPath, quote

MAX_CONFIGS = 10_000


class Boxes(Model):
    """Token boxes that a kernel works on: one extent per token dimension, outermost dimension first."""

    q: AxisOf[Count] = Field(description="Extents of the query tile.")
    kv: AxisOf[Count] = Field(description="Extents of the key/value tile.")


def _not_given() -> Any:
    return None


class Tile(Boxes):
    """The boxes of a forward kernel, and those of the backward kernels if they differ."""

    q_heads: Count = Field(
        default=1,
        description="Query heads that share keys, of which a forward kernel's query tile has the tokens, where the "
        "arch can.",
    )
    backward_q: Boxes = Field(
        default_factory=_not_given, description="Boxes of the kernel of Q's gradient; default: the same ones."
    )
    backward_kv: Boxes = Field(
        default_factory=_not_given, description="Boxes of the kernel of K's and V's gradients; default: the same ones."
    )

    def boxes(self, op: str) -> tuple[Boxes, YamlPath]:
        """The boxes of an op's kernel, and where in the tile they are."""
        name = op.removeprefix("gna_")
        own = getattr(self, name, None)
        return (self, ()) if own is None else (own, (name,))


class KernelEntry(Model):
    """Kernels to generate: the product of all lists below."""

    rank: AxisOf[Rank] = Field(description="Token dimensions, 1 to 3.")
    head_dim: AxisOf[HeadDim] = Field(
        description="Channels per head of Q and K; any: taken at run time, where the arch can."
    )
    value_head_dim: AxisOf[Count] = Field(
        default_factory=tuple, description="Channels per head of V and the output; default: head_dim."
    )
    dtype: AxisOf[DtypeName] = Field(description="Element type of Q, K, V and, but for e4m3, the output.")
    out_dtype: AxisOf[DtypeName] = Field(
        default_factory=tuple,
        description="Element type of the output, where dtype is e4m3; default: bf16. Other types keep their own.",
    )
    direction: AxisOf[Direction] = Field(
        default=("forward",),
        description="Passes to generate; backward: two kernels, of the gradients of Q and of those of K and V; "
        "training: both passes.",
    )
    causal: AxisOf[CausalKind] = Field(
        default_factory=tuple, description="Default of the shapes' causal, one flag per dimension."
    )
    tiles: Annotated[ListOf[Tile], OrAuto()] = Field(
        description="Tiles to generate kernels for; of several ranks, each tile is for the one of its length. "
        "auto: the fewest that fit the shapes, of each op for itself."
    )
    within: Annotated[float, Field(ge=0, le=100)] = Field(
        default=5.0, description="With tiles: auto, by how many per cent a shape's tiles may be worse than its best."
    )
    variant: AxisOf[Variant] = Field(
        default_factory=lambda: ("",),  # no default in the JSON Schema: an editor has no name for it
        description="Kernel family, where an arch has several; default: the first that can have the kernel.",
    )
    arch: AxisOf[Arch] = Field(
        default_factory=tuple, description="Of the spec's architectures, those of this entry; default: all."
    )
    shapes: ListOf[Shape] = Field(default_factory=tuple, description="Problems that the kernels are for.")

    @model_validator(mode="after")
    def _complete(self) -> KernelEntry:
        faults = [*self._length_faults()]
        if ANY_HEAD_DIM in self.head_dim and self.value_head_dim:
            faults.append((("value_head_dim",), "can't be given beside head_dim any, which leaves both open"))
        refuse(faults)
        late = [(i, shape) for i, shape in enumerate(self.shapes) if not shape.causal]  # made before this entry was
        for _, shape in late:
            object.__setattr__(shape, "causal", self.causal or (False,) * len(shape.tokens))
        found = [(i, fault) for i, shape in late for fault in shape.extent_faults()]
        refuse([(("shapes", i, *path), text) for i, (path, text) in found])
        refuse([*self._head_faults()])
        return self

    @model_validator(mode="wrap")
    @classmethod
    def _lend_causal(cls, value: Any, handler: ModelWrapValidatorHandler[KernelEntry]) -> KernelEntry:
        """Validates the entry while its shapes, which are validated before it, know its causal kinds."""
        token = DEFAULT_CAUSAL.set(causal_kinds(value.get("causal", ())) if isinstance(value, dict) else ())
        try:
            return handler(value)
        finally:
            DEFAULT_CAUSAL.reset(token)

    @property
    def problems(self) -> tuple[Shape, ...]:
        """The shapes; in place of one with windows for some heads each, its parts."""
        return tuple(part for shape in self.shapes for part in shape.parts)

    def _length_faults(self) -> Iterator[Fault]:
        known = sorted(set(self.rank))
        ranks = " or ".join(map(str, known))

        def fault(path: YamlPath, values: Sequence[object], rank: int | str) -> Fault:
            entries = "1 entry" if len(values) == 1 else f"{len(values)} entries"
            return path, f"{quote(values)} has {entries}; rank {rank} needs {rank}"

        if self.causal and any(len(self.causal) != rank for rank in self.rank):
            yield fault(("causal",), self.causal, ranks)
        for i, tile in enumerate(self.tiles):
            own = len(tile.q)
            if own not in known:
                yield fault(("tiles", i, "q"), tile.q, ranks)
            if len(tile.kv) not in ([own] if own in known else known):
                yield fault(("tiles", i, "kv"), tile.kv, own if own in known else ranks)
            for name in DIRECTIONS["backward"]:
                boxes, path = tile.boxes(name)
                for field in ("q", "kv") if path else ():
                    if len(getattr(boxes, field)) != own:
                        yield fault(("tiles", i, *path, field), getattr(boxes, field), own)
                if path and set(self.direction) == {"forward"}:
                    yield ("tiles", i, *path), "says something only with direction backward or training"
        if not self.tiles:
            for rank in known:
                if all(len(shape.tokens) != rank for shape in self.shapes):
                    missing = f"auto fits tiles to shapes, and there is none of rank {rank}"
                    yield ("tiles",), f"{missing}; add one, for example {SHAPE_EXAMPLES[rank]}"
        elif "within" in self.model_fields_set:
            yield ("within",), "says something only beside tiles: auto"
        for rank in known if self.tiles and len(known) > 1 else ():
            if all(len(tile.q) != rank for tile in self.tiles):
                yield ("tiles",), f"no tile has {rank} entries; rank {rank} needs at least one"
        for i, shape in enumerate(self.shapes):
            own = len(shape.tokens)
            if own not in known:
                yield fault(("shapes", i, "tokens"), shape.tokens, ranks)
            rank = own if own in known else known[0]
            for field in (*OF_WINDOW, *OF_RANGE):
                if field in shape.model_fields_set and len(getattr(shape, field)) != rank:
                    yield fault(("shapes", i, field), getattr(shape, field), rank)
            for j, field in product(range(len(shape.windows)), OF_WINDOW):
                if (values := getattr(shape.windows[j], field)) and len(values) != rank:
                    yield fault(("shapes", i, "windows", j, field), values, rank)

    def _head_faults(self) -> Iterator[Fault]:
        """Tiles of several heads that no shape of their rank can have."""
        for i, tile in enumerate(self.tiles):
            of_rank = [part.problem() for part in self.problems if len(part.tokens) == len(tile.q)]
            groups = sorted({problem.heads // problem.kv_heads for problem in of_rank})
            if groups and all(group % tile.q_heads for group in groups):
                found = " or ".join(map(str, groups))
                text = f"{tile.q_heads} divides heads / kv_heads of none of the shapes: {found}"
                yield ("tiles", i, "q_heads"), text

    def _types(self) -> list[tuple[int, str, int | None, str]]:
        """Every type of inputs with every one of outputs, with their places; None and empty where it isn't said."""
        found: list[tuple[int, str, int | None, str]] = []
        for j, dtype in enumerate(self.dtype):
            outputs = self.out_dtype if takes_out_dtype(dtype, self.dtype) else []
            found += [(j, dtype, o, output) for o, output in enumerate(outputs)] or [(j, dtype, None, "")]
        return found

    def _tile_axis(self) -> Iterator[tuple[YamlPath, int, Tile | None]]:
        """Every tile once for each time that its rank is listed, with its path and rank; None if it is to be fitted."""
        ranks = Counter(self.rank)
        for t, tile in enumerate(self.tiles):
            yield from [(("tiles", t), len(tile.q), tile)] * ranks[len(tile.q)]
        if not self.tiles:
            for rank in self.rank:
                yield ("tiles",), rank, None

    def _features(self, rank: int) -> frozenset[str]:
        """What the shapes of a rank need of a kernel."""
        return frozenset(
            name for shape in self.problems if len(shape.tokens) == rank for name in shape.problem().features()
        )

    def count(self) -> int:
        """How many configs this entry has on one arch (with tiles: auto: at most), counted without listing them."""
        ranks = Counter(self.rank)
        ops = [op for direction in self.direction for op in DIRECTIONS[direction]]
        axes: tuple[Sequence[Any], ...] = (ops, self._types(), self.head_dim, self.value_head_dim or (0,), self.variant)
        boxes = [tile.q for tile in self.tiles] or [shape.tokens for shape in self.problems]
        return sum(ranks[len(box)] for box in boxes) * prod(map(len, axes))

    def configs(self, arch: str) -> Iterator[tuple[KernelConfig, dict[str, YamlPath]]]:
        """Every config of this entry on ``arch``, with the path in the entry that each field comes from.

        With ``tiles: auto`` each has the smallest tile there is, in place of those that will be fitted. Without a
        variant it is of the first of the arch's families that can have the kernel, and that has what the shapes need.
        """
        needed = {rank: self._features(rank) for rank in {*self.rank}}
        ops = [(i, op) for i, direction in enumerate(self.direction) for op in DIRECTIONS[direction]]
        for (i, op), (j, dtype, o, output), (k, head_dim), (m, value), (n, variant), (path, rank, tile) in product(
            ops,
            self._types(),
            enumerate(self.head_dim),
            enumerate(self.value_head_dim or (0,)),
            enumerate(self.variant),
            self._tile_axis(),
        ):
            names = op, arch, rank, dtype, output, head_dim, value
            boxes, within = (None, ()) if tile is None else tile.boxes(op)
            heads = tile.q_heads if tile is not None and op in DIRECTIONS["forward"] else 1
            config = _config(*names, boxes, heads, variant, needed.get(rank, frozenset()))
            origins: dict[str, YamlPath] = {
                "op": ("direction", i),
                "dtype": ("dtype", j),
                "out_dtype": ("dtype", j) if o is None else ("out_dtype", o),
                "head_dim": ("head_dim", k),
                "value_head_dim": ("value_head_dim", m),
                "variant": ("variant", n),
                "q_tile": (*path, *within, "q") if self.tiles else path,
                "kv_tile": (*path, *within, "kv") if self.tiles else path,
                "q_tile_heads": (*path, "q_heads") if self.tiles else path,
            }
            yield config, origins


def _config(
    op: str,
    arch: str,
    rank: int,
    dtype: str,
    output: str,
    head_dim: int,
    value: int,
    tile: Boxes | None,
    heads: int,
    variant: str,
    needed: Collection[str],
) -> KernelConfig:
    """A config of the family of this variant, or of the first of the arch's that can have it; of those that have the
    features, if some do."""

    def of(variant: str, boxes: tuple[tuple[int, ...], tuple[int, ...]]) -> KernelConfig:
        q_tile, kv_tile = (tile.q, tile.kv) if tile else boxes
        return KernelConfig(op, arch, rank, dtype, head_dim, q_tile, kv_tile, value, variant, output, heads)

    def of_family(family: Family) -> KernelConfig:
        return of(family.variant, family.smallest_boxes(rank))

    named = [family for family in families_of(op, arch) if not variant or family.variant == variant]
    able = [family for family in named if {*needed} <= {*family.features}] or named
    for family in able:
        if len(able) == 1 or not family.faults(of_family(family)):
            return of_family(family)
    # `faults_of` says what is wrong with it.
    return of_family(able[0]) if able else of(variant, ((1,) * rank, (1,) * rank))


class Spec(Model):
    """A kernel spec of gnaforge: the kernels of one library."""

    spec_version: Version = Field(description="Version of this format.")
    library: Library = Field(description="Names the torch library and the wheel.")
    arch: AxisOf[Arch] = Field(description="Architectures to generate every kernel for.")
    kernels: ListOf[KernelEntry] = Field(description="What to generate.")

    @model_validator(mode="after")
    def _check(self) -> Spec:
        count = sum(len(entry.arch or self.arch) * entry.count() for entry in self.kernels)
        if count > MAX_CONFIGS:
            text = f"the lists multiply to {count:,} kernels; at most {MAX_CONFIGS:,}"
            refuse([(("kernels",), text)])
        faults: dict[Fault, None] = {}
        for i, entry in enumerate(self.kernels):
            for k, arch in enumerate(entry.arch):
                if arch not in self.arch:
                    text = f"{arch!r} is not among those of the spec; allowed: {', '.join(dict.fromkeys(self.arch))}"
                    faults[("kernels", i, "arch", k), text] = None
        refuse(list(faults))
        for arch in dict.fromkeys(self.arch):
            for i, entry in self.entries(arch):
                used: dict[Family, None] = {}
                for config, origins in entry.configs(arch):
                    for field, reason in faults_of(config):
                        reason += _nearest(config, field) + _own_boxes(config, field, origins[field])
                        faults[("kernels", i, *origins[field]), reason] = None
                    if (family := find_family(config)) is not None:
                        used[family] = None
                faults |= dict.fromkeys(_feature_faults(i, entry, used))
        refuse(list(faults))
        return self

    def entries(self, arch: str) -> list[tuple[int, KernelEntry]]:
        """The entries that are for an arch, and their places in ``kernels``."""
        return [(i, entry) for i, entry in enumerate(self.kernels) if not entry.arch or arch in entry.arch]


def _feature_faults(index: int, entry: KernelEntry, used: Iterable[Family]) -> Iterator[Fault]:
    """The settings of an entry's shapes that families lack which it has kernels of."""
    for family in used:
        for i, shape in enumerate(entry.shapes):
            for j, part in enumerate(shape.parts):
                if found := feature_fault(part.problem(), family.op, str(family), family.features):
                    field, text = found
                    inside = ("windows", j) if shape.windows and getattr(shape.windows[j], field, ()) else ()
                    yield ("kernels", index, "shapes", i, *inside, field), text


def _own_boxes(config: KernelConfig, field: str, path: YamlPath) -> str:
    """What to give where a backward kernel can't have the forward kernel's tiles."""
    name = config.op.removeprefix("gna_")
    if not field.endswith("_tile") or config.op == DIRECTIONS["forward"][0] or name in path:
        return ""
    return f"; give the tile {name}: {{q: [...], kv: [...]}}, boxes of its own"


def _nearest(config: KernelConfig, field: str) -> str:
    """The nearest value that the family of ``config`` takes, where a number is off."""
    family = find_family(config)
    if family is None:
        return ""
    limits = family.limits
    if field in ("head_dim", "value_head_dim") and (dim := getattr(config, field)) != ANY_HEAD_DIM:
        multiple = family.facts.channel_multiple(config.dtype)
        return f"; did you mean {min(-(-dim // multiple) * multiple, limits.head_dim)}?"
    if field != "kv_tile" or config.kv_columns > limits.kv_columns:
        return ""
    if config.kv_columns % limits.kv_multiple:
        below = config.kv_columns // limits.kv_multiple * limits.kv_multiple
        near = [str(n) for n in (below, below + limits.kv_multiple) if 0 < n <= limits.kv_columns]
        return f"; the nearest: {' or '.join(near)}"
    most = family.most_kv_columns(config)
    return f"; at most {most} key tokens fit" if most else ""
