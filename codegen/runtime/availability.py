"""Tells whether kernels of a family can run on this machine, and if not, why."""

from __future__ import annotations

import ctypes

from .family import FamilyFacts


def why_not(family: FamilyFacts, cuda_runtime: str = "") -> str:
    """Why the kernels of a family can't run in this process; empty if they can.

    Args:
        family: its facts.
        cuda_runtime: version of the CUDA runtime inside the library; the driver must be as new in its first number.
    """
    if family.device == "cpu":
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
    if any(capability in family.capabilities for capability in found):
        return ""
    listing = ", ".join(f"sm_{major}{minor}" for major, minor in sorted(set(found)))
    return f"built for sm_{family.nvcc_target}, the GPUs here are {listing}"


def _driver_version() -> int:
    """The first number of the CUDA version that the driver supports; 0 if it can't be asked."""
    version = ctypes.c_int(0)
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return 0
    return version.value // 1000
