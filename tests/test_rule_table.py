"""A case for each rule that no kernel can lift, in rules.h and in `problem_rules`, with what it says."""

from __future__ import annotations

import ast
import ctypes as c
import faulthandler
import os
import re
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from gnaforge.build import abi
from gnaforge.build.identity import include_dir
from gnaforge.runtime import problem as problem_module, problem_rules
from gnaforge.runtime.problem import Problem
from gnaforge.runtime.problem_rules import Dimension, dimension_faults
from test_problem import WRONG
from test_rules import as_of_a_problem, described

PLAIN = Dimension(12, 4, 2)
PLAIN_FIELDS = {"tokens": 12, "window": 4, "stride": 2}

# Of a dimension: fields, and what rules.h and `Problem` say.
AXES: list[tuple[dict[str, Any], str, str]] = [
    (
        {"window": 13, "stride": 1},
        "kernel_size 13 times dilation 1 exceeds the 12 tokens along dim 0; kernel_size must be at most 12 there",
        "window: 13 is more than the 12 tokens of dimension 0; at most 12",
    ),
    (
        {"window": 2, "tokens": 1},
        "kernel_size 2 times dilation 1 exceeds the 1 token along dim 0; kernel_size must be at most 1 there",
        "window: 2 is more than the 1 token of dimension 0; at most 1",
    ),
    (
        {"window": 5, "dilation": 3},
        "kernel_size 5 times dilation 3 exceeds the 12 tokens along dim 0; kernel_size must be at most 4 there",
        "window: 5 with dilation 3 spans 15 tokens and is more than the 12 tokens of dimension 0; at most 4",
    ),
    (
        {"dilation": 13},
        "kernel_size 4 times dilation 13 exceeds the 12 tokens along dim 0; dilation must be at most 12 there",
        "dilation: 13 is more than the 12 tokens of dimension 0; at most 12",
    ),
    (
        {"stride": 5},
        "stride is 5 along dim 0; it must be 1 to kernel_size (4)",
        "stride: 5 is more than the window of dimension 0; at most 4",
    ),
]

# The same of both, but for names.
AGREED: list[tuple[dict[str, Any], str]] = [
    (
        {"edge": "wrap", "dilation": 5, "window": 2},
        "dilation is 5 along dim 0, which wraps; it must divide the 12 tokens there",
    ),
    ({"edge": "wrap", "causal": True}, "is_causal is true along dim 0, where edge is wrap; it must be false there"),
    ({"edge": "wrap", "causal": "block"}, "is_causal is block along dim 0, where edge is wrap; it must be false there"),
    ({"edge": "wrap", "sink": 3}, "sink is 3 along dim 0, which wraps; it must be 0 there"),
    ({"sink": 3, "dilation": 2}, "sink is 3 along dim 0, which has dilation; it must be 0 there"),
    ({"grid": 20, "kv_sink": 13, "kv_offset": 13}, "kv_sink is 13 along dim 0; it must be 0 to the 12 key tokens"),
    (
        {"grid": 20, "kv_sink": 2, "kv_offset": 2, "dilation": 2},
        "kv_sink is 2 along dim 0, which has dilation; it must be 0 there",
    ),
    ({"edge": "wrap", "kv_sink": 2, "kv_offset": 2}, "kv_sink is 2 along dim 0, which wraps; it must be 0 there"),
    ({"grid": 40, "kv_offset": -1}, "kv_offset is -1 along dim 0; it must be at least 0 where edge is not wrap"),
    ({"grid": 40, "kv_sink": 4, "kv_offset": 3}, "kv_offset is 3 along dim 0; it must be at least 4, which is kv_sink"),
    (
        {"grid": 14, "kv_offset": 3},
        "kv_offset is 3 along dim 0, and the 12 keys from there on end at 15; they must end by 14, as the grid does",
    ),
    (
        {"grid": 14, "kv_offset": 14, "kv_tokens": 1},
        "kv_offset is 14 along dim 0, and the 1 key from there on end at 15; they must end by 14, as the grid does",
    ),
    (
        {"grid": 14, "q_offset": 3},
        "q_offset is 3 along dim 0, and the 12 queries from there on end at 15; they must end by 14, as the grid does",
    ),
    (
        {"grid": 14, "q_offset": 14, "tokens": 1, "kv_tokens": 14},
        "q_offset is 14 along dim 0, and the 1 query from there on end at 15; they must end by 14, as the grid does",
    ),
    (
        {"grid": 14, "window": 14},
        "key tokens are 12 along dim 0, where every query sees all of the grid; they must be its 14",
    ),
    (
        {"grid": 20, "q_offset": 4},
        (
            "queries 10 to 15 see keys 12 to 16 of the grid along dim 0, which the key tensor lacks: "
            "it has 12 keys from kv_offset (0) on, and queries see 3 to 16 in all"
        ),
    ),
    (
        {"grid": 40, "tokens": 1, "kv_tokens": 1, "q_offset": 20, "stride": 1, "window": 2, "kv_offset": 20},
        (
            "query 20 sees key 19 of the grid along dim 0, which the key tensor lacks: "
            "it has 1 key from kv_offset (20) on, and queries see 19 to 20 in all"
        ),
    ),
    (
        {"grid": 40, "sink": 3, "kv_offset": 1, "kv_tokens": 39},
        (
            "queries 0 to 11 see key 0 of the grid along dim 0, which the key tensor lacks: "
            "it has 39 keys from kv_offset (1) on, and queries see 0 to 12 and the first 3 (sink) in all"
        ),
    ),
    (
        {"grid": 40, "sink": 3, "kv_sink": 2, "tokens": 4, "q_offset": 20, "kv_offset": 19, "kv_tokens": 9},
        (
            "queries 20 to 23 see key 2 of the grid along dim 0, which the key tensor lacks: "
            "it has the first 2 (kv_sink) and 7 keys from kv_offset (19) on, "
            "and queries see 19 to 24 and the first 3 (sink) in all"
        ),
    ),
    (
        {"grid": 12, "edge": "wrap", "tokens": 2, "kv_tokens": 4, "kv_offset": -1, "stride": 1},
        (
            "query 0 sees key -2 of the grid along dim 0, which the key tensor lacks: "
            "it has 4 keys from kv_offset (-1) on, and queries see -2 to 2 in all"
        ),
    ),
]

