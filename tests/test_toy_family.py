"""A kernel family that lives outside of the package goes the whole way: the toy in `toy_family/`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from gnaforge.build.render import render_kernel
from gnaforge.families import require_config

ROOT = Path(__file__).parents[1]
FILE = ROOT / "tests/toy_family/cpu_toy_forward.py"
KEY = "gna_forward-cpu-r2-fp32-dany-q4x8-kv4x8-toy"

pytestmark = pytest.mark.usefixtures("named")


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GNAFORGE_FAMILIES", str(FILE))


def test_it_renders_with_its_own_header() -> None:
    source = render_kernel(require_config(KEY))
    assert '#include "toy/kernel.h"' in source and f'key = "{KEY}"' in source


def test_the_command_line_builds_lists_and_verifies_it(cli, tmp_path: Path) -> None:
    spec = """
spec_version: 1
library: toys
arch: cpu
kernels:
  - {rank: 2, head_dim: any, dtype: fp32, variant: toy, tiles: [{q: [4, 8], kv: [4, 8]}]}
"""
    (tmp_path / "toys.yaml").write_text(spec)
    assert cli("generate", "toys.yaml").returncode == 0
    assert (tmp_path / f"generated/toys/src/{KEY}.cpp").is_file()
    built = cli("build", "toys.yaml")
    assert built.returncode == 0, built.stderr
    (row,) = (row for row in json.loads(cli("list", "--json").stdout) if row["key"] == KEY)
    assert row["state"] == "built"
    (row,) = json.loads(cli("list", "generated/toys/lib/toys.so", "--json").stdout)
    assert row["key"] == KEY
    done = cli("verify", KEY, "--random", "6")
    assert done.returncode == 0, done.stdout + done.stderr
    commands = json.loads((tmp_path / "generated/toys/compile_commands.json").read_text())
    assert f"-I{FILE.parent / 'include'}" in commands[0]["arguments"]
    unknown = cli("verify", KEY, GNAFORGE_FAMILIES="")
    assert unknown.returncode == 2 and "variant: 'toy' is not a variant of cpu; it has ''" in unknown.stderr


def test_simulate_and_bench_know_it(cli) -> None:
    problem = ("--tokens", "24,24", "--window", "5,5", "--dtype", "fp32", "--arch", "cpu", "--variant", "toy")
    found = json.loads(cli("simulate", *problem, "--json").stdout)
    assert (found["variant"], found["model"]["source"], found["tiles"]["fitted"]) == ("toy", "made up", True)
    done = cli("bench", *problem, "--head-dim", "16", "--against", "", "--seconds", "0.1", "--report", "report.json")
    assert done.returncode == 0, done.stderr


def test_bench_times_it_beside_the_default_family(cli, tmp_path: Path) -> None:
    """As a contender, by default too; each with its own kernel."""
    problem = ("--tokens", "24,24", "--window", "5,5", "--dtype", "fp32", "--head-dim", "16", "--seconds", "0.1")
    done = cli("bench", *problem, "--against", "gnaforge toy", "--json", "--report", "report.json")
    assert done.returncode == 0, done.stderr
    ours, toy = json.loads(done.stdout)
    assert (ours["contender"], toy["contender"]) == ("gnaforge", "gnaforge toy") and 0 < toy["difference"] < 1e-5
    (row,) = json.loads((tmp_path / "report.json").read_text())["problems"]
    assert row["rivals"].keys() == {"gnaforge toy"} and row["rivals"]["gnaforge toy"].endswith("-toy")
    assert not row["kernel"].endswith("-toy")
    unknown = cli("bench", *problem, "--against", "gnaforge tory")
    assert unknown.returncode == 2 and "--against gnaforge tory: unknown; there are" in unknown.stderr
    assert unknown.stderr.rstrip().endswith("flash dense, gnaforge toy")


def test_contenders_of_an_arch() -> None:
    from gnaforge.bench.run import other_contenders

    assert other_contenders("cpu") == ["gnaforge toy", "sdpa", "flex"]
    assert other_contenders("cpu", "toy") == ["sdpa", "flex"]
    assert other_contenders("sm90")[0] == other_contenders("sm100")[0] == "gnaforge cutlass"


def test_a_call_runs_it_after_registration(forked) -> None:
    done = forked(
        """
import torch, gnaforge
x = torch.randn(2, 5, 7, 3, 24)
keys = gnaforge.register(rank=2, head_dim=24, dtype="fp32", arch="cpu", variant="toy")
toy = gnaforge.na2d(x, x, x, 3, kernel=keys[0])
other = gnaforge.register(rank=2, head_dim=24, dtype="fp32", arch="cpu")
print(keys[0], other[0], float((toy - gnaforge.na2d(x, x, x, 3, kernel=other[0])).abs().max()) < 1e-5)
"""
    )
    assert done.stdout.split() == [KEY, "gna_forward-cpu-r2-fp32-dany-q8x8-kv8x8", "True"], done.stderr


def test_a_wheel_carries_what_the_runtime_needs_of_it(tmp_path: Path, python, monkeypatch) -> None:
    import zipfile

    from gnaforge.plan import Plan
    from gnaforge.wheel.build import build_wheel

    config = require_config(KEY)
    wheel = build_wheel(Plan("toys", (config,)), tmp_path / "dist", rebuild="make")
    with zipfile.ZipFile(wheel.path) as archive:
        archive.extractall(tmp_path / "site")
        metadata = json.loads(archive.read("gnaforge_toys/gnaforge.json"))
    assert metadata["families"]["cpu_toy_forward"]["padding"] == {"rows": 1, "columns": 1, "clips": True, "short": []}
    done = python(
        f"""
import gnaforge_toys, torch
from gnaforge_toys._runtime.bench import computed_pairs
from gnaforge_toys._runtime.config import KernelConfig
from gnaforge_toys._runtime.problem import Problem
x = torch.randn(1, 9, 9, 1, 8)
gnaforge_toys.na2d(x, x, x, 3)
problem = Problem((9, 9), 3)
config = KernelConfig.parse({KEY!r})
print(gnaforge_toys.kernels()[0].key, computed_pairs(problem, config), set(gnaforge_toys.status().values()))
""",
        PYTHONPATH=str(tmp_path / "site"),
        GNAFORGE_FAMILIES="",
    )
    assert done.stdout.split()[0] == KEY and done.stdout.rstrip().endswith("{''}"), done.stderr


def test_its_headers_and_template_decide_what_is_built_again(tmp_path: Path, monkeypatch) -> None:
    import shutil

    from gnaforge.build.identity import source_digest
    from gnaforge.build_tools.includes import forget_headers

    shutil.copytree(FILE.parent, tmp_path / "toy")
    monkeypatch.setenv("GNAFORGE_FAMILIES", str(tmp_path / "toy" / FILE.name))
    digests = {source_digest(require_config(KEY))}
    for name in ("include/toy/kernel.h", "cpu_toy_forward/kernel.cpp.j2"):
        path = tmp_path / "toy" / name
        path.write_text(path.read_text() + "// newer\n")
        forget_headers()
        digests.add(source_digest(require_config(KEY)))
    assert len(digests) == 3
