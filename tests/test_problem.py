"""`Problem`: one constructor that broadcasts and refuses, what it needs of a kernel, and its four texts."""

from __future__ import annotations

import inspect
import json
import pickle
import re
import subprocess
import sys
from dataclasses import fields, replace
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

import gnaforge
import pytest
import torch
from gnaforge.runtime.problem import FEATURES, Problem, fields_of_pattern
from gnaforge.runtime.problem_rules import EDGES, SCALARS, ProblemError

PLAIN = Problem((30, 48, 80), (18, 24, 24), (16, 8, 8), heads=24, kv_heads=8, head_dim=72, value_head_dim=80, batch=2)
# One of each kind that plain GNA doesn't have, with the features that it needs.
BEYOND = (
    (Problem(9, 4, edge="cut"), ["edge"]),
    (Problem((9, 8), 4, edge=("shift", "wrap")), ["edge"]),
    (Problem(9, 20, edge="cut"), ["edge"]),
    (Problem(9, 4, 3, causal="block"), ["block_causal"]),
    (Problem((9, 8), (20, 3), 2, causal=("block", False)), ["block_causal"]),
    (Problem(9, 4, sink=2), ["sink"]),
    (Problem(4, 4, grid=12, q_offset=8, kv_tokens=7, kv_offset=5), ["range"]),
    (Problem(10, 20, kv_tokens=20), ["range"]),
    (Problem(4, 3, causal=True, grid=40, q_offset=36, kv_tokens=8, kv_offset=34, kv_sink=2, sink=2),
     ["sink", "range", "kv_sink"]),
    (Problem(9, 4, extra_tokens=(77, 5)), ["extra_keys"]),
)  # fmt: skip


def test_one_value_stands_for_all_dimensions() -> None:
    whole = Problem((9, 11), (4, 4), (2, 2), (2, 2), (True, True), edge=("cut", "cut"), sink=(0, 0), q_offset=(0, 0))
    assert Problem([9, 11], 4, 2, 2, True, edge="cut") == whole and hash(whole) == hash(
        Problem((9, 11), 4, 2, 2, True, edge="cut")
    )
    assert Problem(9, 4) == Problem((9,), (4,), causal=(False,), kv_tokens=9, grid=(9,), kv_heads=1, value_head_dim=128)
    assert Problem(9, 4, causal="token").causal == (True,)
    assert Problem(9, 4, heads=6).kv_heads == 6 and Problem(9, 4, head_dim=24).value_head_dim == 24


