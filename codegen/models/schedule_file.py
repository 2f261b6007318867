"""Schedules in files: `read_schedule`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from ..build_tools.files import open_regular, read_at_most
from ..errors import InputError
from .schedule import SLIDING_TILE, Pattern, Schedule

_MAX_BYTES = 16_000_000  # a mask strategy names each head of each layer in each step
_FORMS = ("patterns", "natten_parameters", "mask_strategies")
_FIELDS = (*_FORMS, "tile", "layers", "steps", "dense_steps", "dense_layers")
_STRATEGY = re.compile(r"\d+_\d+_\d+")
_PLACE = re.compile(r"(\d+)_(\d+)")


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
    publish: a list of NATTEN parameters, or a mapping ``step_layer_head`` to windows in tiles.

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
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        raise InputError(f"{f'line {mark.line + 1}: ' if mark else ''}not valid YAML: {error.problem}") from None
    except RecursionError:
        raise InputError("the file is nested too deep") from None
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"not valid YAML: {str(error).splitlines()[0]}") from None


def _once(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for name, value in pairs:
        if name in found:
            raise InputError(f"{name!r} is given twice")
        found[name] = value
    return found


class _Loader(yaml.SafeLoader):
    """YAML's plain values; a name that is given twice is refused, where PyYAML takes the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As `yaml.SafeLoader` does."""
        _once([(name.value, None) for name, _ in node.value])
        return super().construct_mapping(node, deep=deep)


def _run_of(value: Any) -> Run:
    if isinstance(value, Sequence) and not isinstance(value, str):
        value = {"natten_parameters": value}
    if not isinstance(value, Mapping):
        raise InputError("a schedule is a mapping, or a list of NATTEN parameters")
    if value and all(isinstance(name, str) and _STRATEGY.fullmatch(name) for name in value):
        value = {"mask_strategies": value}
    if unknown := [name for name in value if name not in _FIELDS]:
        raise InputError(f"a schedule has no field {unknown[0]!r}, only {', '.join(_FIELDS)}")
    given = [name for name in _FORMS if name in value]
    if len(given) != 1:
        raise InputError(f"give one of {', '.join(_FORMS)}" + (f", not {' and '.join(given)}" if given else ""))
    if "tile" in value and given != ["mask_strategies"]:
        raise InputError("tile: goes with mask_strategies")
    schedule = Schedule(
        _patterns(value, given[0]), value.get("dense_steps", 0), _list("dense_layers", value.get("dense_layers", []))
    )
    layers = _count("layers", value["layers"]) if "layers" in value else schedule.layers
    if layers is None and schedule.dense_layers:
        raise InputError("dense_layers: say how many layers there are, by layers")
    if layers is not None:
        schedule.require_layers(layers)
    steps = _count("steps", value["steps"]) if "steps" in value else schedule.steps
    if steps is None and schedule.dense_steps:
        raise InputError("dense_steps: say how many steps there are, by steps")
    schedule.require_steps(steps or 1)
    return Run(schedule, steps or 1, layers)


def _patterns(value: Mapping[str, Any], form: str) -> Any:
    own = value[form]
    if form == "natten_parameters":
        for layer, entry in enumerate(_list(form, own)):
            if entry is not None:
                _require_mapping(f"{form} of layer {layer}", entry)
        return Schedule.from_natten_parameters(own).patterns
    if form == "mask_strategies":
        _require_mapping(form, own)
        return Schedule.from_mask_strategies(own, tile=_list("tile", value.get("tile", list(SLIDING_TILE)))).patterns
    if isinstance(own, Sequence) and not isinstance(own, str):
        return [None if one is None else _pattern(f"patterns, layer {layer}", one) for layer, one in enumerate(own)]
    _require_mapping(form, own)
    places = {name: _PLACE.fullmatch(name) if isinstance(name, str) else None for name in own}
    if not own or not all(places.values()):
        return _pattern("patterns", own)
    return {
        (int(place[1]), int(place[2])): _pattern(f"patterns, {name}", own[name])
        for name, place in places.items()
        if place
    }


def _pattern(where: str, given: Any) -> Pattern:
    _require_mapping(where, given)
    names = [field.name for field in fields(Pattern)]
    if unknown := [name for name in given if name not in names]:
        raise InputError(f"{where}: a pattern has no field {unknown[0]!r}, only {', '.join(names)}")
    if "kernel_size" not in given:
        raise InputError(f"{where}: a pattern needs kernel_size")
    try:
        return Pattern(**given)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def _require_mapping(where: str, given: Any) -> None:
    if not isinstance(given, Mapping):
        raise InputError(f"{where}: {str(given)[:60]!r} is no mapping")


def _list(where: str, given: Any) -> list[Any]:
    if not isinstance(given, list):
        raise InputError(f"{where}: {str(given)[:60]!r} is no list")
    return given


def _count(where: str, given: Any) -> int:
    if not isinstance(given, int) or isinstance(given, bool) or not 1 <= given <= 1_000_000:
        raise InputError(f"{where}: {str(given)[:60]!r} is no number from 1 to 1,000,000")
    return given
