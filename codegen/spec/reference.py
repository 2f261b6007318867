"""Tells the JSON Schema of specs as a Markdown table, a row per field."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..runtime.problem_rules import MAX_EXTENT

Schema = Mapping[str, Any]


def reference_table(schema: Schema) -> str:
    """The fields of the objects of a schema, nested ones after the field that holds them; lines end with a newline."""
    lines = ["| field | allowed | meaning |", "|---|---|---|"]
    return "\n".join([*lines, *_rows(schema, schema["$defs"], "")]) + "\n"


def _rows(schema: Schema, definitions: Schema, prefix: str) -> Iterator[str]:
    for name, field in schema["properties"].items():
        optional = "" if name in schema["required"] else ", optional"
        default = f"; default {_value(field['default'])}" if "default" in field else ""
        yield f"| `{prefix}{name}` | {_allowed(field)}{optional}{default} | {field['description']} |"
        for nested, inside in _references(field):
            yield from _rows(definitions[nested], definitions, f"{prefix}{name}{inside}.")


def _allowed(field: Schema) -> str:
    """The values of a field, in words."""
    if "anyOf" in field:
        choices = field["anyOf"]
        if choices[-1].get("type") == "array" and choices[-1].get("items") == choices[0]:
            return f"{_allowed(choices[0])}; one or a list"
        return " or ".join(map(_allowed, choices))
    if "const" in field:
        return _value(field["const"])
    if "enum" in field:
        return ", ".join(map(_value, field["enum"]))
    if "$ref" in field:
        return "a mapping"
    kind = field["type"]
    if kind == "array":
        return "a list"
    if kind in ("integer", "number"):
        least, most = field.get("minimum"), field.get("maximum")
        word = "whole number" if kind == "integer" else "number"
        if least == -MAX_EXTENT:
            return word
        return f"{word} from {least}" + ("" if most in (None, MAX_EXTENT) else f" to {most}")
    return "true, false" if kind == "boolean" else f"text that matches `{field['pattern']}`"


def _value(value: object) -> str:
    return ", ".join(map(_value, value)) if isinstance(value, list) else f"`{value}`"


def _references(field: Schema) -> Iterator[tuple[str, str]]:
    """The definitions of the objects that a field may be, or a list that it may be may hold; what is between its name
    and those of their fields."""
    for choice in field.get("anyOf", [field]):
        for of, inside in ((choice, ""), (choice.get("items", {}), "[]")):
            if "$ref" in of:
                yield of["$ref"].rpartition("/")[2], inside
