"""Schedules in files: `read_schedule`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from reprlib import repr as shown
from typing import Any

import yaml

from ..build_tools.files import open_regular, read_at_most
from ..errors import InputError
from .pattern import Pattern
from .schedule import MAX_COUNT, SLIDING_TILE, STEP_LAYER, Schedule, numbers_of

_MAX_BYTES = 16_000_000  # a mask strategy names each head of each layer in each step
_FORMS = ("patterns", "natten_parameters", "mask_strategies")
_FIELDS = (*_FORMS, "tile", "layers", "steps", "dense_steps", "dense_layers")
_STRATEGY = re.compile("[0-9]+_[0-9]+_[0-9]+")
_PLACE = re.compile("[0-9]+_[0-9]+")
_INTEGER = re.compile("[-+]?(0|[1-9][0-9]{0,17})")
_TAGS = tuple(f"tag:yaml.org,2002:{kind}" for kind in ("str", "seq", "map"))  # what has no tag in the file
_WORDS = {"": None, "~": None, "null": None, "true": True, "false": False}


@dataclass(frozen=True)
class Run:
    """A schedule and the run that it is for.

    Attributes:
        schedule: the windows.
        steps: of sampling; 1 where a file doesn't say and it makes no difference.
        layers: of the model; None where any number has the same windows.
    """

    schedule: Schedule
    steps: int = 1
    layers: int | None = None


def read_schedule(path: Path) -> Run:
    """The schedule that a YAML or JSON file holds.

    A file is a mapping with one of ``patterns`` (a mapping of the fields of `Pattern`; or a list of them, one for each
    layer, null for a dense one; or a mapping ``step_layer`` to them), ``natten_parameters`` (as
    `Schedule.from_natten_parameters` takes them) and ``mask_strategies`` (as `Schedule.from_mask_strategies` does,
    beside it ``tile``); and with ``layers``, ``steps``, ``dense_steps``, ``dense_layers``. Or it is what others
    publish: a list of NATTEN parameters, or a mapping ``step_layer_head`` to windows in tiles. Of YAML's plain values
    integers, ``true``, ``false`` and ``null`` are what they are in JSON, and everything else is text.

    Raises:
        InputError: it can't be read, holds something else, or `Schedule` refuses it; the message begins with the file.
    """
    try:
        return _run_of(_parse(_read(path)))
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _read(path: Path) -> str:
    try:
        with open_regular(path) as file:
            data = read_at_most(file, _MAX_BYTES)
        if len(data) > _MAX_BYTES:
            raise InputError(f"the file is larger than {_MAX_BYTES:,} bytes")
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InputError("the file is not UTF-8") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise InputError(f"can't be read: {getattr(error, 'strerror', None) or error}") from None


def _parse(text: str) -> Any:
    try:
        with suppress(json.JSONDecodeError):  # YAML then, which takes far longer to read
            return json.loads(text, object_pairs_hook=_once)
        return yaml.load(text, Loader=_Loader)  # which makes plain values only
    except InputError:
        raise
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        raise InputError(f"{_line(mark) if mark else ''}not valid YAML: {error.problem}") from None
    except RecursionError:
        raise InputError("the file is nested too deep") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise InputError(f"not valid YAML: {str(error).splitlines()[0]}") from None


def _line(mark: yaml.Mark) -> str:
    return f"line {mark.line + 1}: "


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise InputError(f"{shown(name)} is given twice")
        found[name] = value
    return found


class _Loader(yaml.BaseLoader):
    """Lists, mappings and the plain values of JSON. Keys are the text that is written: of ``0_1`` YAML 1.1 makes 1."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Of any node; tags are refused."""
        if node.tag not in _TAGS:
            raise InputError(f"{_line(node.start_mark)}the tag {node.tag[:60]!r} is not supported; write a plain value")
        return super().construct_object(node, deep=deep)

    def construct_scalar(self, node: yaml.ScalarNode) -> Any:
        """Of a plain value; what is quoted stays text."""
        text = super().construct_scalar(node)
        if node.style is not None:
            return text
        return int(text) if _INTEGER.fullmatch(text) else _WORDS.get(text, text)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Of keys that are each given once."""
        found: dict[Any, Any] = {}
        for name, value in node.value:
            if not isinstance(name, yaml.ScalarNode):
                raise InputError(f"{_line(name.start_mark)}a key is a list or a mapping; it must be a name")
            if name.value in found:
                raise InputError(f"{_line(name.start_mark)}{shown(name.value)} is given twice")
            found[name.value] = self.construct_object(value, deep=True)
        return found


def _run_of(value: Any) -> Run:
    if isinstance(value, Sequence) and not isinstance(value, str):
        value = {"natten_parameters": value}
    if not isinstance(value, Mapping):
        raise InputError("a schedule is a mapping, or a list of NATTEN parameters")
    if value and all(map(_STRATEGY.fullmatch, value)):
        value = {"mask_strategies": value}
    if unknown := [name for name in value if name not in _FIELDS]:
        raise InputError(f"a schedule has no field {shown(unknown[0])}, only {', '.join(_FIELDS)}")
    given = [name for name in _FORMS if name in value]
    if len(given) != 1:
        raise InputError(f"give one of {', '.join(_FORMS)}" + (f", not {' and '.join(given)}" if given else ""))
    if "tile" in value and given != ["mask_strategies"]:
        raise InputError("tile: goes with mask_strategies")
    schedule = Schedule(
        _patterns(value, given[0]), value.get("dense_steps", 0), _list("dense_layers", value.get("dense_layers", []))
    )
    steps, layers = (_count(name, value[name]) if name in value else None for name in ("steps", "layers"))
    return Run(schedule, *schedule.size_of_run(steps, layers))


def _patterns(value: Mapping[str, Any], form: str) -> Any:
    own = value[form]
    if form == "natten_parameters":
        _list(form, own)
        return Schedule.from_natten_parameters(own).patterns
    if form == "mask_strategies":
        _require_mapping(form, own)
        return Schedule.from_mask_strategies(own, tile=_list("tile", value.get("tile", list(SLIDING_TILE)))).patterns
    if isinstance(own, Sequence) and not isinstance(own, str):
        return [None if one is None else _pattern(f"patterns, layer {layer}", one) for layer, one in enumerate(own)]
    _require_mapping(form, own)
    if not own or not all(map(_PLACE.fullmatch, own)):
        return _pattern("patterns", own)
    return {numbers_of(name, STEP_LAYER): _pattern(f"patterns, {name}", entry) for name, entry in own.items()}


def _pattern(where: str, given: Any) -> Pattern:
    _require_mapping(where, given)
    names = [field.name for field in fields(Pattern)]
    if unknown := [name for name in given if name not in names]:
        raise InputError(f"{where}: a pattern has no field {shown(unknown[0])}, only {', '.join(names)}")
    if "kernel_size" not in given:
        raise InputError(f"{where}: a pattern needs kernel_size")
    try:
        return Pattern(**given)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def _require_mapping(where: str, given: Any) -> None:
    if not isinstance(given, Mapping):
        raise InputError(f"{where}: {shown(given)} is no mapping")


def _list(where: str, given: Any) -> list[Any]:
    if not isinstance(given, list):
        raise InputError(f"{where}: {shown(given)} is no list")
    return given


def _count(where: str, given: Any) -> int:
    if not isinstance(given, int) or isinstance(given, bool) or not 1 <= given <= MAX_COUNT:
        raise InputError(f"{where}: {shown(given)} is no number from 1 to {MAX_COUNT:,}")
    return given
