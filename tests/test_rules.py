"""The rules that no kernel can lift: of the C++ header, beside those of `Problem` and a search query by query."""

from __future__ import annotations

import ctypes as c
import re
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
from gnaforge.build import abi
from gnaforge.runtime.problem import Problem
from gnaforge.runtime.problem_rules import Dimension, ProblemError, dimension_faults

Check = Callable[[abi.Problem], str]


@pytest.fixture(scope="module")
def rules(compile_library: Callable[..., Path]) -> c.CDLL:
    library = c.CDLL(str(compile_library("rules.cpp", "rules", "-O1")))
    library.check_problem.argtypes = [c.POINTER(abi.Problem), c.c_char_p, c.c_size_t]
    library.needed_features.argtypes = [c.POINTER(abi.Problem)]
    library.needed_features.restype = c.c_uint64
    return library


def described(axis: Dimension, **others: int) -> abi.Problem:
    """The contract's form of a problem of one dimension."""
    fields = {"batch": 1, "heads": 2, "kv_heads": 1, "head_dim": 8, "value_head_dim": 8, "scale": 1.0, **others}
    problem = abi.Problem(c.sizeof(abi.Problem), 1, **fields)
    numbers = {
        **axis._asdict(),
        "causal": abi.CAUSAL[{False: "none", True: "token"}.get(axis.causal, axis.causal)],
        "edge": abi.EDGES[axis.edge],
        "grid": axis.length,
        "kv_tokens": axis.keys,
    }
    for name, value in numbers.items():
        getattr(problem, name)[0] = value
    return problem


def refusal(rules: c.CDLL, problem: abi.Problem) -> str:
    text = c.create_string_buffer(512)
    code = rules.check_problem(problem, text, len(text))
    assert (code == 0) == (text.value == b"") and code in (0, abi.CODES.index("bad_input"))
    return text.value.decode()


