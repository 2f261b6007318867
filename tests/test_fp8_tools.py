"""Inputs in e4m3 on the command line, in benchmarks, specs and messages. Kernels run in the emulator, if at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gnaforge
import pytest
import torch
from emulated_calls import run
from gnaforge.bench.emulator import measure_key
from gnaforge.bench.run import config_of, problems_of_spec, rows
from gnaforge.build.kernels import find_libraries
from gnaforge.cli import app
from gnaforge.errors import BuildError
from gnaforge.runtime.config import KernelConfig
from gnaforge.runtime.dtypes import takes_out_dtype
from gnaforge.runtime.problem import Problem
from gnaforge.spec import spec_of
from typer.testing import CliRunner

ENTRY = {"rank": 1, "head_dim": 64, "dtype": "e4m3", "tiles": [{"q": [256], "kv": [128]}]}
SHAPE = ("--tokens", "96,96", "--window", "25")
PACKED = "gna_forward-sm100-r1-e4m3-ofp16-d64-q64h2-kv64"


def keys(**more: object) -> list[str]:
    """The kernels of a spec's entry."""
    spec = {"spec_version": 1, "library": "x", "arch": "sm100", "kernels": [{**ENTRY, **more}]}
    entry = spec_of(spec).kernels[0]
    found = [config.key for config, _ in entry.configs("sm100")]
    assert entry.count() == len(found)
    return found


def test_types_of_outputs_are_of_those_inputs_that_have_a_choice() -> None:
    """A list that has e4m3 says of it what outputs are; a list without, of all."""
    bf16, to_bf16, to_fp16 = (
        f"gna_forward-sm100-r1-{types}-d64-q256-kv128" for types in ("bf16", "e4m3-obf16", "e4m3-ofp16")
    )
    assert keys(dtype=["bf16", "e4m3"]) == [bf16, to_bf16]
    assert keys(dtype=["bf16", "e4m3"], out_dtype="fp16") == [bf16, to_fp16]
    assert keys(dtype=["e4m3", "bf16"], out_dtype=["fp16", "bf16"]) == [to_fp16, to_bf16, bf16]
    assert keys(out_dtype=["bf16", "fp16"]) == [to_bf16, to_fp16]
    for given, said in (
        ({"dtype": "bf16", "out_dtype": "fp16"}, "sm100 kernels of bf16 write bf16, not fp16"),
        ({"dtype": ["bf16", "fp16"], "out_dtype": "fp16"}, "sm100 kernels of bf16 write bf16, not fp16"),
        ({"dtype": ["bf16", "e4m3"], "out_dtype": "fp32"}, "sm100 kernels of e4m3 write bf16, fp16, not fp32"),
    ):
        with pytest.raises(gnaforge.InputError, match=f"out_dtype: {said}"):
            keys(**given)
    assert takes_out_dtype("nonsense", ["nonsense", "bf16"])


@pytest.mark.parametrize(
    "name", ["fp8", "float8", "E4M3", "float8_e4m3fn", "torch.float8_e5m2", "e5m2", "float8_e8m0fnu"]
)
def test_specs_name_the_type_of_8_bits_that_there_is(name: str) -> None:
    with pytest.raises(gnaforge.InputError, match=r"is no dtype; allowed: .*; did you mean 'e4m3'\?"):
        keys(dtype=name)


@pytest.mark.parametrize(("name", "near"), [("float32", "fp32"), ("torch.half", ""), ("torch.bfloat16", "bf16")])
def test_names_of_torch_are_understood(name: str, near: str) -> None:
    with pytest.raises(gnaforge.InputError, match=f"did you mean '{near}'" if near else "e4m3$"):
        keys(dtype=name)


OTHERS = [name for name in dir(torch) if name.startswith(("float8", "float4")) and name != "float8_e4m3fn"]


