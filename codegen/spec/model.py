"""Kernel specs as pydantic models, which check them against the kernel families."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextvars import ContextVar
from itertools import product
from math import gcd, prod
from typing import Annotated, Any, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ModelWrapValidatorHandler,
    PlainValidator,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError, core_schema

from ..families import TARGETS, Family, families, families_of, faults_of, feature_fault, find_family
from ..runtime.config import ANY_HEAD_DIM, OPS, KernelConfig
from ..runtime.dtypes import DTYPES
from ..runtime.problem import Problem
from ..runtime.problem_rules import EDGES, MAX_EXTENT, Dimension, dimension_faults, head_faults
from .yaml import YamlPath, did_you_mean, path_text, quote

SPEC_VERSION = 1
MAX_CONFIGS = 10_000

_DIRECTIONS = {"forward": OPS[:1], "backward": OPS[1:]}
_MAX_NAME = 100
_LIBRARY = re.compile(rf"[a-z][a-z0-9_]{{0,{_MAX_NAME - 1}}}")  # files and a package are named by it

Fault = tuple[YamlPath, str]


def _wrong(message: str) -> PydanticCustomError:
    return PydanticCustomError("wrong", "{message}", {"message": message})


def _refuse(faults: list[Fault]) -> None:
    """Reports what is wrong between the fields of a model, each fault at its own field."""
    if faults:
        message = "; ".join(f"{path_text(path)}: {text}" for path, text in faults)
        raise PydanticCustomError("faults", "{message}", {"message": message, "faults": faults})


class _OneOf:
    """Metadata of a field that takes a name out of a table, which is looked at anew each time."""

    def __init__(self, what: str, allowed: Callable[[], Iterable[str]]) -> None:
        self.what = what
        self.allowed = allowed

    def check(self, value: Any) -> str:
        allowed = list(self.allowed())
        if isinstance(value, str) and value in allowed:
            return value
        choice = f"allowed: {', '.join(allowed)}"
        raise _wrong(f"{quote(value)} is no {self.what}; {choice}{did_you_mean(value, allowed)}")

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(self.check)

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"type": "string", "enum": list(self.allowed())}


def _version(value: Any) -> int:
    if type(value) is int and value == SPEC_VERSION:
        return value
    raise _wrong(f"{quote(value)} is not supported; allowed: {SPEC_VERSION}")


def _library_name(value: Any) -> str:
    if isinstance(value, str) and _LIBRARY.fullmatch(value):
        return value
    if isinstance(value, str) and len(value) > _MAX_NAME:
        raise _wrong(f"{quote(value)} is too long for a library name; at most {_MAX_NAME} letters")
    near = re.sub(r"[^a-z0-9_]+", "_", value.lower())[:60].strip("_") if isinstance(value, str) else ""
    hint = f"; did you mean {near!r}?" if _LIBRARY.fullmatch(near) else ""
    raise _wrong(f"{quote(value)} is no library name; allowed: lower-case letters, digits and _, a letter first{hint}")


def _head_dim(value: Any) -> int:
    if value == "any":
        return ANY_HEAD_DIM
    if type(value) is not int or value < 1:
        raise _wrong(f"{quote(value)} is no head dim; allowed: a positive integer, or any")
    # Here already, so that it is said beside what is wrong with other fields.
    multiple = gcd(*(family.limits.head_dim_multiple for family in families()))
    if value % multiple:
        raise _wrong(f"{value} must be a multiple of {multiple}; did you mean {-(-value // multiple) * multiple}?")
    return value


def _causal(value: Any) -> bool | str:
    if type(value) is bool or value == "block":
        return bool(value) if value != "block" else "block"
    if value == "token":
        return True
    raise _wrong(f"{quote(value)} is no causal kind; allowed: true, false, token, block")


class _OrAuto:
    """Metadata of a tuple field that may also be the word auto, which becomes the empty tuple."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        def convert(value: Any, listed: core_schema.ValidatorFunctionWrapHandler) -> Any:
            if value == "auto":
                return ()
            if isinstance(value, str):
                raise _wrong(f"{quote(value)} is neither auto nor a list of tiles such as [{{q: [8, 8], kv: [8, 8]}}]")
            return listed(value)

        return core_schema.no_info_wrap_validator_function(convert, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"anyOf": [{"const": "auto"}, handler(schema)]}


