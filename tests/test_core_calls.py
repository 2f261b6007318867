"""The core's part of a call: which kernels it asks, what it checks and how often, the codes of its errors."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable
from pathlib import Path

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
    except (RuntimeError, MemoryError) as error:
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
            "q_offset is 4 along dim 0, and the 5 queries from there on end at 9",
        ),
        (
            "x, x[:, :5], x[:, :5], long",
            "queries 4 to 7 see keys 5 to 7 of the grid along dim 0, which the key tensor lacks",
        ),
        ("x[0:0], x[0:0], x[0:0], [9, 9, 1, 1, 1, 1, 0, 0]", "kernel_size 9 times dilation 1 exceeds the 8 tokens"),
        ("x, x, x, plain, None, '', x", "additional_keys and additional_values come together"),
        (
            "x, x, x, plain, None, '', x, x",
            "additional_keys has shape [1, 8, 8, 2, 8]; beside query and key it must be [1, tokens, 2, 8]",
        ),
        (
            "x, x, x, plain, None, '', x[:, 0], x[:, 0].half()",
            "query is float32, additional_values is float16",
        ),
        ("x, x, x, plain, None, '', x[:, 0], x[:, 0], torch.ones(1)", "additional_lengths must be int32"),
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
say(failure(lambda: torch.ops.gnaforge.forward(x, x, x[..., :0], [3, 3, 1, 1, 1, 1, 0, 0])).text)
"""
    *refused, batch, tokens, no_channels = run(forked, code)
    assert "no kernel fits this problem" in no_channels
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
    """48 bytes a call were left, of the key: torch's own conversion of a schema's `str` forgets it."""
    key = FORWARD.format(1)
    path = toy("leak", TOY_KEY=f'"{key}"', TOY_FEATURES=(1 << 3) | (1 << 5))  # ranges and extra keys
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
    "return_lse": lambda: gnaforge.na2d(x, x, x, 3, return_lse=True),
    "compiled": torch.compile(lambda: gnaforge.na2d(x, x, x, 3, kernel={key!r}), backend="eager", fullgraph=True),
    "channels": lambda: operator(channels, x, x, {PLAIN!r}),
    "out": lambda: gnaforge.na2d(x, x, x, 3, out=torch.empty_like(x)),
    "extra keys": lambda: operator(x, x, x, {PLAIN!r}, None, "", x[:, 0], x[:, 0], lengths),
    "joint": lambda: gnaforge.joint_attention(flat, flat, flat, grid=(7, 8), prefix=8, kernel_size=3, lengths=lengths),
    "joint apart": lambda: gnaforge.joint_attention(x, x, x, *[x[:, 0]] * 3, kernel_size=3),
    "without memory": lambda: failure(lambda: operator(huge, huge, huge, {PLAIN!r})),
}}
channels = torch.zeros(1, 8, 8, 8, 2).mT
flat, lengths = x.flatten(1, 2), torch.ones(1, dtype=torch.int32)
huge = x[:, :1, :1, :1].as_strided((1, 2**20, 2**20, 1, 8), (0, 0, 0, 0, 1))
for name, call in calls.items():
    for _ in range(300):
        call()
    before, count = used(), 1000 if name == "without memory" else 20000  # torch takes long for that
    for _ in range(count):
        call()
    say([name, (used() - before) / count])
""",
    )
    assert all(per_call < 1 for _, per_call in out), out
    assert len(out) == 14


# layouts

DEMAND = """([&] {
  for (int role = 0; role < 3; ++role) {
    const gnaforge_tensor& tensor = *args->tensors[role];
    const bool heads = (role ? args->problem->kv_heads : args->problem->heads) > 1;
    if (heads && (tensor.head_stride == 0 || tensor.head_stride % 8)) return GNAFORGE_NO_LAYOUT;
    if (reinterpret_cast<uintptr_t>(tensor.data) % 16) return GNAFORGE_NO_LAYOUT;
  }
  for (int role = 0; role < 5; ++role)
    if (args->tensors[role]->token_stride[2] != 0) return GNAFORGE_BAD_CALL;
  return GNAFORGE_OK;
}())"""
"""Like that of tensor maps; and dims that a tensor doesn't have have no strides."""


