"""Calls of the operator with an emulated kernel, in a process of its own: the stand-in reads its settings once."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

MODES = {"eager": "round-robin", "lazy": "depth-first", "random": "random"}

PRELUDE = """
import torch, gnaforge
from gnaforge.runtime.config import KernelConfig
config = KernelConfig.parse("{key}")
gnaforge.load_library("{library}")
torch.manual_seed(0)
def attend(q, k, v, *pattern):
    return gnaforge.neighborhood_attention(q, k, v, *pattern, return_lse=True, kernel=config)
"""

REFUSED = """
x = torch.randn(1, 300, 2, 136).half()
try:
    {call}
except Exception as error:
    print(error)
"""


def run(code: str | list[str], mode: str = "random", device: str = "b200", relaxed: Sequence[str] = ()) -> str:
    """Runs Python, code or a file with its arguments; it must succeed. Returns what it printed. ``relaxed``: options of
    the emulator."""
    settings = {"MEMORY": "mapped", "TIMING": mode, "ORDER": MODES[mode], "SEED": "0", "DEVICE": device}
    settings["PROCESSORS"] = "3"  # so that CTAs take several Q tiles
    settings.update({option.upper(): "1" for option in relaxed})
    arguments = ["-c", code] if isinstance(code, str) else code
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), *filter(None, [os.environ.get("PYTHONPATH")])])
    names = {f"GNAFORGE_EMULATOR_{name}": value for name, value in settings.items()}
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=here,
        env={**os.environ, **names, "PYTHONPATH": path},
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
