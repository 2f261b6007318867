"""Which arch's kernels run on this machine."""

from __future__ import annotations

from ..errors import InputError
from .arch import ARCHES


def machine_arch(device: str = "", index: int | None = None) -> str:
    """The arch of a device: the GPU's where torch can use one, else ``cpu``. Imports torch.

    Args:
        device: ``cpu`` or ``cuda``; empty for ``cuda`` where there is one.
        index: which CUDA device; default: the current one.

    Raises:
        InputError: the GPU is one that has no kernels in this version.
    """
    import torch

    if device == "cpu" or not (device or torch.cuda.is_available()):
        return "cpu"
    capability = torch.cuda.get_device_capability(index)
    for name, arch in ARCHES.items():
        if capability in arch.capabilities:
            return name
    has = ", ".join(ARCHES)
    raise InputError(
        f"arch: this machine's GPU is sm{capability[0]}{capability[1]}, which this version has no kernels for; "
        f"it has {has}"
    )
