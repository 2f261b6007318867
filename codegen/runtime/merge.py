"""`merge_attentions`: the attention to several sets of keys, of the attentions to each."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import arguments


def merge_attentions(
    outputs: Sequence[torch.Tensor],
    lse_tensors: Sequence[torch.Tensor],
    torch_compile: bool = True,
    use_autograd_fix: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merges attentions of the same queries to different keys into the attention to all of these keys.

    Computes in float32, in plain torch operations: differentiable with respect to outputs and log-sum-exps, and
    compiled where the caller compiles. An attention whose log-sum-exp is -infinity saw no key, and counts for nothing,
    whatever its output holds.

    Args:
        outputs: two or more, ``[batch, *tokens, heads, head_dim]``, of one shape and dtype.
        lse_tensors: their log-sum-exps ``[batch, *tokens, heads]``, natural logarithm.
        torch_compile, use_autograd_fix: NATTEN's; accepted, and without effect.

    Returns:
        The merged output, in the outputs' dtype, and its log-sum-exp in float32. Queries that see no key get zeros and
        -infinity.

    Raises:
        TypeError: there is something else than tensors.
        ValueError: there are fewer than two, or shapes don't fit each other.
    """
    if len(outputs) < 2 or len(outputs) != len(lse_tensors):
        raise ValueError(
            f"merge_attentions takes two or more outputs, and as many lse_tensors; got {len(outputs)} and "
            f"{len(lse_tensors)}"
        )
    for i, (out, lse) in enumerate(zip(outputs, lse_tensors, strict=True)):
        arguments.require_tensors(**{f"outputs[{i}]": out, f"lse_tensors[{i}]": lse})
        if out.shape != outputs[0].shape or out.dtype != outputs[0].dtype:
            said = [f"{tuple(tensor.shape)} of {tensor.dtype}" for tensor in (out, outputs[0])]
            raise ValueError(f"outputs[{i}] is {said[0]}, outputs[0] is {said[1]}; they must be alike")
        if lse.shape != out.shape[:-1]:
            raise ValueError(f"lse_tensors[{i}] has shape {tuple(lse.shape)}; it must be {tuple(out.shape[:-1])}")
    logs = torch.stack([lse.float() for lse in lse_tensors])
    peak = logs.detach().amax(0)
    peak = torch.where(peak == -torch.inf, 0, peak)
    weights = (logs - peak).exp()
    total = weights.sum(0)
    seen = total > 0
    divisor = torch.where(seen, total, 1)
    merged = torch.zeros_like(outputs[0], dtype=torch.float32)
    for weight, out in zip(weights, outputs, strict=True):
        share = (weight / divisor).unsqueeze(-1)
        merged = merged + share * torch.where(share > 0, out.float(), 0)
    lse = torch.where(seen, peak + divisor.log(), -torch.inf)
    return merged.to(outputs[0].dtype), lse
