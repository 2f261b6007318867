"""The table of element types, and what each stage says of a type that the table has and the stage hasn't."""

from __future__ import annotations

import re
from pathlib import Path

import gnaforge
import pytest
from gnaforge.runtime.config import KernelConfig
from gnaforge.runtime.dtypes import DTYPES, dtype_name

ABI = Path(__file__).parents[1] / "templates/include/gnaforge/abi.h"

# A process in which the table has one more type, before anybody else looks at it.
PRELUDE = """
from types import MappingProxyType
from gnaforge.runtime import dtypes
NEW = dtypes.Dtype("fp8_e5m2", bytes=1, code=200, torch_name="float8_e5m2", unwritten=0x7F{more})
dtypes.DTYPES = MappingProxyType({{**dtypes.DTYPES, NEW.name: NEW}})

import gnaforge, gnaforge.families as families
from dataclasses import replace
from gnaforge.runtime.config import KernelConfig
SM90 = "gna_forward-sm90-r1-fp8_e5m2-d64-q64-kv64"
CPU = "gna_forward-cpu-r1-fp8_e5m2-dany-q8-kv8"

def said(call):
    try:
        return str(call())
    except (ValueError, RuntimeError, TypeError) as error:
        return f"{{type(error).__name__}}: {{error}}".splitlines()[0]

def claim(*names):
    "Makes families say that they have the type."
    from importlib import import_module
    for name in names:
        module = import_module(f"gnaforge.families.{{name}}")
        module.FAMILY = replace(module.FAMILY, dtypes=(*module.FAMILY.dtypes, "fp8_e5m2"))
    families._table.cache_clear()
"""


@pytest.fixture
def scratch(python):
    """Runs code after the prelude; gives the lines that it prints."""

    def run(code: str, more: str = "", **environment: str) -> list[str]:
        done = python(PRELUDE.format(more=more) + code, **environment)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return run


def test_names_and_codes_agree_everywhere() -> None:
    import torch

    listed = re.search(r"enum gnaforge_dtype \{(.*?)\}", ABI.read_text(), re.S)[1]  # type: ignore[index]
    codes = {name: int(code) for name, code in re.findall(r"(GNAFORGE_\w+) = (\d+)", listed)}
    for name, dtype in DTYPES.items():
        assert name == dtype.name == dtype_name(dtype.torch)
        assert codes[dtype.names()["enumerator"]] == dtype.code
        assert dtype.bytes == dtype.torch.itemsize
    assert dtype_name(torch.int8) == "torch.int8" and dtype_name("fp16") == "fp16" and dtype_name(3) == "3"


@pytest.mark.parametrize(
    ("key", "out"),
    [
        ("gna_forward-sm90-r1-bf16-d64-q64-kv64", "bf16"),
        ("gna_forward-sm90-r1-bf16-ofp32-d64v32-q64-kv64-lean", "fp32"),
    ],
)
def test_the_output_has_a_type_of_its_own_in_the_key_where_it_differs(key: str, out: str) -> None:
    config = KernelConfig.parse(key)
    assert (config.dtype, config.output_dtype, config.key) == ("bf16", out, key)
    with pytest.raises(ValueError, match="is not canonical; write 'gna_forward-sm90-r1-bf16-d64-q64-kv64'"):
        KernelConfig.parse("gna_forward-sm90-r1-bf16-obf16-d64-q64-kv64")


def test_a_family_that_does_not_write_the_output_type_says_so() -> None:
    from gnaforge.families import require_config

    with pytest.raises(gnaforge.InputError, match="out_dtype: sm90 kernels of bf16 write bf16, not fp32"):
        require_config("gna_forward-sm90-r1-bf16-ofp32-d64-q64-kv64")


