"""Checks of arguments as NATTEN has them in ``natten.utils`` and, since 0.20, in ``natten.utils.checks``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch

log = SimpleNamespace(get_logger=logging.getLogger)
"""Of ``from natten.utils import log``: loggers are those of `logging`."""


def _per_axis(name: str, rank: int, given: Any, is_right: Callable[[Any], bool], expected: str) -> tuple[Any, ...]:
    axes = tuple(given) if isinstance(given, Sequence) and not isinstance(given, str) else (given,) * rank
    if len(axes) != rank or not all(map(is_right, axes)):
        raise ValueError(f"{name} is {given!r}; it must be {expected}, one for all of {rank} axes or one for each")
    return axes


def _is_int(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def check_kernel_size_arg(na_dim: int, kernel_size: Any) -> tuple[int, ...]:
    """One window per axis, each at least 2; raises a ValueError for anything else."""
    return _per_axis("kernel_size", na_dim, kernel_size, lambda one: _is_int(one, 2), "an int of at least 2")


def check_stride_arg(na_dim: int, stride: Any) -> tuple[int, ...]:
    """One stride per axis, 1 for None; raises a ValueError for anything else than positive ints."""
    return _per_axis("stride", na_dim, 1 if stride is None else stride, lambda one: _is_int(one, 1), "a positive int")


def check_dilation_arg(na_dim: int, dilation: Any) -> tuple[int, ...]:
    """One dilation per axis, 1 for None; raises a ValueError for anything else than positive ints."""
    own = 1 if dilation is None else dilation
    return _per_axis("dilation", na_dim, own, lambda one: _is_int(one, 1), "a positive int")


def check_causal_arg(na_dim: int, is_causal: Any) -> tuple[bool, ...]:
    """One bool per axis, False for None; raises a ValueError for anything else."""
    own = False if is_causal is None else is_causal
    return _per_axis("is_causal", na_dim, own, lambda one: isinstance(one, bool), "a bool")


def check_all_args(na_dim: int, kernel_size: Any, *others: Any, **named: Any) -> tuple[Any, ...]:
    """Arguments with a value per axis: ``(kernel_size, stride, dilation, is_causal)``.

    Releases before 0.20 have no stride: three of ``kernel_size, dilation, is_causal`` go in, and as many come out.

    Raises:
        TypeError: there are others.
        ValueError: one is wrong.
    """
    names = ["stride", "dilation", "is_causal"]
    if len(others) + len(named) == 2 and "stride" not in named:
        names.remove("stride")
    given = dict(zip(names, others, strict=False)) | named
    if sorted(given) != sorted(names) or len(others) + len(named) != len(names):
        raise TypeError(
            "check_all_args takes na_dim, kernel_size, stride, dilation, is_causal; or these without stride"
        )
    checks = {"stride": check_stride_arg, "dilation": check_dilation_arg, "is_causal": check_causal_arg}
    return check_kernel_size_arg(na_dim, kernel_size), *(checks[name](na_dim, given[name]) for name in names)


def get_device_cc(device: torch.device | int | None = None) -> int:
    """Compute capability of a GPU, as 90; 0 without one."""
    if not torch.cuda.is_available():
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
