"""Registration and the JIT policy: what is asked for, what is compiled when, and when nothing may be."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from kernel_set import SMALL

pytestmark = pytest.mark.usefixtures("no_kernels")

PRELUDE = f"""
import sys, threading, torch, gnaforge
from gnaforge import register
KEY = {SMALL.key!r}
FIELDS = dict(rank=1, head_dim=8, dtype="fp32", arch="cpu", q_tile=8, kv_tile=8)
torch.manual_seed(0)
x = torch.randn(1, 9, 1, 8)
def said(call):
    try:
        return str(call())
    except Exception as error:
        return f"{{type(error).__name__}}: {{error}}"
def right(out):
    scores = x[0, :, 0] @ x[0, :, 0].T * 8**-0.5
    begin = (torch.arange(9) - 1).clamp(0, 6)
    for i, b in enumerate(begin.tolist()):
        scores[i, :b], scores[i, b + 3:] = -torch.inf, -torch.inf
    return torch.allclose(out[0, :, 0], scores.softmax(-1) @ x[0, :, 0], atol=1e-5)
"""


@pytest.fixture
def run(forked, fake_cxx):
    """Runs code after the prelude, with the stand-in compiler; it must succeed. Returns stdout's and stderr's lines."""

    def call(code: str, **environment: str) -> tuple[list[str], list[str]]:
        done = forked(PRELUDE + code, **{"CXX": f"'{fake_cxx()}'", **environment})
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines(), done.stderr.splitlines()

    return call


@pytest.fixture
def compiled(tmp_path: Path):
    """How many kernels the stand-in compiler compiled."""
    count = tmp_path / "fake compiler" / "compiled"
    return lambda: len(count.read_text().splitlines()) if count.exists() else 0


def test_every_way_to_name_a_kernel(run, compiled, tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text(
        "spec_version: 1\nlibrary: one\narch: [cpu, sm90]\nkernels:\n"
        "  - {rank: 1, head_dim: any, dtype: fp32, tiles: [{q: 8, kv: 8}]}\n".replace("[cpu, sm90]", "cpu")
    )
    out, err = run(
        """
from pathlib import Path
spec = {"spec_version": 1, "library": "one", "arch": "cpu",
        "kernels": [{"rank": 1, "head_dim": 8, "dtype": "fp32", "tiles": [{"q": 8, "kv": 8}]}]}
for keys in (register(**FIELDS), register(**{**FIELDS, "dtype": torch.float32, "q_tile": (8,)}), register(KEY),
             register(gnaforge.KernelConfig.parse(KEY)), register("one.yaml"), register(Path("one.yaml")),
             register(spec), register(**{**FIELDS, "head_dim": [8, 16]}), register(KEY, arch="cpu")):
    assert keys == [KEY], keys
print(len(gnaforge.registry), right(gnaforge.na1d(x, x, x, 3)), gnaforge.warmup(KEY) == [KEY])
"""
    )
    assert out == ["1 True True"] and compiled() == 1
    assert err == []


def test_a_new_process_takes_it_from_the_cache_and_imports_little(run, compiled) -> None:
    run("register(KEY)")
    out, err = run(
        """
before = set(sys.modules)
register(**FIELDS)
gnaforge.na1d(x, x, x, 3)
heavy = {"pydantic", "jinja2", "typer", "yaml", "ninja", "filelock", "matplotlib", "torch._dynamo", "subprocess"}
print(sorted(heavy & (set(sys.modules) - before)), "gnaforge.build.kernels" in sys.modules)
""",
        CXX="/nonexistent/g++",
        PATH="/nonexistent",
    )
    assert out == ["[] False"] and err == [] and compiled() == 1


def test_tiles_are_fitted_to_a_problem_or_the_archs_default(forked) -> None:
    done = forked(
        PRELUDE
        + """
