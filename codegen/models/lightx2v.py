"""Windows in LightX2V's models: `register` puts an attention into its registry, which a config names.

Written for the registry and the call of its Wan models at f8aee98 (version 0.1.0, August 2026).
"""

from __future__ import annotations

from typing import Any

import torch

from ..errors import InputError
from .pattern import Pattern
from .schedule import Schedule
from .windows import Windows, attend


def register(
    schedule: Schedule | Pattern,
    name: str = "gnaforge",
    dense: str = "torch_sdpa",
    layers: int | None = None,
    steps: int | None = None,
) -> type:
    """Registers self-attention with windows: a config takes it by ``"self_attn_1_type": "gnaforge"``.

    Each call has its layer as ``block_idx``, its grid as ``grid_sizes`` (frames, rows, columns, in tokens) and its step
    as ``scheduler.step_index``, as Wan's have; also where heads are divided over devices, each of which then has all
    tokens. Cross-attention keeps the types that the config gives it.

    Args:
        schedule: windows by layer and step; a pattern is that of all.
        name: in the registry; an entry that this function made before is replaced.
        dense: the registry's entry that computes what the schedule leaves dense.
        layers, steps: of the model and a run, to check the schedule against.

    Returns:
        The registered class.

    Raises:
        InputError: the name is taken, there is no such dense attention, or the schedule is for other layers or steps.
    """
    from lightx2v.common.ops.attn.template import AttnWeightTemplate
    from lightx2v.utils.registry_factory import ATTN_WEIGHT_REGISTER

    windows = Windows(schedule, layers, steps)
    if dense not in ATTN_WEIGHT_REGISTER:
        raise InputError(f"dense: LightX2V has no attention {dense!r}, only {', '.join(sorted(ATTN_WEIGHT_REGISTER))}")
    if name in ATTN_WEIGHT_REGISTER and not hasattr(ATTN_WEIGHT_REGISTER[name], "windows"):
        raise InputError(f"name: LightX2V has an attention {name!r}; take another name")

    class NeighborhoodAttnWeight(AttnWeightTemplate):  # type: ignore[misc]  # untyped
        """Self-attention with the windows that `register` was given."""

        def __init__(self) -> None:
            super().__init__(name)
            self.windows = windows
            self._dense = ATTN_WEIGHT_REGISTER[dense]()

        def apply(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            """Attention of ``[tokens, heads, head_dim]``; returns ``[tokens, heads * head_dim]``."""
            return _apply(self, self._dense, name, q, k, v, kwargs)

    NeighborhoodAttnWeight.windows = windows
    ATTN_WEIGHT_REGISTER[name] = NeighborhoodAttnWeight
    return NeighborhoodAttnWeight


def _apply(own: Any, dense: Any, name: str, q: Any, k: Any, v: Any, kwargs: dict[str, Any]) -> torch.Tensor:
    layer, grid = kwargs.get("block_idx"), kwargs.get("grid_sizes")
    where = f"{name}, block {layer}"
    if grid is None or q.dim() != 3:
        raise RuntimeError(
            f"{where}: windows need grid_sizes and tokens [tokens, heads, head_dim], as Wan's self-attention gives "
            f"them; got {grid} and {tuple(q.shape)}"
        )
    step = getattr(kwargs.get("scheduler"), "step_index", None)
    window = own.windows.at(where, layer, step, tuple(map(int, grid)))
    if window is None:
        return dense.apply(q=q, k=k, v=v, **kwargs)  # type: ignore[no-any-return]
    lengths = kwargs.get("cu_seqlens_q")
    if kwargs.get("causal") or kwargs.get("attn_mask") is not None or kwargs.get("drop_rate"):
        raise NotImplementedError(f"{where}: windows go with neither a mask, dropout nor causal=True")
    if k.shape[0] != q.shape[0] or (lengths is not None and len(lengths) > 2):
        raise NotImplementedError(f"{where}: windows are for self-attention of one sample, without a cache")
    return attend(q[None], k[None], v[None], tuple(map(int, grid)), window)[0].flatten(1)
