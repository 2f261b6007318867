"""Without nvcc or CUTLASS what can be built is built, and what can't is said with the command that mends it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from gnaforge.build_tools.cuda import find_nvcc
from gnaforge.errors import BuildError

SPEC = """\
spec_version: 1
library: mixed
arch: [cpu, sm90, sm100]
kernels:
  - {rank: 1, head_dim: 64, dtype: bf16, tiles: [{q: [64], kv: [64]}]}
"""
CPU, SM90, SM100 = (
    *("gna_forward-cpu-r1-bf16-dany-q64-kv64", "gna_forward-sm90-r1-bf16-d64-q64-kv64"),
    "gna_forward-sm100-r1-bf16-d64-q64-kv64",
)
OF_CUTLASS = SM100 + "-cutlass"
NO_NVCC = "for sm90, sm100 can't be built here: no CUDA compiler found with GNAFORGE_TOOLCHAIN=system"
NVCC_REMEDY = "pip install 'gnaforge[cuda]' brings a whole CUDA compiler"
NO_CUTLASS = (
    "1 kernel for sm100 can't be built here: the CUTLASS sources are missing or not whole: "
    "pip install 'nvidia-cutlass>=4.2', or all of 'gnaforge[cuda]'"
)
try:
    find_nvcc((12, 9))
    HAS_NVCC = True
except BuildError:
    HAS_NVCC = False


@pytest.fixture
def without_nvcc(cli, tmp_path: Path) -> Callable:
    """The command line where there is no CUDA compiler, beside mixed.yaml."""
    (tmp_path / "mixed.yaml").write_text(SPEC)
    path = os.pathsep.join(x for x in os.environ["PATH"].split(os.pathsep) if not Path(x, "nvcc").exists())
    return lambda *arguments: cli(*arguments, PATH=path, CUDA_HOME="", CUDA_PATH="", GNAFORGE_TOOLCHAIN="system")


@pytest.fixture
def without_cutlass(cli, tmp_path: Path) -> Callable:
    """The command line where the package of CUTLASS is a husk, beside mixed.yaml."""
    if not HAS_NVCC:
        pytest.skip("no CUDA compiler")
    entry = SPEC.splitlines()[-1].replace("rank: 1", "rank: 1, arch: sm100, variant: cutlass")
    (tmp_path / "mixed.yaml").write_text(SPEC + entry + "\n")
    husk = tmp_path / "husk" / "cutlass_library"
    husk.mkdir(parents=True)
    (husk / "__init__.py").touch()
    return lambda *arguments: cli(*arguments, PYTHONPATH=str(husk.parent))


@pytest.mark.parametrize("command", ["build", "wheel"])
def test_the_other_kernels_are_built(without_nvcc, cli, tmp_path: Path, command: str) -> None:
    done = without_nvcc(command, "mixed.yaml", "-o", "out")
    assert done.returncode == 1 and NO_NVCC in done.stderr and NVCC_REMEDY in done.stderr
    assert f"missing: {SM90}\n" in done.stderr and f"missing: {SM100}\n" in done.stderr
    assert done.stderr.endswith("2 of 3 kernels can't be built here, see above\n")
    if command == "build":
        rows = json.loads(cli("list", "out/mixed/lib/mixed.so", "--json").stdout)
        assert [row["key"] for row in rows] == [CPU]
    else:
        (wheel,) = (tmp_path / "out").glob("gnaforge_mixed-1.0-*.whl")
        assert CPU in cli("check-wheel", str(wheel)).stdout


def test_a_dry_run_says_the_same(without_nvcc, tmp_path: Path) -> None:
    done = without_nvcc("build", "mixed.yaml", "--dry-run")
    assert done.returncode == 1 and NO_NVCC in done.stderr and CPU in done.stdout
    assert f"missing: {SM90}\n" in done.stderr and not (tmp_path / "generated").exists()


def test_shards_and_exports(without_nvcc) -> None:
    done = [without_nvcc("build", "mixed.yaml", "--shard", f"{i}/3") for i in (1, 2, 3)]
    assert sorted(each.returncode for each in done) == [0, 1, 1]
    assert sum("gnaforge cache export part-" in each.stdout for each in done) == 1
    exported = without_nvcc("cache", "export", "part.zip", "--spec", "mixed.yaml")
    assert exported.returncode == 0 and "part.zip: 1 kernel" in exported.stdout
    assert f"note: 2 kernels {NO_NVCC}" in exported.stderr


def test_rendering_needs_no_compiler(without_nvcc, tmp_path: Path) -> None:
    done = without_nvcc("generate", "mixed.yaml")
    assert (done.returncode, done.stdout) == (0, "3 kernels in generated/mixed/src\n")
    assert without_nvcc("generate", "mixed.yaml", "--check").returncode == 0


def test_verify_tries_the_others(without_nvcc) -> None:
    done = without_nvcc("verify", "mixed.yaml", "--random", "1")
    assert done.returncode == 2 and f"{CPU}: good" in done.stdout and f"{SM90}: NOT VERIFIED" in done.stdout
    assert NVCC_REMEDY in done.stdout and "1 of 3 kernels is good" in done.stdout
    rows = json.loads(without_nvcc("verify", "mixed.yaml", "--random", "1", "--json").stdout)
    assert {row["key"]: row["good"] for row in rows} == {CPU: True, SM90: False, SM100: False}


@pytest.mark.parametrize("arguments", [("build",), ("build", "--dry-run"), ("wheel",), ("verify",)], ids=" ".join)
def test_where_nothing_can_be_built_it_is_an_error(without_nvcc, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    command, *options = arguments
    done = without_nvcc(command, "mixed.yaml", "--arch", "sm90", "--arch", "sm100", *options)
    assert done.returncode == (2 if command == "verify" else 1) and not done.stdout
    assert done.stderr.startswith(f"error: 2 kernels {NO_NVCC}") and NVCC_REMEDY in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mixed.yaml"]


def test_register_has_the_others_and_raises(kernel_set, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import gnaforge

    monkeypatch.setenv("GNAFORGE_TOOLCHAIN", "system")
    monkeypatch.setattr("gnaforge.build_tools.cuda._system_candidates", lambda: [])
    (tmp_path / "mixed.yaml").write_text(SPEC.replace("kv: [64]", "kv: [48]"))
    with pytest.raises(gnaforge.BuildError) as caught:
        gnaforge.register(tmp_path / "mixed.yaml", arch=["cpu", "sm90", "sm100"])
    assert str(caught.value).startswith(f"2 kernels {NO_NVCC}") and NVCC_REMEDY in str(caught.value)
    assert CPU.replace("kv64", "kv48") in [config.key for config in gnaforge.registry]


def test_without_cutlass_only_what_is_made_of_it_is_missing(without_cutlass) -> None:
    done = without_cutlass("build", "mixed.yaml", "--dry-run")
    assert done.returncode == 1 and done.stderr.startswith(f"missing: {NO_CUTLASS}\n")
    assert all(key in done.stdout for key in (CPU, SM90, SM100)) and OF_CUTLASS not in done.stdout
    alone = without_cutlass("build", OF_CUTLASS)
    assert alone.returncode == 1 and alone.stderr == f"error: {NO_CUTLASS}\n"


def test_doctor_files_what_is_missing_where_it_is_needed(without_cutlass, without_nvcc) -> None:
    for doctor in (without_cutlass, without_nvcc):
        findings = {finding["name"]: finding for finding in json.loads(doctor("doctor", "--json").stdout)}
        assert findings["GPU"]["group"] == "run GPU kernels"
        assert doctor("doctor").returncode == 0  # cpu kernels work
    groups = without_cutlass("doctor").stdout.split("To ")
    (building,) = (text for text in groups if text.startswith("build GPU kernels:"))
    assert "GPU:" not in building.partition(":")[2] and "MISSING CUTLASS headers" in building
    assert "pip install 'nvidia-cutlass>=4.2'" in building
    assert NVCC_REMEDY in without_nvcc("doctor").stdout


def test_doctor_names_the_command_for_every_package(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import PackageNotFoundError

    from gnaforge import doctor

    def nowhere(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "version", nowhere)
    monkeypatch.setattr("gnaforge.build_tools.cuda.version", nowhere)
    missing = {finding.name: finding.detail for finding in doctor.examine() if not finding.ok}
    assert missing["torch"] == "not installed: pip install torch" and "pip install ninja" in missing["ninja"]
    assert "pip install 'nvidia-cutlass>=4.2'" in missing["CUTLASS headers"]


def test_doctor_says_which_gpus_have_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from gnaforge import doctor

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A GPU")
    for capability, good in (((9, 0), True), ((10, 3), True), ((8, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, it=capability: it)
        found = next(finding for finding in doctor.examine() if finding.name == "GPU")
        assert found.ok == good and f"A GPU (sm{capability[0]}{capability[1]})" in found.detail
    assert "no kernels for it, but sm90 for 9.0 (H100" in found.detail