Change = Callable[[abi.Args, abi.Problem], None]


def put(name: str, value: int) -> Change:
    """A number of the problem, or its first entry."""

    def change(args: abi.Args, problem: abi.Problem) -> None:
        if isinstance(getattr(problem, name), int):
            setattr(problem, name, value)
        else:
            getattr(problem, name)[0] = value

    return change


def role(name: str, **fields: Any) -> Change:
    """A tensor's fields; without any the tensor is missing, or of another role beside."""

    def change(args: abi.Args, problem: abi.Problem) -> None:
        place = abi.ROLES.index(name)
        if not fields and args.tensors[place]:
            args.tensors[place] = None
            return
        tensor = args.tensors[place].contents if args.tensors[place] else abi.Tensor(c.sizeof(abi.Tensor), 1, 256)
        for field, value in fields.items():
            setattr(tensor, field, value)
        args.tensors[place] = c.pointer(tensor)

    return change


def args(**fields: Any) -> Change:
    """Fields of the call itself."""
    return lambda args, problem: [setattr(args, name, value) for name, value in fields.items()] and None


def grown(args: abi.Args, problem: abi.Problem) -> None:
    """A tensor of a role that comes after all that are known, and no other."""
    held = (c.POINTER(abi.Tensor) * (len(abi.ROLES) + 1))()
    held[len(abi.ROLES)] = c.pointer(abi.Tensor(c.sizeof(abi.Tensor), 1, 256))
    args.tensors, args.roles = held, len(abi.ROLES) + 1


