"""Errors that the command line turns into one clear message instead of a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from .build_tools.errors import BuildError as BuildError, GnaforgeError as GnaforgeError, InputError as InputError


@contextmanager
def as_input_error() -> Iterator[None]:
    """Makes an InputError with the same message of a ValueError about what the user gave."""
    try:
        yield
    except GnaforgeError:
        raise
    except ValueError as error:
        raise InputError(str(error)) from None
