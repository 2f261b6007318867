"""Moves parts of flat tensors between the ranks of a group, of uneven sizes: by one of torch.distributed's ways."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from .agreement import Group, explain

Arrival = Callable[[], torch.Tensor]
"""Waits for what was sent, and gives it."""


def _all_to_all(
    out: torch.Tensor, parts: torch.Tensor, received: list[int], sent: list[int], group: Group
) -> list[dist.Work]:
    work = dist.all_to_all_single(out, parts, received, sent, group=group, async_op=True)
    return [] if work is None else [work]


def _p2p(out: torch.Tensor, parts: torch.Tensor, received: list[int], sent: list[int], group: Group) -> list[dist.Work]:
    own, operations = dist.get_rank(group), []
    incoming, outgoing = out.split(received), parts.split(sent)
    for rank in range(len(received)):
        if rank == own:  # gloo sends nothing to oneself
            incoming[rank].copy_(outgoing[rank])
            continue
        peer = dist.get_global_rank(group, rank)
        if received[rank]:
            operations.append(dist.P2POp(dist.irecv, incoming[rank], peer, group))
        if sent[rank]:
            operations.append(dist.P2POp(dist.isend, outgoing[rank], peer, group))
    return dist.batch_isend_irecv(operations) if operations else []


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which gradients of several calls or ranks are added up."""
    return torch.float32 if dtype.itemsize < 4 else dtype


TRANSPORTS = {"all_to_all": _all_to_all, "p2p": _p2p}
"""``all_to_all``: one `all_to_all_single`; on NCCL that is a send and a receive for each count that isn't 0. ``p2p``:
`batch_isend_irecv`, of which a failure ends a rank's neighbours first and others at their next exchange."""


def start_exchange(
    transport: str, parts: torch.Tensor, sent: Sequence[int], received: Sequence[int], group: Group, doing: str
) -> Arrival:
    """Starts to send parts of a tensor, and to receive others.

    Args:
        transport: of `TRANSPORTS`.
        parts: one dimension, contiguous: the parts by the group's ranks.
        sent, received: elements for and from each rank.
        group: all of its ranks call this.
        doing: what it is, for errors.

    Raises:
        RankError: the transport fails, here or where the arrival is waited for.
    """
    out = parts.new_empty(sum(received))
    with explain(doing, group):
        works = TRANSPORTS[transport](out, parts, list(received), list(sent), group)
    alive = [parts]  # until it has been sent

    def arrive() -> torch.Tensor:
        with explain(doing, group):
            for work in works:
                work.wait()
        alive.clear()
        return out

    return arrive


def sum_over_ranks(tensor: torch.Tensor, group: Group) -> torch.Tensor:
    """The sum of all ranks' tensors, on each of them.

    Raises:
        RankError: the transport fails.
    """
    found = tensor.clone(memory_format=torch.contiguous_format)
    with explain("the sum of gradients", group):
        dist.all_reduce(found, group=group)
    return found


def gather_of_ranks(tensor: torch.Tensor, group: Group) -> list[torch.Tensor]:
    """All ranks' tensors of one shape, by rank.

    Raises:
        RankError: the transport fails.
    """
    found = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))]
    with explain("the gathering of rows", group):
        dist.all_gather(found, tensor.contiguous(), group=group)
    return found
