"""First runs of kernels, of which `warmup` is made: what is loaded late, and set up once, is so then."""

from __future__ import annotations

import torch

from .families import family_of
from .runtime.availability import why_not
from .runtime.config import KernelConfig
from .runtime.dtypes import DTYPES
from .runtime.gradient_call import gradient_call
from .runtime.op_table import FORWARD, OPS
from .runtime.ops import neighborhood_attention
from .runtime.problem import Problem


def run_once(config: KernelConfig) -> str:
    """Runs a kernel on a tiny problem, if it can run here. Returns why it can't; empty if it did."""
    target = family_of(config).target
    device = target.device
    if target.is_gpu and not (torch.cuda.is_available() and torch.cuda.get_device_capability() in target.capabilities):
        return why_not(family_of(config).facts) or "the current device is another GPU"
    tokens = tuple(map(max, config.q_tile, config.kv_tile))
    dim = config.head_dim or 64
    value_dim = config.value_head_dim or dim
    if config.op != FORWARD.name:
        problem = Problem(tokens, tokens, head_dim=dim, value_head_dim=value_dim, dtype=config.dtype)
        inputs = {
            role.name: torch.zeros(role.shape(problem), dtype=role.dtype(problem).torch, device=device)
            for role in OPS[config.op].inputs
        }
        gradient_call(problem, inputs, {config.op: config.key})()
        return ""
    dtype = DTYPES[config.dtype].torch
    q = torch.zeros(1, *tokens, config.q_tile_heads, dim, dtype=dtype, device=device)
    k = torch.zeros(1, *tokens, 1, dim, dtype=dtype, device=device)
    v = torch.zeros(1, *tokens, 1, value_dim, dtype=dtype, device=device)
    with torch.no_grad():
        output = DTYPES[config.output_dtype].torch if DTYPES[config.dtype].scaled else None
        neighborhood_attention(q, k, v, tokens, kernel=config, out_dtype=output)
    return ""
