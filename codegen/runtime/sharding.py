"""Divides DTensors over devices for the operators: by batch and by heads, where none needs what another device has.

Tokens stay whole.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from math import prod
from typing import Any

import torch

from .problem import PATTERN_FIELDS, PLAIN_PATTERN_FIELDS

_registered = False


def register_when_imported() -> bool:
    """Registers the sharding of DTensors, once, where they are imported. Whether it did now."""
    global _registered
    if _registered or "torch.distributed.tensor" not in sys.modules:
        return False
    _register_strategies()
    _registered = True
    return True


def _register_strategies() -> None:
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._op_schema import RuntimeSchemaInfo

    operators = torch.ops.gnaforge
    register = DTensor._op_dispatcher.sharding_propagator.register_op_strategy
    # What a placement is remembered for: all arguments from the pattern on.
    for operator in (operators.forward, operators.forward_no_grad):
        register(operator.default, _forward, RuntimeSchemaInfo(3, needs_pytree=True))
    register(operators.forward_varlen.default, _samples, RuntimeSchemaInfo(3, needs_pytree=True))
    register(operators.attention_varlen.default, _packed, RuntimeSchemaInfo(5, needs_pytree=True))
    register(operators.joint.default, _joint, RuntimeSchemaInfo(3, needs_pytree=True))
    register(operators.joint_apart.default, _joint_apart, RuntimeSchemaInfo(3, needs_pytree=True))
    register(operators.backward.default, _backward, RuntimeSchemaInfo(7, needs_pytree=True))
    register(operators.backward_varlen.default, _backward_samples, RuntimeSchemaInfo(7, needs_pytree=True))
    register(operators.attention_backward_varlen.default, _backward_packed, RuntimeSchemaInfo(7, needs_pytree=True))
    register(operators.joint_backward.default, _backward_joint, RuntimeSchemaInfo(3, needs_pytree=True))


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
    return _strategy(schema, kinds[: 2 if _has_own_patterns(schema) else None], outputs=2, query=0)


def _has_own_patterns(schema: Any, place: int = 3) -> bool:
    """Whether a call's pattern, at a place among its arguments, has an entry for each head, so that these can't be
    divided."""
    rank = len(schema.args_strategy[0].shape) - 3
    return len(schema.args_schema[place]) not in (rank * PLAIN_PATTERN_FIELDS, rank * PATTERN_FIELDS)


def _samples(schema: Any) -> Any:
    """The placements that a call of packed samples may have: of out, lse, query, key, value, [batch, tokens, heads,
    channels], and of extra keys and values, and their lengths, of all samples of all batch entries."""
    from torch.distributed.tensor import Replicate, Shard

    extra = len(schema.args_strategy) - 3
    whole, heads = Replicate(), Shard(2)
    kinds = [
        [whole] * (5 + extra),
        [Shard(0)] * (5 + extra),
        [heads] * 5 + [heads, heads, whole][:extra],
        [heads] * 3 + [whole] * (2 + extra),
    ]
    return _strategy(schema, kinds, outputs=2, query=0)


def _packed(schema: Any) -> Any:
    """The placements that dense attention of packed samples may have: of out, lse, query, key, value, and of cumulative
    lengths, which all devices have."""
    from torch.distributed.tensor import Replicate, Shard

    lengths = len(schema.args_strategy) - 3
    whole, heads = Replicate(), Shard(2)
    kinds = [[place] * 5 + [whole] * lengths for place in (whole, Shard(0), heads)]
    kinds.append([heads] * 3 + [whole] * (2 + lengths))
    return _strategy(schema, kinds, outputs=2, query=0)


def on_mesh(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A tensor that all devices have, beside a DTensor; itself beside any other."""
    if "torch.distributed.tensor" not in sys.modules:
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    if not isinstance(like, DTensor) or isinstance(tensor, DTensor):
        return tensor
    mesh = like.device_mesh
    return DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)


def _joint(schema: Any) -> Any:
    """The placements of joint attention of packed tokens: results are [batch, tokens, heads, channels] and the same
    without channels."""
    return _joint_strategy(schema, [2, 2])


