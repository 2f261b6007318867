"""Divides DTensors over devices for the operators: by batch and by heads, where none needs what another device has.

Tokens stay whole.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch


def register_strategies() -> None:
    """Registers the operators' sharding."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._op_schema import RuntimeSchemaInfo

    operators = torch.ops.gnaforge
    register = DTensor._op_dispatcher.sharding_propagator.register_op_strategy
    # What a placement is remembered for: all arguments from the pattern on.
    for operator in (operators.forward, operators.forward_no_grad):
        register(operator.default, _forward, RuntimeSchemaInfo(3, needs_pytree=True))
    register(operators.backward.default, _backward, RuntimeSchemaInfo(7, needs_pytree=True))


def _forward(schema: Any) -> Any:
    """The placements that a forward call may have: of out, lse, query, key, value, and of extra keys and values,
    [batch, tokens, heads, channels], and their lengths."""
    from torch.distributed.tensor import Replicate, Shard

    extra = len(schema.args_strategy) - 3
    heads, whole = Shard(len(schema.args_strategy[0].shape) - 2), Replicate()
    kinds = [
        [whole] * (5 + extra),
        [Shard(0)] * (5 + extra),
        [heads] * 5 + [Shard(2), Shard(2), whole][:extra],
        [heads] * 3 + [whole] * (2 + extra),  # the one head of keys for all
    ]
    return _strategy(schema, kinds, outputs=2, query=0)


def _backward(schema: Any) -> Any:
    """The placements that a backward call may have: of the gradients of query, key and value, of those of out and
    perhaps lse, of query, key, value, out and lse. Gradients that aren't wanted have no elements to divide."""
    from torch.distributed.tensor import Replicate, Shard

    inputs = len(schema.args_strategy)
    wanted = [schema.args_schema[9] >> i & 1 for i in range(3)]
    heads = Shard(len(schema.args_strategy[0].shape) - 2)
    kinds = [
        [placement if there else Replicate() for there in wanted] + [placement] * inputs
        for placement in (Replicate(), Shard(0), heads)
    ]
    return _strategy(schema, kinds, outputs=3, query=inputs - 5)


def _strategy(schema: Any, kinds: list[Any], *, outputs: int, query: int) -> Any:
    """All that a mesh of several dimensions makes of placements along one, as far as each device has the heads of K and
    V that its heads of Q share. ``query`` is the number of its tensor among the inputs; the key's is the next."""
    from torch.distributed.tensor._op_schema import OpStrategy
    from torch.distributed.tensor._ops.utils import expand_to_full_mesh_op_strategy

    shapes = [strategy.shape for strategy in schema.args_strategy[query : query + 2]]
    dim = len(shapes[0]) - 2
    heads, kv_heads = (shape[dim] for shape in shapes)

    def keeps_groups(spec: Any) -> bool:
        parts, kv_parts = (
            prod(own.mesh.size(d) for d, placement in enumerate(own.placements) if placement.is_shard(dim))
            for own in spec.input_specs[query : query + 2]
        )
        if parts != kv_parts:
            return bool(kv_heads == 1 and kv_parts == 1)
        return bool(parts == 1 or heads == kv_heads or kv_heads % parts == 0)

    found = expand_to_full_mesh_op_strategy(schema.get_mesh_from_args(), schema, kinds, input_index=outputs)
    return OpStrategy([spec for spec in found.strategies if keeps_groups(spec)])