class _Listed:
    """Metadata of a tuple field: a list in YAML, not empty, of at most so many entries; with ``or_one``, also its only
    element bare."""

    def __init__(self, *, or_one: bool, most: int | None = None) -> None:
        self.or_one, self.most = or_one, most

    def convert(self, value: Any) -> Any:
        # Not pydantic's own min_length: that counts valid elements only, and blames the list for them.
        if value in ([], ()):
            raise _wrong("is an empty list; allowed: at least one entry")
        if self.most is not None and isinstance(value, list | tuple) and len(value) > self.most:
            raise _wrong(f"{quote(value)} has {len(value)} entries; at most {self.most}")
        if isinstance(value, list):
            return tuple(value)
        return (value,) if self.or_one and not isinstance(value, tuple) else value

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_before_validator_function(self.convert, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        array = {**handler(schema), "minItems": 1, **({} if self.most is None else {"maxItems": self.most})}
        return {"anyOf": [array["items"], array]} if self.or_one else array


def _available_directions() -> list[str]:
    ops = {family.op for family in families()}
    return [name for name, own in _DIRECTIONS.items() if ops.issuperset(own)]


def _variants() -> list[str]:
    return sorted({family.variant for family in families() if family.variant})


_SHAPE_EXAMPLES = {rank: f"shapes: [{{tokens: {[64] * rank}, window: {[13] * rank}}}]" for rank in (1, 2, 3)}

T = TypeVar("T")
_Axis = Annotated[tuple[T, ...], _Listed(or_one=True)]
_List = Annotated[tuple[T, ...], _Listed(or_one=False)]
_Count = Annotated[int, Field(ge=1, le=MAX_EXTENT)]
_Rank = Annotated[int, Field(ge=1, le=3)]
_Arch = Annotated[str, _OneOf("arch", lambda: TARGETS)]
_Dtype = Annotated[str, _OneOf("dtype", lambda: DTYPES)]
_Direction = Annotated[str, _OneOf("direction", _available_directions)]
_Variant = Annotated[str, _OneOf("variant", _variants)]
_Edge = Annotated[str, _OneOf("edge", lambda: EDGES)]
_Number = Annotated[int, Field(ge=0, le=MAX_EXTENT)]
_Offset = Annotated[int, Field(ge=-MAX_EXTENT, le=MAX_EXTENT)]
_Causal = Annotated[
    bool | str,
    PlainValidator(_causal),
    WithJsonSchema({"anyOf": [{"type": "boolean"}, {"enum": ["token", "block"]}]}),
]
_Version = Annotated[int, PlainValidator(_version), WithJsonSchema({"const": SPEC_VERSION})]
_Library = Annotated[
    str, PlainValidator(_library_name), WithJsonSchema({"type": "string", "pattern": f"^{_LIBRARY.pattern}$"})
]
_HeadDim = Annotated[
    int,
    PlainValidator(_head_dim),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1}, {"const": "any"}]}),
]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Tile(_Model):
    """Token boxes that a kernel works on: one extent per token dimension, outermost dimension first."""

    q: _Axis[_Count] = Field(description="Extents of the query tile.")
    kv: _Axis[_Count] = Field(description="Extents of the key/value tile.")


_DEFAULT_CAUSAL: ContextVar[tuple[bool | str, ...] | None] = ContextVar("causal of the entry being read", default=())
"""Of shapes that don't say it; None where the entry's is no list of causal kinds, so that nobody knows."""

_OF_WINDOW = ("window", "stride", "dilation", "causal", "edge", "sink")
_OF_RANGE = ("grid", "q_offset", "kv_tokens", "kv_offset", "kv_sink")


class HeadWindow(_Model):
    """The window of some of a shape's heads; what it leaves out is as the shape has it."""

    heads: _Count = Field(description="So many heads, the next ones.")
    window: _Axis[_Count] = Field(description="Keys that their queries see along each dimension.")
    stride: _Axis[_Count] = Field(default_factory=tuple, description="As the shape's.")
    dilation: _Axis[_Count] = Field(default_factory=tuple, description="As the shape's.")
    causal: _Axis[_Causal] = Field(default_factory=tuple, description="As the shape's.")
    edge: _Axis[_Edge] = Field(default_factory=tuple, description="As the shape's.")
    sink: _Axis[_Number] = Field(default_factory=tuple, description="As the shape's.")


