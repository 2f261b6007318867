"""The contract's twins say what abi.h says: ctypes, the names in C++, the core's error codes."""

from __future__ import annotations

import ctypes as c
import json
import re
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

from c_header import read_header
from gnaforge.build import abi
from gnaforge.build.identity import include_dir, template_dir
from gnaforge.build_tools.toolchain import cxx_compiler
from gnaforge.runtime.core import ErrorCode
from gnaforge.runtime.dtypes import DTYPES
from gnaforge.runtime.problem import FEATURES

HEADER = read_header(include_dir() / "gnaforge" / "abi.h")
STRUCTS = {
    "gnaforge_tensor": abi.Tensor,
    "gnaforge_problem": abi.Problem,
    "gnaforge_host": abi.Host,
    "gnaforge_args": abi.Args,
    "gnaforge_entry": abi.Entry,
    "gnaforge_library": abi.Library,
}


def offsets(include: Path, structs: Mapping[str, list[str]], folder: Path) -> dict[str, dict[str, int]]:
    """Where the fields of a header's structs lie, and their sizes, as a C compiler says that finds no padding in them.

    Args:
        include: the folder that holds gnaforge/abi.h.
        structs: their fields' names.
        folder: where to compile.
    """
    lines = []
    for name, fields in structs.items():
        printed = "".join(f'printf("\\"{field}\\":%zu,", offsetof({name}, {field}));' for field in fields)
        lines.append(f'printf("\\"{name}\\":{{"); {printed} printf("\\"sizeof\\":%zu}},", sizeof({name}));')
    source = folder / "offsets.c"
    source.write_text(
        "#include <stdio.h>\n#include <gnaforge/abi.h>\n"
        f'int main(void) {{ printf("{{"); {" ".join(lines)} printf("\\"end\\":{{}}}}"); return 0; }}\n'
    )
    options = ["-x", "c", "-std=c11", "-Wall", "-Wextra", "-Wpadded", "-Wpedantic", "-Werror"]
    program = folder / "offsets"
    subprocess.run([*cxx_compiler().command, *options, f"-I{include}", source, "-o", program], check=True)
    return json.loads(subprocess.run([program], capture_output=True, text=True, check=True).stdout)


def name_of(declaration: str) -> str:
    """The name that a field's declaration declares."""
    pointer = re.search(r"\(\*(\w+)\)", declaration)
    return pointer[1] if pointer else re.sub(r"\[\w+\]$", "", declaration).split()[-1].lstrip("*")


def test_ctypes_has_the_structs_and_c_finds_no_padding_in_them(tmp_path: Path) -> None:
    assert HEADER.structs.keys() == STRUCTS.keys()
    names = {name: [name_of(field) for field in fields] for name, fields in HEADER.structs.items()}
    assert {name: [field[0] for field in struct._fields_] for name, struct in STRUCTS.items()} == names
    ours = {
        name: {**{field: getattr(struct, field).offset for field in names[name]}, "sizeof": c.sizeof(struct)}
        for name, struct in STRUCTS.items()
    }
    assert offsets(include_dir(), names, tmp_path) == {**ours, "end": {}}


def lower(values: Mapping[str, int], prefix: str) -> dict[str, int]:
    return {name.removeprefix(f"GNAFORGE_{prefix}").lower(): value for name, value in values.items()}


def test_ctypes_has_the_numbers() -> None:
    enums = HEADER.enums
    assert enums.keys() == {f"gnaforge_{x}" for x in ("dtype", "device", "op", "role", "edge", "causal", "code")}
    assert lower(enums["gnaforge_device"], "") == abi.DEVICES
    assert lower(enums["gnaforge_op"], "") == abi.OPS
    assert lower(enums["gnaforge_edge"], "EDGE_") == abi.EDGES
    assert lower(enums["gnaforge_causal"], "CAUSAL_") == abi.CAUSAL
    assert lower(enums["gnaforge_code"], "") == {name: number for number, name in enumerate(abi.CODES)}
    assert {name.lower(): bit for name, bit in HEADER.features.items()} == dict(
        zip(abi.FEATURES, range(99), strict=False)
    )
    roles = lower(enums["gnaforge_role"], "")
    assert roles.pop("roles") == len(abi.ROLES)
    # A piece of extra keys has the number after the first piece's, and no enumerator of its own.
    assert roles == {name: number for number, name in enumerate(abi.ROLES) if not name.endswith("_2")}
    dtypes = lower(enums["gnaforge_dtype"], "")
    assert dtypes.pop("int32") == 4  # of lengths, no kernel's
    assert dtypes == {name: dtype.code for name, dtype in DTYPES.items()}
    assert int(HEADER.macros["GNAFORGE_ABI_MAJOR"].rstrip("u")) == abi.ABI_MAJOR
    assert int(HEADER.macros["GNAFORGE_LIBRARY_EMULATED"].rstrip("u")) == abi.EMULATED
    assert int(HEADER.macros["GNAFORGE_ARGS_CHECKED"].rstrip("u")) == abi.CHECKED
    assert int(HEADER.macros["GNAFORGE_ARGS_BESIDE"].rstrip("u")) == abi.BESIDE
    assert set(FEATURES) <= set(abi.FEATURES)


def test_cpp_has_the_names(compile_library: Callable[..., Path], tmp_path: Path) -> None:
    source = tmp_path / "names.cpp"
    source.write_text(
        '#include "gnaforge/names.h"\n'
        'extern "C" __attribute__((visibility("default"))) const char* feature(int bit) '
        "{ return gnaforge::feature_name(uint64_t{1} << bit); }\n"
        'extern "C" __attribute__((visibility("default"))) const char* op(int op) { return gnaforge::op_name(op); }\n'
        'extern "C" __attribute__((visibility("default"))) const char* dtype(int code) '
        "{ return gnaforge::dtype_name(code); }\n"
    )
    library = c.CDLL(str(compile_library(source, "names")))
    for function in (library.feature, library.op, library.dtype):
        function.restype = c.c_char_p
    assert tuple(library.feature(bit).decode() for bit in range(len(abi.FEATURES))) == abi.FEATURES
    assert library.feature(len(abi.FEATURES)) == b"an unknown feature"
    assert {library.op(code).decode(): code for code in abi.OPS.values()} == abi.OPS
    assert library.op(99) is None
    assert {library.dtype(dtype.code).decode() for dtype in DTYPES.values()} == set(DTYPES)


def test_python_has_the_cores_error_codes() -> None:
    text = (template_dir() / "core" / "error.h").read_text()
    body = re.search(r"enum class ErrorCode : int \{(.*?)\};", text, flags=re.S)[1]
    codes = dict(re.findall(r"(\w+) = (\w+),", body))
    known = HEADER.enums["gnaforge_code"]
    assert {name.upper(): known.get(value) or int(value) for name, value in codes.items()} == dict(
        ErrorCode.__members__
    )
