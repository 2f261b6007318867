"""Finds things, on this machine and on the one with the GPU, where gnaforge need not be installed: running kernels and
checking them asks for torch and NumPy only."""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CARRIED = HERE / "carried"
LIBRARY, BENCH_LIBRARY, CORE = CARRIED / "gpu_suite.so", CARRIED / "gpu_bench.so", CARRIED / "core.so"
DEVICE, FACTS, PLAN = CARRIED / "device.so", CARRIED / "facts.json", CARRIED / "first.json"


def set_up() -> None:
    """Makes the package and the tests' modules importable, and lets the runtime take the core from `CORE`."""
    sys.path[:0] = [str(HERE), str(HERE.parent)]
    if importlib.util.find_spec("gnaforge") is None:
        folder = Path(tempfile.mkdtemp(prefix="gnaforge-"))
        package = folder / "gnaforge"
        package.mkdir()
        # As pyproject.toml maps it.
        for path in (*(ROOT / "codegen").iterdir(), ROOT / "build_tools", ROOT / "templates"):
            (package / path.name).symlink_to(path)
        sys.path.insert(0, str(folder))
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    if CORE.is_file():
        from gnaforge.runtime import core

        core.set_core_files(lambda: [CORE])
