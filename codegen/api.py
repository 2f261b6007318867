"""What `import gnaforge` offers to run kernels: the runtime, connected to the compile cache.

The public names are listed in ``gnaforge.__all__``; here they only pass through.
"""

from __future__ import annotations

from .arch import ARCHES
from .build import LIBRARY_FILE, source_digest
from .build_tools.cache import cache_layers
from .core_extension import core_path
from .errors import BuildError
from .runtime import core, lookup
from .runtime.config import ANY_HEAD_DIM, KernelConfig as KernelConfig
from .runtime.core import load_library as load_library
from .runtime.errors import LibraryError as LibraryError, NoKernelError as NoKernelError
from .runtime.kernels import Kernel as Kernel, kernels as kernels, registry as registry
from .runtime.modules import (
    NeighborhoodAttention1D as NeighborhoodAttention1D,
    NeighborhoodAttention2D as NeighborhoodAttention2D,
    NeighborhoodAttention3D as NeighborhoodAttention3D,
)
from .runtime.ops import na1d as na1d, na2d as na2d, na3d as na3d, neighborhood_attention as neighborhood_attention


class CacheSource:
    """Kernels in the compile cache that were made from the sources that this version has. Probes no compiler."""

    def libraries(self, request: lookup.Request) -> list[str]:
        """Libraries of the cache's layers whose key may serve the request."""
        found = []
        for cache in cache_layers():
            if not cache.trusted():
                continue
            for artifact in cache.artifacts():
                try:
                    config = KernelConfig.parse(artifact.record["key"])
                    source = artifact.record["source_digest"]
                except (ValueError, KeyError):  # the core, or a key of another version
                    continue
                if not _may_serve(config, request) or source != source_digest(config):
                    continue
                try:
                    found.append(str(artifact.verified(LIBRARY_FILE)))
                except BuildError:
                    continue  # damaged: as good as absent, `gnaforge build` makes it anew
        return found

    def remedy(self, request: lookup.Request) -> str:
        """The command that builds a kernel for the request."""
        for arch in ARCHES.values():
            if arch.device != request.device or request.dtype not in arch.dtypes:
                continue
            q_tile, kv_tile = arch.default_tiles[request.rank]
            fixed = not arch.head_dim_at_run_time
            config = KernelConfig(
                op=request.op,
                arch=arch.name,
                rank=request.rank,
                dtype=request.dtype,
                head_dim=request.head_dim if fixed else ANY_HEAD_DIM,
                value_head_dim=request.value_head_dim if fixed else ANY_HEAD_DIM,
                q_tile=request.q_tile or q_tile,
                kv_tile=request.kv_tile or kv_tile,
                variant=arch.variants[0],
            )
            if not arch.problems(config):
                return f"build one with: gnaforge build {config.key}"
        has = ", ".join(ARCHES)
        return f"this version has kernels for {has} only: none for {request.dtype} on {request.device}"


def _may_serve(config: KernelConfig, request: lookup.Request) -> bool:
    arch = ARCHES.get(config.arch)
    dims = (config.head_dim, config.value_head_dim or config.head_dim)
    return (
        arch is not None
        and arch.device == request.device
        and (config.op, config.rank, config.dtype) == (request.op, request.rank, request.dtype)
        and dims in ((ANY_HEAD_DIM, ANY_HEAD_DIM), (request.head_dim, request.value_head_dim))
        and not arch.problems(config)  # a kernel of another version
    )


core.set_core_path(core_path)
lookup.set_source(CacheSource())
