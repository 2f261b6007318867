"""The kernel spec: which kernels a library holds, read from YAML and checked against the arch table."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from importlib import resources
from itertools import product
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    PlainValidator,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError, core_schema

from .arch import ARCHES
from .errors import InputError
from .runtime.config import ANY_HEAD_DIM, DTYPES, OPS, KernelConfig
from .spec_yaml import MAX_BYTES, Document, YamlPath, failure, path_text, read_yaml

SPEC_VERSION = 1
MAX_CONFIGS = 10_000
MAX_COUNT = 2**30 - 1  # tokens along one dimension, as max_axis_length in problem.h

_DIRECTIONS = {op.removeprefix("gna_"): op for op in OPS}
_AVAILABLE = [name for name, op in _DIRECTIONS.items() if any(op in arch.ops for arch in ARCHES.values())]
_VARIANTS = sorted({variant for arch in ARCHES.values() for variant in arch.variants if variant})
_LIBRARY = re.compile(r"[a-z][a-z0-9_]*")

Fault = tuple[YamlPath, str]


def did_you_mean(given: object, allowed: Iterable[str]) -> str:
    """``"; did you mean 'bf16'?"`` for the entry of ``allowed`` nearest to ``given``, or nothing if none is near."""
    near = difflib.get_close_matches(str(given)[:60].lower(), list(allowed), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def _shown(value: object) -> str:
    """``value`` as it looks in YAML, short enough for a message."""
    if value is None:
        return "an empty value"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list | tuple):
        inner = ", ".join(map(_shown, value[:6])) + (", ..." if len(value) > 6 else "")
        return f"[{inner}]"
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _wrong(message: str) -> PydanticCustomError:
    return PydanticCustomError("wrong", "{message}", {"message": message})


def _refuse(faults: list[Fault]) -> None:
    """Reports what is wrong between the fields of a model, each fault at its own field."""
    if faults:
        message = "; ".join(f"{path_text(path)}: {text}" for path, text in faults)
        raise PydanticCustomError("faults", "{message}", {"message": message, "faults": faults})


def _name(value: Any, what: str, allowed: Sequence[str], planned: Sequence[str] = ()) -> str:
    if isinstance(value, str) and value in allowed:
        return value
    choice = f"allowed: {', '.join(allowed)}"
    if isinstance(value, str) and value in planned:
        raise _wrong(f"{value!r} is not available in this version; {choice}")
    raise _wrong(f"{_shown(value)} is no {what}; {choice}{did_you_mean(value, allowed)}")


def _one_of(what: str, allowed: Sequence[str], planned: Sequence[str] = ()) -> tuple[Any, Any]:
    """Metadata of a string field that takes a name out of a table."""
    check = partial(_name, what=what, allowed=allowed, planned=planned)
    return PlainValidator(check), WithJsonSchema({"type": "string", "enum": list(allowed)})


def _library_name(value: Any) -> str:
    if isinstance(value, str) and _LIBRARY.fullmatch(value):
        return value
    near = re.sub(r"[^a-z0-9_]+", "_", value.lower())[:60].strip("_") if isinstance(value, str) else ""
    hint = f"; did you mean {near!r}?" if _LIBRARY.fullmatch(near) else ""
    raise _wrong(
        f"{_shown(value)} is no library name; allowed: lower-case letters, digits and _, a letter first{hint}"
    )


def _head_dim(value: Any) -> int:
    if value == "any":
        return ANY_HEAD_DIM
    if type(value) is int and value >= 1:
        return value
    raise _wrong(f"{_shown(value)} is no head dim; allowed: a positive integer, or any")


def _tuple_of_list(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _refuse_auto(value: Any) -> Any:
    if value == "auto":
        raise _wrong(
            "'auto' is not available in this version, which has no simulator to fit tiles with; "
            "allowed: explicit tiles such as [{q: [2, 8, 8], kv: [2, 8, 8]}]"
        )
    return value


class _OneOrList:
    """Metadata of a tuple field for which YAML may also give its only element without brackets."""

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        def listed(value: Any) -> Any:
            return tuple(value) if isinstance(value, list | tuple) else (value,)

        return core_schema.no_info_before_validator_function(listed, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        array = handler(schema)
        return {"anyOf": [array["items"], array]}


T = TypeVar("T")
_Axis = Annotated[tuple[T, ...], Field(min_length=1), _OneOrList()]
_List = Annotated[tuple[T, ...], Field(min_length=1), BeforeValidator(_tuple_of_list)]
_Count = Annotated[int, Field(ge=1, le=MAX_COUNT)]
_Rank = Annotated[int, Field(ge=1, le=3)]
_Arch = Annotated[str, *_one_of("arch", list(ARCHES))]
