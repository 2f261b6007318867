"""Types of the fields of a spec: what they take, and the words for what they don't."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from math import gcd
from typing import Annotated, Any, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    PlainValidator,
    WithJsonSchema,
)
from pydantic_core import PydanticCustomError, core_schema

from ..families import TARGETS, families
from ..runtime.config import ANY_HEAD_DIM, DIRECTIONS
from ..runtime.dtypes import DTYPES
from ..runtime.problem_rules import EDGES, MAX_EXTENT
from .yaml import YamlPath, did_you_mean, path_text, quote

SPEC_VERSION = 1

_MAX_NAME = 100
_LIBRARY = re.compile(rf"[a-z][a-z0-9_]{{0,{_MAX_NAME - 1}}}")  # files and a package are named by it

Fault = tuple[YamlPath, str]


def wrong(message: str) -> PydanticCustomError:
    return PydanticCustomError("wrong", "{message}", {"message": message})


def refuse(faults: list[Fault]) -> None:
    """Reports what is wrong between the fields of a model, each fault at its own field."""
    if faults:
        message = "; ".join(f"{path_text(path)}: {text}" for path, text in faults)
        raise PydanticCustomError("faults", "{message}", {"message": message, "faults": faults})


class OneOf:
    """Metadata of a field that takes a name out of a table, which is looked at anew each time."""

    def __init__(
        self, what: str, allowed: Callable[[], Iterable[str]], hint: Callable[[Any, list[str]], str] = did_you_mean
    ) -> None:
        self.what = what
        self.allowed = allowed
        self.hint = hint  # of a value that isn't allowed, and of those that are: which of them it may stand for

    def check(self, value: Any) -> str:
        allowed = list(self.allowed())
        if isinstance(value, str) and value in allowed:
            return value
        choice = f"allowed: {', '.join(allowed)}"
        raise wrong(f"{quote(value)} is no {self.what}; {choice}{self.hint(value, allowed)}")

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(self.check)

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"type": "string", "enum": list(self.allowed())}


def _near_dtype(value: Any, allowed: list[str]) -> str:
    """The element type that a name of torch's means, or one of 8 bits; else the nearest."""
    name = str(value).lower().removeprefix("torch.")
    meant = [dtype.name for dtype in DTYPES.values() if name == dtype.torch_name]
    if re.search(r"(fp|float)8|e\dm\d", name):
        meant = [dtype.name for dtype in DTYPES.values() if dtype.bytes == 1]
    return f"; did you mean {' or '.join(map(repr, meant))}?" if meant else did_you_mean(value, allowed)


def _version(value: Any) -> int:
    if type(value) is int and value == SPEC_VERSION:
        return value
    raise wrong(f"{quote(value)} is not supported; allowed: {SPEC_VERSION}")


def _library_name(value: Any) -> str:
    if isinstance(value, str) and _LIBRARY.fullmatch(value):
        return value
    if isinstance(value, str) and len(value) > _MAX_NAME:
        raise wrong(f"{quote(value)} is too long for a library name; at most {_MAX_NAME} letters")
    near = re.sub(r"[^a-z0-9_]+", "_", value.lower())[:60].strip("_") if isinstance(value, str) else ""
    hint = f"; did you mean {near!r}?" if _LIBRARY.fullmatch(near) else ""
    raise wrong(f"{quote(value)} is no library name; allowed: lower-case letters, digits and _, a letter first{hint}")


def _head_dim(value: Any) -> int:
    if value == "any":
        return ANY_HEAD_DIM
    if type(value) is not int or value < 1:
        raise wrong(f"{quote(value)} is no head dim; allowed: a positive integer, or any")
    # Here already, so that it is said beside what is wrong with other fields.
    multiple = gcd(*(family.limits.head_dim_multiple for family in families()))
    if value % multiple:
        raise wrong(f"{value} must be a multiple of {multiple}; did you mean {-(-value // multiple) * multiple}?")
    return value


def causal_kind(value: Any) -> bool | str:
    if type(value) is bool or value == "block":
        return bool(value) if value != "block" else "block"
    if value == "token":
        return True
    raise wrong(f"{quote(value)} is no causal kind; allowed: true, false, token, block")


class OrAuto:
    """Metadata of a tuple field that may also be the word auto, which becomes the empty tuple."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        def convert(value: Any, listed: core_schema.ValidatorFunctionWrapHandler) -> Any:
            if value == "auto":
                return ()
            if isinstance(value, str):
                raise wrong(f"{quote(value)} is neither auto nor a list of tiles such as [{{q: [8, 8], kv: [8, 8]}}]")
            return listed(value)

        return core_schema.no_info_wrap_validator_function(convert, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"anyOf": [{"const": "auto"}, handler(schema)]}


class Listed:
    """Metadata of a tuple field: a list in YAML, not empty, of at most so many entries; with ``or_one``, also its only
    element bare."""

    def __init__(self, *, or_one: bool, most: int | None = None) -> None:
        self.or_one, self.most = or_one, most

    def convert(self, value: Any) -> Any:
        # Not pydantic's own min_length: that counts valid elements only, and blames the list for them.
        if value in ([], ()):
            raise wrong("is an empty list; allowed: at least one entry")
        if self.most is not None and isinstance(value, list | tuple) and len(value) > self.most:
            raise wrong(f"{quote(value)} has {len(value)} entries; at most {self.most}")
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
    return [name for name, own in DIRECTIONS.items() if ops.issuperset(own)]


def _variants() -> list[str]:
    return sorted({family.variant for family in families() if family.variant})


SHAPE_EXAMPLES = {rank: f"shapes: [{{tokens: {[64] * rank}, window: {[13] * rank}}}]" for rank in (1, 2, 3)}

T = TypeVar("T")
AxisOf = Annotated[tuple[T, ...], Listed(or_one=True)]
ListOf = Annotated[tuple[T, ...], Listed(or_one=False)]
Count = Annotated[int, Field(ge=1, le=MAX_EXTENT)]
Rank = Annotated[int, Field(ge=1, le=3)]
Arch = Annotated[str, OneOf("arch", lambda: TARGETS)]
DtypeName = Annotated[str, OneOf("dtype", lambda: DTYPES, _near_dtype)]
Direction = Annotated[str, OneOf("direction", _available_directions)]
Variant = Annotated[str, OneOf("variant", _variants)]
Edge = Annotated[str, OneOf("edge", lambda: EDGES)]
Number = Annotated[int, Field(ge=0, le=MAX_EXTENT)]
Offset = Annotated[int, Field(ge=-MAX_EXTENT, le=MAX_EXTENT)]
CausalKind = Annotated[
    bool | str,
    PlainValidator(causal_kind),
    WithJsonSchema({"anyOf": [{"type": "boolean"}, {"enum": ["token", "block"]}]}),
]
Version = Annotated[int, PlainValidator(_version), WithJsonSchema({"const": SPEC_VERSION})]
Library = Annotated[
    str, PlainValidator(_library_name), WithJsonSchema({"type": "string", "pattern": f"^{_LIBRARY.pattern}$"})
]
HeadDim = Annotated[
    int,
    PlainValidator(_head_dim),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1}, {"const": "any"}]}),
]


class Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


def causal_kinds(value: Any) -> tuple[bool | str, ...] | None:
    """What an entry says of causal; None if it is wrong."""
    values = value if isinstance(value, list | tuple) else [value]
    try:
        return tuple(map(causal_kind, values))
    except PydanticCustomError:
        return None
