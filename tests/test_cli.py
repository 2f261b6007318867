"""The command line as a user calls it: help, results, exit codes, and bad input that leaves nothing behind."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from gnaforge.spec import preset_text, presets

ONE = "gna_forward-cpu-r1-fp32-dany-q8-kv8"
SPEC = """\
spec_version: 1
library: small
arch: [cpu]
kernels:
  - rank: 1
    head_dim: [8, 16]
    dtype: [fp32, fp32]
    tiles: [{q: [8], kv: [8]}]
"""
GPU_SPEC = SPEC.replace("[cpu]", "[cpu, sm90]").replace("fp32, fp32", "bf16").replace("kv: [8]", "kv: [16]")


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_help_imports_no_torch(python) -> None:
    done = python(
        "import sys\nfrom gnaforge.cli import app\n"
        "heavy = {'torch', 'numpy', 'pydantic', 'jinja2', 'matplotlib'} & set(sys.modules)\nprint(heavy)\n"
    )
    assert done.stdout == "set()\n"


def test_version(cli) -> None:
    import gnaforge

    assert cli("--version").stdout == f"gnaforge {gnaforge.__version__}\n"


def test_build_a_spec_list_it_and_build_again(cli, tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(SPEC)
    first = cli("build", "small.yaml", "-o", "out dir")
    assert first.returncode == 0, first.stderr
    assert "1 kernel," in first.stdout and "out dir/small/lib/small.so" in first.stdout
    assert f"asked for 3 times, generated once: {ONE}" in first.stderr
    assert "take the head dim at run time" in first.stderr
    again = cli("build", "small.yaml", "-o", "out dir")
    assert "0 compiled, 1 from the cache" in again.stdout
    rows = json.loads(cli("list", "out dir/small/lib/small.so", "--json").stdout)
    assert [row["key"] for row in rows] == [ONE]
    assert rows[0]["library_bytes"] > 0 and rows[0]["q_tile"] == [8]
    assert ONE in cli("list").stdout
    assert [row["state"] for row in json.loads(cli("list", "small.yaml", "--json").stdout)] == ["built"]
    assert {row["state"] for row in json.loads(cli("list", "vit-56", "--json").stdout)} == {"not built"}
    of_sm100 = "gna_forward-sm100-r1-bf16-d64-q99-kv16"
    for named, archs in (("vit-56", "--arch sm90 --arch sm100"), (of_sm100, "--arch sm100")):
        said = cli("list", named, "--static").stderr
        assert said.endswith(f"no GPU kernel among these is built yet: gnaforge build SPEC {archs}\n")
    dry = cli("build", "small.yaml", "--dry-run")
    assert f"cached   {ONE}" in dry.stdout and "0 of 1 kernel to compile" in dry.stdout
    assert not (tmp_path / "generated").exists()


def test_build_takes_a_key(cli, tmp_path: Path) -> None:
    done = cli("build", ONE)
    assert done.returncode == 0, done.stderr
    other = ONE.replace("kv8", "kv16")
    assert cli("build", other).returncode == 0
    for key in (ONE, other):  # side by side
        name = key.replace("-", "_")
        rows = json.loads(cli("list", f"generated/{name}/lib/{name}.so", "--json").stdout)
        assert [row["key"] for row in rows] == [key]


def test_generate_check_and_arch(cli, tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(GPU_SPEC)
    assert cli("generate", "small.yaml", "--arch", "cpu").returncode == 0
    assert cli("generate", "small.yaml", "--arch", "cpu", "--check").returncode == 0
    source = next((tmp_path / "generated/small/src").glob("gna*.cpp"))
    source.write_text("edited")
    stale = cli("generate", "small.yaml", "--arch", "cpu", "--check")
    assert stale.returncode == 1 and f"changed: {source.relative_to(tmp_path)}" in stale.stderr
    assert "run `gnaforge generate small.yaml --arch cpu -o generated`" in stale.stderr
    assert source.read_text() == "edited"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["build", "missing.yaml"], "missing.yaml: no such file"),
        (["build", "hunyuan-vidoe"], "did you mean 'hunyuan-video'"),
        (["build", "broken.yaml"], "broken.yaml:6:15: kernels[0].head_dim: 70 must be a multiple of 8"),
        (["build", "gpu.yaml", "--arch", "sm90"], "arch 'sm90' is not in the spec of small"),
        (["build", "gpu.yaml", "--arch", "sm101"], "arch: 'sm101' is unknown; there are cpu, sm90, sm100"),
        (["presets", "vit-57"], "did you mean 'vit-56'?"),
        (["presets", "vit-56", "--json"], "--json: has no effect beside a preset's name"),
        (["generate", "small.yaml", "-o", "file"], "can't write to"),
        (["build", "gna_forward-cpu-r1-fp32"], "is no kernel key; a key looks like"),
        (["build", "gna_forward-cpu-r1-fp32-dany-q999-kv8"], "q_tile: holds 999 query tokens; cpu takes at most 256"),
        (["build", "gna_forward-tpu-r1-fp32-d8-q8-kv8"], "arch: 'tpu' is unknown; there are cpu, sm90, sm100"),
        (["build", ONE, "--arch", "sm90"], "excludes this kernel, which is for cpu"),
        (["build", "small.yaml", "--jobs", "0"], "Invalid value for '-j' / '--jobs'"),
        (["list", "nothing.so"], "nothing.so: No such file"),
        (["list", "text.so"], "text.so is no shared library"),
        (["bench"], "give either --preset, or --tokens and --window"),
        (["bench", "--tokens", "8", "--window", "9"], "window: 9 is more than the 8 tokens"),
        (
            ["bench", "--tokens", "8", "--window", "3", "--dtype", "fp8"],
            "--dtype: 'fp8' is not one of fp32",
        ),
        (["bench", "--tokens", "8", "--window", "a"], "'a' is no list of whole numbers"),
        (["bench", "--tokens", "8,8", "--window", "3,3,3"], "--window: (3, 3, 3) has 3 entries for 2 dimensions"),
        (["bench", "--tokens", "8", "--window", "3", "--against", "magic"], "--against magic: unknown"),
        (["quickstart", "--plot", "picture.txt"], "--plot picture.txt: give the name of a .png or .svg file"),
        (["quickstart", "--plot", "none/picture.png"], "none: No such file or directory"),
        (["nonsense"], "No such command 'nonsense'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input(cli, tmp_path: Path, arguments: list[str], expected: str) -> None:
    (tmp_path / "small.yaml").write_text(SPEC)
    (tmp_path / "broken.yaml").write_text(SPEC.replace("[8, 16]", "70"))
    (tmp_path / "gpu.yaml").write_text(GPU_SPEC.replace("cpu, sm90", "sm100"))
    (tmp_path / "text.so").write_text("no library, but long enough to look at its header without running out of it")
    (tmp_path / "file").write_text("")
    before = files(tmp_path)
    done = cli(*arguments)
    assert done.returncode == 2
    assert expected in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert files(tmp_path) == before


def test_bench_times_all_contenders_with_the_same_result(cli, tmp_path: Path) -> None:
    done = cli(
        *("bench", "--tokens", "12,10", "--window", "5,3", "--heads", "4", "--kv-heads", "2", "--head-dim", "16"),
        *("--dtype", "fp32", "--seconds", "0.1", "--json", "--plot", "bars.png"),
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [row["contender"] for row in rows] == ["gnaforge", "sdpa", "flex"]
    assert all(row["ms"] > 0 and row["difference"] < 1e-5 for row in rows)
    assert rows[0]["sparsity"] == "87.5%"
    assert (tmp_path / "bars.png").stat().st_size > 5000


def test_quickstart(cli, tmp_path: Path) -> None:
    done = cli("quickstart")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("correct") >= 2 and "WRONG" not in done.stdout
    assert "Next:" in done.stdout
    png = (tmp_path / "gnaforge-quickstart.png").read_bytes()
    assert png.startswith(b"\x89PNG") and len(png) > 10_000
    assert (tmp_path / "generated/quickstart/lib/quickstart.so").is_file()


def test_doctor(cli) -> None:
    findings = json.loads(cli("doctor", "--json").stdout)
    by_name = {finding["name"]: finding for finding in findings}
    assert by_name["torch"]["ok"] and by_name["C++ compiler"]["ok"]
    assert os.environ["GNAFORGE_CACHE_DIR"] in by_name["cache"]["detail"]
    missing = cli("doctor", PATH="/nonexistent", CXX="")
    assert missing.returncode == 1
    assert "MISSING C++ compiler: no C++ compiler found" in missing.stdout and "apt install g++" in missing.stdout
    assert "portable vectors, by GNAFORGE_CPU_ISA" in cli("doctor", GNAFORGE_CPU_ISA="portable").stdout
    assert "it must be one of portable, avx2, avx512" in cli("doctor", GNAFORGE_CPU_ISA="sse9").stdout
    assert cli("doctor", GNAFORGE_TOOLCHAIN="magic").stdout.count("it must be one of auto, system, pip") == 1


def test_schema_accepts_the_example(cli) -> None:
    import jsonschema
    import yaml

    schema = json.loads(cli("schema").stdout)
    jsonschema.validate(yaml.safe_load(SPEC), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(yaml.safe_load(SPEC.replace("rank: 1", "rank: 4")), schema)


def test_presets_are_listed_with_what_they_are_for(cli) -> None:
    rows = json.loads(cli("presets", "--json").stdout)
    assert {row["name"]: row["description"] for row in rows} == presets()
    text = cli("presets", COLUMNS="60").stdout
    assert all(f"{row['name']} " in text and row["description"] in text for row in rows)
    assert all(row["arch"] and row["rank"] and row["dtype"] for row in rows)
    shown = cli("presets", "vit-56")
    assert shown.stdout.encode() == preset_text("vit-56"), shown.stderr


def test_a_command_without_its_spec_says_what_one_is(cli) -> None:
    for command in ("build", "wheel", "generate"):
        done = cli(command)
        assert done.returncode == 2 and "gnaforge presets lists them" in done.stderr