@pytest.mark.parametrize("pinned", [False, True])
def test_only_what_a_kernel_cannot_read_as_it_lies_is_copied(python, toy, pinned: bool) -> None:
    """The toy writes the heads' strides of what it gets. Elsewhere a stride of 24 shows that nothing is copied."""
    key = FORWARD.format(1)
    picky = toy(
        f"picky_{pinned}",
        TOY_KEY=f'"{key}"',
        TOY_CODE=" ".join(DEMAND.split()),
        TOY_VALUE="(i<3?args->tensors[i]->head_stride:0)",
    )
    out = run(
        python,
        f"""
core.load_library({str(picky)!r})
odd, good = torch.zeros(1, 8, 8, 2, 12)[..., :8], torch.zeros(1, 8, 8, 2, 24)[..., :8]
misplaced = torch.zeros(1 + 8 * 8 * 2 * 8)[1:].view(1, 8, 8, 2, 8)
expanded = torch.zeros(1, 8, 8, 1, 8).expand(-1, -1, -1, 2, -1)
def strides(*tensors):
    for _ in range(2):
        out = gnaforge.na2d(*tensors, 3, kernel={key if pinned else None!r})
    return out.flatten()[:3].int().tolist()
say(strides(good, good, good))
for bad in (odd, misplaced, expanded):
    say([strides(bad, good, good), strides(good, bad, good), strides(good, good, bad)])
    say(strides(bad, bad, good) if bad is not expanded else strides(good, expanded, expanded))
    say(strides(torch.zeros(1, 8, 8, 8, 2).mT, bad, good))  # channels, too
say(gnaforge.na2d(x, x, x, 3).flatten()[:3].int().tolist())
""",
    )
    assert out.pop(0) == [24, 24, 24] and out.pop() == [8, 8, 8]
    for bad in ("odd", "misplaced", "expanded"):
        assert out.pop(0) == [[8, 24, 24], [24, 8, 24], [24, 24, 8]], bad
        assert out.pop(0) == ([8, 8, 24] if bad != "expanded" else [24, 0, 0])
        assert out.pop(0) == [8, 8, 24]


# memory


