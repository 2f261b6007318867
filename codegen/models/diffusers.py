"""Windows in the attention of diffusers' transformers: `sparsify`. Tried with diffusers 0.42.1.

A model keeps its own attention processors, with their norms, rotary embeddings and layouts; `sparsify` exchanges the
function below them that computes attention (`dispatch_attention_fn`), for one model, layer by layer. Nothing of
diffusers itself is changed.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from ..api import neighborhood_attention
from ..errors import InputError
from ..runtime.problem import Causal
from .dispatch import Layer, Running, swapped
from .layouts import LAYOUTS as LAYOUTS, Layout as Layout, attention_modules, grid_of, layout_of, patch_of
from .pattern import Pattern, kept_share
from .schedule import Schedule, require_layer_numbers


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
    if layout is not None and not isinstance(layout, Layout):
        raise InputError(f"layout is {layout!r}; make it by Layout(blocks, attention, patch, text)")
    found = layout or layout_of(model)
    if layers is not None:
        require_layer_numbers("layers", layers)
    if kernel_size is None and schedule is None:
        raise InputError("there are no windows: give kernel_size, or a schedule")
    if kernel_size is not None and schedule is not None:
        raise InputError("the schedule says windows: leave kernel_size out")
    if schedule is None:
        assert kernel_size is not None
        pattern = Pattern(kernel_size, stride, dilation, is_causal, edge)
        schedule = Schedule(pattern, dense_steps, dense_layers)
    elif not isinstance(schedule, Schedule):
        raise InputError(f"schedule is {schedule!r}; make it by Schedule(patterns)")
    elif (stride, dilation, is_causal, edge, dense_steps, tuple(dense_layers)) != (1, 1, False, None, 0, ()):
        raise InputError("the schedule says windows, dense steps and dense layers; leave them out")
    if steps is not None:
        schedule.require_steps(steps)
    return Handle(model, found, schedule, layers, grid)


@dataclass(frozen=True)
class _Now:
    """A forward pass: its grid, its step, and the arguments of each layer's window, None for a dense layer."""

    grid: tuple[int, ...]
    step: int
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
        running = Running(layout.text)
        self._layers = [
            Layer(running, index, name, module)
            for index, (name, module) in enumerate(modules)
            if layers is None or index in layers
        ]
        classes: dict[type, type] = {}
        processors = [swapped(layer, classes) for layer in self._layers]
        for layer, processor in zip(self._layers, processors, strict=True):
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
        """The step of sampling, from 0, where the schedule follows steps: the last forward pass's, or as it is set.

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
        self._hooks, self._read = [], None

    def report(self) -> str:
        """The windows of the last forward pass, layer by layer, and the share of the image's pairs that they leave."""
        name = type(self._model).__name__
        now = "" if self._hooks else "; windows were removed since"
        if self._last is None:
            return f"{name}: {len(self._layers)} layers with windows; no forward pass yet{now}"
        grid, windows = self._last.grid, self._last.windows
        shares = [kept_share(windows[layer.index], grid) for layer in self._layers]
        passes = f"{self.forwards} forward pass{'' if self.forwards == 1 else 'es'}"
        step = f", step {self._last.step}" if self.schedule.follows_steps else ""
        share = f"{sum(shares) / len(shares):.1%}" if shares else "all"
        lines = [f"{name}: {passes}{step}, grid {'x'.join(map(str, grid))}; {share} of the image's pairs{now}"]
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
            self._last = _Now(grid, self._step, tuple(self._windows(grid)))
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
