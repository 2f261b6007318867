"""A time model of GPU kernels that needs no GPU: cycles per tile, from the schedule that ptxas wrote into the code."""

from .description import (
    SM90 as SM90,
    SM100 as SM100,
    Multiprocessor as Multiprocessor,
    RoleLoop as RoleLoop,
    Roles as Roles,
    Step as Step,
    TileLoop as TileLoop,
)
from .instruction import UnknownCode as UnknownCode
from .kernel import QUEUES as QUEUES, KernelCycles as KernelCycles, model_kernel as model_kernel