import gnaforge.registration as module
asked = []
module._have = lambda configs: asked.extend(configs)
import gnaforge as g
fields = dict(rank=2, head_dim=32, dtype="fp32", arch="cpu")
problem = dict(tokens=(56, 56), window=(7, 7), heads=4)
print(module.register(**fields))
short = dict(tokens=(56, 56), window=7, heads=4, tiles="auto")
print(module.register(**fields, **problem) == module.register(**fields, **short))
fitted = g.fit(problem, arch="cpu", head_dim=32, dtype="fp32").tiles[0]
print((asked[1].q_tile, asked[1].kv_tile) == (fitted.q, fitted.kv), asked[1] != asked[0])
"""
    )
    assert done.stdout.splitlines() == ["['gna_forward-cpu-r2-fp32-dany-q8x8-kv8x8']", "True", "True True"], done.stderr


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        ("", "InputError: say which kernel: rank, head_dim and dtype; or"),
        ("rank=2", "InputError: head_dim: is required\ndtype: is required"),
        (
            "**{**FIELDS, 'head_dim': 70}",
            "InputError: head_dim: 70 must be a multiple of 8; did you mean 72?",
        ),
        (
            "**{**FIELDS, 'dtype': 'bf15'}",
            "dtype: 'bf15' is no dtype; allowed: fp32, bf16, fp16, e4m3; did you mean 'bf16'?",
        ),
        ("**{**FIELDS, 'arch': 'sm9'}", "arch: 'sm9' is no arch; allowed: cpu, sm90, sm100; did you mean 'sm90'?"),
        (
            "**{**FIELDS, 'arch': 'sm100', 'dtype': 'bf16', 'kv_tile': 144}",
            "kv_tile: holds 144 key tokens; sm100 takes",
        ),
        ("**{**FIELDS, 'q_tile': (8, 8)}", "InputError: q_tile: [8, 8] has 2 entries; rank 1 needs 1"),
        ("**{**FIELDS, 'q_tile': 999}", "InputError: q_tile: holds 999 query tokens; cpu takes at most 256"),
        ("**{**FIELDS, 'kv_tile': None}", "InputError: kv_tile: is required"),
        ("**{**FIELDS, 'tiles': 'auto'}", "InputError: tiles: can't be given beside q_tile and kv_tile"),
        (
            "rank=1, head_dim=8, dtype='fp32', tiles='auto'",
            "tiles: auto fits tiles to a problem; give its tokens and window",
        ),
        ("rank=1, head_dim=8, dtype='fp32', tokens=9", "InputError: window: is required"),
        ("rank=1, head_dim=8, dtype='fp32', tokens=9, window=10", "InputError: window: 10 is more than the 9 tokens"),
        (
            "rank=1, head_dim=8, dtype='fp32', tokens=9, window=9, heads=4, kv_heads=3",
            "kv_heads: 3 does not divide heads",
        ),
        ("KEY, rank=1", "InputError: rank: can't be given beside"),
        ("KEY, arch='sm90'", "InputError: arch: 'sm90' excludes"),
        ("**{**FIELDS, 'arch': 5}", "InputError: arch: 5 is neither a name nor a list of names; there are cpu, sm90"),
        ("**{**FIELDS, 'arch': []}", "InputError: arch: [] is neither a name nor a list of names"),
        ("KEY + '-odd'", "variant: 'odd' is not a variant of cpu"),
        (
            "'gna_backward_q-sm90-r1-bf16-d64-q128-kv128-cutlass'",
            "variant: 'cutlass' is not a variant of the gna_backward_q kernels of sm90; they have ''",
        ),
        ("'gna_forward-cpu'", "is no kernel key; a key looks like"),
        ("'vit-57'", "did you mean 'vit-56'?"),
        ("'missing.yaml'", "missing.yaml: no such file"),
        ("'hunyuan-video', arch='tpu'", "arch: 'tpu' is unknown; there are cpu, sm90, sm100"),
        ("{'library': 'x'}", "InputError: spec_version: is required"),
        ("5", "InputError: kernel: 5 is no config, key or spec"),
        ("policy='maybe'", "InputError: policy: 'maybe' is not one of never, warn, always"),
    ],
)
def test_errors_name_the_field(call: str, expected: str) -> None:
    import gnaforge

    fields = {"rank": 1, "head_dim": 8, "dtype": "fp32", "arch": "cpu", "q_tile": 8, "kv_tile": 8}
    with pytest.raises(gnaforge.InputError) as caught:
        eval(f"gnaforge.register({call})", {"gnaforge": gnaforge, "FIELDS": fields, "KEY": SMALL.key})
    assert expected in f"InputError: {caught.value}"


def test_warming_up_runs_no_kernel_of_another_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from gnaforge.first_runs import run_once
    from gnaforge.runtime.config import KernelConfig

    config = KernelConfig.parse("gna_forward-sm100-r2-bf16-d64-q16x16-kv8x16-cutlass")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert "torch" in run_once(config) or "another GPU" in run_once(config)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (10, 3))
    with pytest.raises((AssertionError, RuntimeError)):  # torch has no CUDA: it tried
        run_once(config)


def test_without_a_toolchain_the_error_says_how_to_get_one(run) -> None:
    out, _ = run(
        """
