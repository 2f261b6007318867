"""Calls through the C contract that are wrong, or too large: refused with the right code, and never a crash."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from math import prod
from pathlib import Path

import pytest
from gnaforge.build import abi
from gnaforge.build.identity import include_dir
from gnaforge.build.kernels import make_jobs
from gnaforge.build.render import render_kernel, render_library
from gnaforge.build_tools.cuda_compiler import CudaCompiler
from gnaforge.build_tools.toolchain import cxx_compiler
from gnaforge.errors import BuildError
from gnaforge.runtime.config import KernelConfig
from kernel_set import cpu_config

# What can_run says of each of hostile_calls.cpp's cases; of those that it accepts, what run says.
EXPECTED = {
    "bad_call": "no args|"
    "no problem|no tensors|no roles|too few roles|no query|no out|small args|small problem|small tensor|"
    "small log_sum_exp|small host|a feature that isn't announced|"
    "extra keys that aren't announced|extra keys without values|extra keys that are not there|"
    "accumulation that isn't announced|a tensor too many|a reserved tensor",
    "no_op": "unknown op|another op",
    "no_feature": "unknown feature|a feature it hasn't|a tensor of an unknown role",
    "no_device": "unknown device",
    "bad_input": "no room for words|rank 0|rank -1|rank 99|batch -1|heads -1|kv_heads 0|kv_heads INT64_MIN|"
    "batch 2^62|heads 2^62|batch 2^40 of 2^30 tokens|batch 2^62 without strides|tokens INT64_MAX|tokens -5|"
    "window 0|window 17|"
    "window INT64_MIN|stride 6|dilation 4|dilation INT64_MAX|causal 3|bf16 log_sum_exp|token stride INT64_MAX|"
    "token stride INT64_MIN|token stride -2^62|token stride of out 0|head stride of log_sum_exp 0|misaligned|"
    "a part of the grid that isn't announced|extra keys 2^62|extra keys -1|extra lengths of fp32|"
    "extra lengths at an odd address",
    "no_size": "tokens 2^30",
    "no_dtype": "dtype 0|dtype 77|int32 query",
    "no_head_dim": "head_dim 12|head_dim 2^40|value_head_dim 0",
    "ok ok": "good|no log_sum_exp|no host|large structs|unknown flags|no tensor of an unknown role|batch 0|"
    "token stride of query 0|strides of one element|scale NaN|scale 1e308|threads INT_MAX|threads -5|no parallel_for|"
    "extra keys, 5 of them|extra keys, 0 of them|extra keys, INT_MAX of them|extra keys, INT_MIN of them|"
    "extra keys of two pieces|extra keys without lengths",
    "ok": "extra keys 2^40 without strides",
    "ok bad_call": "data of query null|data of out null|data of log_sum_exp null|no workspace|misaligned workspace|"
    "extra keys' data null|extra lengths' data null",
}

PLAIN = {"batch": 2, "tokens": 16, "heads": 2, "channels": 16}
"""Sizes of the calls; elements have 4 bytes."""


def fits_int64(sizes: dict[str, int], strides: dict[str, int], bytes_each: int = 4) -> bool:
    """Whether a tensor's elements, and the bytes from its first to its last, can be counted in 64 bits."""
    reach = sizes["channels"] + sum(max(sizes[dim] - 1, 0) * abs(stride) for dim, stride in strides.items())
    return max(reach, prod(sizes.values())) * bytes_each < 2**63


def expected_of(name: str) -> str:
    """What can_run says of one of hostile_calls.cpp's `every_field`, and run where the call was run."""
    kind, *rest = name.split()
    if kind == "size":
        return "bad_call"
    if kind == "null":
        return "ok bad_call" if rest[0] == "data" else "ok ok" if rest == ["log_sum_exp"] else "bad_call"
    if kind == "offset":
        return "ok ok" if rest[0] == "4" else "bad_input"
    value = int(rest[0])
    if kind == "stride":
        dim, role = rest[1:]
        sizes = PLAIN | {"channels": 1} if role == "log_sum_exp" else PLAIN
        heads = sizes["channels"]
        strides = {"batch": 32 * heads, "tokens": 2 * heads, "heads": heads, dim: value}
        overlaps = value == 0 and role in ("out", "log_sum_exp")
        return "ok" if fits_int64(sizes, strides) and not overlaps else "bad_input"
    field = rest[1]
    neutral = {"causal", "edge", "sink", "q_offset", "kv_offset", "kv_sink", "extra_tokens"}
    if field in ("batch", "heads") and value >= 0 and value % 2 == 0:
        strides = {"batch": 512, "tokens": 32, "heads": 16}
        return "ok" if fits_int64(PLAIN | {field: value}, strides) else "bad_input"
    if (field in neutral and value == 0) or (field == "causal" and value == 1):
        return "ok"
    return "refused"


