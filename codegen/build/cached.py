"""Kernels in the compile cache and its layers that this version would make. Asks no compiler and starts nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ..build_tools.cache import cache_layers, current_in_layers, open_in_layers
from ..families import find_family
from ..runtime.config import KernelConfig
from ..runtime.request import Request, refusal
from .identity import LIBRARY_FILE, installed_parts, source_digest


def find_kernel(config: KernelConfig) -> Path | None:
    """The library of a kernel that was compiled before."""
    return current_in_layers(config.key, source_digest(config), LIBRARY_FILE, installed_parts(config))


def open_kernel(config: KernelConfig) -> Iterator[BinaryIO]:
    """The libraries of a kernel that were compiled before and fit this machine, open, the best first: see
    `gnaforge.build_tools.cache.open_in_layers`."""
    return open_in_layers(config.key, source_digest(config), LIBRARY_FILE, installed_parts(config))


def open_kernels(request: Request) -> Iterator[Iterator[BinaryIO]]:
    """`open_kernel` of all kernels that may serve a request."""
    names = dict.fromkeys(name for cache in cache_layers() for name in cache.names())
    configs = [config for name in names if (config := _parse(name)) is not None and may_serve(config, request)]
    return map(open_kernel, configs)


def _parse(name: str) -> KernelConfig | None:
    try:
        return KernelConfig.parse(name)
    except ValueError:  # the core, an emulated kernel, or one of another version
        return None


def may_serve(config: KernelConfig, request: Request) -> bool:
    """Whether a kernel may compute what a request asks for, as far as its key tells."""
    family = find_family(config)
    return family is not None and not refusal(config, family.target.device, request, features=family.features)
