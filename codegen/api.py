"""Offers all that runs kernels to `import gnaforge`: the runtime, connected to the cache (`registration.connect`).

The public names are listed in ``gnaforge.__all__``; here they only pass through.
"""

from __future__ import annotations

from .errors import BuildError as BuildError, InputError as InputError
from .registration import connect as connect, disconnect as disconnect
from .runtime.config import KernelConfig as KernelConfig
from .runtime.core import load_library as load_library
from .runtime.errors import LibraryError as LibraryError, NoKernelError as NoKernelError
from .runtime.joint import joint_attention as joint_attention
from .runtime.kernels import Kernel as Kernel, kernels as kernels, registry as registry
from .runtime.modules import (
    NeighborhoodAttention1D as NeighborhoodAttention1D,
    NeighborhoodAttention2D as NeighborhoodAttention2D,
    NeighborhoodAttention3D as NeighborhoodAttention3D,
)
from .runtime.ops import na1d as na1d, na2d as na2d, na3d as na3d, neighborhood_attention as neighborhood_attention

connect()