# What only a caller of the C contract can get wrong.
CALLS: list[tuple[Change, str]] = [
    (args(struct_size=8), "gnaforge_args is smaller than version 1.0's"),
    (args(problem=None), "gnaforge_problem is smaller than version 1.0's"),
    (args(host=c.pointer(abi.Host(8))), "gnaforge_host is smaller than version 1.0's"),
    (args(tensors=None), "there are 26 roles and no tensors"),
    (grown, "there is a tensor of role 26, which this version doesn't know"),
    (role("k", struct_size=8), "gnaforge_tensor of key is smaller than version 1.0's"),
    (args(op=77), "op 77 is unknown to this version"),
    (put("sink", 3), "the problem needs sink, which features don't announce"),
    (put("extra_tokens", 3), "the problem needs extra_keys, which features don't announce"),
    (args(accumulate=1 << 7), "the call needs accumulate, which features don't announce"),
    (args(accumulate=8, features=1 << 8), "accumulate holds 0x8, which are no gradients that gna_forward writes"),
    (role("v"), "value is missing, which gna_forward needs"),
    (role("extra_k", dtype=1), "extra_key is there, which gna_forward doesn't take"),
    (put("rank", 4), "rank is 4; it must be 1 to 3"),
    (put("batch", -1), "batch is -1, heads is 2, kv_heads is 2; none may be negative"),
    (put("kv_heads", 3), "2 query heads can't be shared among 3 key/value heads; it must divide evenly"),
    (put("head_dim", -8), "head_dim is -8, value_head_dim is 8; neither may be negative"),
    (put("extra_tokens", -3), "extra_tokens is -3 in piece 0; it must be at least 0"),
    (put("tokens", -1), "query tokens are -1 along dim 0; they must be at least 0"),
    (put("kv_tokens", -1), "key tokens are -1 along dim 0; they must be at least 0"),
    (put("grid", -1), "grid is -1 along dim 0; it must be at least 0"),
    (put("window", 0), "kernel_size is 0 along dim 0; it must be at least 1"),
    (put("stride", 0), "stride is 0 along dim 0; it must be 1 to kernel_size (4)"),
    (put("dilation", 0), "dilation is 0 along dim 0; it must be at least 1"),
    (put("causal", 3), "is_causal is 3 along dim 0; it must be 0, 1 or 2"),
    (put("edge", 3), "edge is 3 along dim 0; it must be 0, 1 or 2"),
    (put("sink", -1), "sink is -1 along dim 0; it must be at least 0"),
    (put("q_offset", -1), "q_offset is -1 along dim 0; it must be at least 0"),
    (put("kv_sink", -1), "kv_sink is -1 along dim 0; it must be 0 to the 12 key tokens"),
    (put("q_offset", 2**41), "q_offset: 2199023255552 along dim 0 is too large for a range; at most 2^40"),
    (role("k", dtype=99), "key is of unknown dtype 99"),
    (role("lse", dtype=2), "log_sum_exp is bf16, it must be fp32"),
    (role("q", data=258), "query is not aligned to its elements of 4 bytes"),
    (role("q", batch_stride=2**62), "query is too large: its sizes and strides reach beyond 64 bits"),
    (role("out", head_stride=0), "out has a stride of 0, so its elements overlap"),
]


def legal_call() -> tuple[abi.Args, abi.Problem]:
    problem = described(PLAIN, batch=3, kv_heads=2)
    tensors = {
        name: abi.Tensor(c.sizeof(abi.Tensor), 1, 256, 4096, abi.I64x3(64, 0, 0), 8) for name in abi.ROLES[:5]
    }  # fp32: q, k, v, out, lse
    return abi.make_args("gna_forward", problem, tensors, abi.Host(c.sizeof(abi.Host), 1)), problem