@pytest.mark.parametrize("name", OTHERS)
def test_calls_name_the_type_of_8_bits_that_there_is(name: str) -> None:
    x = torch.empty(1, 64, 2, 64, dtype=getattr(torch, name))
    with pytest.raises(ValueError, match=f"float16, got {name}; of 8 bits na1d, na2d and na3d take float8_e4m3fn"):
        gnaforge.na1d(x, x, x, 9)
    with pytest.raises(ValueError, match=f"descales and out_dtype go with query in float8_e4m3fn; it is {name}"):
        gnaforge.na1d(x, x, x, 9, descale_q=0.5)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("bench", "--out-dtype", "fp16"), "--out-dtype: 'fp16' is no type of outputs of bf16; allowed: bf16"),
        (
            ("bench", "--arch", "sm100", "--dtype", "e4m3", "--out-dtype", "fp32"),
            "--out-dtype: 'fp32' is no type of outputs of e4m3; allowed: bf16, fp16",
        ),
        (
            ("bench", "--arch", "sm90", "--dtype", "e4m3", "--out-dtype", "fp16"),
            "dtype: sm90 has no e4m3 kernels; it has bf16, fp16",
        ),
        (("bench", "--dtype", "bf16,e4m3"), "dtype: cpu has no e4m3 kernels; it has fp32, bf16, fp16"),
        (
            ("bench", "--arch", "sm100", "--variant", "cutlass", "--dtype", "e4m3"),
            "dtype: sm100 cutlass has no e4m3 kernels; it has bf16, fp16",
        ),
        (("bench", "--arch", "sm100", "--dtype", "e4m3", "--head-dim", "72"), "head_dim: 72 must be a multiple of 16"),
        (("bench", "--arch", "sm100", "--dtype", "e4m3", "--direction", "training"), "sm100 has no backward pass"),
        (("bench", "--arch", "sm100", "--dtype", "bf16,e4m3", "--out-dtype", "fp16"), "torch sees no GPU here"),
        (("verify", PACKED, "--out-dtype", "fp15"), "--out-dtype: 'fp15' is not one of fp32, bf16, fp16"),
        (("verify", PACKED, "--out-dtype", "bf16"), "none is for that rank, head dim, dtypes and arch"),
        (("verify", PACKED, "--dtype", "fp8"), "--dtype: 'fp8' is not one of fp32, bf16, fp16, e4m3"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_commands_refuse(monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], said: str) -> None:
    """In one line."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = CliRunner().invoke(app, [*arguments, *(SHAPE if arguments[0] == "bench" else ())])
    assert isinstance(done.exception, gnaforge.InputError)
    assert said in str(done.exception) and "\n" not in str(done.exception)


def test_problems_of_a_preset_have_the_outputs_type() -> None:
    found = problems_of_spec("flux-4k", ["bf16", "e4m3"], "sm100", out_dtype="fp16")
    assert {(problem.dtype, problem.output_dtype) for problem in found} == {("bf16", "bf16"), ("e4m3", "fp16")}
    config = config_of(found[-1], "sm100")
    assert (config.dtype, config.out_dtype) == ("e4m3", "fp16")
    with pytest.raises(gnaforge.InputError, match="out_dtype: 'fp32' is no type of outputs of e4m3; allowed: bf16"):
        problems_of_spec("flux-4k", ["bf16", "e4m3"], "sm100", out_dtype="fp32")


@pytest.fixture(scope="module")
def library(session_cache: Path) -> Path:
    try:
        (path,) = find_libraries([KernelConfig.parse(PACKED)], emulated=True).values()
    except BuildError as error:
        if "no CUDA compiler" in str(error):
            pytest.skip(str(error))
        raise
    return path


MEASURE = """
import json, sys
import gnaforge
from gnaforge.runtime import bench, dtypes
from gnaforge.runtime.config import KernelConfig
from gnaforge.runtime.problem import Problem

key, library = sys.argv[1:]
gnaforge.load_library(library)
bench.matmul_gflops = lambda: 1.0
problem = Problem(200, 90, heads=4, kv_heads=2, head_dim=64, dtype="e4m3", out_dtype="fp16", extra_tokens=(30,))
contenders = ["gnaforge", "sdpa", "gnaforge dense"]
found = bench.report([problem], contenders, 0.1, [key], "cpu", None)
print(json.dumps(found))
"""


def test_a_benchmark_in_the_emulator(library: Path, tmp_path: Path) -> None:
    """What a report takes, of a kernel that writes fp16 with tiles of two heads; times are nobody's matter."""
    (tmp_path / "measure.py").write_text(MEASURE)
    found = json.loads(run([str(tmp_path / "measure.py"), PACKED, str(library)], "eager"))
    (row,) = found["problems"]
    assert row["kernel"] == PACKED and row["notes"] == {} and row["problem"]["out_dtype"] == "fp16"
    assert Problem.from_json(row["problem"]).output_dtype == "fp16"
    # Units of e4m3, of the largest value; SDPA has them in bf16.
    assert row["error_units"] < 1 and row["speedups"].keys() == {"sdpa", "gnaforge dense"}
    assert {timing["contender"] for timing in row["timings"]} == {"gnaforge", "sdpa", "gnaforge dense"}
    assert found["overhead_us"].keys() == {"call", "two torch.empty"} and found["complete"]
    assert {shown["dtype"] for shown in rows(found)} == {"e4m3, fp16 out"}


def test_the_emulators_own_benchmark_takes_the_kernel(library: Path) -> None:
    assert all(one.instructions > 0 for one in measure_key(PACKED, 1).values())


def test_verify_takes_kernels_by_their_outputs_type(library: Path, cli: Any) -> None:
    done = cli("verify", PACKED, "--out-dtype", "fp16", "--tokens", "70", "--window", "20", "--heads", "2",
               "--kv-heads", "1", "--timing", "eager", "--order", "round-robin")  # fmt: skip
    assert done.returncode == 0 and "1 of 1 kernel is good" in done.stdout, done.stdout + done.stderr
