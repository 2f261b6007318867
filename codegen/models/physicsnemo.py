"""PhysicsNeMo's neighborhood attention of tensors whose tokens are divided over ranks: `install`. Tried with
nvidia-physicsnemo 2.2.2.

PhysicsNeMo pads each shard with half a window of its neighbours' tokens, computes queries of the padding too, and cuts
them off. It refuses even windows and dilation, and with most strides windows lie elsewhere than in the whole, without
an error. Here `gnaforge.distributed` computes it: every window, as in one piece.
"""

from __future__ import annotations

from collections.abc import Mapping
from inspect import Parameter, Signature
from typing import Any

from .natten.functional import without_tuning

_NEEDED = ("query", "key", "value", "kernel_size")
_OPTIONAL = ("stride", "dilation", "is_causal", "scale", "additional_keys", "additional_values")
_KEYWORDS = ("additional_lengths", "edge", "sink", "return_lse")
_SIGNATURE = Signature(
    [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in _NEEDED]
    + [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, default=None) for name in _OPTIONAL]
    + [Parameter(name, Parameter.KEYWORD_ONLY, default=None) for name in _KEYWORDS]
)
_DIVIDED = ("mode", "by_heads", "transport", "save_halo", "head_chunks", "border_multiple")


def install(**options: Any) -> None:
    """From now on `physicsnemo.nn.functional.natten.na1d`, `na2d` and `na3d` of ShardTensors are computed by gnaforge,
    by a handler in `ShardTensor`'s registry. A second call replaces the options. Plain tensors go to NATTEN, as they do
    without it, or to `gnaforge.models.natten` where its `install` was called.

    Args:
        options: of `gnaforge.distributed.context_parallel_attention`, for all calls: ``mode``, ``by_heads``,
            ``transport``, ``save_halo``, ``head_chunks``, ``border_multiple``.

    Raises:
        TypeError: an option isn't one of these.
    """
    from physicsnemo.domain_parallel import ShardTensor

    # Its own handlers come first, wherever it imports them, so that they don't replace these later.
    from physicsnemo.domain_parallel.shard_utils import natten_patches  # noqa: F401
    from physicsnemo.nn.functional import natten

    if unknown := options.keys() - set(_DIVIDED):
        raise TypeError(f"{sorted(unknown)[0]!r} is no option; these are {', '.join(_DIVIDED)}")

    def handle(function: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return attend(function.__name__, args, kwargs, options)

    for function in (natten.na1d, natten.na2d, natten.na3d):
        ShardTensor.register_function_handler(function, handle)


def attend(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
    """A call of ``na1d``, ``na2d`` or ``na3d`` with ShardTensors.

    Args:
        name: of the function.
        args, kwargs: as it takes them: query, key and value, ``[batch, *tokens, heads, head_dim]``, of equal
            placements; ``kernel_size``, ``stride``, ``dilation``, ``is_causal``, ``scale``, ``return_lse``; additional
            keys and values ``[batch, keys, heads, head_dim]``, ShardTensors that are replicated along dimensions that
            divide tokens, or plain tensors, equal on all ranks. And ``edge``, ``sink`` and ``additional_lengths``.
            Arguments that tune NATTEN's kernels have no effect.
        options: as `install` takes them.

    Returns:
        A ShardTensor placed as the query is, with the channels of the value; with ``return_lse`` a tuple with the
        log-sum-exp ``[batch, *tokens, heads]``, float32.

    Raises:
        TypeError: query, key and value aren't ShardTensors, all of them; an argument is unknown, missing or given
            twice.
        ValueError: they are placed differently, divide channels, or are partial sums; ranks of the tensors don't match
            the function.
        RankError: as `gnaforge.distributed.context_parallel_attention`.
    """
    try:
        given: dict[str, Any] = _SIGNATURE.bind(*args, **without_tuning(dict(kwargs))).arguments
    except TypeError as error:
        raise TypeError(f"{name} of ShardTensors: {error}") from None
    from physicsnemo.domain_parallel import ShardTensor
    from torch.distributed.tensor import DTensor, Shard

    from ..distributed import context_parallel_attention
    from ..distributed.tensors import localize

    tensors = given.pop("query"), given.pop("key"), given.pop("value")
    if not all(isinstance(tensor, ShardTensor) for tensor in tensors):  # plain ones come as DTensors
        raise TypeError(f"{name}: query, key and value must be ShardTensors, all of them")
    query, _, value = tensors
    rank = query.dim() - 3
    if name != f"na{rank}d":
        raise ValueError(f"{name} takes [batch, tokens, heads, head_dim], got {tuple(query.shape)}")
    extra = tuple(given.pop(f"additional_{what}", None) for what in ("keys", "values", "lengths"))
    local, (keys, values, lengths), where = localize(tensors, extra, (ShardTensor, DTensor))

    # Shards of any size, as its spec has them; one mesh dimension divides an axis.
    shapes = query._spec.sharding_shapes()
    shards: list[list[int] | None] = [None] * rank
    for mesh_dim, placement in enumerate(query.placements):
        if isinstance(placement, Shard) and 1 <= placement.dim <= rank:
            shards[placement.dim - 1] = [int(shape[placement.dim]) for shape in shapes[mesh_dim]]
    found = context_parallel_attention(
        *local,
        **{**given, **options},
        additional_keys=keys,
        additional_values=values,
        additional_lengths=lengths,
        extra_grad="partial",  # placements of the gradients say that they are to be added
        mesh=where.mesh,
        dims=where.dims,
        grid=where.grid,
        shards=shards,
    )

    def distribute(result: Any, *end: int) -> Any:
        own = {dim: tuple((*shape[: rank + 1], shape[-2], *end) for shape in every) for dim, every in shapes.items()}
        return ShardTensor.from_local(result.contiguous(), query.device_mesh, query.placements, own)

    if given.get("return_lse"):
        out, lse = found
        return distribute(out, value.shape[-1]), distribute(lse)
    return distribute(found, value.shape[-1])