def found_codes(objects: list[Path], program: Path, *options: str) -> dict[str, str]:
    """What can_run says of each case, and run; `objects` are or make the kernel's library."""
    source = str(Path(__file__).with_name("hostile_calls.cpp"))
    command = [*cxx_compiler().command, "-std=c++17", "-w", *options, f"-I{include_dir()}", source, *map(str, objects)]
    subprocess.run([*command, "-o", str(program)], check=True)
    done = subprocess.run([program], capture_output=True, text=True, check=True)
    found = {}
    for line in done.stdout.splitlines():
        name, codes, text = line.split("\t", 2)
        assert not text.endswith("\tdied"), line + done.stderr
        words = " ".join(abi.CODES[int(code)] for code in codes.split())
        assert (text == "") == (words in ("ok", "ok ok") or name == "no room for words"), line
        found[name] = words
    return found


def expected_codes(names: Iterable[str]) -> dict[str, str]:
    """Of a cpu kernel."""
    known = {name: words for words, names in EXPECTED.items() for name in names.split("|")}
    return {name: known[name] if name in known else expected_of(name) for name in names}


def test_cpu_kernels_survive_hostile_calls(tmp_path: Path) -> None:
    config = cpu_config(1, "fp32", (40,), (24,))
    source = tmp_path / "kernel.cpp"
    source.write_text(render_kernel(config) + render_library("hostile", [config]))
    sanitizers = ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
    found = found_codes([source], tmp_path / "program", *sanitizers)
    expected = expected_codes(found)
    assert len(found) > 700
    assert set(found) >= {name for names in EXPECTED.values() for name in names.split("|")}
    for name, words in found.items():
        assert words == expected[name] or (expected[name] == "refused" and not words.startswith("ok")), (name, words)


def test_host_code_of_gpu_kernels_survives_hostile_calls(tmp_path: Path) -> None:
    """It refuses what a cpu kernel does, and besides what tensor maps can't show. sm100 kernels have the same."""
    config = KernelConfig.parse("gna_forward-sm90-r1-bf16-d16-q64-kv16")
    try:
        (job,) = make_jobs([config], cxx_compiler(), emulated=True)
    except BuildError as error:
        if "no CUDA compiler" in str(error):
            pytest.skip(str(error))
        raise
    assert isinstance(job.compiler, CudaCompiler) and job.compiler.stand_in is not None
    source, built = tmp_path / "kernel.cu", tmp_path / "kernel.o"
    source.write_text(job.source + job.library)
    undefined = ("-fsanitize=undefined", "-fno-sanitize-recover=undefined")
    command = job.compiler.compile_command(str(source), str(built), include_dir())
    subprocess.run([*command, f"-Xcompiler={','.join(undefined)}"], check=True)
    stand_in = job.compiler.stand_in
    options = ("-DHOSTILE_DTYPE=GNAFORGE_BF16", "-DHOSTILE_RUNS=false", f"-Wl,-rpath={stand_in.parent}", *undefined)
    found = found_codes([built, stand_in], tmp_path / "program", *options)
    others = {"misaligned": "no_layout", "scale NaN": "no_scale"}
    refused = 0
    for name, expected in expected_codes(found).items():
        words = found[name]
        if name.startswith("extra") and words == "no_feature":
            continue
        if expected.startswith("ok"):
            assert words in ("ok", "no_layout", "no_size", "no_scale"), (name, words)
            refused += words != "ok"
        elif name.startswith(("offset", "stride")):  # elements of 2 bytes
            assert words in ("bad_input", "no_layout"), (name, words)
        else:
            assert words in (expected, others.get(name)) or (expected == "refused" and words != "ok"), (name, words)
    assert found["good"] == "ok" and refused > 50
