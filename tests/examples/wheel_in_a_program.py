"""A wheel of one kernel, and another program that uses it: that program has torch and the wheel, and no gnaforge."""

import subprocess
import sys
import tempfile
from pathlib import Path

PROGRAM = """
import sys
import torch
import my_attention

q = k = v = torch.randn(1, 24, 24, 4, 32)
out, lse = my_attention.na2d(q, k, v, kernel_size=7, stride=2, return_lse=True)
print(my_attention.report())
print(tuple(out.shape), tuple(lse.shape), "gnaforge" in sys.modules)
"""

with tempfile.TemporaryDirectory() as folder:
    kernel = "gna_forward-cpu-r2-fp32-dany-q8x8-kv8x8"  # or a spec; see `gnaforge presets`
    gnaforge = [sys.executable, "-m", "gnaforge"]
    subprocess.run([*gnaforge, "wheel", kernel, "--name", "my_attention", "--out", folder], check=True)
    (wheel,) = Path(folder).glob("*.whl")
    site = Path(folder) / "site"  # pip install would do; this leaves your environment as it is
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(site), str(wheel)]
    subprocess.run(pip, check=True)
    subprocess.run([sys.executable, "-c", PROGRAM], check=True, cwd=site)
