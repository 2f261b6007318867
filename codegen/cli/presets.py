"""`gnaforge presets`."""

from __future__ import annotations

from .inspecting import print_json
from .options import JsonOption
from .tables import print_table


def presets(json: JsonOption = False) -> None:
    """List the specs that come with gnaforge.

    Every command that takes a spec takes the name of one.

    Examples:
        gnaforge presets
        gnaforge presets --json
    """
    from ..spec import load_spec, presets as descriptions

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
