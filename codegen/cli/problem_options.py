"""The options that say a problem, once for all commands that take one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields
from functools import wraps
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_args, get_type_hints

import typer

from ..build_tools.text import listed
from ..runtime.dtypes import DTYPES

if TYPE_CHECKING:
    from ..runtime.problem import Problem

PATTERN = (
    *("tokens", "window", "stride", "dilation", "causal", "edge", "sink"),
    *("grid", "q_offset", "kv_tokens", "kv_offset", "kv_sink", "extra_tokens"),
)
"""The options that give tokens and pattern."""

# The element types whose outputs have another one.
_SCALED = [dtype for dtype in DTYPES.values() if dtype.scaled]
_BUT_FOR = f"but for {listed([dtype.name for dtype in _SCALED])}"
_OUTPUTS = "; of ".join(f"{dtype.name}: {' or '.join(dtype.outputs)}" for dtype in _SCALED)


@dataclass(frozen=True)
class ProblemOptions:
    """The options of a problem, None where one wasn't given. Numbers are separated by commas or x."""

    preset: Annotated[
        str | None, typer.Option("--preset", metavar="SPEC", help="Take every shape of a preset or spec file.")
    ] = None
    tokens: Annotated[str | None, typer.Option(help="Token layout, for example 56,56.")] = None
    window: Annotated[
        str | None, typer.Option(help="Window, for example 7,7; one number holds for all dimensions.")
    ] = None
    stride: Annotated[
        str | None,
        typer.Option(help="Queries in a row that share a window: one number, or one per dimension.", show_default="1"),
    ] = None
    dilation: Annotated[
        str | None,
        typer.Option(help="Tokens from key to key of a window: one number, or one per dimension.", show_default="1"),
    ] = None
    causal: Annotated[
        str | None,
        typer.Option(
            help="1 where a query sees no key after itself, block where none after its --stride queries, else 0; once "
            "or per dimension.",
            show_default="0",
        ),
    ] = None
    edge: Annotated[
        str | None,
        typer.Option(
            help="What a window does that would leave the tokens: shift, cut or wrap; once or per dimension.",
            show_default="shift",
        ),
    ] = None
    sink: Annotated[
        str | None,
        typer.Option(help="First tokens that are seen beside the window; once or per dimension.", show_default="0"),
    ] = None
    grid: Annotated[
        str | None,
        typer.Option(
            help="Tokens that windows are laid in, where queries or keys are a part of them.",
            show_default="the key tokens",
        ),
    ] = None
    q_offset: Annotated[
        str | None,
        typer.Option(help="Where in the grid the queries begin.", show_default="0"),
    ] = None
    kv_tokens: Annotated[str | None, typer.Option(help="Tokens of the keys.", show_default="as --tokens")] = None
    kv_offset: Annotated[str | None, typer.Option(help="Where in the grid the keys begin.", show_default="0")] = None
    kv_sink: Annotated[
        str | None,
        typer.Option(
            help="So many keys are the grid's first; the others begin at --kv-offset.",
            show_default="0",
        ),
    ] = None
    extra_tokens: Annotated[
        str | None,
        typer.Option(help="Extra keys that all queries see, for example 256; two numbers for two pieces."),
    ] = None
    heads: Annotated[int | None, typer.Option(help="Query heads.", show_default="1")] = None
    kv_heads: Annotated[
        int | None, typer.Option(help="Heads of K and V; divide --heads.", show_default="as --heads")
    ] = None
    batch: Annotated[int | None, typer.Option(help="Batch entries.", show_default="1")] = None
    head_dim: Annotated[int | None, typer.Option(help="Channels per head of Q and K.")] = None
    value_head_dim: Annotated[
        int | None, typer.Option(help="Channels per head of V.", show_default="as --head-dim")
    ] = None
    dtype: Annotated[
        str | None, typer.Option(help=f"Element type of Q, K, V and, {_BUT_FOR}, the output: {', '.join(DTYPES)}.")
    ] = None
    out_dtype: Annotated[
        str | None,
        typer.Option(
            help=f"Element type of the output of {_OUTPUTS}.",
            show_default="the first",
        ),
    ] = None

    def fields_in_use(self) -> dict[str, Any]:
        """The fields of a problem that were given."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "preset"}
        return {name: value for name, value in values.items() if value is not None}

    def problem(self, **default: Any) -> Problem:
        """The problem that they say; ``default`` has fields for where they say nothing.

        Raises:
            InputError: they say none; begins with the option.
        """
        from ..errors import InputError
        from ..runtime.problem import Problem, option_of
        from ..runtime.problem_rules import ProblemError

        try:
            return Problem.from_options({**default, **self.fields_in_use()})
        except ProblemError as error:
            raise InputError(f"{option_of(error.field)}: {error.text}") from None


Command = TypeVar("Command", bound=Callable[..., None])


def takes_problem(*, without: Collection[str] = (), **shown: str | Mapping[str, Any]) -> Callable[[Command], Command]:
    """Gives a command the options of `ProblemOptions`, in the place of its parameter ``options``.

    Args:
        without: fields that the command has no option for.
        shown: by field, what the help shows as the default, or settings of `typer.Option` to change.
    """

    def decorate(command: Command) -> Command:
        signature = inspect.signature(command, eval_str=True)
        names = [field.name for field in fields(ProblemOptions) if field.name not in without]

        @wraps(command)
        def run(**values: Any) -> None:
            options = ProblemOptions(**{name: values.pop(name) for name in names})
            command(options=options, **values)

        parameters = []
        for parameter in signature.parameters.values():
            if parameter.name == "options":
                parameters += [_parameter(name, shown.get(name, {})) for name in names]
            else:
                parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
        run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run  # type: ignore[return-value]

    return decorate


def _parameter(name: str, changed: str | Mapping[str, Any]) -> inspect.Parameter:
    from copy import copy

    kind, option = get_args(get_type_hints(ProblemOptions, include_extras=True)[name])
    option = copy(option)
    for setting, value in ({"show_default": changed} if isinstance(changed, str) else changed).items():
        setattr(option, setting, value)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, option])


def parse_numbers(field: str, text: str) -> tuple[int, ...]:
    """The whole numbers that the value of the option for a field lists.

    Raises:
        InputError: it lists something else.
    """
    from ..errors import InputError
    from ..runtime import problem
    from ..runtime.problem_rules import ProblemError

    try:
        return problem.parse_numbers(field, text)
    except ProblemError as error:
        raise InputError(f"{problem.option_of(field)}: {error.text}") from None
