"""The operators under torch.vmap: its dimension becomes part of the batch, so one kernel runs for all of it."""

from __future__ import annotations

from typing import Any

import torch

_RUNS_AS = {"forward_no_grad": "forward"}  # tensors below may want gradients, although torch.vmap's own said no
_WANTED = {"backward": 9, "joint_backward": 5, "backward_varlen": 11, "attention_backward_varlen": 11}  # its place
_LENGTHS = {"attention_varlen": (3, 4), "attention_backward_varlen": (7, 8)}  # places of what samples share


def _map(name: str) -> Any:
    """The rule of `torch.library.register_vmap`. A tensor without the dimension is repeated along it, which copies it
    if its batch has several entries. Packed samples are the same for all batch entries."""

    def call(
        info: Any, in_dims: tuple[Any, ...], *arguments: Any
    ) -> tuple[tuple[torch.Tensor, ...], tuple[int | None, ...]]:
        if any(place < len(in_dims) and in_dims[place] is not None for place in _LENGTHS.get(name, ())):
            raise NotImplementedError("gnaforge: torch.vmap over cumulative lengths: samples are the same for all")

        def fold(place: int, argument: Any, dim: int | None) -> Any:
            if not isinstance(argument, torch.Tensor) or place in _LENGTHS.get(name, ()):
                return argument
            whole = argument.expand(info.batch_size, *argument.shape) if dim is None else argument.movedim(dim, 0)
            return whole.flatten(0, 1)

        dims = (*in_dims, *[None] * (len(arguments) - len(in_dims)))
        operator = getattr(torch.ops.gnaforge, _RUNS_AS.get(name, name)).default
        results = operator(*map(fold, range(len(arguments)), arguments, dims))
        # What isn't wanted of gradients has no entries, for nobody.
        wanted = arguments[_WANTED[name]] if name in _WANTED else -1
        mapped = [bool(wanted >> i & 1) for i in range(len(results))]
        parts = zip(results, mapped, strict=True)
        unfolded = (x.unflatten(0, (info.batch_size, -1)) if own else x for x, own in parts)
        return tuple(unfolded), tuple(0 if own else None for own in mapped)

    return call


def _refuse(*arguments: Any, **results: Any) -> Any:
    raise NotImplementedError(
        "gnaforge: out= and out_lse= can't be given under torch.vmap: it makes results of its own"
    )


def register_batching(name: str, library: torch.library.Library) -> None:
    """Registers the rule for an operator; one that writes to the caller's tensors has none, and says so."""
    if name.endswith("_out"):
        library.impl(name, _refuse, "FuncTorchBatched")  # `torch.library.register_vmap` takes no such operators
    else:
        torch.library.register_vmap(f"gnaforge::{name}", _map(name), lib=library)
