"""DTensors: their placements say which ranks have which tokens, and results are placed as queries are."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any, cast

import torch
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from .call import Given, Options, Tensors, Where, prepare
from .kernels import Extra


def attend_dtensors(
    tensors: Tensors,
    extra: Extra,
    given: Given,
    options: Options,
    return_lse: bool,
) -> tuple[Any, Any]:
    """`context_parallel_attention` of DTensors.

    Raises:
        TypeError: some are DTensors and others aren't.
        ValueError: they are placed in a way that can't be.
    """
    for tensor in (*tensors, *(x for x in extra if x is not None)):
        if not isinstance(tensor, DTensor):
            raise TypeError("query, key, value and additional keys must be DTensors, all of them or none")
    query, key, value = cast("tuple[DTensor, DTensor, DTensor]", tensors)
    mesh, placements = query.device_mesh, tuple(query.placements)
    if any(tuple(x.placements) != placements or x.device_mesh != mesh for x in (key, value)):
        raise ValueError(
            f"query, key and value must be placed alike; they are {[x.placements for x in (query, key, value)]}"
        )
    rank = query.dim() - 3
    names = mesh.mesh_dim_names or ()
    if not names:
        raise ValueError("the DTensors' mesh has no names of its dimensions; give init_device_mesh mesh_dim_names")
    dims: list[str | None] = [None] * rank
    for name, placement in zip(names, placements, strict=True):
        axis = _shard_dim(placement, name, query.dim())
        if axis is not None and 1 <= axis <= rank:
            if dims[axis - 1] is not None:
                raise ValueError(f"dimension {axis} is divided by {dims[axis - 1]!r} and {name!r}; one is possible")
            dims[axis - 1] = name
    local = tuple(_local(x, placements, dims, names) for x in extra)
    grid = tuple(query.shape[1:-2])
    where = Where(mesh, dims, grid, None)
    own = query.to_local(), key.to_local(), value.to_local()
    partial = replace(options, extra_grad="partial")  # DTensor adds them itself
    prepared = prepare(own, cast("Extra", local), given, where, partial)
    out, lse = prepared.run(return_lse)
    rows = tuple(query.shape[:-1])
    return _distribute(out, (*rows, value.shape[-1]), query), _distribute(lse, rows, query) if return_lse else lse


def _shard_dim(placement: Placement, name: str, dims: int) -> int | None:
    """The dimension that a placement divides.

    Raises:
        ValueError: it is a partial sum, divides channels, or in another way than in chunks.
    """
    if isinstance(placement, Replicate):
        return None
    if type(placement) is not Shard:
        raise ValueError(
            f"mesh dimension {name!r} has the placement {placement}; redistribute to Shard or Replicate first"
        )
    dim = placement.dim % dims
    if dim == dims - 1:
        raise ValueError(f"mesh dimension {name!r} divides channels, which can't be")
    return dim


def _local(
    tensor: torch.Tensor | None, placements: tuple[Placement, ...], dims: list[str | None], names: tuple[str, ...]
) -> torch.Tensor | None:
    """This rank's additional keys or values, or lengths; their gradients are partial sums along mesh dimensions that
    divide tokens."""
    if tensor is None:
        return None
    assert isinstance(tensor, DTensor)
    gradients = []
    for name, own in zip(names, tensor.placements, strict=True):
        if name in dims and not isinstance(own, Replicate):
            raise ValueError(
                f"additional keys, values and lengths must be replicated along {name!r}, which divides tokens"
            )
        gradients.append(Partial() if name in dims else own)
    return tensor.to_local(grad_placements=gradients)


def _distribute(local: torch.Tensor, shape: tuple[int, ...], like: DTensor) -> DTensor:
    stride = tuple(prod(shape[i + 1 :]) for i in range(len(shape)))
    return DTensor.from_local(
        local.contiguous(), like.device_mesh, like.placements, run_check=False, shape=torch.Size(shape), stride=stride
    )
