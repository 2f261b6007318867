"""What the core makes of a call: which kernels it asks, what it checks and how often, the codes of its errors."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from gnaforge.build import abi
from kernel_set import cpu_config

pytestmark = pytest.mark.usefixtures("no_kernels")

FORWARD = "gna_forward-cpu-r2-fp32-d8-q{}x8-kv8x8"
PREAMBLE = """
import ctypes, json, sys, threading, torch, gnaforge
from pathlib import Path
from gnaforge.runtime import core
x = torch.zeros(1, 8, 8, 2, 8)
def message(call):
    try:
        return call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
def failure(call):
    try:
        call()
    except RuntimeError as error:
        return core.failure_of(error)
def say(*values):
    for value in values:
        print(json.dumps(value))
"""


def run(process: Callable[..., object], code: str, **environment: str) -> list[object]:
    done = process(PREAMBLE + code, **environment)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


# ops


@pytest.mark.parametrize("op", [*list(abi.OPS)[1:], "gna_unknown"])
def test_a_kernel_of_another_op_never_runs(forked, toy, op: str) -> None:
    key = FORWARD.format(1).replace("gna_forward", op)
    path = toy(op, TOY_KEY=f'"{key}"', TOY_OP=abi.OPS.get(op, 99))
    out = run(
        forked,
        f"""
say(core.load_library({str(path)!r}))
say(message(lambda: gnaforge.na2d(x, x, x, 3)))
if {op!r} != "gna_unknown":  # whose key is none of this version's
    say(message(lambda: gnaforge.na2d(x, x, x, 3, kernel={key!r})))
    say(message(lambda: gnaforge.na2d(x, x, x, 3, q_tile_shape=(1, 8), kv_tile_shape=(8, 8))))
    say(message(lambda: gnaforge.na2d(x, x, x, 3, q_tile_shape=(1, 8))))
operator = torch.ops.gnaforge.forward.default
found = failure(lambda: operator(x, x, x, [3, 3, 1, 1, 1, 1, 0, 0], None, {key!r}))
say([kernel.key for kernel in gnaforge.kernels()])
say(found.code.name, found.text)
""",
    )
    assert out[-3] == ([key] if op in abi.OPS else [])  # nobody can ask for one whose key means nothing
    assert out[0] == 1
    assert "NoKernelError: gnaforge: no kernel fits this problem" in out[1] and "no kernel is loaded" in out[1]
    assert out[-2] == "REFUSED" and out[-1].endswith("doesn't compute gna_forward")
    if op != "gna_unknown":
        assert "NoKernelError" in out[2] and "doesn't compute gna_forward" in out[2]
        assert all("there are: none" in text for text in out[3:5])


def test_a_kernel_whose_key_names_another_op_is_not_loaded(forked, toy) -> None:
    path = toy("two_ops", TOY_KEY=f'"{FORWARD.format(1)}"', TOY_OP="GNAFORGE_GNA_BACKWARD_Q")
    (text,) = run(forked, f"say(message(lambda: core.load_library({str(path)!r})))")
    assert text.startswith("LibraryError: ") and "says that it computes gna_backward_q, which its key doesn't" in text


# features

PLAIN = [3, 3, 1, 1, 1, 1, 0, 0]
NEUTRAL = [0, 0, 0, 0, 8, 8, 0, 0, 0, 0, 0, 0]  # edge, sink, grid, q_offset, kv_offset, kv_sink


def changed(position: int, value: int) -> list[int]:
    numbers = [*PLAIN, *NEUTRAL]
    numbers[position] = value
    return numbers


def test_the_feature_that_is_missing_is_named_and_a_kernel_that_has_it_is_chosen(forked, toy) -> None:
    plain = toy("plain", TOY_KEY=f'"{FORWARD.format(1)}"', TOY_VALUE="1.f")
    able = {
        name: str(
            toy(
                f"has_{name}",
                TOY_KEY=f'"{FORWARD.format(2 + number)}"',
                TOY_VALUE=f"{2 + number}.f",
                TOY_WORK="3.0",
                TOY_FEATURES=f"GNAFORGE_FEATURE_{name.upper()}",
            )
        )
        for number, name in enumerate(("edge", "block_causal", "sink", "range", "kv_sink", "extra_keys"))
    }
    out = run(
        forked,
        f"""
