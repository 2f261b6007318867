"""Reads abi.h as far as tests compare it: structs, enums, macros."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Header:
    """The declarations of a header, without comments.

    Attributes:
        structs: per struct the declarations of its fields, in order.
        enums: per enum its values by name.
        macros: what is defined, by name, as text.
        features: bits by name, without GNAFORGE_FEATURE_.
    """

    structs: dict[str, list[str]]
    enums: dict[str, dict[str, int]]
    macros: dict[str, str]
    features: dict[str, int]


def read_header(path: Path) -> Header:
    """A header whose declarations look as those of abi.h do."""
    text = re.sub(r"/\*.*?\*/", "", path.read_text(), flags=re.S).replace("\\\n", " ")
    structs = {
        name: [" ".join(field.split()) for field in body.split(";") if field.strip()]
        for body, name in re.findall(r"typedef struct \w+ \{(.*?)\n\} (\w+);", text, flags=re.S)
    }
    enums = {
        name: {key: int(value) for key, value in re.findall(r"(\w+) = (\d+)", body)}
        for name, body in re.findall(r"enum (\w+) \{(.*?)\};", text, flags=re.S)
    }
    macros = {
        name: " ".join(value.split())
        for name, value in re.findall(r"^#define (\w+(?:\([^)]*\))?)(.*)$", text, flags=re.M)
    }
    bits = {
        name.removeprefix("GNAFORGE_FEATURE_"): int(found[1])
        for name, value in macros.items()
        if (found := re.fullmatch(r"\(UINT64_C\(1\) << (\d+)\)", value))
    }
    assert structs and enums and bits, path
    return Header(structs, enums, macros, bits)
