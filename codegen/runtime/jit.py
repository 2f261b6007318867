"""Decides what a call does when no kernel fits: the policy ``GNAFORGE_JIT``, and when nothing may be compiled.

``never`` raises; ``warn``, the default, compiles a kernel and says so in one line on stderr; ``always`` compiles and
says nothing. While torch traces, or a CUDA graph is captured, every policy raises: a compiler in there would stall, or
break, what nobody expects to wait.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from . import lookup
from .request import Request

POLICIES = ("never", "warn", "always")
TRACING = "torch is tracing, and nothing is compiled meanwhile: register the kernel before"

_policy: str | None = None
_locks: dict[Request, threading.Lock] = {}


def set_policy(policy: str | None) -> None:
    """Sets the policy of this process, in place of ``GNAFORGE_JIT``; None goes back to that.

    Raises:
        ValueError: it is none of `POLICIES`.
    """
    global _policy
    if policy is not None and policy not in POLICIES:
        raise ValueError(f"policy: {policy!r} is not one of {', '.join(POLICIES)}")
    _policy = policy


def policy() -> str:
    """The policy in force.

    Raises:
        ValueError: ``GNAFORGE_JIT`` is none of `POLICIES`.
    """
    chosen = _policy or os.environ.get("GNAFORGE_JIT") or "warn"
    if chosen not in POLICIES:
        raise ValueError(f"GNAFORGE_JIT is {chosen!r}; it must be one of {', '.join(POLICIES)}")
    return chosen


def _origin(chosen: str) -> str:
    """Where the policy in force was set, as whoever wants another has to write it."""
    if _policy is not None:
        return f'gnaforge.register(policy="{chosen}") was called'
    return f"GNAFORGE_JIT={chosen}" if os.environ.get("GNAFORGE_JIT") else f"GNAFORGE_JIT is not set, so {chosen}"


def busy() -> str:
    """Why nothing may be compiled or loaded right now; empty if it may."""
    if torch.compiler.is_compiling():
        return TRACING
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is being captured, and nothing is compiled or loaded meanwhile: register the kernel before"
    return ""


@contextmanager
def one_thread(request: Request) -> Iterator[None]:
    """Of threads that miss the same kind of kernel one makes it, whatever their shapes and heads: most often it serves
    the others too."""
    lock = _locks.setdefault(replace(request, problem=None, one_pattern=False, heads_per_kv=0), threading.Lock())
    with lock:
        yield


def make_kernels(*requests: Request) -> str:
    """Compiles and loads a kernel for each part of a call, if the policy says so. Returns why not; empty if it did."""
    chosen = policy()
    source = lookup.source()
    if source is None:  # a package of built kernels
        return ""
    if chosen == "never":
        return f"calls don't compile ({_origin(chosen)})"
    try:
        made = source.make(requests, quiet=chosen == "always")
    except (RuntimeError, ValueError) as error:
        return f"it can't be compiled now: {error}"
    if made.compiled and chosen == "warn":
        line = f"gnaforge: compiled {', '.join(made.compiled)} in {made.seconds:.1f} s: no kernel fitted a call"
        print(f"{line} ({_origin(chosen)})", file=sys.stderr, flush=True)
    return ""


def _after_fork() -> None:
    _locks.clear()  # a thread that held one doesn't exist in the child


os.register_at_fork(after_in_child=_after_fork)