def _joint_apart(schema: Any) -> Any:
    """Those of tensors apart, whose first two results have the image's token dimensions."""
    image = len(schema.args_strategy[0].shape) - 2
    return _joint_strategy(schema, [image, image, 2, 2])


def _joint_strategy(schema: Any, heads_of_results: list[int]) -> Any:
    """By batch, or by heads: of all tensors that have some, or of queries alone, where keys have one head for all."""
    from torch.distributed.tensor import Replicate, Shard

    whole, inputs = Replicate(), [len(strategy.shape) for strategy in schema.args_strategy]
    results = [Shard(dim) for dim in heads_of_results]
    count = len(results) + len(inputs)
    kinds = [[whole] * count, [Shard(0)] * count]
    if not _has_own_patterns(schema):
        kinds.append([*results, *(Shard(dims - 2) if dims > 1 else whole for dims in inputs)])
        triples = iter([True, False, False] * count)  # query, key and value, of the image and of texts; then lengths
        kinds.append([*results, *(Shard(dims - 2) if dims > 1 and next(triples) else whole for dims in inputs)])
    return _strategy(schema, kinds, outputs=len(heads_of_results), query=0)


def _backward(schema: Any) -> Any:
    """The placements that a backward call may have: of the gradients of query, key, value, extra keys and values; of
    those of out and perhaps lse, of query, key, value, out and lse, perhaps of extra keys, values and lengths."""
    heads = len(schema.args_strategy[0].shape) - 2
    rows = 6 + (schema.args_schema[1] is not None)
    inputs = [heads] * rows + [2, 2, None][: len(schema.args_strategy) - rows]
    own = _has_own_patterns(schema, 7)
    return _gradients(schema, [heads] * 3 + [2] * 2, inputs, wanted=9, query=rows - 5, by_heads=not own)


def _backward_samples(schema: Any) -> Any:
    """Those of packed samples, and perhaps of their extra keys, values and lengths."""
    rows = 6 + (schema.args_schema[1] is not None)
    inputs = [2] * rows + [2, 2, None][: len(schema.args_strategy) - rows]
    return _gradients(schema, [2] * 5, inputs, wanted=11, query=rows - 5)


def _backward_packed(schema: Any) -> Any:
    """Those of packed samples with cumulative lengths, which all devices have."""
    rows = 6 + (schema.args_schema[1] is not None)
    common = len(schema.args_strategy) - rows
    return _gradients(schema, [2] * 3, [2] * rows, wanted=11, query=rows - 5, common=common)


def _backward_joint(schema: Any) -> Any:
    """Those of joint attention: of tensors of the image, then of texts, of which lengths have no heads."""
    heads = len(schema.args_strategy[0].shape) - 2
    image = 5 + sum(gradient is not None for gradient in schema.args_schema[8:10])
    text: list[int | None] = [2 if len(strategy.shape) > 1 else None for strategy in schema.args_strategy[image:]]
    own = _has_own_patterns(schema)
    inputs = *[heads] * image, *text
    return _gradients(schema, [heads] * 3 + [2] * 6, inputs, wanted=5, query=0, by_heads=not own)


def _gradients(
    schema: Any,
    results: Sequence[int],
    inputs: Sequence[int | None],
    *,
    wanted: int,
    query: int,
    by_heads: bool = True,
    common: int = 0,
) -> Any:
    """By batch, or by heads, whose dimension each result and input says. Gradients that aren't wanted, as the argument
    at the place ``wanted`` has it, have no elements to divide; ``common`` inputs behind the others all devices have."""
    from torch.distributed.tensor import Replicate, Shard

    whole, kinds = Replicate(), []
    asked = [schema.args_schema[wanted] >> i & 1 for i in range(len(results))]
    for places in (
        [whole] * (len(results) + len(inputs)),
        [Shard(0)] * (len(results) + len(inputs)),
        [whole if heads is None else Shard(heads) for heads in (*results, *inputs)],
    )[: 3 if by_heads else 2]:
        found = [place if there else whole for place, there in zip(places, asked, strict=False)]
        kinds.append(found + places[len(results) :] + [whole] * common)
    return _strategy(schema, kinds, outputs=len(results), query=query)


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
