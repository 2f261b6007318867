"""DTensors: their placements say which ranks have which tokens, and results are placed as queries are."""

from __future__ import annotations

from math import prod
from typing import Any, cast

import torch
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from .call import Tensors, Where
from .kernels import Extra


def localize(tensors: Tensors, extra: Extra, kinds: tuple[type, ...] = (DTensor,)) -> tuple[Tensors, Extra, Where]:
    """This rank's tensors of DTensors', and the tokens that they are; or of other ``kinds`` that have what is taken of
    DTensors here: mesh, placements, the whole shape, `to_local`.

    Raises:
        TypeError: some are DTensors and others aren't.
        ValueError: they are placed in a way that can't be.
    """
    for tensor in (*tensors, *(x for x in extra if x is not None)):
        if not isinstance(tensor, kinds):
            name = kinds[0].__name__
            raise TypeError(f"query, key, value and additional keys must be {name}s, all of them or none")
    query, key, value = cast("tuple[DTensor, DTensor, DTensor]", tensors)
    mesh, placements = query.device_mesh, tuple(query.placements)
    if any(tuple(x.placements) != placements or x.device_mesh != mesh for x in (key, value)):
        raise ValueError(
            f"query, key and value must be placed alike; they are {[x.placements for x in (query, key, value)]}"
        )
    rank = query.dim() - 3
    names = mesh.mesh_dim_names or ()
    if not names:
        raise ValueError("the tensors' mesh has no names of its dimensions; give init_device_mesh mesh_dim_names")
    axes = [_shard_dim(placement, name, query.dim()) for name, placement in zip(names, placements, strict=True)]
    dims: list[str | None] = [None] * rank
    for name, axis in zip(names, axes, strict=True):
        if axis is not None and 1 <= axis <= rank:
            if dims[axis - 1] is not None:
                raise ValueError(f"dimension {axis} is divided by {dims[axis - 1]!r} and {name!r}; one is possible")
            dims[axis - 1] = name
    parts = prod(mesh.size(i) for i, axis in enumerate(axes) if axis == rank + 1)
    heads, kv_heads = query.shape[-2], key.shape[-2]
    if parts > 1 and heads != kv_heads and kv_heads % parts:
        raise ValueError(
            f"{heads} heads, {kv_heads} of keys and values, are divided over {parts} ranks: these would have queries "
            "without their keys"
        )
    local = [_local(x, query, axes) for x in extra]
    own = query.to_local(), key.to_local(), value.to_local()
    return own, (local[0], local[1], local[2]), Where(mesh, dims, tuple(query.shape[1:-2]), None)


def distribute_results(
    out: torch.Tensor, lse: torch.Tensor, query: Any, value: Any, return_lse: bool
) -> tuple[Any, Any]:
    """Results placed as the query is; the log-sum-exp where it is returned."""
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
            f"mesh dimension {name!r} has the placement {placement!r}; redistribute to Shard or Replicate first"
        )
    dim = placement.dim % dims
    if dim == dims - 1:
        raise ValueError(f"mesh dimension {name!r} divides channels, which can't be")
    return dim


def _local(tensor: torch.Tensor | None, query: DTensor, axes: list[int | None]) -> torch.Tensor | None:
    """This rank's additional keys or values, ``[batch, keys, heads, D]``, or lengths ``[batch]``, of the query's batch
    entries and heads, and of all keys. Gradients are partial sums along mesh dimensions that divide tokens.

    Raises:
        ValueError: they are placed otherwise than that.
    """
    if tensor is None:
        return None
    given = cast("DTensor", tensor)
    mesh, names = query.device_mesh, query.device_mesh.mesh_dim_names or ()
    if given.device_mesh != mesh:
        raise ValueError(f"additional keys, values and lengths must be on the query's mesh; {given.device_mesh} isn't")
    gradients: list[Placement] = []
    heads = query.dim() - 2
    for name, own, axis in zip(names, given.placements, axes, strict=True):
        expected: Placement = Replicate()
        if axis == 0 or (axis == heads and tensor.dim() > 1):
            expected = Shard(0 if axis == 0 else 2)
        if own != expected:
            raise ValueError(
                f"additional keys, values and lengths have the query's batch and heads: one of shape "
                f"{list(tensor.shape)} is {own!r} along {name!r}; it must be {expected!r}"
            )
        gradients.append(Partial() if axis is not None and 0 < axis < heads else own)
    return given.to_local(grad_placements=gradients)


def _distribute(local: torch.Tensor, shape: tuple[int, ...], like: DTensor) -> DTensor:
    stride = tuple(prod(shape[i + 1 :]) for i in range(len(shape)))
    return DTensor.from_local(
        local.contiguous(), like.device_mesh, like.placements, run_check=False, shape=torch.Size(shape), stride=stride
    )