print(said(lambda: register(KEY)))
print(said(lambda: gnaforge.na1d(x, x, x, 3)))
import os
os.environ["GNAFORGE_TOOLCHAIN"] = "system"
print(said(lambda: register("gna_forward-sm90-r1-bf16-d64-q64-kv64")))
""",
        CXX="",
        PATH="/nonexistent",
        CUDA_HOME="",
        GNAFORGE_JIT="warn",
    )
    text = "\n".join(out)
    assert text.startswith("BuildError: no C++ compiler found") and "`gnaforge doctor`" in text
    assert "NoKernelError" in text and "it can't be compiled now: no C++ compiler found" in text


def test_without_nvcc_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import gnaforge

    monkeypatch.setenv("GNAFORGE_TOOLCHAIN", "system")
    monkeypatch.setenv("CUDA_HOME", "/nonexistent")
    monkeypatch.setattr("gnaforge.build_tools.cuda._system_candidates", lambda: [])
    with pytest.raises(gnaforge.BuildError) as caught:
        gnaforge.register("gna_forward-sm90-r1-bf16-d64-q64-kv64")
    assert "pip install 'gnaforge[cuda]'" in str(caught.value) and "gnaforge doctor" in str(caught.value)


MISS = """
from gnaforge.families.cpu_forward import FAMILY
FAMILY.default_tiles[1] = ((8,), (8,))
"""


@pytest.mark.parametrize("policy", ["never", "warn", "always", "", "sometimes"])
def test_what_a_call_does_that_no_kernel_fits(run, compiled, policy: str) -> None:
    code = (
        "print(said(lambda: right(gnaforge.na1d(x, x, x, 3))))\nprint(said(lambda: right(gnaforge.na1d(x, x, x, 3))))"
    )
    out, err = run(MISS + code, GNAFORGE_JIT=policy)
    if policy == "sometimes":
        assert out[0] == "ValueError: GNAFORGE_JIT is 'sometimes'; it must be one of never, warn, always"
    elif policy == "never":
        assert out[0].startswith("NoKernelError: gnaforge: no kernel fits this problem: rank 1, fp32, head_dim 8,")
        assert "calls don't compile (GNAFORGE_JIT=never)" in out
        assert f"or build one with: gnaforge build {SMALL.key}" in out
        call = 'gnaforge.register(rank=1, head_dim=8, dtype="fp32", arch="cpu", tokens=9, window=3, heads=1)'
        assert f"register one with: {call}" in out
    else:
        assert out == ["True", "True"]
    assert compiled() == (policy in ("warn", "always", ""))
    if policy in ("warn", ""):
        assert len(err) == 1
        origin = "GNAFORGE_JIT=warn" if policy else "GNAFORGE_JIT is not set, so warn"
        assert re.fullmatch(rf"gnaforge: compiled {SMALL.key} in \d+\.\d s: no kernel .*\({origin}\)", err[0])
    else:
        assert err == []


def test_the_policy_can_be_set_and_the_named_call_registers(run, compiled) -> None:
    out, _ = run(
        MISS
        + """
