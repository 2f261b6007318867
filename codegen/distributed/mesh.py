"""The ranks of a device mesh that share a call: groups, and who has which shard."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from weakref import WeakSet, ref

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from .agreement import Group, explain, refuse_capture

Dims = Sequence[str | None]
"""Per token axis the name of the mesh dimension that divides it, or None."""


@dataclass(frozen=True)
class Team:
    """The ranks along some dimensions of a mesh.

    Attributes:
        group: theirs; None where that is one rank.
        rank: this one's number among them: that of its shard.
    """

    group: Group | None
    rank: int


def are_dtensors(*tensors: torch.Tensor | None) -> bool:
    """True if some are; importing what they are takes two seconds, which calls without any don't need."""
    if "torch.distributed.tensor" not in sys.modules:
        return False
    from torch.distributed.tensor import DTensor

    return any(isinstance(tensor, DTensor) for tensor in tensors)


def check_dims(mesh: DeviceMesh, dims: Dims, rank: int) -> None:
    """Refuses dimensions that can't divide so many token axes.

    Raises:
        TypeError: ``mesh`` is no device mesh.
        ValueError: the mesh has no names, ``dims`` are not one per axis, one isn't the mesh's, or they are not in the
            mesh's order, in which shards are numbered.
    """
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"mesh must be a torch.distributed.device_mesh.DeviceMesh, got {type(mesh).__name__}")
    names = mesh.mesh_dim_names
    if not names:
        raise ValueError("mesh has no names of its dimensions; give init_device_mesh mesh_dim_names")
    if isinstance(dims, str) or len(dims) != rank:
        raise ValueError(
            f"dims is {dims!r}; it must have one entry, a name or None, for each of {rank} token dimensions"
        )
    for name in dims:
        if name is not None and name not in names:
            raise ValueError(f"dims: {name!r} is no dimension of the mesh; these are {', '.join(names)}")
    places = [names.index(name) for name in dims if name is not None]
    if places != sorted(set(places)):
        raise ValueError(f"dims is {tuple(dims)!r}; names must be in the mesh's order ({', '.join(names)}), each once")


def sizes_of(mesh: DeviceMesh, names: Sequence[str | None]) -> list[int]:
    """Ranks along each of some dimensions; 1 for None."""
    own = mesh.mesh_dim_names or ()
    return [1 if name is None else mesh.size(own.index(name)) for name in names]


# By the mesh itself, as equal ones may have other groups. Torch keeps groups, and ends them: one that is kept here past
# its end would abort the process.
_groups: dict[tuple[int, tuple[str, ...]], tuple[ref[DeviceMesh], ref[Group]]] = {}
_met: WeakSet[Group] = WeakSet()


def team_of(mesh: DeviceMesh, names: Sequence[str]) -> Team:
    """The ranks of the mesh that differ in nothing but these dimensions.

    The first call for them makes process groups, of each choice of them: replicas with other grids may need others, and
    all ranks of the mesh must make them, in one order. Each has its first collective here, of all its ranks, which NCCL
    needs before sends and receives between some.

    Raises:
        RankError: a rank of the mesh doesn't take part, or a CUDA graph is captured.
    """
    several = tuple(name for name, size in zip(names, sizes_of(mesh, names), strict=True) if size > 1)
    if not several:
        return Team(None, 0)
    group = _find(mesh, several)
    if group is None:
        with explain("making groups of ranks", mesh.get_group(several[0])):
            for count in range(1, len(several) + 1):
                for some in combinations(several, count):  # last, all of them
                    group = _make(mesh, some)
    assert group is not None
    return Team(group, dist.get_rank(group))


def _find(mesh: DeviceMesh, names: tuple[str, ...]) -> Group | None:
    own, group = _groups.get((id(mesh), names), (None, None))
    return None if own is None or group is None or own() is not mesh else group()


def _make(mesh: DeviceMesh, names: tuple[str, ...]) -> Group:
    """The group along some dimensions, which torch makes once. It has no public way to that of several; a name of its
    own can't be that of a dimension."""
    group = mesh.get_group(names[0])
    if len(names) > 1:
        group = mesh[names]._flatten(f"gnaforge:{','.join(names)}").get_group()
    if group not in _met:
        refuse_capture()
        dist.all_reduce(torch.zeros(1, device=mesh.device_type), group=group)
        _met.add(group)
    key = id(mesh), names
    _groups[key] = ref(mesh, lambda _: _groups.pop(key, None)), ref(group)
    return group
