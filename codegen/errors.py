"""Errors that the command line turns into one clear message instead of a traceback."""

from __future__ import annotations

from .build_tools.errors import BuildError as BuildError, GnaforgeError as GnaforgeError, InputError as InputError