print(register(policy="never"))
text = said(lambda: gnaforge.na1d(x, x, x, 3))
(call,) = [line.removeprefix("register one with: ") for line in text.splitlines() if line.startswith("register one")]
from gnaforge import fit
import gnaforge.simulator.fitting
keys = eval(call.replace("tokens=9, window=3", "q_tile=8, kv_tile=8").replace(", heads=1", ""))
print(keys, right(gnaforge.na1d(x, x, x, 3)))
""",
        GNAFORGE_JIT="warn",
    )
    assert out == ["[]", f"['{SMALL.key}'] True"] and compiled() == 1


def test_a_pinned_kernel_and_pinned_tiles_are_made(run, compiled) -> None:
    out, _ = run(
        """
print(right(gnaforge.na1d(x, x, x, 3, kernel=KEY)))
print(right(gnaforge.na1d(x, x, x, 3, q_tile_shape=(8,), kv_tile_shape=(8,))))
register(policy="never")
print(said(lambda: gnaforge.na1d(x, x, x, 3, kernel=KEY.replace("q8", "q16"))))
print(said(lambda: gnaforge.na1d(x, x, x, 3, q_tile_shape=(16,))))
""",
        GNAFORGE_JIT="always",
    )
    assert out[:2] == ["True", "True"] and compiled() == 1
    text = "\n".join(out)
    assert f'register it with: gnaforge.register("{SMALL.key.replace("q8", "q16")}")' in text
    assert "no kernel with q_tile_shape (16,)" in text
    assert """calls don't compile (gnaforge.register(policy="never") was called)""" in text


IMPOSSIBLE = {
    (36, 36): "head_dim: 36 is no such number: cpu kernels take multiples of 8 up to 256; pad query and key with zeros "
    "to 40 channels, with scale=36 ** -0.5, and value to 40 channels, of which the output's first 36 count",
    (8, 7): "value_head_dim: 7 is no such number: cpu kernels take multiples of 8 up to 256; pad value to 8 channels, "
    "of which the output's first 7 count",
    (257, 8): "head_dim: 257 is too large; cpu kernels take multiples of 8 up to 256",
    (8, 512): "value_head_dim: 512 is too large; cpu kernels take multiples of 8 up to 256",
}


@pytest.mark.parametrize("policy", ["never", "always"])
def test_head_dims_that_no_kernel_can_have(run, compiled, policy: str) -> None:
    """To register one is no advice, whatever way a call takes."""
    out, _ = run(
        f"for d, dv in {list(IMPOSSIBLE)}:"
        """
    q, v = torch.randn(1, 9, 1, d), torch.randn(1, 9, 1, dv)
    tiles = dict(q_tile_shape=(8,), kv_tile_shape=(8,))
    traced = torch.compile(lambda q, v: gnaforge.na1d(q, q, v, 3), fullgraph=True, backend="eager")
    for call in (lambda: gnaforge.na1d(q, q, v, 3), lambda: gnaforge.na1d(q, q, v, 3, **tiles)):
        print(said(call))
    print("ValueError" in said(lambda: traced(q, v)) or "InputError" in said(lambda: traced(q, v)))
""",
        GNAFORGE_JIT=policy,
    )
    expected = [line for text in IMPOSSIBLE.values() for line in (f"InputError: {text}", f"InputError: {text}", "True")]
    assert out == expected and compiled() == 0


