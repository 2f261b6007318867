"""What `import gnaforge` offers to run kernels: the runtime, connected to the compile cache.

The public names are listed in ``gnaforge.__all__``; here they only pass through.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

from .build.cached import open_kernels
from .build.core import core_files
from .errors import BuildError as BuildError, InputError as InputError
from .families import TARGETS, find_family
from .runtime import core, family as family_facts, lookup
from .runtime.config import KernelConfig as KernelConfig
from .runtime.core import load_library as load_library
from .runtime.errors import LibraryError as LibraryError, NoKernelError as NoKernelError
from .runtime.kernels import Kernel as Kernel, kernels as kernels, registry as registry
from .runtime.modules import (
    NeighborhoodAttention1D as NeighborhoodAttention1D,
    NeighborhoodAttention2D as NeighborhoodAttention2D,
    NeighborhoodAttention3D as NeighborhoodAttention3D,
)
from .runtime.ops import na1d as na1d, na2d as na2d, na3d as na3d, neighborhood_attention as neighborhood_attention
from .runtime.request import Request


class CacheSource:
    """Kernels in the compile cache, and the compiler."""

    def builds(self, request: Request) -> Iterator[Iterator[BinaryIO]]:
        """What the cache and its layers have of each kernel whose key may serve the request. Asks no compiler."""
        return open_kernels(request)

    def make(self, request: Request, *, quiet: bool) -> lookup.Made:
        """Compiles a kernel for the request and loads it."""
        from .registration import make_for_call

        return make_for_call(request, quiet=quiet)

    def remedy(self, request: Request) -> str:
        """The command that builds a kernel for the request."""
        from .registration import config_for

        try:
            return f"or build one with: gnaforge build {config_for(request, fit=False)}"
        except InputError as error:
            has = ", ".join(TARGETS)
            return f"this version has kernels for {has} only: {error}"


def _facts(config: KernelConfig) -> family_facts.FamilyFacts | None:
    family = find_family(config)
    return family.facts if family else None


core.set_core_files(core_files)
lookup.set_source(CacheSource())
family_facts.set_provider(_facts)