core.load_library({str(plain)!r})
operator = torch.ops.gnaforge.forward
n = x.new_zeros(1, 5, 8, 2, 8)  # the first 5 of 8 tokens
e, lengths = torch.zeros(1, 3, 2, 8), torch.zeros(1, dtype=torch.int32)
whole, neutral = {PLAIN!r}, {NEUTRAL!r}
calls = {{
    "edge": lambda: operator(x, x, x, {changed(8, 1)}),
    "block_causal": lambda: operator(x, x, x, {changed(6, 2)}),
    "sink": lambda: operator(x, x, x, {changed(10, 2)}),
    "range": lambda: operator(n, x, x, whole + neutral),
    "kv_sink": lambda: operator(x, x, x, {[*PLAIN, *NEUTRAL[:8], 2, 0, 2, 0]}),
    "extra_keys": lambda: operator(x, x, x, whole, extra_k=e, extra_v=e, extra_lengths=lengths),
}}
call = lambda name: message(lambda: calls[name]()[0].max().item())
say(message(lambda: operator(x, x, x, whole)[0].max().item()))
say(message(lambda: operator(x, x, x, whole + neutral)[0].max().item()))
for name, path in {able!r}.items():
    say(call(name))
    core.load_library(path)
    say(call(name))
say(message(lambda: operator(x, x, x, whole)[0].max().item()))
say([kernel.features for kernel in gnaforge.kernels()])
""",
    )
    assert sorted(out.pop()) == sorted([[], *([name] for name in able)])
    assert out[:2] == [1.0, 1.0] and out[-1] == 1.0
    for number, name in enumerate(able):
        if name != "kv_sink":  # which comes with an offset, and so with a range
            assert f"{FORWARD.format(1)}: doesn't have the feature {name}" in out[2 + 2 * number], name
            assert f", with {name}, on cpu" in out[2 + 2 * number]
            assert out[3 + 2 * number] == 2.0 + number
    assert "doesn't have the feature range" in out[10]
    assert "with range, with kv_sink" in out[10] and "doesn't have the feature kv_sink" in out[11]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("x, x, x, [3] * 7", "pattern must hold window, stride, dilation and causal of 1 to 3 dimensions"),
        ("x, x, x, []", "got 0 numbers"),
        ("x, x, x, [3, 1, 1, 0]", "query must be [batch, 1 token dims, heads, head_dim], got shape [1, 8, 8, 2, 8]"),
        ("x, x[:, :5], x[:, :5], plain", "batch and token dims must agree"),
        ("x, x[:, :5], x, long", "value has shape [1, 8, 8, 2, 8], key has [1, 5, 8, 2, 8]"),
        ("x, x, x, [*plain, 3, *long[9:]]", "edge is 3 along dim 0"),
        ("x, x, x, [*plain[:6], 3, 0]", "is_causal is 3 along dim 0"),
        (
            "x[:, :5], x, x, [*long[:14], 4, 0, 0, 0, 0, 0]",
            "query tokens reach up to 9 along dim 0, beyond the grid's 8",
        ),
        ("x, x[:, :5], x[:, :5], long", "queries see the keys 0 to 7 along dim 0, which are not all there"),
        ("x[0:0], x[0:0], x[0:0], [9, 9, 1, 1, 1, 1, 0, 0]", "kernel_size 9 times dilation 1 exceeds the 8 tokens"),
        ("x, x, x, plain, None, '', x", "extra_k and extra_v come together"),
        ("x, x, x, plain, None, '', x, x", "extra_k has shape [1, 8, 8, 2, 8], which doesn't fit"),
        (
            "x, x, x, plain, None, '', x[:, 0], x[:, 0].half()",
            "query is float32, extra_v is float16",
        ),
        ("x, x, x, plain, None, '', x[:, 0], x[:, 0], torch.ones(1)", "extra_lengths must be int32"),
    ],
    ids=lambda value: value if " must " in value or " is " in value else "",
)
def test_bad_operator_calls(forked, arguments: str, expected: str) -> None:
    code = f"""
plain, long = {PLAIN!r}, {[*PLAIN, *NEUTRAL]!r}
core.core()
found = failure(lambda: torch.ops.gnaforge.forward({arguments}))
say(found.code.name, found.reason, found.text)
"""
    name, reason, text = run(forked, code)
    assert name == "BAD_INPUT" and expected in reason and text == f"gnaforge: {reason}"


def test_the_pattern_of_an_empty_batch_is_checked_too(forked) -> None:
    code = """
empty = x[0:0]
for arguments in ((500,), (0,), (3, 4), (3, 1, 9)):
    say(message(lambda: gnaforge.na2d(empty, empty, empty, *arguments)))
say(gnaforge.na2d(empty, empty, empty, 3).shape[0], gnaforge.na2d(x[:, :0], x[:, :0], x[:, :0], 3).shape[1])
"""
    *refused, batch, tokens = run(forked, code)
    assert all(text.startswith("ValueError: ") for text in refused) and (batch, tokens) == (0, 0)


# codes


def test_errors_have_codes_and_keep_their_words(forked, toy) -> None:
    fits = toy("codes", TOY_KEY=f'"{FORWARD.format(1)}"')
    layout = toy("codes_layout", TOY_KEY=f'"{FORWARD.format(2)}"', TOY_CODE="GNAFORGE_NO_LAYOUT")
    out = run(
        forked,
        f"""