@pytest.mark.parametrize("policy", ["never", "always"])
def test_a_named_kernel_that_can_not_serve_the_call_is_no_advice(run, compiled, policy: str) -> None:
    cases = {
        "gna_forward-sm90-r1-bf16-d64-q64-kv64": "takes cuda tensors",
        "gna_forward-cpu-r2-fp32-dany-q8x8-kv8x8": "rank is 2, not 1",
        "gna_forward-cpu-r1-bf16-dany-q8-kv8": "dtype is bf16, not fp32",
    }
    out, _ = run(
        f"for key in {list(cases)}: print(said(lambda: gnaforge.na1d(x, x, x, 3, kernel=key)))\n", GNAFORGE_JIT=policy
    )
    advice = "leave out kernel= to let gnaforge choose one that fits"
    assert out == [f"InputError: kernel: {key}: {reason}; {advice}" for key, reason in cases.items()]
    assert compiled() == 0


def test_what_a_gpu_has_no_kernels_for_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    import gnaforge
    from gnaforge.errors import InputError
    from gnaforge.families import TARGETS
    from gnaforge.registration import CacheSource
    from gnaforge.runtime.request import Request

    def remedy(arch: str, dtype: str, head_dim: int) -> str:
        monkeypatch.setattr("gnaforge.registration.machine_target", lambda *_: TARGETS[arch])
        return CacheSource().remedy(Request("gna_forward", 1, dtype, head_dim, head_dim, "cuda"))

    assert remedy("sm90", "bf16", 192) == "or build one with: gnaforge build gna_forward-sm90-r1-bf16-d192-q128-kv64"
    with pytest.raises(InputError, match=r"^dtype: sm90 kernels take bf16, fp16, not fp32; convert the tensors$"):
        remedy("sm90", "fp32", 64)
    with pytest.raises(InputError, match=r"^head_dim: 264 is too large; sm100 kernels take multiples of 8 up to 256$"):
        remedy("sm100", "bf16", 264)

    def unknown(*_: object) -> None:
        raise InputError("arch: this machine's GPU is sm80, which this version has no kernels for")

    monkeypatch.setattr("gnaforge.registration.machine_target", unknown)
    with pytest.raises(gnaforge.NoKernelError, match=r"^arch: this machine's GPU is sm80"):
        CacheSource().remedy(Request("gna_forward", 1, "bf16", 64, 64, "cuda"))


def test_calls_use_fitted_tiles_and_small_ones_the_default() -> None:
    from gnaforge import fit
    from gnaforge.families.cpu_forward import FAMILY
    from gnaforge.registration import config_for
    from gnaforge.runtime.problem import Problem
    from gnaforge.runtime.request import Request

    def request(*tokens: int, **fields: object) -> Request:
        problem = Problem(tokens, 7, heads=4, head_dim=32, dtype="fp32")
        return Request.of_problem("gna_forward", problem, "cpu", **fields)

    large = config_for(request(56, 56), fit=True)
    best = fit({"tokens": (56, 56), "window": (7, 7), "heads": 4}, arch="cpu", head_dim=32, dtype="fp32").tiles[0]
    assert (large.q_tile, large.kv_tile) == (best.q, best.kv) != FAMILY.default_tiles[2]
    small = config_for(request(9, 9), fit=True)
    assert (small.q_tile, small.kv_tile) == FAMILY.default_tiles[2]
    asked = config_for(request(56, 56, q_tile=(4, 4)), fit=True)
    assert (asked.q_tile, asked.kv_tile) == ((4, 4), FAMILY.default_tiles[2][1])


