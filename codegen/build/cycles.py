"""Modelled cycles of compiled GPU kernels."""

from __future__ import annotations

from typing import Any

from ..build_tools.artifact import Artifact
from ..errors import BuildError
from ..families import find_family
from ..runtime.config import KernelConfig
from .identity import CUBIN_FILE


def modelled_cycles(artifact: Artifact) -> dict[str, Any]:
    """What the time model says of the kernel of an artifact, as `KernelCycles.to_json`; else ``not_modelled``, with the
    reason as its value. Reads the machine code, which takes a fifth of a second and more.
    """
    try:
        return _model(artifact)
    except BuildError as error:
        return {"not_modelled": str(error)}


def _model(artifact: Artifact) -> dict[str, Any]:
    from ..build_tools.cycles import UnknownCode, model_kernel
    from ..build_tools.files import read_at_most
    from ..build_tools.limits import CUBIN_BYTES
    from ..build_tools.sass import read_cubin

    record = artifact.record
    config = KernelConfig.parse(record["key"])
    family = find_family(config)
    demands = family.machine_code if family is not None else None
    if demands is None or demands.tile_loop is None:
        raise UnknownCode(f"nobody has told the model how kernels of {family or config.arch} work through KV tiles")
    if CUBIN_FILE not in record["files"]:
        raise UnknownCode("the cache holds no machine code of it; build it again")
    registers, memory = record.get("registers"), record.get("shared_memory")
    if not isinstance(registers, int) or not isinstance(memory, int):
        raise UnknownCode("its record doesn't say how many registers and how much shared memory it takes")
    with artifact.open_verified(CUBIN_FILE) as file:
        code = read_cubin(read_at_most(file, CUBIN_BYTES))
    return model_kernel(code, demands.tile_loop(config), registers=registers, shared_memory=memory).to_json()
