"""Lists of calls in the core: one kernel for all, and what it does with libraries that take none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.usefixtures("no_kernels")

TOY = "gna_forward-cpu-r2-fp32-d8-q{}x8-kv8x8"
PREAMBLE = """
import json, torch, gnaforge
from gnaforge.runtime import core
x = torch.zeros(32 + 15, 2, 8)
layouts = [(4, 8), (3, 5)]
def value(key=None, **options):
    try:
        out, lse = gnaforge.na2d_varlen(x, x, x, layouts, 3, return_lse=True, kernel=key, **options)
        return [out.unique().tolist(), lse.unique().tolist()]
    except Exception as error:
        return f"{type(error).__name__}: {error}"
def say(found):
    print(json.dumps(found))
"""


def run(python: Callable[..., Any], code: str) -> list[Any]:
    done = python(PREAMBLE + code)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_the_core_gives_a_kernel_the_whole_list_if_it_takes_lists(python: Any, toy: Any) -> None:
    lists = {"TOY_RUN_CALLS": "run_calls", "TOY_CALLS_WORKSPACE": "calls_workspace_bytes"}
    together = toy("together", TOY_KEY=f'"{TOY.format(1)}"', TOY_VALUE="1.f", **lists)
    apart = toy("apart", TOY_KEY=f'"{TOY.format(2)}"', TOY_VALUE="2.f", TOY_WORKSPACE="args->problem->tokens[0]")
    half = toy("half", TOY_KEY=f'"{TOY.format(3)}"', TOY_VALUE="3.f", TOY_RUN_CALLS="run_calls")
    old = toy("frozen", f"-I{Path(__file__).parent / 'abi_1_0'}", TOY_KEY=f'"{TOY.format(4)}"', TOY_VALUE="4.f")
    paths = [str(path) for path in (together, apart, half, old)]
    out = run(
        python,
        f"""
for path in {paths!r}:
    core.load_library(path)
for number in (1, 2, 3, 4, 1):
    say(value({TOY!r}.format(number)))
layouts = layouts[:1]
x = x[:32]
say(value({TOY.format(1)!r}))  # one call is none that needs a list
""",
    )
    assert out == [[[102.0], [102.0]], [[2.0], [2.0]], [[3.0], [3.0]], [[4.0], [4.0]], [[102.0], [102.0]], [[1.0]] * 2]


def test_one_kernel_is_chosen_for_all_calls_of_a_list(python: Any, toy: Any) -> None:
    """That with the least work for all together, of those that compute each; the words name the call."""
    first = toy(
        "first", TOY_KEY=f'"{TOY.format(1)}"', TOY_VALUE="1.f", TOY_WORK="args->problem->tokens[0] == 4 ? 1 : 9"
    )
    second = toy("second", TOY_KEY=f'"{TOY.format(2)}"', TOY_VALUE="2.f", TOY_WORK="4")
    picky = toy(
        "picky",
        TOY_KEY=f'"{TOY.format(3)}"',
        TOY_VALUE="3.f",
        TOY_WORK="0",
        TOY_CODE="args->problem->tokens[0] == 4 ? GNAFORGE_OK : GNAFORGE_NO_OTHER",
    )
    out = run(
        python,
        f"""
core.load_library({str(picky)!r})
say(value())
core.load_library({str(first)!r})
say(value())
core.load_library({str(second)!r})
say(value())
say(value({TOY.format(3)!r}))
say(value({TOY.format(2)!r}, scale=0.5))
""",
    )
    assert "no kernel fits this problem" in out[0] and "and 1 more of a list" in out[0]
    assert "sample 1: " in out[0]
    assert out[1:3] == [[[1.0], [1.0]], [[2.0], [2.0]]]  # 1 + 9 are more than 4 + 4
    assert "was asked for and can't run this problem" in out[3] and "sample 1: " in out[3]
    assert f"kernel {TOY.format(2)} failed: the toy fails at scale 0.5" in out[4]
