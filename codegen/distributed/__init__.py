"""Attention whose tokens are divided over devices, on `torch.distributed`: the README beside this file explains it.

`context_parallel_attention`, `context_parallel_joint_attention`, `plan`, `plan_joint`. Imported only when asked for:
nothing else of the package needs it, and `gnaforge simulate --devices` takes its counts without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .agreement import RankError
    from .attention import context_parallel_attention, plan
    from .planning import Plan
    from .text import context_parallel_joint_attention, plan_joint

__all__ = [
    "Plan",
    "RankError",
    "context_parallel_attention",
    "context_parallel_joint_attention",
    "plan",
    "plan_joint",
]

_MODULES = {
    "Plan": ".planning",
    "RankError": ".agreement",
    "context_parallel_attention": ".attention",
    "context_parallel_joint_attention": ".text",
    "plan": ".attention",
    "plan_joint": ".text",
}


def __getattr__(name: str) -> Any:
    # Counting needs no torch, and torch.distributed takes a while to import.
    if name not in _MODULES:
        raise AttributeError(f"module 'gnaforge.distributed' has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(_MODULES[name], __name__), name)
    return found
