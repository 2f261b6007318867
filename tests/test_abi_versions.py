"""The promises of abi.h from version 1.0 on: old libraries under newer cores, newer libraries under this core."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from c_header import Header, read_header
from gnaforge.build.identity import include_dir, template_dir
from kernel_set import cpu_config
from test_contract import name_of, offsets

FROZEN = Path(__file__).parent / "abi_1_0"  # a copy of the header as it was released; never edited
KEY = "gna_forward-cpu-r2-fp32-d8-q{}x8-kv8x8"
REAL = cpu_config(2, "fp32", (4, 8), (8, 8))

pytestmark = pytest.mark.usefixtures("no_kernels")


def headers() -> tuple[Header, Header]:
    return read_header(FROZEN / "gnaforge" / "abi.h"), read_header(include_dir() / "gnaforge" / "abi.h")


def test_structs_have_grown_at_their_ends_only(tmp_path: Path) -> None:
    frozen, now = headers()
    for name, fields in frozen.structs.items():
        assert now.structs[name][: len(fields)] == fields, name
    names = {name: [name_of(field) for field in fields] for name, fields in frozen.structs.items()}
    before, after = (offsets(folder, names, tmp_path) for folder in (FROZEN, include_dir()))
    for name, fields in names.items():
        assert [after[name][field] for field in fields] == [before[name][field] for field in fields], name
        assert after[name]["sizeof"] >= before[name]["sizeof"]


def test_numbers_are_what_they_were() -> None:
    frozen, now = headers()
    counts = {"GNAFORGE_ROLES"}
    for name, values in frozen.enums.items():
        assert now.enums[name].items() >= {key: value for key, value in values.items() if key not in counts}.items()
    assert now.enums["gnaforge_role"]["GNAFORGE_ROLES"] >= frozen.enums["gnaforge_role"]["GNAFORGE_ROLES"]
    assert now.features.items() >= frozen.features.items()
    grows = {"GNAFORGE_ABI_MINOR"}
    same = {name: text for name, text in frozen.macros.items() if name not in grows}
    assert now.macros.items() >= same.items()


def grow(text: str, pattern: str, added: str) -> str:
    """The text with something added where a pattern ends, which is there once."""
    grown, count = re.subn(pattern, lambda found: found[0] + added, text, flags=re.S)
    assert count == 1, pattern
    return grown


@pytest.fixture(scope="session")
def newer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Headers and core sources of a version 1.2: every struct has grown, every enum has a further value, there are two
    more roles, and a feature that calls with a scale of 0.125 need."""
    folder = tmp_path_factory.mktemp("newer")
    shutil.copytree(include_dir(), folder / "include")
    shutil.copytree(template_dir() / "core", folder / "core")

    def edit(file: str, *changes: tuple[str, str]) -> None:
        path = folder / file
        text = path.read_text()
        for pattern, added in changes:
            text = grow(text, pattern, added)
        path.write_text(text)

    abi = "include/gnaforge/abi.h"
    text = (folder / abi).read_text().replace("GNAFORGE_ABI_MINOR 1u", "GNAFORGE_ABI_MINOR 2u")
    (folder / abi).write_text(
        text.replace("GNAFORGE_ROLES = 26", "GNAFORGE_FUTURE = 26, GNAFORGE_FUTURE_2 = 27, GNAFORGE_ROLES = 28")
    )
    plain = ("tensor", "problem", "host", "args", "library")
    values = {"dtype": 5, "device": 2, "op": 4, "edge": 3, "causal": 3, "code": 16}
    edit(
        abi,
        *((rf"(?=\n\}} gnaforge_{name};)", "\n  int64_t from_the_future;") for name in plain),
        (r"(?=\n\} gnaforge_entry;)", "\n  int (*from_the_future)(void);"),
        *(
            (rf"enum gnaforge_{name} \{{[^}}]*?(?=\s*\}};)", f", GNAFORGE_FUTURE_{name.upper()} = {value}")
            for name, value in values.items()
        ),
        (r"#define GNAFORGE_FEATURE_DETERMINISTIC [^\n]*", "\n#define GNAFORGE_FEATURE_FUTURE (UINT64_C(1) << 13)"),
    )
    row = '\n    {"future", Tokens::none, Heads::none, Channels::none, 0, 0},'
    edit("include/gnaforge/names.h", (r'\{"block_counts",[^\n]*', 2 * row), (r'"deterministic"', ', "future"'))
    edit("core/signature.h", (r"count a new field here\"\);", ""), (r"\(5(?= \+ 12 \* GNAFORGE_MAX_RANK)", " + 1"))
    edit(
        "core/call.h",
        (r"args_\.features = features_of\(problem\)", " | (problem.scale == 0.125 ? GNAFORGE_FEATURE_FUTURE : 0)"),
    )
    return folder


