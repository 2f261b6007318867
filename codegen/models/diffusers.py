"""Windows in the attention of diffusers' transformers: `sparsify`. Tried with diffusers 0.42.1.

A model keeps its own attention processors, with their norms, rotary embeddings and layouts; `sparsify` exchanges the
function below them that computes attention (`dispatch_attention_fn`), for one model, layer by layer. Nothing of
diffusers itself is changed.
"""

from __future__ import annotations

import copy
import inspect
import pickle
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from types import FunctionType
from typing import Any

import torch

from ..api import joint_attention, neighborhood_attention
from ..errors import InputError
from ..runtime.problem import Causal
from .layouts import LAYOUTS as LAYOUTS, Layout as Layout, attention_modules, grid_of, layout_of, patch_of, text_lengths
from .schedule import Pattern, Schedule, kept_share

_DISPATCH = "dispatch_attention_fn"


def sparsify(
    model: torch.nn.Module,
    *,
    kernel_size: int | Sequence[int] | Sequence[Sequence[int]] | None = None,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: Causal | Sequence[Causal] = False,
    edge: str | Sequence[str] | None = None,
    dense_steps: int = 0,
    dense_layers: Collection[int] = (),
    layers: Collection[int] | None = None,
    grid: Sequence[int] | None = None,
    schedule: Schedule | None = None,
    layout: Layout | None = None,
    steps: int | None = None,
) -> Handle:
    """Gives the self-attention of a transformer windows, until the handle's `remove`.

    Args:
        model: the transformer, such as ``pipe.transformer``: one of `LAYOUTS`, or any other with its ``layout``; also
            what torch.compile made of one.
        kernel_size, stride, dilation, is_causal, edge: the window over the tokens of the image or video, in tokens of
            the transformer (patches), frames first: see `gnaforge.neighborhood_attention`. -1 is a whole axis, a window
            longer than an axis too. ``[heads, rank]``: of each head its own.
        dense_steps: steps of sampling, from the first on, in which attention stays dense. A step is one value of
            ``timestep``; where that rises, a new image or video begins. The value is read, so the device is waited for
            once per call, and two steps of equal values, as bfloat16 makes of near ones (Cosmos), count as one. Where
            the pipeline tells steps, by `Handle.on_step_end`, it is not read. Of a pipeline with two transformers (Wan
            2.2) each counts from the first value that it sees itself.
        dense_layers: layers that stay dense.
        layers: the layers that get windows; default: all. Layers are counted from 0 through all lists of blocks.
        grid: tokens along each axis, for models whose latents don't say: needed where the layout has no ``positions``,
            and for FLUX compiled as a whole, where they can't be read (height and width of the image over 16). Where
            they are read it is checked.
        schedule: instead of window and dense steps: patterns by layer and step.
        layout: where the model's attention and its text are.
        steps: how many the run will have. A schedule of fewer, a table by steps, is then refused here; without it, by
            the first forward pass beyond the table.

    Returns:
        The handle. Text is attended to by all tokens, and attends to all; cross-attention is left alone.

    Raises:
        InputError: the model is unknown, or has windows already; it has no such layer, or its processor doesn't compute
            attention by diffusers' dispatch; there is no window, or no grid; the schedule is for another number of
            layers, or for fewer steps.
    """
    model = getattr(model, "_orig_mod", model)
    found = layout or layout_of(model)
    if kernel_size is None and schedule is None:
        raise InputError("there are no windows: give kernel_size, or a schedule")
    if kernel_size is not None and schedule is not None:
        raise InputError("the schedule says windows: leave kernel_size out")
    if schedule is None:
        assert kernel_size is not None
        pattern = Pattern(kernel_size, stride, dilation, is_causal, edge)
        schedule = Schedule(pattern, dense_steps, dense_layers)
    elif (stride, dilation, is_causal, edge, dense_steps, tuple(dense_layers)) != (1, 1, False, None, 0, ()):
        raise InputError("the schedule says windows, dense steps and dense layers; leave them out")
    if steps is not None:
        schedule.require_steps(steps)
    return Handle(model, found, schedule, layers, grid)


