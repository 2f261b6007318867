"""Windows in vLLM-Omni's diffusion models: `register` puts a backend into its registry of attention backends.

Written for the registry, the backends' interface and the layouts of video tokens of vllm-omni 0.30.0.
"""

from __future__ import annotations

import re
from math import prod
from typing import Any

import torch

from ..errors import InputError
from .pattern import Pattern
from .schedule import Schedule
from .windows import Windows, attend


def register(
    schedule: Schedule | Pattern,
    backend: str = "TORCH_SDPA",
    layers: int | None = None,
    steps: int | None = None,
) -> type:
    """Takes the place of one of vLLM-Omni's backends, whose names are fixed: where its attention is asked for,
    self-attention of video tokens has windows. All else (cross-attention, layers and steps that the schedule leaves
    dense) is computed by vLLM-Omni's own SDPA backend. Call it in every worker before the model is made, and choose
    the backend by its name (``--diffusion-attention-backend``, or the attention config).

    The grid is ``AttentionMetadata.video_layout``'s, which Wan 2.2 publishes: text before the video, padding behind it.
    The layer is the first number in the module's prefix, the step that of the forward context.

    Args:
        schedule: windows by layer and step; a pattern is that of all.
        backend: a member of ``DiffusionAttentionBackendEnum``.
        layers, steps: of the model and a run, to check the schedule against.

    Returns:
        The backend's class. ``DiffusionAttentionBackendEnum[...].clear_override()`` takes it out again.

    Raises:
        InputError: there is no such backend, or the schedule is for other layers or steps.
    """
    from vllm_omni.diffusion.attention.backends import registry, sdpa

    windows = Windows(schedule, layers, steps)
    try:
        member = registry.DiffusionAttentionBackendEnum[backend]
    except (KeyError, ValueError):
        names = ", ".join(registry.DiffusionAttentionBackendEnum.__members__)
        raise InputError(f"backend: vLLM-Omni has no {backend!r}, only {names}") from None

    class NeighborhoodImpl(sdpa.SDPAImpl):  # type: ignore[misc]  # untyped
        """Attention of one layer: ``[batch, tokens, heads, head_dim]``, for q, k, v and the result."""

        def __init__(
            self,
            num_heads: int,
            head_size: int,
            softmax_scale: float,
            causal: bool = False,
            num_kv_heads: int | None = None,
            prefix: str = "",
            role: str = "self",
            **more: Any,
        ) -> None:
            super().__init__(num_heads, head_size, softmax_scale, causal, num_kv_heads, prefix, **more)
            self.name, self.has_windows = prefix or "attention", role == "self"

        def forward(
            self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_metadata: Any = None
        ) -> torch.Tensor:
            """With windows where they are asked for; as SDPA elsewhere."""
            if self.has_windows:
                found = _attend(windows, self, query, key, value, attn_metadata)
                if found is not None:
                    return found
            return super().forward(query, key, value, attn_metadata)  # type: ignore[no-any-return]

    class NeighborhoodBackend(sdpa.SDPABackend):  # type: ignore[misc]  # untyped
        """The backend that `register` puts into the registry."""

        @staticmethod
        def get_name() -> str:
            """The name of the backend whose place it takes, which vLLM-Omni compares."""
            return backend

        @staticmethod
        def get_impl_cls() -> type:
            """Of a layer."""
            return NeighborhoodImpl

    # The registry imports classes by their path.
    globals()[f"NeighborhoodBackend_{backend}"] = NeighborhoodBackend
    registry.register_diffusion_backend(member, f"{__name__}.NeighborhoodBackend_{backend}")
    return NeighborhoodBackend


def _attend(
    windows: Windows, layer: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, metadata: Any
) -> torch.Tensor | None:
    """Attention with windows; None where the schedule is dense.

    Raises:
        RuntimeError: the call doesn't say what its windows follow.
        NotImplementedError: it asks for what windows don't do.
    """
    name, layout = layer.name, getattr(metadata, "video_layout", None)
    if layout is None or (layout.latent_grid is None and not layout.video_spans):
        raise RuntimeError(f"{name}: the model publishes no video_layout, so the grid of its windows is unknown")
    if layout.latent_grid is None:
        raise NotImplementedError(f"{name}: there are several videos in the sequence, and windows are for one")
    number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    grid, prefix = tuple(layout.latent_grid), layout.prefix_len or 0
    window = windows.at(name, None if number is None else int(number[1]), _step(), grid)
    if window is None:
        return None
    if layer.causal or metadata.joint_key is not None or metadata.full_attn_spans is not None:
        raise NotImplementedError(f"{name}: windows go with neither causal=True, joint tensors nor spans")
    used = prefix + prod(grid)
    if query.shape[1] < used or key.shape[1] != query.shape[1]:
        raise RuntimeError(f"{name} has {query.shape[1]} queries and {key.shape[1]} keys; its layout has {used} tokens")
    # The layout says that a mask hides what is behind the video, and nothing else.
    q, k, v = (tensor[:, :used] for tensor in (query, key, value))
    out = attend(q, k, v, grid, window, layer.softmax_scale, prefix)
    return torch.nn.functional.pad(out, (0, 0, 0, 0, 0, query.shape[1] - used))


def _step() -> int | None:
    from vllm_omni.diffusion import forward_context

    if not forward_context.is_forward_context_available():
        return None
    return forward_context.get_forward_context().denoise_step_idx  # type: ignore[no-any-return]