def test_nothing_is_compiled_while_torch_traces(run, compiled) -> None:
    out, _ = run(
        """
from torch._subclasses.fake_tensor import FakeTensorMode
def attend(x):
    return gnaforge.na1d(x, x, x, 3)
def pinned(x):
    return gnaforge.na1d(x, x, x, 3, kernel=KEY)
class Module(torch.nn.Module):
    def forward(self, x):
        return attend(x)
def registering(x):
    register(KEY)
    return x
gnaforge.na1d and gnaforge.runtime.ops.load_operators()
for trace in (lambda: torch.compile(attend, backend="eager", fullgraph=True)(x),
              lambda: torch.compile(attend, backend="eager", dynamic=True)(x),
              lambda: torch.compile(pinned, backend="eager", fullgraph=True)(x),
              lambda: torch.export.export(Module(), (x,)),
              lambda: torch.compile(registering, backend="eager", fullgraph=True)(x)):
    print(said(trace).replace("\\n", " | "))
    torch._dynamo.reset()
with FakeTensorMode() as mode:
    fake = torch.empty(1, 9, 1, 8)
    print(said(lambda: attend(fake)).replace("\\n", " | "))
print(len(gnaforge.registry))
register(KEY)
print(right(torch.compile(attend, backend="eager", fullgraph=True)(x)))
""",
        GNAFORGE_JIT="always",
    )
    call = 'gnaforge.register(rank=1, head_dim=8, dtype="fp32", arch="cpu"'
    assert all("torch is tracing, and nothing is compiled meanwhile" in out[i] for i in (0, 1, 2, 3, 5)), out
    assert all(f"register one with: {call}, tokens=9, window=3, heads=1)" in out[i] for i in (0, 1, 3, 5)), out
    assert f'register it with: gnaforge.register("{SMALL.key}")' in out[2], out
    assert "torch is tracing" in out[4], out
    assert out[6:] == ["0", "True"] and compiled() == 1


def test_a_compiled_graph_that_misses_its_kernel_names_the_call(run, compiled) -> None:
    """A graph exported elsewhere calls the operator with no Python around it."""
    out, _ = run(
        """
gnaforge.na1d and gnaforge.runtime.ops.load_operators()
print(said(lambda: torch.ops.gnaforge.forward(x, x, x, [3, 1, 1, 0])).replace("\\n", " | "))
y = torch.randn(2, 8, 9, 4, 16, dtype=torch.bfloat16)
v = torch.randn(2, 8, 9, 2, 32, dtype=torch.bfloat16)
print(said(lambda: torch.ops.gnaforge.forward(y, y[:, :, :, :2], v, [3, 4, 2, 1, 1, 2, 0, 1])).replace("\\n", " | "))
from gnaforge.runtime.request import request_of
print(request_of(y, y[:, :, :, :2], v, [3, 4, 2, 1, 1, 2, 0, 1]).register_call())
""",
        GNAFORGE_JIT="always",
    )
    assert out[0].startswith("RuntimeError: gnaforge: no kernel fits this problem") and compiled() == 0
    assert out[1].split("register one with: ")[1] == out[2]
    assert out[2] == (
        'gnaforge.register(rank=2, head_dim=16, value_head_dim=32, dtype="bf16", arch="cpu", tokens=(8, 9), '
        "window=(3, 4), stride=(2, 1), dilation=(1, 2), causal=(False, True), heads=4, kv_heads=2, batch=2)"
    )


def test_nothing_is_compiled_or_loaded_under_capture(run, compiled) -> None:
    """What torch says of a capture is set by hand: this needs no GPU."""
    out, _ = run(
        """
register(KEY)  # in the cache, so a call could load it
""",
        GNAFORGE_JIT="always",
    )
    out, _ = run(
        """
torch.cuda.is_initialized = torch.cuda.is_current_stream_capturing = lambda: True
print(said(lambda: gnaforge.na1d(x, x, x, 3)).replace("\\n", " | "))
print(said(lambda: register(KEY)))
print(len(gnaforge.runtime.core.table()))
torch.cuda.is_current_stream_capturing = lambda: False
register(KEY)
torch.cuda.is_current_stream_capturing = lambda: True
print(right(gnaforge.na1d(x, x, x, 3)))
""",
        GNAFORGE_JIT="always",
    )
    assert "a CUDA graph is being captured" in out[0] and "register one with: gnaforge.register(" in out[0]
    assert out[1].startswith("RuntimeError: gnaforge.register: a CUDA graph is being captured")
    assert out[2:] == ["0", "True"] and compiled() == 1


