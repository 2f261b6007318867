"""The function below a processor that computes attention: diffusers' dispatch, and windows in its place."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable, Mapping
from math import prod
from types import FunctionType
from typing import Any

import torch

from ..api import joint_attention, neighborhood_attention
from ..errors import InputError
from .layouts import text_lengths

_DISPATCH = "dispatch_attention_fn"


class Running:
    """The layer of a model that runs, and the side of the image that its text is on (`Layout.text`)."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.layer: Layer | None = None


class Layer:
    """One layer's attention, in the forward pass that the model is in: grid and window, None where it is dense."""

    def __init__(self, running: Running, index: int, name: str, module: Any) -> None:
        self.running, self.index, self.name, self.module = running, index, name, module
        self.processor = module.processor
        self.swapped: Any = None
        self.grid: tuple[int, ...] = ()
        self.window: dict[str, Any] | None = None
        self.has_run = False


class Dispatch:
    """Stands for diffusers' dispatch in all layers of a model: the window of the layer that runs, or ``dense``.

    The layers share it, and with it the graphs that torch.compile makes of blocks with equal windows.
    """

    def __init__(self, running: Running, dense: Callable[..., torch.Tensor]) -> None:
        self.running, self.dense = running, dense

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        attention_kwargs: Mapping[str, Any] | None = None,
        *,
        backend: Any = None,
        parallel_config: Any = None,
    ) -> torch.Tensor:
        layer = self.running.layer
        if layer is None or not layer.grid:
            raise RuntimeError(
                f"{'attention' if layer is None else layer.name} was called outside of its model, so its grid is "
                "unknown: call the model, not its forward, and the model that was given windows, not a copy"
            )
        grid, window = layer.grid, layer.window
        layer.has_run = True
        # Keys of another number are those of something else, such as an image prompt.
        if window is None or key.shape[1] != query.shape[1]:
            return self.dense(
                query,
                key,
                value,
                attn_mask=attn_mask,
                dropout_p=dropout_p,
                is_causal=is_causal,
                scale=scale,
                enable_gqa=enable_gqa,
                attention_kwargs=attention_kwargs,
                backend=backend,
                parallel_config=parallel_config,
            )
        if parallel_config is not None or dropout_p or is_causal or attention_kwargs:
            raise NotImplementedError(
                f"{layer.name}: windows go with neither context parallelism of diffusers, dropout, a causal mask nor "
                "attention_kwargs"
            )
        image = prod(grid)
        text = query.shape[1] - image
        place = self.running.text
        if text < 0 or (text > 0 and place == "none"):
            raise RuntimeError(f"{layer.name} has {query.shape[1]} tokens, and the grid {grid} {image}")
        if attn_mask is not None and place != "last":  # only lengths of a text can be read off a mask
            raise NotImplementedError(f"{layer.name}: windows go with no mask in this model")
        if place == "none":
            tokens = query.shape[0], *grid
            q, k, v = (tensor.reshape(*tokens, *tensor.shape[2:]) for tensor in (query, key, value))
            out: torch.Tensor = neighborhood_attention(q, k, v, scale=scale, **window)
            return out.flatten(1, -3)
        sides: dict[str, Any] = {"prefix" if place == "first" else "suffix": text}
        if attn_mask is not None:
            sides["lengths"] = text_lengths(layer.name, attn_mask, query, image)
        return joint_attention(query, key, value, grid=grid, scale=scale, **sides, **window)  # type: ignore[no-any-return]


def swapped(layer: Layer, classes: dict[type, type]) -> Any:
    """The layer's processor with another dispatch below it: a copy, of a class that layers of one class share."""
    processor = layer.processor
    cls = type(processor)
    if cls not in classes:
        classes[cls] = _class_with(layer, cls)
    layer.swapped = copy.copy(processor)
    layer.swapped.__class__ = classes[cls]
    layer.swapped.gnaforge_layer = layer
    return layer.swapped


def _class_with(layer: Layer, cls: type) -> type:
    """A class of processors like ``cls``, whose `__call__` is the same code with one global name bound otherwise."""
    call: Any = cls.__call__
    dense = getattr(call, "__globals__", {}).get(_DISPATCH)
    if hasattr(layer.processor, "gnaforge_layer"):
        raise InputError(f"{layer.name} has windows already: remove the handle first")
    if not isinstance(call, FunctionType) or _DISPATCH not in call.__code__.co_names or dense is None:
        raise InputError(f"{layer.name}: its processor {cls.__name__} doesn't compute attention by {_DISPATCH}")
    # torch.compile takes globals for those of the module that __name__ says, and would guard on its dispatch.
    known = {name: value for name, value in call.__globals__.items() if name != "__name__"}
    known[_DISPATCH] = Dispatch(layer.running, dense)
    own = FunctionType(call.__code__, known, call.__name__, call.__defaults__, call.__closure__)
    own.__kwdefaults__ = call.__kwdefaults__

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.gnaforge_layer.running.layer = self.gnaforge_layer
        return own(self, *args, **kwargs)

    run.__signature__ = inspect.signature(call)  # type: ignore[attr-defined]  # diffusers looks at it
    names = {"__call__": run, "__doc__": cls.__doc__, "__reduce_ex__": _refuse_pickling, "__deepcopy__": _copy_deep}
    return type(cls.__name__, (cls,), names)


def _refuse_pickling(processor: Any, protocol: Any) -> Any:
    raise pickle.PicklingError(
        "a model with windows can't be pickled: call its handle's remove first, or save its state_dict"
    )


def _copy_deep(processor: Any, memo: dict[int, Any]) -> Any:
    memo[id(processor)] = found = object.__new__(type(processor))
    found.__dict__.update(copy.deepcopy(processor.__dict__, memo))
    return found