@pytest.fixture(scope="module")
def rules(compile_library: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> c.CDLL:
    """rules.h in which any one rule can be left out: by its number, from the first on."""
    text, number = (include_dir() / "gnaforge" / "rules.h").read_text(), iter(range(1000))
    refusal = "return reason.refuse("
    for part in text.split(refusal)[1:]:
        skips = f"return skipped == {next(number)} ? GNAFORGE_OK : reason.refuse("
        text = text.replace(refusal + part, skips + part, 1)
    flag = 'extern "C" {\n[[gnu::visibility("default")]] inline int skipped = -1;\n}\n\nnamespace gnaforge {'
    folder = tmp_path_factory.mktemp("rules") / "gnaforge"
    folder.mkdir()
    (folder / "rules.h").write_text(text.replace("namespace gnaforge {", flag, 1))
    library = c.CDLL(str(compile_library("rules.cpp", "rule_table", "-O0", f"-I{folder.parent}")))
    library.check_call.argtypes = [c.POINTER(abi.Args), c.c_char_p, c.c_size_t]
    library.check_problem.argtypes = [c.POINTER(abi.Problem), c.c_char_p, c.c_size_t]
    return library


def said_of_axis(rules: c.CDLL, fields: dict[str, Any]) -> str:
    text = c.create_string_buffer(512)
    rules.check_problem(described(PLAIN._replace(**fields)), text, len(text))
    return text.value.decode()


def said_of_call(rules: c.CDLL, change: Change) -> str:
    call, problem = legal_call()
    text = c.create_string_buffer(512)
    assert rules.check_call(call, text, len(text)) in (0, None), text.value
    change(call, problem)
    rules.check_call(call, text, len(text))
    return text.value.decode()


def wrong_cases(rules: c.CDLL) -> list[str]:
    """Those of which rules.h says something else."""
    wrong = [text for fields, text, _ in AXES if said_of_axis(rules, fields) != text]
    wrong += [text for fields, text in AGREED if said_of_axis(rules, fields) != text]
    return wrong + [text for change, text in CALLS if said_of_call(rules, change) != text]


def test_every_rule_of_the_contract_has_a_case_and_is_needed(rules: c.CDLL) -> None:
    assert wrong_cases(rules) == []
    skipped = c.c_int.in_dll(rules, "skipped")

    def passes() -> None:
        faulthandler.disable()
        os._exit(bool(wrong_cases(rules)))

    count = (include_dir() / "gnaforge" / "rules.h").read_text().count("return reason.refuse(")
    for number in range(count):
        skipped.value = number
        child = get_context("fork").Process(target=passes)  # without a rule of structs it crashes
        child.start()
        child.join()
        assert child.exitcode != 0, f"no case for the refusal number {number} of rules.h"
    skipped.value = -1
    assert count > 40


def test_refusals_of_a_dimension_name_it_the_field_the_value_and_what_is_allowed() -> None:
    texts = [text for _, text, _ in AXES] + [text for _, text in AGREED]
    for text in (*texts, *(text for _, text in CALLS if " dim " in text)):
        assert re.search(r"dim 0\b", text) and re.search(r"\d", text), text
        assert re.search(r"must|at most|in all$", text), text
        assert not re.search(r"\b1 (tokens|keys|queries)\b", text), text


def test_problems_say_the_same() -> None:
    for fields, _, text in AXES:
        (fault,) = dimension_faults(PLAIN._replace(**fields), 0)
        assert f"{fault.field}: {fault.text}" == text
    for fields, text in AGREED:
        faults = [f"{fault.field}: {fault.text}" for fault in dimension_faults(PLAIN._replace(**fields), 0)]
        assert as_of_a_problem(text) in faults, (fields, faults)


class WithoutOne(ast.NodeTransformer):
    """Leaves out one fault that is yielded, or one error that is raised."""

    def __init__(self, number: int) -> None:
        self.number, self.met = number, 0

    def _leave_out(self, node: ast.stmt) -> ast.stmt:
        self.met += 1
        return ast.copy_location(ast.Pass(), node) if self.met - 1 == self.number else node

    def visit_Expr(self, node: ast.Expr) -> ast.stmt:
        value = node.value
        said = value.value if isinstance(value, ast.Yield) else value
        names = [ast.unparse(part.func) for part in ast.walk(said) if isinstance(part, ast.Call)] if said else []
        return self._leave_out(node) if "Fault" in names else node

    def visit_Raise(self, node: ast.Raise) -> ast.stmt:
        return self._leave_out(node)


def problem_cases() -> list[tuple[dict[str, Any], str]]:
    """Fields of a problem, and how the error about them begins."""
    cases = [({**PLAIN_FIELDS, **fields}, text) for fields, _, text in AXES]
    cases += [({**PLAIN_FIELDS, **fields}, as_of_a_problem(text)) for fields, text in AGREED]
    return cases + [({"tokens": 12, "window": 4, **given}, text) for given, text in WRONG]


def wrong_problems() -> list[str]:
    """Those cases of which `Problem` says something else."""
    wrong = []
    for given, text in problem_cases():
        try:
            Problem(**given)
        except Exception as error:  # whatever comes where a rule is left out
            if str(error).startswith(text):
                continue
        wrong.append(text)
    return wrong


def test_every_rule_of_problems_has_a_case_and_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert wrong_problems() == []
    source, number = Path(str(problem_rules.__file__)).read_text(), 0
    while True:
        without = WithoutOne(number)
        changed = without.visit(ast.parse(source))
        if number == without.met:
            break
        module = ModuleType("gnaforge.runtime.problem_rules")
        module.__package__ = "gnaforge.runtime"
        exec(compile(changed, "problem_rules.py", "exec"), module.__dict__)
        for name in ("require_types", "dimension_faults", "head_faults"):
            monkeypatch.setattr(problem_module, name, getattr(module, name))
        assert wrong_problems(), f"no case for rule {number} of problem_rules.py"
        monkeypatch.undo()
        number += 1
    assert number > 25
