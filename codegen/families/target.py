"""The hardware that kernels are compiled for: one entry per target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ..errors import InputError


@dataclass(frozen=True)
class Target:
    """Hardware, and what compiles for it.

    Attributes:
        name: of the target in keys and specs, where it is called arch.
        device: ``cpu`` or ``cuda``: where the tensors of its kernels are.
        compiler: ``c++`` or ``nvcc``.
        nvcc_target: what nvcc compiles for, as in ``sm_<nvcc_target>``; empty for C++.
        nvcc: the first release of nvcc that kernels are compiled with; (0, 0) for C++.
        capabilities: the CUDA compute capabilities that its kernels run on; none for a CPU. The only list of them:
            kernels and wheels take it from here.
        gpus: names of GPUs that have these capabilities, for messages.
        emulated_device: the GPU of the emulator that stands for it; empty for a CPU.
        job_memory_gb: the most memory that one compilation takes.
    """

    name: str
    device: str
    compiler: str
    nvcc_target: str = ""
    nvcc: tuple[int, int] = (0, 0)
    capabilities: tuple[tuple[int, int], ...] = ()
    gpus: str = ""
    emulated_device: str = ""
    job_memory_gb: float = 4.0

    @property
    def is_gpu(self) -> bool:
        """Whether its kernels run on a GPU."""
        return self.device == "cuda"

    @property
    def needs(self) -> str:
        """The compute capabilities as a refusal names them; empty for a CPU."""
        names = " or ".join(f"{major}.{minor}" for major, minor in self.capabilities)
        return f"{names} ({self.gpus})" if names else ""


TARGETS: Mapping[str, Target] = MappingProxyType(
    {
        target.name: target
        for target in (
            Target(name="cpu", device="cpu", compiler="c++", job_memory_gb=1.0),
            Target(
                name="sm90",
                device="cuda",
                compiler="nvcc",
                nvcc_target="90a",
                # Knows it since 12.0, but ptxas of 12.4 schedules the same PTX up to 15 % worse, by its own stall
                # counts, than those of 12.8 and 13.5, which are within 1 %.
                nvcc=(12, 8),
                capabilities=((9, 0),),
                gpus="H100, H200, GH200",
                emulated_device="h100",
            ),
            Target(
                name="sm100",
                device="cuda",
                compiler="nvcc",
                nvcc_target="100f",
                nvcc=(12, 9),
                capabilities=((10, 0), (10, 3)),
                gpus="B200, GB200, B300, GB300",
                emulated_device="b200",
            ),
        )
    }
)


def require_target(name: str) -> Target:
    """The target of this name.

    Raises:
        InputError: there is none.
    """
    if name not in TARGETS:
        raise InputError(f"arch: {name!r} is unknown; there are {', '.join(TARGETS)}")
    return TARGETS[name]


def machine_target(device: str = "", index: int | None = None) -> Target:
    """The target of a device of this machine: the GPU's where torch can use one, else the CPU's. Imports torch.

    Args:
        device: ``cpu`` or ``cuda``; empty for ``cuda`` where there is one.
        index: of the CUDA device; default: the current one.

    Raises:
        InputError: the GPU is one that has no kernels in this version, or there is none.
    """
    import torch

    if device == "cpu" or not (device or torch.cuda.is_available()):
        return TARGETS["cpu"]
    if not torch.cuda.is_available():  # fake tensors may be on any device
        raise InputError("arch: torch finds no GPU on this machine; name the arch to build for, or the kernel to take")
    capability = torch.cuda.get_device_capability(index)
    for target in TARGETS.values():
        if capability in target.capabilities:
            return target
    raise InputError(
        f"arch: this machine's GPU is sm{capability[0]}{capability[1]}, which this version has no kernels for; "
        f"it has {', '.join(TARGETS)}"
    )
