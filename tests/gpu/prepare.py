#!/usr/bin/env python3
"""Builds what the suite takes to a machine with a GPU and without gnaforge: the kernels, the core extension, facts."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

from paths import CARRIED, CORE, FACTS, LIBRARY, ROOT

sys.path.insert(0, str(ROOT / "tests"))

from gnaforge.build import build, library_path  # noqa: E402
from gnaforge.core_extension import core_path  # noqa: E402
from gnaforge.generate import generate  # noqa: E402
from gnaforge.plan import Plan, plan  # noqa: E402
from gnaforge.spec import load_spec  # noqa: E402
from sm90_kernels import CONFIGS  # noqa: E402

# What `gnaforge bench` times there: kernels fitted to these presets' shapes.
PRESETS = ("hunyuan-video", "flux-4k", "wan-720p", "cosmos", "vit-56")


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    CARRIED.mkdir(exist_ok=True)
    fitted = {config for name in PRESETS for config in plan(load_spec(name), ["sm90"]).configs}
    facts: dict[str, object] = {"commit": _git("rev-parse", "HEAD"), "uncommitted": _git("status", "--short")}
    for name, configs in (("gpu_suite", sorted(CONFIGS)), ("gpu_bench", sorted(fitted))):
        made = Plan(name, tuple(configs))
        generate(made, CARRIED)
        result = build(made, CARRIED)
        shutil.copy(library_path(CARRIED, name), LIBRARY.with_name(f"{name}.so"))
        facts[name] = result.records
        print(f"{name}.so: {len(configs)} kernels, {len(result.compiled)} compiled in {result.seconds:.0f} s")
        shutil.rmtree(CARRIED / name)
    shutil.copy(core_path(), CORE)
    FACTS.write_text(json.dumps(facts, indent=1) + "\n")
    print(f"{sum(path.stat().st_size for path in CARRIED.iterdir()) / 2**20:.1f} MB in {CARRIED}")


if __name__ == "__main__":
    main()
