"""Errors that the command line turns into one clear message instead of a traceback."""

from __future__ import annotations


class GnaforgeError(Exception):
    """Base of all errors that carry a message for the user; ``exit_code`` is the CLI's exit status."""

    exit_code = 1


class InputError(GnaforgeError, ValueError):
    """A spec, an option, a path or another thing that the user gave is wrong. Nothing was written."""

    exit_code = 2


class BuildError(GnaforgeError, RuntimeError):
    """A compiler or linker failed, or a tool that a build needs is missing."""
