"""Text to print: from elsewhere, made safe; numbers of things."""

from __future__ import annotations

from collections.abc import Iterable


def printable(text: object, *, lines: bool = False, most: int | None = None) -> str:
    """``text`` with every character that isn't printable written as its escape: terminals obey some of them.

    Escaped are control characters, what turns the direction of writing, separators other than the space, and halves of
    surrogate pairs, which can't be encoded. With ``lines``, line ends and tabs stay. Of more than ``most`` characters
    the rest is left out.
    """
    text = str(text)
    if most is not None and len(text) > most:
        text = text[:most] + "..."
    if text.isprintable():
        return text
    kept = "\n\t" if lines else ""
    return "".join(
        char if char.isprintable() or char in kept else char.encode("unicode_escape", "surrogatepass").decode()
        for char in text
    )


def listed(names: Iterable[object]) -> str:
    """Things in a sentence: ``a``, ``a and b``, ``a, b and c``."""
    *others, last = map(str, names)
    return f"{', '.join(others)} and {last}" if others else last


def count_of(number: int, noun: str) -> str:
    """A number of things: ``1 kernel``, ``2,000 kernels``. The noun is one whose plural ends in s."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