def test_without_memory_the_error_says_how_much_was_wanted_for_what(python, toy) -> None:
    """A MemoryError, in compiled graphs too; rules that the call breaks come first."""
    plain = toy("memory", TOY_KEY=f'"{FORWARD.format(1)}"')
    hungry = toy("hungry", TOY_KEY=f'"{FORWARD.format(2)}"', TOY_WORKSPACE="INT64_C(1) << 50")
    out = run(
        python,
        f"""
import resource
core.load_library({str(plain)!r}), core.load_library({str(hungry)!r})
first, second = {FORWARD.format(1)!r}, {FORWARD.format(2)!r}
def huge(*sizes, last=1):
    return torch.zeros(sizes[-1]).as_strided(sizes, (0,) * (len(sizes) - 1) + (last,))
q = huge(1, 2**20, 2**20, 1, 8)
say(message(lambda: gnaforge.na2d(q, q, q, 3)))
say(message(lambda: gnaforge.na2d(q, q, q, 0)))
compiled = torch.compile(lambda q: gnaforge.na2d(q, q, q, 3, kernel=first), backend="eager")
say(message(lambda: compiled(q)))
transposed = huge(1, 2**20, 2**20, 1, 8, last=0)
say(message(lambda: gnaforge.na2d(transposed, q, q, 3)))
say(message(lambda: gnaforge.na2d(x, x, x, 3, kernel=second)))
say(message(lambda: gnaforge.na2d(x, x, x, 3, kernel=first, scale=0.25)))
many, wide = huge(2**50, 1, 1, 2**7, 8), huge(2**50, 1, 1, 1, 256)
say(message(lambda: gnaforge.na2d(many, huge(2**50, 1, 1, 1, 8), wide, 1)))
q = huge(1, 2**10, 2**12, 2**4, 8)
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**31 + 2**27,) * 2)
say(message(lambda: gnaforge.na2d(q, q, q, 3)))
say(gnaforge.na2d(x, x, x, 3, kernel=first).max().item())
""",
    )
    size = f"torch can't allocate {2**45} bytes (32768.0 GiB) for"
    said = "MemoryError: gnaforge: out of memory: "
    assert out[0] == out[2] == f"{said}{size} out, [1, 1048576, 1048576, 1, 8] in fp32"
    assert out[1] == "ValueError: kernel_size is 0 along dim 0; it must be at least 1"
    assert out[3] == f"{said}{size} a contiguous copy of query, [1, 1048576, 1048576, 1, 8]"
    assert out[4] == f"{said}torch can't allocate {2**50 + 256} bytes (1048576.0 GiB) for the workspace of " + (
        FORWARD.format(2)
    )
    assert out[5] == f"{said}kernel {FORWARD.format(1)}: the toy needs 5 bytes at scale 0.25"
    assert out[6] == "ValueError: out is too large: its sizes reach beyond 64 bits"
    assert out[7] == f"{said}torch can't allocate {2**28} bytes (0.2 GiB) for log_sum_exp, [1, 1024, 4096, 16] in fp32"
    assert out[8] == 1.0


def test_a_gpu_without_memory_raises_the_error_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The core's error becomes torch's own, with what torch says of the device."""
    import torch
    from gnaforge.runtime import core, finding

    core.core()  # which is there whenever a call has failed
    failure = core.Failure(core.ErrorCode.OUT_OF_MEMORY, *["CUDA out of memory: 5 bytes for out"] * 3)
    monkeypatch.setattr(core, "failure_of", lambda error: failure)

    class Full(torch.Tensor):
        def new_empty(self, *_: object, **__: object) -> torch.Tensor:
            raise torch.OutOfMemoryError("GPU 0 has 0 bytes free")

    def fail(*_: object) -> None:
        raise RuntimeError

    for query, text in ((torch.zeros(8), failure.text), (torch.zeros(8).as_subclass(Full), "GPU 0 has 0 bytes free")):
        with pytest.raises(torch.OutOfMemoryError, match=text):
            finding.recover(RuntimeError(), fail, query, query, query, [], None, "")


def test_the_core_raises_what_becomes_a_memory_error_but_for_gpus(compile_library: Callable[..., Path]) -> None:
    """pybind11 makes a MemoryError of a std::bad_alloc; for GPUs Python turns a RuntimeError into torch's error."""
    from gnaforge.build.identity import template_dir

    library = ctypes.CDLL(str(compile_library("signature.cpp", "errors", "-O1", f"-I{template_dir() / 'core'}")))
    text = ctypes.create_string_buffer(100)
    assert library.thrown_without_memory(False, text, 100) == 1
    assert text.value == b"gnaforge: out of memory: 5 bytes"
    assert library.thrown_without_memory(True, text, 100) == 2
    assert text.value == b"gnaforge: CUDA out of memory: 5 bytes"


def test_exact_attention_without_memory_says_how_much_it_needs() -> None:
    import torch
    from gnaforge.runtime.problem import Problem
    from gnaforge.runtime.reference import attention

    q = torch.zeros(8).as_strided((1, 2**29, 2**10, 8), (0, 0, 0, 1))
    with pytest.raises(
        MemoryError, match=r"exact attention in float64 needs .* bytes for inputs and results and .* of 1 "
    ):
        attention(Problem(2**29, 3, heads=2**10, head_dim=8), q, q, q)