def test_plain_problems_are_those_that_gna_allows() -> None:
    for length, window, stride, dilation, causal in product(range(1, 8), range(9), range(5), range(4), (False, True)):
        allowed = 1 <= stride <= window and dilation >= 1 and window * dilation <= length
        try:
            problem = Problem((3, length), (1, window), (1, stride), (1, dilation), (False, causal))
        except ProblemError as error:
            assert not allowed and "dimension 1" in str(error)
            continue
        assert allowed and problem.features() == () and problem.axes[1] == (length, window, stride, dilation, causal)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"tokens": ()}, "tokens: () has 0 entries; one to three dimensions are possible"),
    ({"tokens": (2, 2, 2, 2)}, "tokens: (2, 2, 2, 2) has 4 entries; one to three dimensions are possible"),
    ({"tokens": (9, 0)}, "tokens: 0 is not a positive integer (dimension 1)"),
    ({"tokens": "99"}, "tokens: '99' is not a positive integer (dimension 0)"),
    ({"tokens": 2**30}, "tokens: 1073741824 is more than 1073741823 (dimension 0)"),
    ({"window": (7, 7)}, "window: (7, 7) has 2 entries for 1 dimension"),
    ({"window": True}, "window: True is not a positive integer (dimension 0)"),
    ({"window": 13}, "window: 13 is more than the 12 tokens of dimension 0; at most 12"),
    ({"window": 5, "dilation": 3}, "window: 5 with dilation 3 spans 15 tokens and is more than the 12 tokens of"),
    ({"dilation": 13}, "dilation: 13 is more than the 12 tokens of dimension 0; at most 12"),
    ({"stride": 5}, "stride: 5 is more than the window of dimension 0; at most 4"),
    ({"causal": 1}, "causal: 1 is not true or false, token or block"),
    ({"heads": 24, "kv_heads": 5}, "kv_heads: 5 does not divide heads; allowed: a divisor of heads, which is 24; did"),
    ({"heads": 0}, "heads: 0 is not a positive integer below 2^30"),
    ({"batch": 1.0}, "batch: 1.0 is not a positive integer below 2^30"),
    ({"head_dim": 2**30}, "head_dim: 1073741824 is not a positive integer below 2^30"),
    ({"dtype": "fp64"}, "dtype: 'fp64' is not one of fp32, bf16, fp16, e4m3"),
    ({"out_dtype": "fp16"}, "out_dtype: 'fp16' is no type of outputs of bf16; allowed: bf16"),
    ({"dtype": "e4m3", "out_dtype": "e4m3"}, "out_dtype: 'e4m3' is no type of outputs of e4m3; allowed: bf16, fp16"),
    ({"scale": float("nan")}, "scale: nan is not a finite number"),
    ({"edge": "mirror"}, "edge: 'mirror' is not one of shift, cut, wrap"),
    ({"edge": "wrap", "causal": True}, "causal: true along dimension 0, where edge is wrap; it must be false there"),
    ({"edge": "wrap", "sink": 1}, "sink: 1 along dimension 0, which wraps; it must be 0 there"),
    ({"edge": "wrap", "window": 2, "dilation": 5}, "dilation: 5 along dimension 0, which wraps; it must divide"),
    ({"sink": 2, "dilation": 2}, "sink: 2 along dimension 0, which has dilation; it must be 0 there"),
    ({"sink": -1}, "sink: -1 is not an integer from 0 to 1073741823"),
    ({"kv_tokens": 20}, "kv_tokens: 20 key tokens and 12 query tokens along dimension 0 are parts of a grid"),
    ({"grid": 40, "q_offset": 30}, "q_offset: 30 along dimension 0, and the 12 queries from there on end at 42"),
    ({"grid": 40, "kv_offset": 30}, "kv_offset: 30 along dimension 0, and the 12 keys from there on end at 42"),
    ({"kv_offset": 1.5}, "kv_offset: 1.5 is not an integer up to 1073741823"),
    ({"grid": 40, "kv_offset": -1}, "kv_offset: -1 along dimension 0; it must be at least 0 where edge is not wrap"),
    ({"grid": 40, "kv_sink": 13}, "kv_sink: 13 along dimension 0; it must be 0 to the 12 key tokens"),
    ({"grid": 40, "kv_sink": 4, "kv_offset": 3}, "kv_offset: 3 along dimension 0; it must be at least 4"),
    ({"grid": 14, "window": 14}, "kv_tokens: 12 along dimension 0, where every query sees all of the grid;"),
    ({"grid": 0}, "grid: 0 is not a positive integer"),
    ({"extra_tokens": (1, 2, 3)}, "extra_tokens: (1, 2, 3) has more than 2 entries"),
    ({"extra_tokens": (0,)}, "extra_tokens: 0 is not a positive integer"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "message"), WRONG)
