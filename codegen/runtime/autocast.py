"""The operators under torch.autocast: tensors are cast as torch's scaled_dot_product_attention casts its own."""

from __future__ import annotations

from typing import Any

import torch

_DEVICES = {"cpu": torch._C.DispatchKey.AutocastCPU, "cuda": torch._C.DispatchKey.AutocastCUDA}


def autocast_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The type that a tensor has for the operators here: autocast's, where that is on for its device; its own, if it is
    float64, of 8 bits, whose numbers mean nothing without a descale, or not of floating point."""
    device, own = tensor.device.type, tensor.dtype
    if own == torch.float64 or own.itemsize == 1 or not own.is_floating_point or device not in _DEVICES:
        return own
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else own


def autocast_tensor(tensor: Any) -> Any:
    """A tensor of that type: itself if it has it. Whatever else is given is given back."""
    return tensor.to(autocast_dtype(tensor)) if isinstance(tensor, torch.Tensor) else tensor


def register_autocast(name: str, library: torch.library.Library) -> None:
    """Registers casts for an operator's inputs, not for what it writes to. Autocast is off below them, as it is for
    torch's own operators."""
    operator = getattr(torch.ops.gnaforge, name).default

    def make_kernel(key: torch._C.DispatchKey) -> Any:
        def call_with_casts(*arguments: Any, **results: Any) -> Any:
            whole = [autocast_tensor(argument) for argument in arguments]
            with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
                return operator(*whole, **results)

        return call_with_casts

    for key in _DEVICES.values():
        library.impl(name, make_kernel(key), key.name)