core.core()
operator, plain = torch.ops.gnaforge.forward, {PLAIN!r}
def said(*arguments):
    say(failure(lambda: operator(*arguments)))
first, second = {FORWARD.format(1)!r}, {FORWARD.format(2)!r}
said(x, x, x, plain)
said(x, x, x, plain, None, first)
core.load_library({str(layout)!r})
said(x, x, x, plain)
said(x, x, x, plain, None, second)
core.load_library({str(fits)!r})
y = x[..., :4]
said(y, y, y, plain)
said(y, y, y, plain, None, first)
said(x, x, x, plain, 0.5)
said(x, x, x, plain, 0.25)
said(x, x, x, [9, *plain[1:]])
say(core.failure_of(RuntimeError("somebody else's")))
# The text alone is not enough: the error is the thread's own.
error = []
def elsewhere():
    try:
        operator(x, x, x, [9, *plain[1:]])
    except RuntimeError as raised:
        error.append(raised)
thread = threading.Thread(target=elsewhere); thread.start(); thread.join()
operator(x, x, x, plain)
said(x, x, x, plain, 0.5)
say(core.failure_of(error[0]))
try:
    gnaforge.na2d(x.requires_grad_(), x, x, 3).sum().backward()
except RuntimeError as raised:
    say(core.failure_of(raised))
""",
    )
    codes = [core[0] for core in out]
    assert codes == [64, 65, 11, 11, 64, 66, 14, 15, 2, 0, 14, 0, 0]
    none, missing, *_ = out
    assert none[3] == none[2] + "\nregister one with: " + none[3].partition("register one with: ")[2]
    assert none[2].endswith("\n  no kernel is loaded") and none[2] == f"gnaforge: {none[1]}"
    assert missing[1] == f"no kernel {FORWARD.format(1)} is loaded or in the cache"
    assert missing[3].endswith(f'register it with: gnaforge.register("{FORWARD.format(1)}")')
    assert "the toy needs 5 bytes at scale 0.25" in out[7][1]


# checks


@pytest.fixture(scope="module")
def counting(compile_core, compile_kernel) -> tuple[str, list[str]]:
    """A core and three kernels that count how often they apply the rules."""
    define = "-DGNAFORGE_COUNT_CHECKS"
    configs = [cpu_config(1, "fp32", (size,), (8,)) for size in (8, 16, 24)]
    kernels = [str(compile_kernel(config, f"counting_{i}", define)) for i, config in enumerate(configs)]
    return str(compile_core("counting_core", define)), kernels


def test_a_call_is_checked_once_when_it_is_new_and_never_again(python, counting) -> None:
    core, kernels = counting
    out = run(
        python,
        f"""
core.set_core_files(lambda: [Path({core!r})])
for path in {kernels!r}:
    core.load_library(path)
libraries = [ctypes.CDLL(path) for path in ({core!r}, *{kernels!r})]
counters = {{ctypes.addressof(c): c for c in (ctypes.c_int64.in_dll(l, "gnaforge_rule_checks") for l in libraries)}}
checks = lambda: sum(counter.value for counter in counters.values())
for tokens in (16, 24, 32):
    y = torch.randn(1, tokens, 2, 8)
    before = checks()
    gnaforge.na1d(y, y, y, 5)
    cold = checks() - before
    for _ in range(100):
        gnaforge.na1d(y, y, y, 5)
    say([cold, checks() - before])
""",
    )
    assert out == [[1, 1]] * 3


LEAK = """
class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in
                ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keep")]
info = ctypes.CDLL(None).mallinfo2
info.restype = Info
used = lambda: info().uordblks + info().hblkhd
torch.set_num_threads(1)
"""


def test_calls_leave_no_memory_behind(python, toy) -> None:
    """48 bytes a call did, of the key: torch's own conversion of a schema's `str` forgets it."""
    key = FORWARD.format(1)
    path = toy("leak", TOY_KEY=f'"{key}"')
    out = run(
        python,
        LEAK
        + f"""
core.load_library({str(path)!r})
operator = torch.ops.gnaforge.forward
calls = {{
    "na2d": lambda: gnaforge.na2d(x, x, x, 3),
    "kernel=": lambda: gnaforge.na2d(x, x, x, 3, kernel={key!r}),
    "tiles": lambda: gnaforge.na2d(x, x, x, 3, q_tile_shape=(1, 8)),
    "operator": lambda: operator(x, x, x, {PLAIN!r}, 0.7, {key!r}),
    "bad input": lambda: failure(lambda: operator(x, x, x, {[9, *PLAIN[1:]]!r}, None, {key!r})),
    "failed": lambda: failure(lambda: operator(x, x, x, {PLAIN!r}, 0.5)),
}}
for name, call in calls.items():
    for _ in range(300):
        call()
    before = used()
    for _ in range(20000):
        call()
    say([name, (used() - before) / 20000])
""",
    )
    assert all(per_call < 1 for _, per_call in out), out
    assert len(out) == 6