def test_what_is_wrong_is_said_beginning_with_the_field(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as raised:
        Problem(**{"tokens": 12, "window": 4, **given})
    error = raised.value
    assert isinstance(error, ProblemError) and str(error).startswith(message)
    assert error.field == message.partition(":")[0] and str(pickle.loads(pickle.dumps(error))) == str(error)


@pytest.mark.parametrize(("problem", "needed"), BEYOND)
def test_what_a_problem_needs_of_a_kernel(problem: Problem, needed: list[str]) -> None:
    assert list(problem.features()) == needed
    problem.require_features(needed)
    for name in needed:
        with pytest.raises(ProblemError, match=f"that kernel doesn't have the feature {name}$"):
            problem.require_features(set(FEATURES) - {name}, "that kernel")
    with pytest.raises(ProblemError, match="doesn't have the feature"):
        problem.axes  # noqa: B018


@pytest.mark.parametrize("problem", [PLAIN, Problem(9, 4), *(problem for problem, _ in BEYOND)])
def test_the_operators_pattern_brings_a_problem_back(problem: Problem) -> None:
    further = {name: getattr(problem, name) for name in ("tokens", "kv_tokens", "extra_tokens", *SCALARS)}
    fields = fields_of_pattern(problem.pattern)
    assert Problem(**fields, **further, dtype=problem.dtype, scale=problem.scale) == problem
    is_plain = set(problem.features()) <= {"block_causal", "extra_keys"}
    assert len(problem.pattern) == problem.rank * (4 if is_plain else 10)


@pytest.mark.parametrize("pattern", [[], [3], [3, 1, 1], [3] * 11, [3, 1, 1, 4], [3, 1, 1, 0, 3, 0, 9, 0, 0, 0]])
def test_numbers_that_are_no_pattern(pattern: list[int]) -> None:
    with pytest.raises(ProblemError, match="pattern: "):
        fields_of_pattern(pattern)


def test_features_are_all_fields_beyond_plain_gna() -> None:
    assert {name for _, needed in BEYOND for name in needed} == set(FEATURES)
    assert all(edge == "shift" or Problem(9, 3, edge=edge).features() == ("edge",) for edge in EDGES)


@pytest.mark.parametrize("problem", [PLAIN, Problem(9, 4), *(problem for problem, _ in BEYOND)])
def test_json_brings_a_problem_back(problem: Problem) -> None:
    assert Problem.from_json(json.loads(json.dumps(problem.as_json()))) == problem
    assert pickle.loads(pickle.dumps(problem)) == problem and replace(problem, batch=3).batch == 3
    assert Problem.from_json({**problem.as_json(), "scale": 0.5}).scale == 0.5


def test_json_of_another_kind() -> None:
    with pytest.raises(ProblemError, match=r"^windows: is no field of a problem"):
        Problem.from_json({"tokens": 9, "window": 3, "windows": 3})
    with pytest.raises(ProblemError, match=r"^window: is required"):
        Problem.from_json({"tokens": 9})


def test_texts() -> None:
    assert str(PLAIN) == "30x48x80, window 18x24x24, stride 16x8x8, batch 2, 24 heads (8 of K, V)"
    assert str(Problem(9, 4, dilation=2, causal=True)) == "9, window 4, dilation 2, causal 1"
    assert (
        str(BEYOND[8][0]) == "4, window 3, causal 1, sink 2, grid 40, q offset 36, kv tokens 8, kv offset 34, kv sink 2"
    )
    assert str(BEYOND[9][0]) == "9, window 4, extra keys 77 and 5"
    assert PLAIN.options() == (
        "--tokens 30,48,80 --window 18,24,24 --stride 16,8,8 --heads 24 --kv-heads 8 --batch 2 --head-dim 72 "
        "--value-head-dim 80 --dtype bf16"
    )
    causal = Problem((9, 8), 3, causal=(True, False))
    assert causal.options().startswith("--tokens 9,8 --window 3,3 --causal 1,0 --head-dim")
    assert causal.register_arguments() == ["tokens=(9, 8)", "window=(3, 3)", "causal=(True, False)", "heads=1"]
    assert PLAIN.pattern == [18, 24, 24, 16, 8, 8, 1, 1, 1, 0, 0, 0]


NARROW = Problem(9, 4, dtype="e4m3", out_dtype="fp16")


@pytest.mark.parametrize("problem", [PLAIN, NARROW, Problem((9, 8), 4, causal=(True, False)), *(p for p, _ in BEYOND)])
def test_options_bring_a_problem_back(problem: Problem) -> None:
    words = problem.options().split()
    given = {word[2:].replace("-", "_"): value for word, value in zip(words[::2], words[1::2], strict=True)}
    numbers = {name: int(text) if name in SCALARS else text for name, text in given.items()}
    assert Problem.from_options(numbers) == problem


def test_words_of_options_that_mean_nothing() -> None:
    with pytest.raises(ProblemError, match=r"^causal: '1,blok' is not 0, 1 \(or token\) or block, once or per dim"):
        Problem.from_options({"tokens": "9,9", "window": "3", "causal": "1,blok"})
    with pytest.raises(ProblemError, match=r"^edge: 'warp' is not one of shift, cut, wrap"):
        Problem.from_options({"tokens": "9,9", "window": "3", "edge": "cut,warp"})
    with pytest.raises(ProblemError, match=r"^extra_tokens: \(1, 2, 3\) has more than 2 entries"):
        Problem.from_options({"tokens": "9,9", "window": "3", "extra_tokens": "1,2,3"})
    assert Problem.from_options({"tokens": "9", "window": "3", "extra_tokens": "77"}).extra_tokens == (77,)


def test_arguments_are_those_of_calls() -> None:
    """All fields but the tensors', and those of extra keys, which are tensors."""
    names = set(inspect.signature(gnaforge.neighborhood_attention).parameters)
    for problem, needed in BEYOND:
        if "extra_keys" in needed:
            with pytest.raises(ProblemError, match=r"^extra_tokens: a call without their tensors doesn't have"):
                problem.arguments()
            continue
        given = problem.arguments()
        assert given.keys() <= names
        fields = {"kernel_size": "window", "is_causal": "causal"}
        brought = {fields.get(name, name): value for name, value in given.items()}
        assert Problem(problem.tokens, kv_tokens=problem.kv_tokens, **brought) == problem


def test_register_arguments_are_fields() -> None:
    rng = Random(5)
    for _ in range(100):
        rank = rng.randint(1, 3)
        window = [rng.randint(1, 4) for _ in range(rank)]
        problem = Problem(
            [rng.randint(8, 20) for _ in range(rank)],
            window,
            [rng.randint(1, w) for w in window],
            rng.randint(1, 2),
            [rng.random() < 0.5 for _ in range(rank)],
            heads=rng.choice((2, 4)),
            kv_heads=rng.choice((1, 2)),
            batch=rng.randint(1, 2),
        )
        assert eval(f"Problem({', '.join(problem.register_arguments())})") == problem


@pytest.mark.parametrize("problem", [problem for problem, _ in BEYOND])
def test_register_arguments_say_every_setting(problem: Problem) -> None:
    """As register takes them: of one piece of extra keys the number alone."""
    given = eval(f"dict({', '.join(problem.register_arguments())})")
    assert Problem(**{**given, "extra_tokens": given.get("extra_tokens", ())}) == problem
    one = replace(problem, extra_tokens=(7,))
    assert one.register_arguments()[-2] == "extra_tokens=7"


def test_of_tensors() -> None:
    q, k = torch.empty(2, 9, 8, 4, 24, dtype=torch.float16), torch.empty(2, 9, 8, 2, 24, dtype=torch.float16)
    found = Problem.of_tensors(q, k, k[..., :16], (3, 4), causal=(True, False), scale=0.25)
    assert found == Problem(
        (9, 8), (3, 4), causal=(True, False), heads=4, kv_heads=2, head_dim=24, value_head_dim=16, batch=2,
        dtype="fp16", scale=0.25,
    )  # fmt: skip
    assert found.arguments() == {
        "kernel_size": (3, 4), "stride": (1, 1), "dilation": (1, 1), "is_causal": (True, False), "scale": 0.25,
    }  # fmt: skip
    with pytest.raises(ProblemError, match=r"^dtype: 'torch.float64' is not one of"):
        Problem.of_tensors(q.double(), k, k, 3)
    short = Problem.of_tensors(q[:, :2, :3], k, k, (9, 8))
    assert short.kv_tokens == (9, 8) and short.features() == ("range",)


def test_every_field_is_in_a_text_or_neutral() -> None:
    """A field that a printer forgets would be lost where a problem is written down."""
    said = set(Problem.from_json(BEYOND[8][0].as_json()).as_json()) | set(BEYOND[0][0].as_json())
    said |= set(replace(BEYOND[9][0], scale=0.5).as_json()) | set(Problem(9, 2, 2, 2).as_json())
    said |= set(Problem(9, 2, dtype="e4m3", out_dtype="fp16").as_json())
    assert said == {field.name for field in fields(Problem)}


def test_no_other_class_is_called_a_problem() -> None:
    """But for the contract's form of one."""
    root = Path(gnaforge.__file__).parent if gnaforge.__file__ else Path()
    found = [
        str(p.relative_to(root)) for p in root.rglob("*.py") if re.search(r"^class \w*Problem\b", p.read_text(), re.M)
    ]
    assert sorted(found) == ["build/abi.py", "runtime/problem.py"]


def test_the_standard_library_is_enough() -> None:
    code = "import sys, gnaforge.runtime.problem; print(sorted({'torch', 'numpy', 'pydantic'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
