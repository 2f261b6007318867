"""Small random models of diffusers, and the same models with SDPA under the whole mask in their attention."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from diffusers import (
    CosmosTransformer3DModel,
    FluxTransformer2DModel,
    HunyuanVideoTransformer3DModel,
    WanTransformer3DModel,
)
from oracle import Problem, mask

GRIDS = {"wan": (3, 6, 5), "cosmos": (3, 6, 5), "hunyuan": (3, 6, 5), "flux": (8, 7)}
TEXT = 7  # tokens
MODELS = tuple(GRIDS)


def make(name: str, layers: int = 2) -> torch.nn.Module:
    """A model in evaluation mode, the same at each call; every parameter differs from zero."""
    torch.manual_seed(0)
    heads: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 16}
    if name == "wan":
        sizes = {"in_channels": 4, "out_channels": 4, "text_dim": 16, "freq_dim": 16, "ffn_dim": 32}
        model = WanTransformer3DModel(patch_size=(1, 2, 2), num_layers=layers, rope_max_seq_len=32, **sizes, **heads)
    elif name == "cosmos":
        sizes = {
            "in_channels": 4,
            "out_channels": 4,
            "text_embed_dim": 16,
            "adaln_lora_dim": 8,
            "max_size": (8, 16, 16),
        }
        model = CosmosTransformer3DModel(num_layers=layers, concat_padding_mask=False, **sizes, **heads)
    elif name == "hunyuan":
        sizes = {
            "in_channels": 4,
            "out_channels": 4,
            "text_embed_dim": 16,
            "pooled_projection_dim": 12,
            "mlp_ratio": 2.0,
        }
        model = HunyuanVideoTransformer3DModel(
            num_layers=layers - 1, num_single_layers=1, num_refiner_layers=1, rope_axes_dim=(4, 6, 6), **sizes, **heads
        )
    else:
        sizes = {"in_channels": 4, "joint_attention_dim": 16, "pooled_projection_dim": 12}
        model = FluxTransformer2DModel(
            num_layers=layers - 1,
            num_single_layers=1,
            axes_dims_rope=(4, 6, 6),
            guidance_embeds=False,
            **sizes,
            **heads,
        )
    for parameter in model.parameters():
        if parameter.dim() < 2 or not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()  # type: ignore[no-any-return]


def inputs(name: str, grid: tuple[int, ...] | None = None, step: float = 500.0, batch: int = 2) -> dict[str, Any]:
    """Arguments of a forward pass, the same at each call but for the timestep."""
    torch.manual_seed(1)
    own = grid or GRIDS[name]
    text = torch.randn(batch, TEXT, 16)
    found: dict[str, Any] = {"timestep": torch.full((batch,), step), "encoder_hidden_states": text}
    if name == "flux":
        ids = torch.zeros(*own, 3)
        ids[..., 1], ids[..., 2] = torch.arange(own[0])[:, None], torch.arange(own[1])
        found |= {"img_ids": ids.flatten(0, 1), "txt_ids": torch.zeros(TEXT, 3)}
        found["hidden_states"] = torch.randn(batch, prod(own), 4)
    else:
        found["hidden_states"] = torch.randn(batch, 4, own[0], 2 * own[1], 2 * own[2])
    if name in ("flux", "hunyuan"):
        found["pooled_projections"] = torch.randn(batch, 12)
    if name == "hunyuan":
        found |= {"encoder_attention_mask": torch.arange(TEXT) < torch.tensor([[TEXT], [3]])[:batch]}
        found["guidance"] = torch.full((batch,), 1000.0)
    return found


def to(given: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The same inputs, of another floating-point type; timesteps stay as they are."""
    return {
        name: value.to(dtype) if value.is_floating_point() and name not in ("timestep", "img_ids", "txt_ids") else value
        for name, value in given.items()
    }


@contextmanager
def whole_mask(name: str, model: torch.nn.Module, grid: tuple[int, ...], **pattern: Any) -> Iterator[list[int]]:
    """The model's module computes self-attention by SDPA under the oracle's mask; yields the numbers of keys of these
    calls. Text, which is seen by all, is where the model has it."""
    module: Any = sys.modules[type(model).__module__]
    before, image, calls = module.dispatch_attention_fn, prod(grid), []
    windows = torch.tensor(mask(Problem(grid, **pattern)))

    def attend(query: Any, key: Any, value: Any, attn_mask: Any = None, **others: Any) -> torch.Tensor:
        tokens = query.shape[1]
        if key.shape[1] != tokens or tokens < image:  # cross-attention, the text's own
            return before(query, key, value, attn_mask=attn_mask, **others)  # type: ignore[no-any-return]
        calls.append(tokens)
        whole = torch.ones(tokens, tokens, dtype=torch.bool)
        own = slice(tokens - image, tokens) if name == "flux" else slice(0, image)
        whole[own, own] = windows
        return before(query, key, value, attn_mask=whole if attn_mask is None else whole & attn_mask, **others)  # type: ignore[no-any-return]

    module.dispatch_attention_fn = attend
    try:
        yield calls
    finally:
        module.dispatch_attention_fn = before