@dataclass(frozen=True)
class _Now:
    """A forward pass: its grid, and the arguments of each layer's window, None for a dense layer."""

    grid: tuple[int, ...]
    windows: tuple[dict[str, Any] | None, ...]


class Handle:
    """Windows in a model: `report` says what they are, `remove` takes them out. Made by `sparsify`.

    The forward pass raises a RuntimeError where a layer wouldn't get its window: one whose processor was replaced, or
    all of them because ``forward`` was called in place of the model, which leaves hooks out. A copy of the model is
    another model: copy it first. Blocks may be skipped, as caches do. One forward pass runs at a time: a second, of
    another thread, raises a RuntimeError.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        layout: Layout,
        schedule: Schedule,
        layers: Collection[int] | None,
        grid: Sequence[int] | None,
    ) -> None:
        self.layout, self.schedule = layout, schedule
        self.forwards = 0
        """How many forward passes there were."""
        self._model = model
        self.grid = grid
        self._read: tuple[torch.Tensor, int, tuple[int, ...]] | None = None
        self.running: _Layer | None = None
        self._now: _Now | None = None
        self._last: _Now | None = None
        self._thread: int | None = None
        self.reset()
        if any(isinstance(getattr(hook, "__self__", None), Handle) for hook in model._forward_pre_hooks.values()):
            raise InputError(f"{type(model).__name__} has windows already: call its handle's remove first")
        self._arguments = list(inspect.signature(type(model).forward).parameters)[1:]
        modules = list(attention_modules(model, layout))
        count = len(modules)
        if wrong := [index for index in layers or () if not 0 <= index < count]:
            raise InputError(f"layers names layer {wrong[0]}, and there are {count}, counted from 0")
        schedule.require_layers(count)
        self._patch = patch_of(model, layout)
        schedule.require_rank(len(self._patch or self.grid or (1, 1)))  # positions are of rows and columns
        self._layers = [
            _Layer(self, index, name, module)
            for index, (name, module) in enumerate(modules)
            if layers is None or index in layers
        ]
        classes: dict[type, type] = {}
        swapped = [_swapped(layer, classes) for layer in self._layers]
        for layer, processor in zip(self._layers, swapped, strict=True):
            layer.module.set_processor(processor)
        self._hooks = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._end, always_call=True),
        ]

    @property
    def grid(self) -> tuple[int, ...] | None:
        """Tokens along each axis, as the caller gave them; None where the model's input says them.

        Raises:
            InputError: it is set to what is no grid; the model has its grid from the shape of its input; it can't go
                without.
        """
        return self._grid

    @grid.setter
    def grid(self, grid: Sequence[int] | None) -> None:
        name = type(self._model).__name__
        if grid is None and not self.layout.patch and not self.layout.positions:
            raise InputError(f"{name} doesn't know its grid: give grid=(rows, columns) of its tokens")
        if grid is not None and self.layout.patch:
            raise InputError(f"{name} has its grid from its input: leave grid out")
        if grid is not None and (
            not isinstance(grid, Sequence) or not all(isinstance(n, int) and n > 0 for n in grid) or not grid
        ):
            raise InputError(f"grid is {grid!r}; it is the number of tokens along each axis, as (rows, columns)")
        self._grid = None if grid is None else tuple(grid)

    @property
    def step(self) -> int:
        """The step of sampling, counted from 0, where the schedule follows steps; of the last forward pass, or as set.

        Once it is set, ``timestep`` isn't read, until `reset`.

        Raises:
            InputError: it is set to a number that is no step.
        """
        return self._step

    @step.setter
    def step(self, step: int) -> None:
        if not isinstance(step, int) or step < 0:
            raise InputError(f"step is {step!r}; steps count from 0")
        self._step, self._is_told = step, True

    def on_step_end(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """Tells steps by the pipeline's own count: ``pipe(..., callback_on_step_end=handle.on_step_end)``.

        The arguments are those of diffusers' callbacks, and the tensors go back as they came. After the last step, by
        the pipeline's ``num_timesteps``, the next image or video begins.
        """
        if step + 1 == getattr(pipe, "num_timesteps", None):
            self.reset()
        else:
            self.step = step + 1
        return tensors

    def reset(self) -> None:
        """The next forward pass begins an image or video: needed after a run that was stopped before its end."""
        self._step, self._is_told, self._timestep = 0, False, float("inf")

    def remove(self) -> None:
        """Takes the windows out: the model is what it was. A second call does nothing."""
        for hook in self._hooks:
            hook.remove()
        for layer in self._layers:
            if layer.module.processor is layer.swapped:
                layer.module.set_processor(layer.processor)
        if isinstance(inner := getattr(self._model, "_gradient_checkpointing_func", None), _Checkpointing):
            _set_checkpointing(self._model, inner.inner)
        self.enter(None)
        self._layers, self._hooks, self._read = [], [], None

    def report(self) -> str:
        """The windows of the last forward pass, layer by layer, and the share of the image's pairs that they leave."""
        name = type(self._model).__name__
        if self._last is None:
            return f"{name}: {len(self._layers)} layers with windows; no forward pass yet"
        grid, windows = self._last.grid, self._last.windows
        shares = [kept_share(windows[layer.index], grid) for layer in self._layers]
        passes = f"{self.forwards} forward pass{'' if self.forwards == 1 else 'es'}"
        step = f", step {self.step}" if self.schedule.follows_steps else ""
        share = f"{sum(shares) / len(shares):.1%}" if shares else "all"
        lines = [f"{name}: {passes}{step}, grid {'x'.join(map(str, grid))}; {share} of the image's pairs"]
        for layer, own in zip(self._layers, shares, strict=True):
            if (window := windows[layer.index]) is None:
                lines.append(f"  {layer.index} {layer.name}: dense")
                continue
            said = ", ".join(f"{key} {value}" for key, value in window.items() if _is_said(key, value))
            skipped = "" if layer.has_run else "; hasn't run yet"
            lines.append(f"  {layer.index} {layer.name}: {own:.1%}, {said}{skipped}")
        return "\n".join(lines)

    def _begin(self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a forward pass: finds the grid, the step, and with them each layer's window."""
        if not torch.compiler.is_compiling():
            # The same thread again: its pass before was interrupted, for which torch runs no hooks.
            if self._thread not in (None, threading.get_ident()):
                raise RuntimeError(f"{type(model).__name__} is in a forward pass of another thread: run one at a time")
            self._thread = threading.get_ident()
        self._require_own(model)
        given = dict(zip(self._arguments, args, strict=False)) | kwargs
        grid = self._grid_of(model, self._argument(given, "hidden_states"), given)
        if self.schedule.follows_steps:
            if self._last is None or self._last.grid != grid:
                self.schedule.require_grid(grid)
            if not self._is_told:
                self._follow(self._argument(given, "timestep"))
        if self._last is None or self._last.grid != grid or self.schedule.follows_steps:
            self._last = _Now(grid, tuple(self._windows(grid)))
        self.enter(self._last)
        if not torch.compiler.is_compiling():
            self.forwards += 1
            # Blocks that are computed again, in the backward pass, need the grid of their own forward pass.
            inner = getattr(model, "_gradient_checkpointing_func", None)
            if inner is not None and not isinstance(inner, _Checkpointing):
                _set_checkpointing(model, _Checkpointing(inner, self))

    def enter(self, now: _Now | None) -> _Now | None:
        """Goes to a forward pass, or out of all; returns the one before."""
        before, self._now = self._now, now
        for layer in self._layers:
            layer.grid = () if now is None else now.grid
            layer.window = None if now is None else now.windows[layer.index]
        return before

    def _end(self, model: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not torch.compiler.is_compiling() and self._thread != threading.get_ident():
            return  # this pass was refused, and another one runs
        self._thread = None
        self.enter(None)

    def _argument(self, given: Mapping[str, Any], name: str) -> Any:
        if given.get(name) is None:
            raise InputError(f"{type(self._model).__name__} was called without {name}, which its windows follow")
        return given[name]

    def _require_own(self, model: torch.nn.Module) -> None:
        modules = [module for _, module in attention_modules(model, self.layout)]
        for layer in self._layers:
            if modules[layer.index] is not layer.module or layer.module.processor is not layer.swapped:
                raise RuntimeError(
                    f"{layer.name} lost its window: it was replaced after sparsify; remove the handle first"
                )

    def _grid_of(
        self, model: torch.nn.Module, hidden_states: torch.Tensor, given: Mapping[str, Any]
    ) -> tuple[int, ...]:
        if not self.layout.patch:
            grid = self.grid
            if self.layout.positions and not torch.compiler.is_compiling():
                grid = self._grid_of_positions(self._argument(given, self.layout.positions))
            if grid is None:
                raise InputError(f"torch.compile can't read {self.layout.positions}: give the grid")
            if self.grid not in (None, grid) or hidden_states.shape[1] != prod(grid):
                own = self.grid or grid
                raise InputError(
                    f"the grid {own} has {prod(own)} tokens, and the image {hidden_states.shape[1]}"
                    + (f", in a grid {grid}" if own != grid else "")
                    + ": set the handle's grid"
                )
            return grid
        axes = hidden_states.shape[2:]
        if len(axes) != len(self._patch):
            raise InputError(
                f"hidden_states are {tuple(hidden_states.shape)}, and the layout's patch {self._patch}: one entry for "
                "each axis behind batch and channels"
            )
        return tuple(n // p for n, p in zip(axes, self._patch, strict=True))

    def _grid_of_positions(self, positions: torch.Tensor) -> tuple[int, ...]:
        # All steps of a run have one tensor: it is read once, which waits for the device.
        version = -1 if positions.is_inference() else positions._version
        if self._read is None or self._read[0] is not positions or version == -1 or version != self._read[1]:
            self._read = positions, version, grid_of(self.layout.positions, positions)
        return self._read[2]

    def _follow(self, timestep: Any) -> None:
        # Where tokens have their own, those of given frames are smaller.
        value = float(timestep.max() if isinstance(timestep, torch.Tensor) else timestep)
        if value > self._timestep or self._timestep == float("inf"):
            self._step = 0
        elif value < self._timestep:
            self._step += 1
        self._timestep = value

    def _windows(self, grid: tuple[int, ...]) -> Iterator[dict[str, Any] | None]:
        found: dict[int, dict[str, Any] | None] = {}
        # A list: torch.compile traces no generator in max.
        for index in range(1 + max([layer.index for layer in self._layers], default=-1)):
            pattern = self.schedule.at(self._step, index)
            if pattern is not None and id(pattern) not in found:
                found[id(pattern)] = pattern.at(grid)
            yield None if pattern is None else found[id(pattern)]


def _is_said(name: str, value: Any) -> bool:
    neutral = {"stride": 1, "dilation": 1, "is_causal": False}
    return name not in neutral or any(one != neutral[name] for one in value)


class _Layer:
    """One layer's attention, in the forward pass that the model is in: grid and window, None where it is dense."""

    def __init__(self, handle: Handle, index: int, name: str, module: Any) -> None:
        self.handle, self.index, self.name, self.module = handle, index, name, module
        self.processor = module.processor
        self.swapped: Any = None
        self.grid: tuple[int, ...] = ()
        self.window: dict[str, Any] | None = None
        self.has_run = False


class _Dispatch:
    """Stands for diffusers' dispatch in all layers of a model: the window of the layer that runs, or ``dense``.

    The layers share it, and with it the graphs that torch.compile makes of blocks with equal windows.
    """

    def __init__(self, handle: Handle, dense: Callable[..., torch.Tensor]) -> None:
        self.handle, self.dense = handle, dense

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
        layer = self.handle.running
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
        place = self.handle.layout.text
        if text < 0 or (text > 0 and place == "none"):
            raise RuntimeError(f"{layer.name} has {query.shape[1]} tokens, and the grid {grid} {image}")
        if attn_mask is not None and place != "last":
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


def _swapped(layer: _Layer, classes: dict[type, type]) -> Any:
    """The layer's processor with another dispatch below it: a copy, of a class that layers of one class share."""
    processor = layer.processor
    cls = type(processor)
    if cls not in classes:
        classes[cls] = _class_with(layer, cls)
    layer.swapped = copy.copy(processor)
    layer.swapped.__class__ = classes[cls]
    layer.swapped.gnaforge_layer = layer
    return layer.swapped


def _class_with(layer: _Layer, cls: type) -> type:
    """A class of processors like ``cls``, whose `__call__` is the same code with one global name bound otherwise."""
    call: Any = cls.__call__
    dense = getattr(call, "__globals__", {}).get(_DISPATCH)
    if hasattr(layer.processor, "gnaforge_layer"):
        raise InputError(f"{layer.name} has windows already: remove the handle first")
    if not isinstance(call, FunctionType) or _DISPATCH not in call.__code__.co_names or dense is None:
        raise InputError(f"{layer.name}: its processor {cls.__name__} doesn't compute attention by {_DISPATCH}")
    # torch.compile takes globals for those of the module that __name__ says, and would guard on its dispatch.
    known = {name: value for name, value in call.__globals__.items() if name != "__name__"}
    known[_DISPATCH] = _Dispatch(layer.handle, dense)
    own = FunctionType(call.__code__, known, call.__name__, call.__defaults__, call.__closure__)
    own.__kwdefaults__ = call.__kwdefaults__

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.gnaforge_layer.handle.running = self.gnaforge_layer
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


class _Checkpointing:
    """A model's gradient checkpointing, in which blocks keep the grid of the forward pass that they were called in."""

    def __init__(self, inner: Callable[..., Any], handle: Handle) -> None:
        self.inner, self._handle = inner, handle

    def __call__(self, module: Any, *args: Any) -> Any:
        return self.inner(_Remembering(module, self._handle), *args)


class _Remembering:
    """A block that runs, also later and again, in the forward pass in which this was made."""

    def __init__(self, module: Any, handle: Handle) -> None:
        self._module, self._handle, self._now = module, handle, handle._now

    def __call__(self, *args: Any) -> Any:
        before = self._handle.enter(self._now)
        try:
            return self._module(*args)
        finally:
            self._handle.enter(before)


def _set_checkpointing(model: Any, function: Any) -> None:
    model._gradient_checkpointing_func = function


class NeighborhoodProcessor:
    """The attention processor of LTX-2.5's video decoder, on gnaforge's kernels: ``decoder.set_attn_processor(...)``.

    In place of diffusers' own, which need FlexAttention or, on GPUs, NATTEN from the Hub. The decoder's windows, norms
    and rotary embeddings are its own; no block mask is built.
    """

    def __call__(self, attn: Any, hidden_states: torch.Tensor, block_mask: Any = None) -> torch.Tensor:
        """``hidden_states``: ``[batch, frames, height, width, channels]``; so is the result.

        Raises:
            ValueError: there is a block mask: the decoder builds none for this processor.
        """
        if block_mask is not None:
            raise ValueError("NeighborhoodProcessor takes no block_mask: windows are the kernel's own")
        query, key, value = attn.project_qkv(hidden_states)
        # Queries come scaled.
        out = neighborhood_attention(query, key, value, kernel_size=attn.kernel_size, scale=1.0)
        return attn.to_out[0](out.flatten(-2))  # type: ignore[no-any-return]
