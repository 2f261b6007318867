"""`gnaforge presets`."""

from __future__ import annotations

from typing import Annotated

import typer

from .inspecting import print_json
from .options import JsonOption
from .tables import print_table, say


def presets(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME]", help="Write the YAML of this one to stdout.", show_default=False),
    ] = None,
    json: JsonOption = False,
) -> None:
    """List the specs that come with gnaforge, or show one.

    Every command that takes a spec takes the name of one.

    Examples:
        gnaforge presets
        gnaforge presets --json
        gnaforge presets vit-56  # Its YAML, to copy to a file of your own.
    """
    from ..errors import InputError
    from ..spec import load_spec, preset_text, presets as descriptions

    if name is not None:
        if json:
            raise InputError("--json: has no effect beside a preset's name")
        say(preset_text(name).decode(), end="")
        return
    columns = ("name", "rank", "dtype", "arch", "description")
    rows = []
    for name, description in descriptions().items():
        spec = load_spec(name)
        ranks = sorted({rank for entry in spec.kernels for rank in entry.rank})
        dtypes = list(dict.fromkeys(dtype for entry in spec.kernels for dtype in entry.dtype))
        rows.append((name, ranks, dtypes, list(spec.arch), description))
    if json:
        print_json([dict(zip(columns, row, strict=True)) for row in rows])
        return
    texts = (
        (name, ", ".join(map(str, ranks)), ", ".join(dtypes), ", ".join(arches), description)
        for name, ranks, dtypes, arches, description in rows
    )
    print_table(columns, texts, left=columns)
