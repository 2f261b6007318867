"""Functions that torch.compile leaves to Python: a call of divided tokens is a plan of exchanges and of kernels' calls,
made in Python for each rank."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch

F = TypeVar("F", bound=Callable[..., Any])
_REASON = "calls of divided tokens run between compiled graphs: leave out fullgraph=True"


def untraced(function: F) -> F:
    """Does what torch.compiler.disable does. That imports all of torch._dynamo, in over a second: here when torch
    compiles."""
    disabled: list[Callable[..., Any]] = []

    def disable_now() -> bool:
        """Runs as plain Python while torch.compile traces."""
        if not disabled:
            disabled.append(torch.compiler.disable(function, reason=_REASON))
        return True

    disable_now._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as runtime.ops does

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            disable_now()
            return disabled[0](*args, **kwargs)
        return function(*args, **kwargs)

    return cast("F", call)
