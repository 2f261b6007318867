"""Calls through the C contract that are wrong, or too large: refused with the right code, and never a crash."""

from __future__ import annotations

import subprocess
from pathlib import Path

from gnaforge.build import abi
from gnaforge.build.identity import include_dir
from gnaforge.build.render import render_kernel, render_library
from gnaforge.build_tools.toolchain import cxx_compiler
from kernel_set import cpu_config

# What can_run says of each of hostile_calls.cpp's cases; of those that it accepts, what run says.
EXPECTED = {
    "bad_call": "no problem|no tensors|no roles|too few roles|no query|no out|small args|small problem|small tensor|"
    "small log_sum_exp|small host|a feature that isn't announced|"
    "extra keys that aren't announced|accumulation that isn't announced|a tensor too many|a reserved tensor",
    "no_op": "unknown op|another op",
    "no_feature": "unknown feature|a feature it hasn't|a tensor of an unknown role",
    "no_device": "unknown device",
    "bad_input": "rank 0|rank -1|rank 99|batch -1|heads -1|kv_heads 0|kv_heads INT64_MIN|batch 2^62|heads 2^62|"
    "batch 2^40 of 2^30 tokens|batch 2^62 without strides|tokens INT64_MAX|tokens -5|window 0|window 17|"
    "window INT64_MIN|stride 6|dilation 4|dilation INT64_MAX|causal 3|bf16 log_sum_exp|token stride INT64_MAX|"
    "token stride INT64_MIN|token stride -2^62|token stride of out 0|head stride of log_sum_exp 0|misaligned|"
    "a part of the grid that isn't announced",
    "no_size": "tokens 2^30",
    "no_dtype": "dtype 0|dtype 77|int32 query",
    "no_head_dim": "head_dim 12|head_dim 2^40|value_head_dim 0",
    "ok ok": "good|no log_sum_exp|no host|large structs|unknown flags|no tensor of an unknown role|batch 0|"
    "token stride of query 0|strides of one element|scale NaN|scale 1e308|threads INT_MAX|threads -5|no parallel_for",
    "ok bad_call": "data of query null|data of out null|data of log_sum_exp null",
}


def test_hostile_calls(tmp_path: Path) -> None:
    config = cpu_config(1, "fp32", (40,), (24,))
    source = tmp_path / "kernel.cpp"
    source.write_text(render_kernel(config) + render_library("hostile", [config]))
    options = ["-std=c++17", "-O1", "-w", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    program = Path(__file__).with_name("hostile_calls.cpp")
    command = [*cxx_compiler().command, *options, f"-I{include_dir()}", source, program, "-o", tmp_path / "program"]
    subprocess.run(command, check=True)
    done = subprocess.run([tmp_path / "program"], capture_output=True, text=True, check=True)
    found = {}
    for line in done.stdout.splitlines():
        name, codes, text = line.split("\t", 2)
        assert not text.endswith("\tdied"), line + done.stderr
        words = " ".join(abi.CODES[int(code)] for code in codes.split())
        assert (text == "") == (words == "ok ok"), line
        found[name] = words
    assert found == {name: words for words, names in EXPECTED.items() for name in names.split("|")}
