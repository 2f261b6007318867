"""The layouts of diffusers' transformers: blocks, grid, text, and the mask of text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ..errors import InputError


@dataclass(frozen=True)
class Layout:
    """The layout of a transformer's tokens, and the names of its parts.

    Args:
        blocks: names of the model's lists of blocks, in the order in which they run.
        attention: name of a block's self-attention.
        patch: names of the model's config values that hold the patch along the grid's axes, first axis first, or of one
            that holds them all; empty where latents come packed (FLUX).
        text: on which side of the image the text is, in one sequence with it; ``none`` where text comes by
            cross-attention, which stays as it is. A mask is taken for text that is last: bool, ``[batch, 1, 1,
            tokens]``, true for the image and, of each text, for its first tokens. Other types and shapes are refused,
            other values on a CPU only: on GPUs, where reading them waits, and in `torch.compile` the model keeps to it.
        positions: without a patch, the forward's argument that holds the place of each token, ``[tokens, 3]``: frame,
            row, column. The grid is read there; empty: the caller gives it.

    The model's forward takes the latents as ``hidden_states``, ``[batch, channels, *axes]`` or, without a patch,
    ``[batch, tokens, channels]``, and the time as ``timestep`` if there are dense steps or a table of them.

    Raises:
        InputError: blocks or patch are one name, not in a tuple; there is no such side for text.
    """

    blocks: tuple[str, ...]
    attention: str
    patch: tuple[str, ...]
    text: Literal["none", "first", "last"]
    positions: str = ""

    def __post_init__(self) -> None:
        for name in ("blocks", "patch"):
            if isinstance(own := getattr(self, name), str):
                raise InputError(f"{name} of the layout is {own!r}; it is a tuple of names, ({own!r},)")
        if self.text not in ("none", "first", "last"):
            raise InputError(f"text of the layout is {self.text!r}; it is none, first or last")


LAYOUTS = {
    "CosmosTransformer3DModel": Layout(("transformer_blocks",), "attn1", ("patch_size",), "none"),
    "FluxTransformer2DModel": Layout(
        ("transformer_blocks", "single_transformer_blocks"), "attn", (), "first", "img_ids"
    ),
    "HunyuanVideoTransformer3DModel": Layout(
        ("transformer_blocks", "single_transformer_blocks"),
        "attn",
        ("patch_size_t", "patch_size", "patch_size"),
        "last",
    ),
    "WanTransformer3DModel": Layout(("blocks",), "attn1", ("patch_size",), "none"),
}
"""The models that `sparsify` knows, by class."""


def layout_of(model: torch.nn.Module) -> Layout:
    """The layout of a model that `LAYOUTS` has, or a class that it derives from.

    Raises:
        InputError: it has none.
    """
    for cls in type(model).__mro__:
        if cls.__name__ in LAYOUTS:
            return LAYOUTS[cls.__name__]
    raise InputError(f"{type(model).__name__} is not known, only {', '.join(LAYOUTS)}: give its layout")


def attention_modules(model: torch.nn.Module, layout: Layout) -> Iterator[tuple[str, Any]]:
    """The self-attentions of a model, in order, with their names.

    Raises:
        InputError: the layout is another model's.
    """
    for name in layout.blocks:
        blocks = getattr(model, name, None)
        if blocks is None:
            raise InputError(f"{type(model).__name__} has no {name}")
        for index, block in enumerate(blocks):
            place = f"{name}.{index}.{layout.attention}"
            attention = getattr(block, layout.attention, None)
            if not hasattr(attention, "processor"):
                raise InputError(f"{type(model).__name__} has no {place} with a processor: give another layout")
            yield place, attention


def patch_of(model: Any, layout: Layout) -> tuple[int, ...]:
    """The patch along each axis of a model's grid; empty where it can't know.

    Raises:
        InputError: the model's config lacks it.
    """
    config = getattr(model, "config", None)
    if missing := [name for name in layout.patch if not hasattr(config, name)]:
        raise InputError(f"{type(model).__name__} has no {missing[0]} in its config: give another layout")
    values = [getattr(config, name) for name in layout.patch]
    return tuple(values[0]) if len(values) == 1 and isinstance(values[0], Sequence) else tuple(values)


def grid_of(name: str, positions: torch.Tensor) -> tuple[int, int]:
    """Rows and columns of an image, by the place of each token, ``[tokens, 3]`` or the same behind a batch axis.

    Places may be rounded, as bfloat16 does beyond 256. ``name`` is theirs, for the error.

    Raises:
        InputError: they are no grid, row by row: of two images, as some pipelines append a reference.
    """
    places = (positions[0] if positions.dim() == 3 else positions).cpu()
    count = places.shape[0]
    behind = (places[:, 1] != places[0, 1]).nonzero()
    columns = int(behind[0]) if len(behind) else count
    if count % columns == 0:
        grid = places.reshape(count // columns, columns, -1)
        is_regular = (grid[:, :, :2] == grid[:, :1, :2]).all() and (grid[:, :, 2] == grid[:1, :, 2]).all()
        neighbors_differ = columns == 1 or bool(grid[0, 0, 2] != grid[0, 1, 2])
        if is_regular and neighbors_differ and (grid[..., 0] == grid[0, 0, 0]).all():
            return count // columns, columns
    raise InputError(f"{name} are not those of one image, row by row, so windows have no grid")


def text_lengths(name: str, mask: torch.Tensor, query: torch.Tensor, image: int) -> torch.Tensor:
    """The number of valid text tokens of each entry, ``[batch]`` int32, by a mask as `Layout` describes it.

    Raises:
        NotImplementedError: the mask says something else, as far as it can be read without waiting.
    """
    if mask.shape != (query.shape[0], 1, 1, query.shape[1]):
        raise NotImplementedError(f"{name}: a mask of shape {tuple(mask.shape)} is more than padding")
    if mask.dtype != torch.bool:
        raise NotImplementedError(f"{name}: a mask of {mask.dtype} says no lengths: windows go with a bool mask")
    valid = mask.reshape(query.shape[0], -1)
    if not torch.compiler.is_compiling() and mask.device.type == "cpu":
        if not valid[:, :image].all():
            raise NotImplementedError(f"{name}: the mask leaves out tokens of the image, and windows have all of them")
        if (valid[:, image + 1 :] & ~valid[:, image:-1]).any():
            raise NotImplementedError(f"{name}: the mask leaves out text in front of other text, and not only padding")
    return valid[:, image:].sum(-1, dtype=torch.int32)