def seen_by(axis: Dimension, query: int) -> set[int]:
    """Positions in the grid that a query sees; where it wraps, before they are taken modulo its length."""
    if axis.dense:
        return set(range(axis.length))
    group, i = query % axis.dilation, query // axis.dilation
    length = len(range(group, axis.length, axis.dilation))
    shared = [j for j in range(i - axis.stride + 1, i + axis.stride) if j // axis.stride == i // axis.stride]
    if axis.causal:
        leader = max(j for j in shared if j < length) if axis.causal is True else shared[-1]
        keys = set(range(leader - axis.window + 1, leader + 1))
        keys = {j for j in keys if 0 <= j < length and (axis.causal == "block" or j <= i)}
    else:
        leader = shared[axis.stride // 2]
        keys = set(range(leader - axis.window // 2, leader - axis.window // 2 + axis.window))
        if axis.edge == "cut":
            keys = {j for j in keys if 0 <= j < length}
        while axis.edge == "shift" and min(keys) < 0:
            keys = {j + 1 for j in keys}
        while axis.edge == "shift" and max(keys) >= length:
            keys = {j - 1 for j in keys}
    keys |= {j for j in range(min(axis.sink, length)) if not axis.causal or j <= max(keys)}
    return {group + axis.dilation * j for j in keys}


def all_there(axis: Dimension) -> bool:
    """Whether every key that a query sees is in the key tensor."""
    stored = {*range(axis.kv_sink), *range(axis.kv_offset, axis.kv_offset + axis.keys - axis.kv_sink)}
    if axis.dense or (axis.edge == "wrap" and axis.kv_offset == 0 and axis.keys == axis.length):
        return True
    return all(seen_by(axis, axis.q_offset + q) <= stored for q in range(axis.tokens))


def random_axis(rng: Random) -> Dimension:
    """Mostly right; where it has ranges, its keys are about those that its queries see."""
    length = rng.randrange(1, 40)
    edge, causal = rng.choice((("shift", False), ("cut", False), ("wrap", False), ("shift", True), ("cut", "block")))
    dilation = rng.choice((1, 1, 1, 2, 3))
    window = rng.randrange(1, max(2, length // dilation + (3 if rng.random() < 0.3 else 1)))
    stride = rng.randrange(1, min(window, 6) + 1)
    sink = rng.choice((0, 0, 1, 3)) if edge != "wrap" and dilation == 1 else 0
    plain = Dimension(length, window, stride, dilation, causal, edge, sink)
    if rng.random() < 0.2:
        return plain
    first = rng.randrange(length)
    tokens = rng.randrange(1, length - first + 1)
    part = plain._replace(tokens=tokens, q_offset=first, grid=length)
    try:
        keys = set().union(*(seen_by(part, first + q) for q in range(tokens)))
    except ValueError:  # no such window
        return part
    head = sink if sink and rng.random() < 0.5 else rng.random() < 0.05
    body = {key for key in keys if key >= head} or {head}
    begin = min(body) + rng.choice((0, 0, 0, -1, -2, 1))
    end = max(body) + 1 + rng.choice((0, 0, 0, 1, 2, -1))
    return part._replace(kv_offset=begin, kv_tokens=max(1, end - begin + int(head)), kv_sink=int(head))


def kept(axis: Dimension) -> bool:
    """Whether `Problem` takes it."""
    try:
        values = {**axis._asdict(), "grid": axis.grid if axis.grid is None else (axis.grid,)}
        Problem(**{name: value if isinstance(value, tuple | None) else (value,) for name, value in values.items()})
    except ProblemError:
        return False
    return True


FIELDS = {"kernel_size": "window", "is_causal": "causal", "key tokens": "kv_tokens"}


def as_of_a_problem(text: str) -> str:
    """A sentence of rules.h in the words of `Problem`: these begin with the field."""
    text = text.replace(" dim ", " dimension ")
    if re.match("quer(y|ies) ", text):
        return f"kv_offset: {text}"
    name = re.match("([a-z_ ]+) (?:is|are) ", text)
    return f"{FIELDS.get(name[1], name[1])}: {text[name.end() :]}" if name else text


def check_missing(axis: Dimension, reason: str) -> None:
    """The sentence about missing keys, beside a search query by query."""
    found = re.match(r"quer(?:y|ies) (\d+)(?: to (\d+))? sees? keys? (-?\d+)(?: to (-?\d+))? of the grid", reason)
    assert found, (axis, reason)
    first, last, low, high = (int(found[i] or found[i - 1]) for i in (1, 2, 3, 4))
    stored = {*range(axis.kv_sink), *range(axis.kv_offset, axis.kv_offset + axis.keys - axis.kv_sink)}
    lost = {axis.q_offset + q: seen_by(axis, axis.q_offset + q) - stored for q in range(axis.tokens)}
    who = [query for query, keys in lost.items() if keys & {*range(low, high + 1)}]
    assert (min(who), max(who)) == (first, last), (axis, reason)
    missing = set().union(*lost.values())
    assert {low, high} <= missing and not {*range(low, high + 1)} & stored, (axis, reason)


def test_random_axes_are_judged_as_problems_and_as_a_search_for_their_keys(rules: c.CDLL) -> None:
    """In the same words."""
    rng = Random(0)
    taken = missing = refused = 0
    for _ in range(20_000):
        axis = random_axis(rng)
        reason = refusal(rules, described(axis))
        faults = [*dimension_faults(axis, 0)]
        assert bool(reason) == bool(faults) == (not kept(axis)), (axis, reason, faults)
        assert not re.search(r"\b1 (tokens|keys|queries|key tokens)\b", f"{reason} {faults}"), (axis, reason, faults)
        if not faults:
            assert all_there(axis), axis
            taken += 1
        elif "lacks" in reason:
            check_missing(axis, reason)
            assert as_of_a_problem(reason) == f"{faults[0].field}: {faults[0].text}", axis
            missing += 1
        else:
            same = [fault for fault in faults if fault.field not in ("window", "stride") and "more" not in fault.text]
            if len(faults) == len(same) == 1:
                assert as_of_a_problem(reason) == f"{same[0].field}: {same[0].text}", axis
            refused += 1
    assert min(taken, missing, refused) > 1000, (taken, missing, refused)


def test_features_follow_from_the_numbers_as_for_problems(rules: c.CDLL) -> None:
    rng = Random(1)
    for _ in range(5000):
        axis = random_axis(rng)
        if not kept(axis):
            continue
        values = {name: None if value is None else (value,) for name, value in axis._asdict().items()}
        bits = rules.needed_features(described(axis))
        names = tuple(name for bit, name in enumerate(abi.FEATURES) if bits >> bit & 1)
        assert names == Problem(**values).features(), axis


EXTREMES = """
import ctypes as c, itertools
from gnaforge.build import abi
from gnaforge.runtime.problem_rules import Dimension
from test_rules import described
library = c.CDLL({path!r})
numbers = [sign * 2**power - less for power in (0, 30, 40, 62, 63) for sign in (1, -1) for less in (0, 1)]
fields = "tokens window stride dilation causal edge sink grid q_offset kv_tokens kv_offset kv_sink".split()
scalars = "rank batch heads kv_heads head_dim value_head_dim".split()
for edge, causal in itertools.product(abi.EDGES, range(3)):
    for field, value in itertools.product(fields + scalars, [0, *(n for n in numbers if -(2**63) <= n < 2**63)]):
        problem = described(Dimension(32, 5, 2, 1, False, edge, grid=64, kv_tokens=64))
        problem.causal[0] = causal
        if field in scalars:
            setattr(problem, field, c.c_int32(value).value if field == "rank" else value)
        else:
            getattr(problem, field)[0] = value
        print(edge, causal, field, value, flush=True)
        library.check_problem(c.byref(problem), c.create_string_buffer(512), c.c_size_t(512))
"""


def test_no_number_is_too_large_to_be_judged(python, compile_library: Callable[..., Path]) -> None:
    traps = ("-fsanitize=undefined", "-fsanitize-undefined-trap-on-error")  # an overflow ends the process
    library = compile_library("rules.cpp", "rules_traps", "-O1", *traps)
    done = python(EXTREMES.format(path=str(library)), PYTHONPATH=str(Path(__file__).parent))
    assert done.returncode == 0, [*done.stdout.splitlines()[-1:], done.stderr]
    assert len(done.stdout.splitlines()) > 3000