def test_threads_that_miss_one_kernel_compile_it_once(run, compiled) -> None:
    out, err = run(
        MISS
        + """
go = threading.Barrier(8)
done = []
def call(i):
    go.wait()
    y = x.repeat(1, 1 + i, 1, 1)
    gnaforge.na1d(y, y, y, 3)
    done.append(right(gnaforge.na1d(x, x, x, 3)))
threads = [threading.Thread(target=call, args=(i,)) for i in range(8)]
[t.start() for t in threads]; [t.join() for t in threads]
print(done, [c.key for c in gnaforge.registry] == [KEY])
""",
        GNAFORGE_JIT="warn",
    )
    assert out == [f"{[True] * 8} True"] and compiled() == 1 and len(err) == 1


def test_threads_register_while_others_call_and_compile(run, compiled) -> None:
    """Several kernels at once, one of them asked for by all; operators run and are traced meanwhile."""
    out, _ = run(
        """
register(KEY)
others = [KEY.replace("q8-kv8", f"q8-kv{n}") for n in (16, 24)]
import gnaforge.build.kernels as building
stop, errors = threading.Event(), []
def calling():
    while not stop.is_set():
        assert right(gnaforge.na1d(x, x, x, 3))
def tracing():
    compiled = torch.compile(lambda x: gnaforge.na1d(x, x, x, 3), backend="eager", fullgraph=True)
    assert right(compiled(x))
def registering(i):
    assert register(KEY) == [KEY]
def guarded(body, *arguments):
    def work():
        try:
            body(*arguments)
        except BaseException as error:
            errors.append(repr(error))
    return threading.Thread(target=work)
caller = guarded(calling)
caller.start()
threads = [guarded(registering, i) for i in range(7)] + [guarded(tracing)]
[t.start() for t in threads]; [t.join() for t in threads]
stop.set(); caller.join()
print(errors)
"""
    )
    assert out == ["[]"] and compiled() == 1


def test_what_importing_the_package_connects_can_be_undone(run, compiled) -> None:
    """Calls see what is loaded then, and nothing is compiled; what needs the core connects anew."""
    out, _ = run(
        """
from gnaforge import api
from gnaforge.runtime import core, family, lookup
print(type(lookup.source()).__name__, core._core_files is not None, family._provider is not None)
gnaforge.registry and core.core()
api.disconnect()
print(lookup.source(), core._core_files, family._provider)
print(said(lambda: gnaforge.na1d(x, x, x, 3)).replace("\\n", " | "))
api.connect()
print(right(gnaforge.na1d(x, x, x, 3)))
""",
        GNAFORGE_JIT="always",
    )
    assert out[0] == "CacheSource True True" and out[1] == "None None None"
    assert (
        out[2].startswith("NoKernelError: gnaforge: no kernel fits")
        and "this package holds only the kernels above" in out[2]
    )
    assert out[3] == "True" and compiled() == 1


def test_warmup_names_what_it_did_not_run(capfd: pytest.CaptureFixture[str]) -> None:
    """A kernel of a GPU that isn't here is built all the same."""
    import gnaforge
    import torch
    from gnaforge.build_tools.cuda import find_nvcc
    from gnaforge.errors import GnaforgeError
    from sm90_kernels import CONFIGS

    try:
        find_nvcc()
    except GnaforgeError:
        pytest.skip("needs a CUDA compiler")
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    key = CONFIGS[2].key
    assert gnaforge.warmup(key) == [key]
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "warmup" in line]
    assert line.startswith(f"gnaforge: warmup did not run {key}: ") and "torch" in line