class Shape(_Model):
    """A problem that the kernels are for. Feeds tile fitting and checks; kernels also run other shapes."""

    tokens: _Axis[_Count] = Field(description="Tokens along each dimension, outermost first.")
    window: _Axis[_Count] = Field(
        default_factory=tuple, description="Keys that a query sees along each dimension; required without windows."
    )
    stride: _Axis[_Count] = Field(
        default_factory=tuple, description="Consecutive queries that share a window; default 1 everywhere."
    )
    dilation: _Axis[_Count] = Field(
        default_factory=tuple, description="Distance between the keys of a window; default 1 everywhere."
    )
    causal: _Axis[_Causal] = Field(
        default_factory=tuple,
        description="Dimensions where keys after the query are hidden (true, token), or after its group of stride "
        "queries (block); default: the entry's.",
    )
    edge: _Axis[_Edge] = Field(
        default_factory=tuple,
        description="What a window does that would leave the tokens: shift inwards, be cut, or wrap; default shift.",
    )
    sink: _Axis[_Number] = Field(
        default_factory=tuple, description="First tokens that are seen beside the window; default 0 everywhere."
    )
    windows: _List[HeadWindow] = Field(
        default_factory=tuple,
        description="In place of window: windows of some heads each, a problem of its own for fitting, checks and "
        "bounds.",
    )
    grid: _Axis[_Count] = Field(
        default_factory=tuple,
        description="Tokens that windows are laid in, where queries or keys are a part of them; default: the keys'.",
    )
    q_offset: _Axis[_Number] = Field(
        default_factory=tuple, description="Where in the grid the queries begin; default 0."
    )
    kv_tokens: _Axis[_Count] = Field(default_factory=tuple, description="Tokens of the keys; default: as tokens.")
    kv_offset: _Axis[_Offset] = Field(default_factory=tuple, description="Where in the grid the keys begin; default 0.")
    kv_sink: _Axis[_Number] = Field(
        default_factory=tuple,
        description="So many keys are the grid's first, the others begin at kv_offset; default 0.",
    )
    extra_tokens: Annotated[tuple[_Count, ...], _Listed(or_one=True, most=2)] = Field(
        default_factory=tuple,
        description="Keys that all queries see beside their window, such as a text's: one piece, or a list of two.",
    )
    heads: _Count = Field(default_factory=int, description="Query heads; default 1, or those of the windows.")
    kv_heads: _Count = Field(
        default_factory=int,
        description="Key/value heads, a divisor of heads (GQA, MQA); default: as many as heads.",
    )
    batch: _Count = Field(default=1, description="Batch size.")

    @model_validator(mode="after")
    def _complete(self) -> Shape:
        rank = len(self.tokens)
        default = _DEFAULT_CAUSAL.get()
        heads = sum(each.heads for each in self.windows) or 1
        if not (self.window or self.windows):
            _refuse([(("window",), "is required")])
        if self.window and self.windows:
            _refuse([(("windows",), "can't be given beside window, which all heads have")])
        if self.windows and self.heads not in (0, heads):
            _refuse([(("heads",), f"{self.heads} is not the {heads} heads of the windows together")])
        for name, value in (
            ("stride", (1,) * rank),
            ("dilation", (1,) * rank),
            ("causal", default or ()),
            ("edge", ("shift",) * rank),
            ("sink", (0,) * rank),
            ("heads", heads),
            ("kv_heads", self.heads or heads),
        ):
            object.__setattr__(self, name, getattr(self, name) or value)
        extents = [] if default is None and not self.causal else self.extent_faults()
        _refuse([*extents, *self._head_faults()])
        return self

    @property
    def parts(self) -> tuple[Shape, ...]:
        """The shape; of one with windows for some heads each, those with their heads, in that order."""
        if not self.windows:
            return (self,)
        return tuple(part for part, _ in self._parts())

    def _parts(self) -> Iterator[tuple[Shape, int]]:
        """A shape for each of the windows, and the number of its first head."""
        group, first = self.heads // self.kv_heads, 0
        for each in self.windows:
            given = {name: getattr(each, name) or getattr(self, name) for name in _OF_WINDOW}
            kv_heads = max(each.heads // group, 1)
            yield self.model_copy(update={**given, "windows": (), "heads": each.heads, "kv_heads": kv_heads}), first
            first += each.heads

    def problem(self, **fields: Any) -> Problem:
        """The problem that the shape is, one of `parts`; ``fields`` add to its own, or take their place.

        Raises:
            ProblemError: they don't fit each other.
        """
        own = {name: getattr(self, name) for name in type(self).model_fields if name != "windows"}
        return Problem(**{**{name: value for name, value in own.items() if value != ()}, **fields})

    def extent_faults(self) -> Iterator[Fault]:
        """The rules that a dimension breaks."""
        if not self.windows:
            yield from self._dimension_faults()
        for index, (part, _) in enumerate(self._parts() if self.windows else ()):
            for path, text in part._dimension_faults():
                own = getattr(self.windows[index], str(path[0]), ())
                yield (("windows", index, *path) if own else path), text

    def _dimension_faults(self) -> Iterator[Fault]:
        # Columns of unequal length end at the shortest: their entry reports the length.
        names = ("tokens", *_OF_WINDOW, *_OF_RANGE)
        columns = {name: values for name in names if (values := getattr(self, name))}
        for dim in range(min(map(len, columns.values()))):
            axis = Dimension(**{name: values[dim] for name, values in columns.items()})
            for fault in dimension_faults(axis, dim):
                yield (fault.field, dim), fault.text

    def _head_faults(self) -> Iterator[Fault]:
        faults = [*head_faults(self.heads, self.kv_heads)]
        for fault in faults:
            yield (fault.field,), fault.text
        group = self.heads // self.kv_heads if not faults else 1
        for index, (part, first) in enumerate(self._parts() if self.windows and not faults else ()):
            last = first + part.heads - 1
            if first // group != last // group and (first % group or part.heads % group):
                text = f"heads {first} to {last} share heads of K and V, {group} each, with others"
                yield ("windows", index, "heads"), f"{text}; allowed: a multiple of {group}, or some of one head's"


class KernelEntry(_Model):
    """Kernels to generate: the product of all lists below."""

    rank: _Axis[_Rank] = Field(description="Token dimensions, 1 to 3.")
    head_dim: _Axis[_HeadDim] = Field(
        description="Channels per head of Q and K; any: taken at run time, where the arch can."
    )
    value_head_dim: _Axis[_Count] = Field(
        default_factory=tuple, description="Channels per head of V and the output; default: head_dim."
    )
    dtype: _Axis[_Dtype] = Field(description="Element type of Q, K, V and the output.")
    direction: _Axis[_Direction] = Field(
        default=("forward",),
        description="Passes to generate; backward: two kernels, of the gradients of Q and of those of K and V.",
    )
    causal: _Axis[_Causal] = Field(
        default_factory=tuple, description="Default of the shapes' causal, one flag per dimension."
    )
    tiles: Annotated[_List[Tile], _OrAuto()] = Field(
        description="Tiles to generate kernels for; of several ranks, each tile is for the one of its length. "
        "auto: the fewest that fit the shapes."
    )
    within: Annotated[float, Field(ge=0, le=100)] = Field(
        default=5.0, description="With tiles: auto, by how many per cent a shape's tiles may be worse than its best."
    )
    variant: _Axis[_Variant] = Field(
        default_factory=lambda: ("",),  # no default in the JSON Schema: an editor has no name for it
        description="Kernel family, where an arch has several; default: the first that can have the kernel.",
    )
    arch: _Axis[_Arch] = Field(
        default_factory=tuple, description="Of the spec's architectures, those of this entry; default: all."
    )
    shapes: _List[Shape] = Field(default_factory=tuple, description="Problems that the kernels are for.")

    @model_validator(mode="after")
    def _complete(self) -> KernelEntry:
        faults = [*self._length_faults()]
        if ANY_HEAD_DIM in self.head_dim and self.value_head_dim:
            faults.append((("value_head_dim",), "can't be given beside head_dim any, which leaves both open"))
        _refuse(faults)
        late = [(i, shape) for i, shape in enumerate(self.shapes) if not shape.causal]  # made before this entry was
        for _, shape in late:
            object.__setattr__(shape, "causal", self.causal or (False,) * len(shape.tokens))
        found = [(i, fault) for i, shape in late for fault in shape.extent_faults()]
        _refuse([(("shapes", i, *path), text) for i, (path, text) in found])
        return self

    @model_validator(mode="wrap")
    @classmethod
    def _lend_causal(cls, value: Any, handler: ModelWrapValidatorHandler[KernelEntry]) -> KernelEntry:
        """Validates the entry while its shapes, which are validated before it, know its causal kinds."""
        token = _DEFAULT_CAUSAL.set(_causal_kinds(value.get("causal", ())) if isinstance(value, dict) else ())
        try:
            return handler(value)
        finally:
            _DEFAULT_CAUSAL.reset(token)

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
        if not self.tiles:
            for rank in known:
                if all(len(shape.tokens) != rank for shape in self.shapes):
                    missing = f"auto fits tiles to shapes, and there is none of rank {rank}"
                    yield ("tiles",), f"{missing}; add one, for example {_SHAPE_EXAMPLES[rank]}"
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
            for field in (*_OF_WINDOW, *_OF_RANGE):
                if field in shape.model_fields_set and len(getattr(shape, field)) != rank:
                    yield fault(("shapes", i, field), getattr(shape, field), rank)
            for j, field in product(range(len(shape.windows)), _OF_WINDOW):
                if (values := getattr(shape.windows[j], field)) and len(values) != rank:
                    yield fault(("shapes", i, "windows", j, field), values, rank)

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
        ops = [op for direction in self.direction for op in _DIRECTIONS[direction]]
        axes = (ops, self.dtype, self.head_dim, self.value_head_dim or (0,), self.variant)
        boxes = [tile.q for tile in self.tiles] or [shape.tokens for shape in self.problems]
        return sum(ranks[len(box)] for box in boxes) * prod(map(len, axes))

    def configs(self, arch: str) -> Iterator[tuple[KernelConfig, dict[str, YamlPath]]]:
        """Every config of this entry on ``arch``, with the path in the entry that each field comes from.

        With ``tiles: auto`` each has the smallest tile there is, in place of those that will be fitted. Without a
        variant it is of the first of the arch's families that can have the kernel, and that has what the shapes need.
        """
        needed = {rank: self._features(rank) for rank in {*self.rank}}
        ops = [(i, op) for i, direction in enumerate(self.direction) for op in _DIRECTIONS[direction]]
        for (i, op), (j, dtype), (k, head_dim), (m, value), (n, variant), (path, rank, tile) in product(
            ops,
            enumerate(self.dtype),
            enumerate(self.head_dim),
            enumerate(self.value_head_dim or (0,)),
            enumerate(self.variant),
            self._tile_axis(),
        ):
            names = op, arch, rank, dtype, head_dim, value
            config = _config(*names, tile, variant, needed.get(rank, frozenset()))
            origins: dict[str, YamlPath] = {
                "op": ("direction", i),
                "dtype": ("dtype", j),
                "head_dim": ("head_dim", k),
                "value_head_dim": ("value_head_dim", m),
                "variant": ("variant", n),
                "q_tile": (*path, "q") if self.tiles else path,
                "kv_tile": (*path, "kv") if self.tiles else path,
            }
            yield config, origins


def _causal_kinds(value: Any) -> tuple[bool | str, ...] | None:
    """What an entry says of causal; None if it is wrong."""
    values = value if isinstance(value, list | tuple) else [value]
    try:
        return tuple(map(_causal, values))
    except PydanticCustomError:
        return None


def _config(
    op: str,
    arch: str,
    rank: int,
    dtype: str,
    head_dim: int,
    value: int,
    tile: Tile | None,
    variant: str,
    needed: Collection[str],
) -> KernelConfig:
    """A config of the family of this variant, or of the first of the arch's that can have it; of those that have the
    features, if some do."""

    def of(variant: str, boxes: tuple[tuple[int, ...], tuple[int, ...]]) -> KernelConfig:
        q_tile, kv_tile = (tile.q, tile.kv) if tile else boxes
        return KernelConfig(op, arch, rank, dtype, head_dim, q_tile, kv_tile, value, variant)

    def of_family(family: Family) -> KernelConfig:
        return of(family.variant, family.smallest_boxes(rank))

    named = [family for family in families_of(op, arch) if not variant or family.variant == variant]
    able = [family for family in named if {*needed} <= {*family.features}] or named
    for family in able:
        if len(able) == 1 or not family.faults(of_family(family)):
            return of_family(family)
    # `faults_of` says what is wrong with it.
    return of_family(able[0]) if able else of(variant, ((1,) * rank, (1,) * rank))


class Spec(_Model):
    """A kernel spec of gnaforge: the kernels of one library."""

    spec_version: _Version = Field(description="Version of this format.")
    library: _Library = Field(description="Names the torch library and the wheel.")
    arch: _Axis[_Arch] = Field(description="Architectures to generate every kernel for.")
    kernels: _List[KernelEntry] = Field(description="What to generate.")

    @model_validator(mode="after")
    def _check(self) -> Spec:
        count = sum(len(entry.arch or self.arch) * entry.count() for entry in self.kernels)
        if count > MAX_CONFIGS:
            text = f"the lists multiply to {count:,} kernels; at most {MAX_CONFIGS:,}"
            _refuse([(("kernels",), text)])
        faults: dict[Fault, None] = {}
        for i, entry in enumerate(self.kernels):
            for k, arch in enumerate(entry.arch):
                if arch not in self.arch:
                    text = f"{arch!r} is not among those of the spec; allowed: {', '.join(dict.fromkeys(self.arch))}"
                    faults[("kernels", i, "arch", k), text] = None
        _refuse(list(faults))
        for arch in dict.fromkeys(self.arch):
            for i, entry in self.entries(arch):
                used: dict[Family, None] = {}
                for config, origins in entry.configs(arch):
                    for field, reason in faults_of(config):
                        faults[("kernels", i, *origins[field]), reason + _nearest(config, field)] = None
                    if (family := find_family(config)) is not None:
                        used[family] = None
                faults |= dict.fromkeys(_feature_faults(i, entry, used))
        _refuse(list(faults))
        return self

    def entries(self, arch: str) -> list[tuple[int, KernelEntry]]:
        """The entries that are for an arch, and their places in ``kernels``."""
        return [(i, entry) for i, entry in enumerate(self.kernels) if not entry.arch or arch in entry.arch]


def _feature_faults(index: int, entry: KernelEntry, used: Iterable[Family]) -> Iterator[Fault]:
    """The settings of an entry's shapes that families lack which it has kernels of."""
    for family in used:
        for i, shape in enumerate(entry.shapes):
            for j, part in enumerate(shape.parts):
                if found := feature_fault(part.problem(), str(family), family.features):
                    field, text = found
                    inside = ("windows", j) if shape.windows and getattr(shape.windows[j], field, ()) else ()
                    yield ("kernels", index, "shapes", i, *inside, field), text


def _nearest(config: KernelConfig, field: str) -> str:
    """The nearest value that the family of ``config`` takes, where a number is off."""
    family = find_family(config)
    if family is None:
        return ""
    limits = family.limits
    if field in ("head_dim", "value_head_dim") and (dim := getattr(config, field)) != ANY_HEAD_DIM:
        multiple = limits.head_dim_multiple
        return f"; did you mean {min(-(-dim // multiple) * multiple, limits.head_dim)}?"
    if field != "kv_tile" or config.kv_columns > limits.kv_columns:
        return ""
    if config.kv_columns % limits.kv_multiple:
        below = config.kv_columns // limits.kv_multiple * limits.kv_multiple
        near = [str(n) for n in (below, below + limits.kv_multiple) if 0 < n <= limits.kv_columns]
        return f"; the nearest: {' or '.join(near)}"
    most = family.most_kv_columns(config)
    return f"; at most {most} key tokens fit" if most else ""
