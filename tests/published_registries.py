"""The part of LightX2V (0.1.0, f8aee98) and vllm-omni (0.30.0) that adapters take: modules, names and signatures that
they publish, with torch's SDPA behind them. Neither installs here. Written from their interfaces.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass, field
from enum import Enum, EnumMeta
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention


def _install(patch: pytest.MonkeyPatch, name: str, **members: Any) -> None:
    """A module of that name, and its packages, as far as they aren't there."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        path = ".".join(parts[:end])
        try:
            module = importlib.import_module(path)
        except ModuleNotFoundError:
            module = ModuleType(path)
            module.__path__ = []
            patch.setitem(sys.modules, path, module)
            if end > 1:
                setattr(sys.modules[".".join(parts[: end - 1])], parts[end - 1], module)
    for member, value in members.items():
        setattr(module, member, value)


class Register(dict[str, Any]):
    """LightX2V's registry: a mapping of names to classes, and a decorator that adds one."""

    def __call__(self, name: str) -> Any:
        def add(target: Any) -> Any:
            if name in self:
                raise Exception(f"{name} already exists.")
            self[name] = target
            return target

        return add


class AttnWeightTemplate:
    """LightX2V's base of attentions."""

    def __init__(self, weight_name: str) -> None:
        self.weight_name, self.config = weight_name, {}

    def load(self, weight_dict: Any) -> None: ...

    def to_cpu(self, non_blocking: bool = False) -> None: ...

    def to_cuda(self, non_blocking: bool = False) -> None: ...

    def state_dict(self, destination: Any = None) -> Any:
        return {} if destination is None else destination

    def load_state_dict(self, destination: Any, block_index: int, adapter_block_index: Any = None) -> Any:
        return {}


class TorchSDPAWeight(AttnWeightTemplate):
    """``[tokens, heads, head_dim]`` in, ``[tokens, heads * head_dim]`` out."""

    def __init__(self) -> None:
        super().__init__("torch_sdpa")

    def apply(self, q: Any, k: Any, v: Any, attn_mask: Any = None, causal: bool = False, **kwargs: Any) -> Any:
        q, k, v = (x.movedim(0, 1) for x in (q, k, v))
        out = scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, is_causal=causal)
        return out.movedim(0, 1).flatten(1)


def install_lightx2v(patch: pytest.MonkeyPatch) -> Register:
    """Its modules, for a test; returns its registry."""
    registry = Register(torch_sdpa=TorchSDPAWeight)
    _install(patch, "lightx2v.utils.registry_factory", ATTN_WEIGHT_REGISTER=registry)
    _install(patch, "lightx2v.common.ops.attn.template", AttnWeightTemplate=AttnWeightTemplate)
    return registry


@dataclass(frozen=True)
class VideoTokenLayout:
    """vLLM-Omni's: text, one video or several spans, padding."""

    prefix_len: int | None = None
    latent_grid: tuple[int, int, int] | None = None
    used_len: int | None = None
    video_spans: tuple[Any, ...] = ()


@dataclass
class AttentionMetadata:
    """vLLM-Omni's, of a call."""

    attn_mask: torch.Tensor | None = None
    joint_attn_mask: torch.Tensor | None = None
    joint_query: torch.Tensor | None = None
    joint_key: torch.Tensor | None = None
    joint_value: torch.Tensor | None = None
    joint_strategy: str = "front"
    extra: dict[str, Any] = field(default_factory=dict)
    full_attn_spans: Any = None
    query_ranges: Any = None
    video_layout: VideoTokenLayout | None = None
    packed_padding: Any = None


class SDPAImpl:
    """``[batch, tokens, heads, head_dim]`` in and out; a mask ``[batch, tokens]`` hides keys."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        softmax_scale: float,
        causal: bool = False,
        num_kv_heads: int | None = None,
        prefix: str = "",
        backend_kwargs: dict[str, Any] | None = None,
        **extra_impl_args: Any,
    ) -> None:
        self.causal, self.softmax_scale = causal, softmax_scale

    def forward(self, query: Any, key: Any, value: Any, attn_metadata: AttentionMetadata | None = None) -> Any:
        mask = None if attn_metadata is None else attn_metadata.attn_mask
        mask = None if mask is None else mask.bool()[:, None, None]
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        scale = self.softmax_scale
        out = scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=self.causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        return out.transpose(1, 2)


class SDPABackend:
    """vLLM-Omni's backend that every platform has."""

    @staticmethod
    def get_name() -> str:
        return "SDPA"

    @staticmethod
    def get_impl_cls() -> type:
        return SDPAImpl


class _Names(EnumMeta):
    def __getitem__(cls, name: str) -> Any:
        try:
            return super().__getitem__(name)
        except KeyError:
            raise ValueError(f"Unknown diffusion attention backend: '{name}'.") from None


def install_vllm_omni(patch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Its modules, for a test; returns ``enum``, its backends, and ``context``, the forward context."""
    overrides: dict[Any, str] = {}

    class DiffusionAttentionBackendEnum(Enum, metaclass=_Names):
        FLASH_ATTN = "vllm_omni.diffusion.attention.backends.flash_attn.FlashAttentionBackend"
        TORCH_SDPA = "vllm_omni.diffusion.attention.backends.sdpa.SDPABackend"
        SAGE_ATTN = "vllm_omni.diffusion.attention.backends.sage_attn.SageAttentionBackend"

        def get_class(self) -> Any:
            module, _, name = overrides.get(self, self.value).rpartition(".")
            return getattr(importlib.import_module(module), name)

        def clear_override(self) -> None:
            overrides.pop(self, None)

    def register_diffusion_backend(backend: Any, class_path: str | None = None) -> Any:
        if class_path is not None:
            overrides[backend] = class_path
        return lambda cls: cls

    backends, state = "vllm_omni.diffusion.attention.backends", SimpleNamespace(context=None)
    members = {"register_diffusion_backend": register_diffusion_backend}
    _install(patch, f"{backends}.registry", DiffusionAttentionBackendEnum=DiffusionAttentionBackendEnum, **members)
    _install(patch, f"{backends}.sdpa", SDPAImpl=SDPAImpl, SDPABackend=SDPABackend)
    _install(
        patch,
        "vllm_omni.diffusion.forward_context",
        is_forward_context_available=lambda: state.context is not None,
        get_forward_context=lambda: state.context,
    )
    return SimpleNamespace(enum=DiffusionAttentionBackendEnum, state=state)
