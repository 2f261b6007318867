"""Trains a layer of a weather model on 4 processes, each with a quarter of the globe: longitude wraps around.

    python weather.py                 # starts its processes; or: torchrun --nproc-per-node 4 weather.py

Latitude and longitude are divided in two each. A process holds its part of a field, and never more than that and a
border of keys and values of its neighbours, for windows of 7 x 7 around each point; windows end at the poles, and go on
where longitude begins again. On GPUs the backend is nccl; that has not been run on hardware.
"""

from __future__ import annotations

import os
import socket

import torch
import torch.distributed as dist
from gnaforge.distributed import context_parallel_attention, plan
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

GRID, CHANNELS, HEADS = (24, 48), 32, 2
WINDOWS = {"kernel_size": 7, "edge": ("cut", "wrap")}


class Layer(nn.Module):
    """Attention to the neighbourhood of each point, and what a point makes of it."""

    def __init__(self, mesh: DeviceMesh) -> None:
        super().__init__()
        self.where = {"mesh": mesh, "dims": ("latitude", "longitude"), "grid": GRID}
        self.qkv, self.out = nn.Linear(CHANNELS, 3 * CHANNELS), nn.Linear(CHANNELS, CHANNELS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).unbind(-3)
        return x + self.out(context_parallel_attention(q, k, v, **WINDOWS, **self.where).flatten(-2))


def fields() -> tuple[torch.Tensor, torch.Tensor]:
    """Today's field and tomorrow's, which the wind has moved by three points to the east."""
    today = torch.randn(2, *GRID, CHANNELS, generator=torch.Generator().manual_seed(0))
    return today, today.roll(3, dims=2)


def part(x: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    """This process's quarter; a real model reads no more than that."""
    for dim, name in ((1, "latitude"), (2, "longitude")):
        x = x.chunk(mesh[name].size(), dim)[mesh.get_local_rank(name)]
    return x.contiguous()


def train() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("latitude", "longitude"))
    torch.manual_seed(0)  # all processes have the same weights
    layer = Layer(mesh)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    today, tomorrow = (part(x, mesh) for x in fields())
    q = torch.empty(*today.shape[:-1], HEADS, CHANNELS // HEADS)
    what = plan(q, q, q, **WINDOWS, **layer.where)
    for step in range(5):
        loss = (layer(today) - tomorrow).square().mean() / 4
        optimizer.zero_grad()
        loss.backward()
        for parameter in layer.parameters():  # as data parallelism does it: points are spread over processes
            dist.all_reduce(parameter.grad)
        optimizer.step()
        dist.all_reduce(loss)
        if dist.get_rank() == 0:
            print(f"step {step}: loss {loss.item():.4f}")
    if dist.get_rank() == 0:
        print(
            f"{what.mode}: {what.traffic.received} bytes from {what.peers} processes, {what.inner_share:.0%} need none"
        )


def main(rank: int = int(os.environ.get("RANK", 0))) -> None:
    dist.init_process_group("gloo", rank=rank, world_size=4)
    train()
    dist.destroy_process_group()


if __name__ == "__main__":
    if "RANK" in os.environ:  # of torchrun
        main()
    else:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
        children = [torch.multiprocessing.get_context("fork").Process(target=main, args=(rank,)) for rank in range(4)]
        for child in children:
            child.start()
        for child in children:
            child.join()
        raise SystemExit(any(child.exitcode for child in children))
