"""Errors of the runtime."""

from __future__ import annotations


class LibraryError(RuntimeError):
    """A kernel library or the core can't be loaded: missing, damaged, or built for another ABI."""


class NoKernelError(RuntimeError):
    """No loaded kernel computes the problem. The message lists each kernel's reason and how to get one."""