PREAMBLE = """
import json, torch, gnaforge
from pathlib import Path
from gnaforge.runtime import core
x = torch.randn(1, 8, 8, 2, 8)
def message(call):
    try:
        return call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
def value(**options):
    return message(lambda: gnaforge.na2d(x, x, x, 3, **options).unique().tolist())
def near(out):
    from gnaforge.runtime.problem import Problem
    from gnaforge.runtime.reference import attention
    exact, _ = attention(Problem.of_tensors(x, x, x, 3), x, x, x)
    return bool((out - exact).abs().max() < 1e-5)
"""


def run(python: Callable[..., object], code: str) -> list[object]:
    done = python(PREAMBLE + code)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_newer_core_runs_libraries_of_version_1_0(python, toy, compile_core, compile_kernel, newer: Path) -> None:
    """And gives them no call that needs what they don't know."""
    core = compile_core("newer_core", include=newer / "include", sources=newer / "core")
    old = toy("old_toy", f"-I{FROZEN}", TOY_KEY=f'"{KEY.format(1)}"', TOY_VALUE="3.f")
    # As it is built today; the test of the frozen copy says that this is as it was built then.
    real = compile_kernel(REAL, "old_real")
    out = run(
        python,
        f"""
core.set_core_files(lambda: [Path({str(core)!r})])
print(core.load_library({str(old)!r}), json.dumps(core.core().gnaforge_core_abi()), sep="\\n")
print(json.dumps(value()), json.dumps(value(scale=0.125)), sep="\\n")
print(core.load_library({str(real)!r}))
print(json.dumps(near(gnaforge.na2d(x, x, x, 3, kernel={REAL.key!r}))))
print(json.dumps(value(scale=0.125, kernel={REAL.key!r})))
""",
    )
    assert out[:3] == [1, 1 << 16 | 2, [3.0]]
    assert "doesn't have the feature future" in out[3]
    assert out[4:6] == [1, True]
    assert "doesn't have the feature future" in out[6]


def test_this_core_runs_libraries_of_version_1_0(python, toy) -> None:
    """Whose entries end before `run_calls`."""
    old = toy("frozen_toy", f"-I{FROZEN}", TOY_KEY=f'"{KEY.format(4)}"', TOY_VALUE="5.f")
    assert run(python, f"print(core.load_library({str(old)!r}))\nprint(json.dumps(value()))") == [1, [5.0]]


def test_this_core_runs_newer_libraries(python, toy, compile_kernel, newer: Path) -> None:
    """And no kernel of theirs that computes something else."""
    include = newer / "include"
    plain = toy("newer_toy", f"-I{include}", TOY_KEY=f'"{KEY.format(2)}"', TOY_VALUE="4.f", TOY_FEATURES="(1 << 13)")
    other = KEY.format(3).replace("gna_forward", "gna_future")
    options = {"TOY_OP": "GNAFORGE_FUTURE_OP", "TOY_WORK": "0.5", "TOY_VALUE": "9.f"}
    future = toy("newer_op", f"-I{include}", TOY_KEY=f'"{other}"', **options)
    real = compile_kernel(REAL, "newer_real", include=include)
    out = run(
        python,
        f"""
print(*(core.load_library(path) for path in {[str(plain), str(future)]!r}), sep="\\n")
print(json.dumps(value()))
operator = torch.ops.gnaforge.forward.default
print(json.dumps(message(lambda: operator(x, x, x, [3, 3, 1, 1, 1, 1, 0, 0], None, {other!r})[0].max().item())))
print(core.load_library({str(real)!r}))
print(json.dumps(near(gnaforge.na2d(x, x, x, 3, kernel={REAL.key!r}))))
""",
    )
    assert out[:3] == [1, 1, [4.0]]
    assert "doesn't compute gna_forward" in out[3]
    assert out[4:] == [1, True]
