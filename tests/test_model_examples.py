"""The programs of `examples/`, run as they stand; they check their own results."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "examples"
SAY = {
    "flux_windows.py": "3 forward passes, step 2, grid 16x16; 19.1% of the image's pairs",
    "hunyuan_block.py": "the second prompt's padding changed nothing but itself",
    "streaming_video.py": "all frames at once give the same",
    "train_nat.py": "step 40: loss 0.0",
    "wheel_in_a_program.py": "(1, 24, 24, 4, 32) (1, 24, 24, 4) False",
}


def test_every_example_is_run() -> None:
    elsewhere = {"weather.py"}  # on several processes: tests/test_distributed.py
    assert {path.name for path in FOLDER.glob("*.py")} == SAY.keys() | elsewhere


@pytest.mark.usefixtures("kernel_set")
@pytest.mark.parametrize("name", SAY)
def test_example(name: str, tmp_path: Path) -> None:
    """With kernels that tests have, and no others: an example compiles none of its own here."""
    if name == "flux_windows.py":
        pytest.importorskip("diffusers")
    environment = {**os.environ, "GNAFORGE_JIT": "never", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(FOLDER / name)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert SAY[name] in done.stdout, done.stdout
    assert all(word not in done.stderr for word in ("Traceback", "compiled"))