def test_a_kernel_is_found_while_torch_jit_traces(run, compiled, tmp_path: Path) -> None:
    """No kernel is loaded, and one is in the cache."""
    run("register(KEY)")
    code = """
import gnaforge, torch
module = gnaforge.NeighborhoodAttention1D(16, 2, 3)
x = torch.randn(1, 9, 16)
traced = torch.jit.trace(module, x)
print(torch.equal(traced(x), module(x)))
"""
    out, _ = run(code)
    assert out == ["True"] and compiled() == 1


def test_calls_of_heads_that_share_keys_have_tiles_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the arch can, all heads have one window, and it saves time; so do `register`'s fitted tiles."""
    import torch
    from gnaforge.families import TARGETS
    from gnaforge.registration import _configs_of_fields, config_for
    from gnaforge.runtime.problem import Problem
    from gnaforge.runtime.request import Request, request_of

    def heads_of(arch: str, one_pattern: bool = True, **fields: Any) -> int:
        monkeypatch.setattr("gnaforge.registration.machine_target", lambda *_: TARGETS[arch])
        problem = Problem((48, 48), 7, head_dim=64, **fields)
        request = Request.of_problem("gna_forward", problem, "cuda", one_pattern=one_pattern)
        return config_for(request, fit=True).q_tile_heads

    assert heads_of("sm100", heads=16, kv_heads=2) > 1
    assert heads_of("sm100", heads=16, kv_heads=2, dtype="e4m3", out_dtype="fp16") > 1
    assert heads_of("sm100", heads=16, kv_heads=16) == 1
    assert heads_of("sm100", one_pattern=False, heads=16, kv_heads=2) == 1
    assert heads_of("sm90", heads=16, kv_heads=2) == 1
    monkeypatch.setattr("gnaforge.call_tiles._WORTH_SHARING", 0.99)
    assert heads_of("sm100", heads=16, kv_heads=2) == 1
    q, k = torch.zeros(1, 48, 48, 16, 64), torch.zeros(1, 48, 48, 2, 64)
    of_head = [7, 7, 1, 1, 1, 1, 0, 0]
    assert request_of(q, k, k, of_head).one_pattern
    assert not request_of(q, k, k, of_head * 15 + [9, 9, *of_head[2:]]).one_pattern
    fields = {"rank": 2, "head_dim": 64, "dtype": "bf16"}
    shape = {"tokens": (48, 48), "window": 7, "heads": 16, "kv_heads": 2}
    assert all(config.q_tile_heads > 1 for config in _configs_of_fields(fields | shape, "sm100"))


def test_tiles_of_several_heads_are_registered() -> None:
    from gnaforge.errors import InputError
    from gnaforge.registration import _configs_of_fields

    fields = {"rank": 2, "head_dim": 64, "dtype": "bf16"}
    tiles = {"q_tile": (4, 8), "kv_tile": (8, 8), "q_tile_heads": 4}
    (config,) = _configs_of_fields(fields | tiles, "sm100")
    assert config.key == "gna_forward-sm100-r2-bf16-d64-q4x8h4-kv8x8"
    for wrong, said in (
        ({"q_tile_heads": 4}, r"^q_tile_heads: is of tiles that are given, by q_tile and kv_tile"),
        ({**tiles, "q_tile_heads": 0}, r"^q_tile_heads: "),
        ({**tiles, "q_tile_heads": 16}, r"^q_tile: "),
        ({**tiles, "tiles": "auto"}, r"^tiles: can't be given beside q_tile and kv_tile"),
    ):
        with pytest.raises(InputError, match=said):
            _configs_of_fields(fields | wrong, "sm100")
    with pytest.raises(InputError, match=r"^q_tile_heads: tiles of sm90 kernels have 1 head, not 4"):
        _configs_of_fields(fields | tiles, "sm90")
