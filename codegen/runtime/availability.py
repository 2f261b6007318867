"""Whether kernels of an arch can run on this machine, and if not, why."""

from __future__ import annotations

import ctypes
import re

_TARGET = re.compile(r"(?P<major>\d+)(?P<minor>\d)(?P<kind>[af]?)")


def runs_on(target: str, capability: tuple[int, int]) -> bool:
    """Whether code compiled for ``sm_<target>`` runs on a GPU of that compute capability (CUDA C Programming Guide).

    ``90a`` runs on 9.0 alone, ``100f`` on 10.0 and later ones of that family, ``90`` on any 9.x from 9.0 on.
    """
    match = _TARGET.fullmatch(target)
    if match is None:
        return False
    built = int(match["major"]), int(match["minor"])
    if match["kind"] == "a":
        return built == capability
    return built[0] == capability[0] and built[1] <= capability[1]


def why_not(target: str, cuda_runtime: str = "") -> str:
    """Why kernels compiled for ``sm_<target>`` can't run in this process; empty if they can.

    Args:
        target: the architecture that nvcc compiled for, as in ``90a``; empty for cpu kernels, which always run.
        cuda_runtime: version of the CUDA runtime inside the library; the driver must be as new in its first number.
    """
    if not target:
        return ""
    import torch

    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) is built without CUDA"
    if not torch.cuda.is_available():
        return "torch finds no GPU, or no driver for it"
    driver = _driver_version()
    if cuda_runtime and driver < int(cuda_runtime.split(".")[0]):
        return f"the GPU's driver is for CUDA {driver}, the kernels need one for CUDA {cuda_runtime.split('.')[0]}"
    found = [torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())]
    if any(runs_on(target, capability) for capability in found):
        return ""
    listing = ", ".join(f"sm_{major}{minor}" for major, minor in sorted(set(found)))
    return f"built for sm_{target}, the GPUs here are {listing}"


def _driver_version() -> int:
    """The first number of the CUDA version that the driver supports; 0 if it can't be asked."""
    version = ctypes.c_int(0)
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return 0
    return version.value // 1000
