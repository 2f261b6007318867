"""Reads kernel specs: from a path or a preset's name to a checked `Spec`, or one error that lists it all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from ..build_tools.files import open_regular, read_at_most
from ..errors import InputError
from .model import Boxes, KernelEntry, Spec, Tile
from .shape import HeadWindow, Shape
from .yaml import MAX_BYTES, MAX_REPORTED, Document, YamlPath, did_you_mean, input_error, path_text, quote, read_yaml

__all__ = [
    "HeadWindow",
    "KernelEntry",
    "Shape",
    "Spec",
    "Tile",
    "json_schema",
    "load_spec",
    "parse_spec",
    "presets",
    "spec_of",
]


def load_spec(source: str | Path) -> Spec:
    """The spec in the file ``source``, or of the preset of that name: no ``/``, no ``.yaml`` and no ``.yml``.

    Raises:
        InputError: there is no such file or preset, or its contents are wrong. The message has a line
            ``file:line:column: field: fault`` for each fault.
    """
    if isinstance(source, str) and is_preset(source):
        file, data = f"preset {source}", preset_text(source)
    else:
        file, data = str(source), _read(Path(source))
    return parse_spec(data, file)


def parse_spec(data: bytes, file: str) -> Spec:
    """The spec that the YAML in ``data`` holds; messages name it ``file``.

    Raises:
        InputError: as `load_spec`.
    """
    document = read_yaml(data, file)
    try:
        spec = Spec.model_validate(document.value)
    except ValidationError as error:
        _add_faults(document, error)
    if document.faults:
        raise input_error(file, document.faults, document.unreported)
    return spec


def spec_of(value: Any, name_of: Callable[[YamlPath], str] | None = None) -> Spec:
    """The spec that a mapping holds, as YAML would be read into one.

    Args:
        value: the mapping.
        name_of: how messages call the place of a fault; by default as in a file.

    Raises:
        InputError: it is wrong; a line ``field: fault`` for each fault.
    """
    try:
        return Spec.model_validate(value)
    except ValidationError as error:
        name = name_of or (lambda path: path_text(_written_path(value, path)))
        found = dict.fromkeys(f"{name(path)}: {_text(detail)}" for detail, path in _faults(error))
        raise InputError("\n".join(found)) from None


def _written_path(value: Any, path: YamlPath) -> YamlPath:
    """``path`` without the index of a value that was given bare, in place of a list of one."""
    for at, part in enumerate(path):
        if isinstance(part, int) and not isinstance(value, list | tuple):
            return path[:at]
        inside = isinstance(value, Mapping) and part in value
        value = value[part] if inside or (isinstance(part, int) and part < len(value)) else None
    return path


def presets() -> dict[str, str]:
    """Every preset's name and what its first comment line says about it, in alphabetical order."""
    files = [file for file in resources.files("gnaforge.presets").iterdir() if file.name.endswith(".yaml")]
    return {
        file.name.removesuffix(".yaml"): file.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
        for file in sorted(files, key=lambda file: file.name.removesuffix(".yaml"))
    }


def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of the spec format, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Spec.model_json_schema()}


def is_preset(source: str) -> bool:
    """Whether a spec's name is a preset's, no file's."""
    return "/" not in source and not source.endswith((".yaml", ".yml"))


def preset_text(name: str) -> bytes:
    """The YAML of a preset.

    Raises:
        InputError: there is none of that name.
    """
    known = presets()
    if name in known:
        return (resources.files("gnaforge.presets") / f"{name}.yaml").read_bytes()
    hint = did_you_mean(name, known)
    for file in (f"{name}.yaml", f"{name}.yml"):
        if name.isprintable() and Path(file).is_file():
            hint = f"; did you mean the file {file}?"
    raise InputError(f"no preset {quote(name)}; presets: {', '.join(known)}{hint}; a file's name ends in .yaml")


def _read(path: Path) -> bytes:
    try:
        with open_regular(path) as file:
            return read_at_most(file, MAX_BYTES)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; presets are named without .yaml: {', '.join(presets())}") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise InputError(f"can't read {quote(str(path))}: {getattr(error, 'strerror', None) or error}") from error


_MODELS: dict[object, type[BaseModel]] = {
    "kernels": KernelEntry,
    "tiles": Tile,
    **{name: Boxes for name, field in Tile.model_fields.items() if field.annotation is Boxes},
    "shapes": Shape,
    "windows": HeadWindow,
}


def _model_at(path: YamlPath) -> type[BaseModel]:
    """The model that the mapping at ``path`` fills."""
    return _MODELS[[part for part in path if isinstance(part, str)][-1]] if path else Spec


def _message(error: ErrorDetails) -> str:
    """What pydantic found, in the words of a spec's author."""
    kind, value, context = error["type"], error["input"], error.get("ctx", {})
    given = quote(value)
    if kind == "missing":
        return "is required"
    if kind == "extra_forbidden":
        allowed = list(_model_at(tuple(error["loc"][:-1])).model_fields)
        return f"unknown field; allowed: {', '.join(allowed)}{did_you_mean(error['loc'][-1], allowed)}"
    if kind == "int_type":
        return f"{given} is no integer; allowed: a whole number, not in quotes"
    if kind == "float_type":
        return f"{given} is no number; allowed: a number, not in quotes"
    if kind == "bool_type":
        return f"{given} is no boolean; allowed: true, false"
    if kind == "greater_than_equal":
        return f"{given} is too small; at least {context['ge']}"
    if kind == "less_than_equal":
        return f"{given} is too large; at most {context['le']}"
    if kind == "tuple_type":
        return f"{given} is no list; allowed: a list, each entry after a '-'"
    if kind == "model_type":
        fields = ", ".join(_model_at(tuple(error["loc"])).model_fields)
        return f"{given} is no mapping; allowed: a mapping with the fields {fields}"
    return error["msg"]


def _add_faults(document: Document, error: ValidationError) -> None:
    """Adds the first that validation found to ``document.faults``, each at the value or name that it is about."""
    unreadable = frozenset(document.refused)  # reading has reported these already
    found = []
    for detail, path in _faults(error):
        at = document.locate(path)
        if detail["type"] == "missing":
            found.append((document.values[at], path, detail))
        elif at not in unreadable:
            positions = document.names if detail["type"] == "extra_forbidden" else document.values
            unwritten = len(path) > len(at) and isinstance(path[len(at)], str)  # a field that should be there
            found.append((positions[at], path if unwritten else at, detail))
    found.sort(key=lambda item: item[0])
    for position, path, detail in found[:MAX_REPORTED]:  # suggestions take time: only what is shown gets its text
        document.add(position, path, _text(detail))
    document.unreported += len(found[MAX_REPORTED:])


def _faults(error: ValidationError) -> Iterator[tuple[ErrorDetails, YamlPath]]:
    """What validation found, and where; of one detail that holds several faults, each."""
    for detail in error.errors(include_url=False):
        loc: YamlPath = tuple(detail["loc"])
        if detail["type"] == "faults":
            for path, text in detail["ctx"]["faults"]:
                yield {**detail, "msg": text}, (*loc, *path)
        else:
            yield detail, loc


def _text(detail: ErrorDetails) -> str:
    return detail["msg"] if detail["type"] == "faults" else _message(detail)