def test_every_stage_names_a_type_that_it_does_not_have(scratch) -> None:
    lines = scratch(
        """
from gnaforge.spec import spec_of
spec = {"spec_version": 1, "library": "x", "arch": "sm90"}
entry = {"rank": 1, "head_dim": 64, "dtype": "fp8_e5m2", "tiles": [{"q": 64, "kv": 64}]}
print(said(lambda: KernelConfig.parse(SM90.replace("-d64", "-obf16-d64"))))
print(said(lambda: families.require_config(SM90)))
print(said(lambda: gnaforge.simulate((64,), 9, dtype="fp8_e5m2", arch="sm90")))
print(said(lambda: gnaforge.fit({"tokens": (64,), "window": 9}, dtype="fp8_e5m2", arch="cpu")))
print(said(lambda: spec_of({**spec, "kernels": [entry]})))
print(said(lambda: gnaforge.register(rank=1, head_dim=64, dtype="fp8_e5m2", arch="sm90", q_tile=64, kv_tile=64)))
print(said(lambda: gnaforge.register(SM90)))
import torch
x = torch.zeros(1, 64, 1, 64).to(torch.float8_e5m2)
print(said(lambda: gnaforge.register(rank=1, head_dim=64, dtype=x.dtype, arch="cpu")))
print(said(lambda: gnaforge.na1d(x, x, x, 9)))
"""
    )
    refused = "dtype: sm90 has no fp8_e5m2 kernels; it has bf16, fp16"
    assert lines[0] == "gna_forward-sm90-r1-fp8_e5m2-obf16-d64-q64-kv64"
    assert lines[1] == f"InputError: gna_forward-sm90-r1-fp8_e5m2-d64-q64-kv64: {refused}"
    assert lines[2] == f"InputError: {refused}"
    assert lines[3] == "InputError: dtype: cpu has no fp8_e5m2 kernels; it has fp32, bf16, fp16"
    assert lines[4] == f"InputError: kernels[0].{refused}"
    assert lines[5] == f"InputError: {refused}"
    assert lines[6].endswith(refused)
    assert lines[7].startswith("InputError: dtype: cpu has no fp8_e5m2 kernels")
    assert "query must be float32, bfloat16 or float16" in lines[8]


def test_tiles_are_fitted_to_the_type_itself(scratch) -> None:
    lines = scratch(
        """
claim("sm90_forward")
import gnaforge.plan as planning
from gnaforge.spec import spec_of
from gnaforge.runtime.op_table import FORWARD
fit = planning.fit_problems
def recorded(problems, *args, **more):
    print({problem.dtype for problem in problems}, FORWARD.bytes(problems[0]))
    return fit(problems, *args, **more)
planning.fit_problems = recorded
shape = {"tokens": 512, "window": 64}
entry = {"rank": 1, "head_dim": 64, "dtype": ["fp8_e5m2", "bf16"], "tiles": "auto", "shapes": [shape]}
plan = planning.plan(spec_of({"spec_version": 1, "library": "x", "arch": "sm90", "kernels": [entry]}))
print(*(config.dtype for config in plan.configs))
"""
    )
    lse = 512 * 4
    assert lines == [f"{{'fp8_e5m2'}} {4 * 512 * 64 + lse}", f"{{'bf16'}} {8 * 512 * 64 + lse}", "bf16 fp8_e5m2"]


def test_templates_and_headers_refuse_to_compute_it_in_another_type(scratch) -> None:
    """A family that claims the type without kernels for it: nothing is built, and nothing computes in fp16."""
    code = """
claim("sm90_forward", "cpu_forward")
from gnaforge.build.kernels import build_kernels
from gnaforge.build.render import render_kernel
print(said(lambda: render_kernel(families.require_config(SM90))))
print(said(lambda: build_kernels([families.require_config(CPU)])))
"""
    template, unknown = scratch(code)
    assert "the template of the kernel family sm90_forward takes what this config doesn't have" in template
    assert re.search("did not compile: .*GNAFORGE_FP8_E5M2.* not declared", unknown)
    # The contract has a code for it, the kernels' headers have no element.
    _, known = scratch(code, CXX="g++ '-DGNAFORGE_FP8_E5M2=static_cast<gnaforge_dtype>(200)'")
    assert re.search("did not compile: .*no cpu kernel takes this dtype", known)


def test_a_kernel_does_not_write_another_output_type_than_it_is_built_for(scratch) -> None:
    (said,) = scratch(
        """
import gnaforge.families.cpu_forward as own
own.FAMILY = replace(own.FAMILY, out_dtypes={"bf16": ("fp32",)})
families._table.cache_clear()
from gnaforge.build.kernels import build_kernels
config = families.require_config("gna_forward-cpu-r1-bf16-ofp32-dany-q8-kv8")
print(said(lambda: build_kernels([config])))
"""
    )
    assert re.search("did not compile: .*the output has the inputs' dtype", said)
