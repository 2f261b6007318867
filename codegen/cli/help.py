"""Prints `--help`: prose, options and examples that wrap at the terminal's width, whatever it is.

typer's own tables cut names of options and defaults on narrow terminals, and keep the line ends of docstrings.
"""

from __future__ import annotations

import inspect
import math
import textwrap
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from .tables import writing

_INDENT = 2
_WIDEST = 100  # longer lines are hard to read
_NARROWEST = 40


class Command(TyperCommand):
    """A command whose help wraps, which says what a missing spec can be, and takes finite numbers only."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As its base class does.

        Raises:
            BadParameter: an argument is wrong, or missing.
        """
        try:
            rest = super().parse_args(ctx, args)
        except typer.BadParameter as error:
            missing = type(error) is not typer.BadParameter  # typer exports no name of that subclass
            if missing and error.param is not None and error.param.name == "spec":
                error.message = "Give a spec file, a preset's name (gnaforge presets lists them), or a kernel's key"
            raise
        param: Any  # of typer's own copy of click
        for param in self.params:
            value = ctx.params.get(param.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise typer.BadParameter(f"{value} is not finite; give a number", ctx, param)
        return rest

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Prints the page."""
        _print(_page(self, ctx))


class Group(TyperGroup):
    """A group of commands whose help wraps."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Prints the page."""
        _print(_page(self, ctx))


def _page(command: Any, ctx: Any) -> str:
    """The help of a command as plain text."""
    width = _width()
    usage = f"Usage: {ctx.command_path} "
    blocks = [_wrap(" ".join(command.collect_usage_pieces(ctx)), width, usage, " " * len("Usage: "))]
    text, examples = split_examples(command.help or "")
    blocks += _prose(text, width)
    parameters = command.get_params(ctx)
    for title, kind in (("Arguments", "argument"), ("Options", "option")):
        rows = [parameter.get_help_record(ctx) for parameter in parameters if parameter.param_type_name == kind]
        blocks += _section(title, [row for row in rows if row is not None], width)
    commands = [(name, one) for name, one in getattr(command, "commands", {}).items() if not one.hidden]
    titles = {name: one.rich_help_panel or "Commands" for name, one in commands}
    for title in dict.fromkeys(titles.values()):
        rows = [(name, _summary(one.help or "")) for name, one in commands if titles[name] == title]
        blocks += _section(title, rows, width)
    blocks += _examples(examples, width)
    return "\n\n".join([*blocks, *_prose(command.epilog or "", width)])


def split_examples(text: str) -> tuple[str, list[tuple[str, str]]]:
    """A docstring's prose, and its examples: of each the command line and what it does.

    Examples come last, below a line ``Examples:``, a line each: ``COMMAND  # WHAT``.
    """
    prose, _, examples = inspect.cleandoc(text).partition("\nExamples:\n")
    pairs = (line.partition("  # ") for line in examples.splitlines() if line.strip())
    return prose, [(command.strip(), what.strip()) for command, _, what in pairs]


def _width() -> int:
    from rich.console import Console

    return max(_NARROWEST, min(Console().width, _WIDEST))


def _paragraphs(text: str) -> list[str]:
    return [block for block in inspect.cleandoc(text).split("\n\n") if block.strip()]


def _summary(text: str) -> str:
    """The first paragraph of a docstring."""
    return next(iter(_paragraphs(text)), "")


def _prose(text: str, width: int) -> list[str]:
    """The paragraphs of a docstring, wrapped; one that is indented stays so."""
    margins = ((block, block[: len(block) - len(block.lstrip(" "))]) for block in _paragraphs(text))
    return [_wrap(" ".join(block.split()), width, margin, margin) for block, margin in margins]


def _wrap(text: str, width: int, first: str, other: str) -> str:
    """Lines of at most ``width`` letters that begin with ``first``, later ones with ``other``. Keys and options stay
    whole: they are there to be copied."""
    return textwrap.fill(
        text,
        width,
        initial_indent=first,
        subsequent_indent=other,
        break_on_hyphens=False,
        break_long_words=False,
    )


def _section(title: str, rows: Sequence[tuple[str, str]], width: int) -> list[str]:
    """A title with rows below: names in a column, or on lines of their own where they are too long for it."""
    if not rows:
        return []
    column = min(_INDENT + max(len(name) for name, _ in rows) + 2, width // 3)
    lines = [f"{title}:"]
    for name, text in rows:
        text = " ".join(text.split())
        begin = f"{'':{_INDENT}}{name}"
        if len(begin) + 2 > column:
            lines.append(begin)
            begin = ""
        lines.append(_wrap(text, width, begin.ljust(column), " " * column))
    return ["\n".join(lines)]


def _examples(examples: Sequence[tuple[str, str]], width: int) -> list[str]:
    """Command lines, and below each what it does where that is said."""
    margin = " " * _INDENT
    lines = [
        _wrap(text, width, margin * times, margin * 3)
        for command, what in examples
        for text, times in ((command, 1), (what, 3))
        if text
    ]
    return ["\n".join(["Examples:", *lines])] if lines else []


def _print(page: str) -> None:
    """Prints the page, in colours where it goes to a terminal that has them."""
    from rich.console import Console
    from rich.text import Text

    text = Text(page)
    text.highlight_regex(r"(?m)^[A-Z][a-z ]+:(?= |$)", "bold yellow")
    text.highlight_regex(r"(?<![\w-])--?[a-z][\w-]*", "cyan")
    text.highlight_regex(r"(?s)`[^`]*`", "bold")
    with writing():
        Console(highlight=False).print(
            text, soft_wrap=True
        )  # directly, as typer's own: without arguments none is echoed
