"""`gnaforge list`, `gnaforge doctor` and `gnaforge schema`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..families.target import TARGETS
from .options import JsonOption, plan_of
from .tables import print_table, say


def print_json(value: object) -> None:
    """Prints a value for programs."""
    import json

    say(json.dumps(value, indent=2))


def _cached_rows() -> list[dict[str, Any]]:
    """Compiled kernels, with their artifacts; those made from sources of another version, which calls don't use, are
    marked stale."""
    from ..build.identity import installed_parts, source_digest
    from ..build_tools.cache import cache_layers
    from ..families import faults_of
    from ..runtime.config import KernelConfig

    rows = []
    for cache in cache_layers():
        for artifact in cache.artifacts():
            try:
                config = KernelConfig.parse(artifact.record["key"])
                known = not faults_of(config)
            except (ValueError, KeyError):  # the core, or a kernel of another version
                continue
            current = known and artifact.is_made_of(source_digest(config), installed_parts(config))
            state = "built" if current else "stale"
            rows.append({**artifact.record, "state": state, "where": str(artifact.folder), "artifact": artifact})
    return rows


def _planned_rows(spec: str) -> list[dict[str, Any]]:
    built = {row["key"]: row for row in _cached_rows() if row["state"] == "built"}
    plan = plan_of(spec, None)
    return [built.get(config.key, {"key": config.key, "state": "not built"}) for config in plan.configs]


def _row(raw: dict[str, Any], *, modelled: bool = False) -> dict[str, Any]:
    from ..families import find_family
    from ..runtime.config import KernelConfig

    config = KernelConfig.parse(raw["key"])
    family = find_family(config)
    # Records may come from elsewhere: what is no number is left out.
    facts = {name: raw.get(name) for name in ("seconds", "library_bytes", "registers", "spill_bytes", "shared_memory")}
    code = raw.get("code")
    return {
        "key": config.key,
        "state": raw["state"],
        "op": config.op,
        "arch": config.arch,
        "q_tile": list(config.q_tile),
        "kv_tile": list(config.kv_tile),
        "q_tile_heads": config.q_tile_heads,
        "features": list(family.features) if family else None,
        **{name: value if isinstance(value, int | float) else None for name, value in facts.items()},
        "code": {str(name): n for name, n in code.items() if isinstance(n, int)} if isinstance(code, dict) else None,
        "where": raw.get("where", ""),
        **({"modelled": _modelled(raw)} if modelled else {}),
    }


def list_kernels(
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="[SPEC|LIB]",
            help="A spec, a preset's name, or a library (.so). Without it: what the compile cache holds.",
            show_default=False,
        ),
    ] = None,
    static: Annotated[
        bool, typer.Option("--static", help="Show what the build found in the machine code of GPU kernels.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """List kernels and what is known of the compiled ones.

    Needs no compiler. Beyond plain windows, kernels may take edges, frames, sinks, parts of a grid and extra keys.

    With `--static`: registers after launch, bytes spilled, shared memory per thread block, and of the machine
    code the instructions, matrix products (HGMMA or UTCHMMA), special functions (MUFU, nearly all of them exp2), and,
    where one warp does both, how many of those run while a product is under way.

    For kernels of the compile cache also modelled cycles of one multiprocessor: of a KV tile without and with a mask,
    and of a Q tile beyond its KV tiles. Each is three numbers: on sm90 with any number, with two and with one matrix
    product waiting for the tensor core; on sm100, whose warps wait for each other, with signals of 60, 100 and 150
    cycles. They come from the schedule in the machine code. The model tells a faster version of a kernel from a slower
    one; it doesn't say how fast either is, since it knows nothing of power, clocks, caches, loads and conflicts in
    shared memory. No kernel has run on hardware to check it. With `--json` as well, `modelled` has the cycles, or says
    why there are none.

    Examples:
        gnaforge list  # What the compile cache holds.
        gnaforge list hunyuan-video --static
        gnaforge list generated/quickstart/lib/quickstart.so
    """
    from ..build.library import read_library

    if source is None:
        raw = _cached_rows()
    elif source.endswith(".so"):
        raw = [{**row, "state": "built", "where": source} for row in read_library(Path(source))]
    else:
        raw = _planned_rows(source)
    rows = [_row(row, modelled=static) for row in raw]
    if json:
        print_json(rows)
        return
    if not rows:
        say("no kernels yet: try `gnaforge quickstart`, or `gnaforge build PRESET`; presets:")
        _print_presets()
        return
    (_print_static if static else _print_table)(rows)


def _modelled(raw: dict[str, Any]) -> dict[str, Any]:
    from ..build.cycles import modelled_cycles

    if (artifact := raw.get("artifact")) is None:
        return {"not_modelled": "the model reads kernels of the compile cache only"}
    return modelled_cycles(artifact)


def _print_static(rows: list[dict[str, Any]]) -> None:
    named, rows = rows, [row for row in rows if row["registers"]]
    if not rows:
        known = [name for name, target in TARGETS.items() if target.is_gpu]
        archs = {row["key"].split("-")[1] for row in named}.intersection(known) or known
        options = " ".join(f"--arch {arch}" for arch in known if arch in archs)
        say(f"no GPU kernel among these is built yet: gnaforge build SPEC {options}", file=sys.stderr)
        return
    print_table(
        (
            *("kernel", "registers", "spills", "shared memory", "instructions", "products", "MUFU", "under a product"),
            *("interior tile", "shell tile", "Q tile", "busiest"),
        ),
        (
            (
                row["key"],
                str(row["registers"]),
                f"{row['spill_bytes']} B",
                f"{row['shared_memory']} B",
                *_counts(row["code"] or {}),
                *_cycles(row["modelled"]),
            )
            for row in rows
        ),
    )
    for reason in dict.fromkeys(row["modelled"].get("not_modelled") for row in rows):
        if reason is not None:
            keys = [row["key"] for row in rows if row["modelled"].get("not_modelled") == reason]
            say(f"no modelled cycles of {', '.join(keys)}: {reason}", file=sys.stderr)


def _cycles(modelled: dict[str, Any]) -> list[str]:
    if "not_modelled" in modelled:
        return [""] * 4
    tiles = (modelled[f"{name}_cycles"] for name in ("interior_tile", "shell_tile", "q_tile"))
    limit = modelled["interior_limit"]
    return [*("/".join(map(str, cycles.values())) for cycles in tiles), f"{limit['pipe']} {limit['busy_share']:.0%}"]


def _counts(code: dict[str, int]) -> list[str]:
    return [str(code.get(name, "")) for name in ("instructions", "products", "mufu", "mufu_under_product")]


def _print_presets() -> None:
    from ..spec import presets

    for name, description in presets().items():
        say(f"  {name:16} {description}")


def _print_table(rows: list[dict[str, Any]]) -> None:
    print_table(
        ("kernel", "state", "size", "compiled in", "registers", "shared memory", "beyond plain windows"),
        (
            (
                row["key"],
                row["state"],
                f"{row['library_bytes'] / 1e3:.0f} KB" if row["library_bytes"] else "",
                f"{row['seconds']:.1f} s" if row["seconds"] else "",
                str(row["registers"] or ""),
                f"{row['shared_memory']} B" if row["shared_memory"] else "",
                _features(row["features"]),
            )
            for row in rows
        ),
    )


def _features(names: list[str] | None) -> str:
    """The settings that a kernel takes, of `FEATURES`; others say nothing of problems."""
    from ..runtime.problem import FEATURES

    if names is None:
        return ""
    own = [name for name in FEATURES if name in names]
    return "everything" if len(own) == len(FEATURES) else ", ".join(name.replace("_", " ") for name in own) or "nothing"


def doctor(json: JsonOption = False) -> None:
    """Say what gnaforge needs, what it found, and how to get the rest.

    Exits with 1 if cpu kernels can't be built and run here.

    Examples:
        gnaforge doctor
        gnaforge doctor --json  # For a report of a fault.
    """
    from ..doctor import GROUPS, NEEDED, examine

    findings = examine()
    if json:
        print_json([vars(finding) for finding in findings])
    else:
        for group in GROUPS:
            say(f"To {group}:")
            for finding in findings:
                if finding.group == group:
                    say(f"  {'ok     ' if finding.ok else 'MISSING'} {finding.name}: {finding.detail}")
    if not all(finding.ok for finding in findings if finding.group in NEEDED):
        raise typer.Exit(1)


def schema(
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print a Markdown table of the fields, for people.")
    ] = False,
) -> None:
    """Print the JSON Schema of kernel specs, for editors.

    Redirect it to gnaforge.schema.json and put `# yaml-language-server: $schema=gnaforge.schema.json` on a spec's first
    line: editors then complete and check its fields.

    Examples:
        gnaforge schema
        gnaforge schema --markdown  # A table of the fields, to read.
    """
    from ..spec import json_schema
    from ..spec.reference import reference_table

    if markdown:
        say(reference_table(json_schema()), end="")
    else:
        print_json(json_schema())
