"""`gnaforge cache`: the compile cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..build_tools.text import count_of
from .cache_moving import export, import_
from .help import Command, Group
from .options import JsonOption
from .tables import say

if TYPE_CHECKING:
    from ..build_tools.cache_care import Doomed

app = typer.Typer(
    name="cache",
    cls=Group,
    help=(
        "Look at the compile cache, make room, move kernels between machines.\n\n"
        "GNAFORGE_CACHE_DIR says where it is.\n\n"
        "Examples:\n"
        "gnaforge cache info\n"
        "gnaforge cache export kernels.zip --spec hunyuan-video  # For `gnaforge cache import` elsewhere.\n"
    ),
    no_args_is_help=True,
    rich_markup_mode="rich",
)

DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Say what would be deleted; delete nothing.")]


@app.command(cls=Command)
def info(json: JsonOption = False) -> None:
    """Say where the cache and its read-only layers are, and what they hold.

    Examples:
        gnaforge cache info
        gnaforge cache info --json
    """
    from ..build.cache_report import summaries

    rows = summaries()
    if json:
        from .inspecting import print_json

        print_json(rows)
        return
    for row in rows:
        kind = "cache" if row is rows[-1] else "layer"
        say(f"{kind} {row['folder']}" + _state(row))
        for text, size in _kinds(row):
            say(f"  {text}, {size / 1e6:.1f} MB")


def _kinds(row: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """The kinds of things that a cache holds, with their number in words, and how many bytes they are."""
    texts = {
        "kernels": count_of(row["kernels"]["count"], "kernel"),
        "stale": f"{row['stale']['count']:,} made by another version (gnaforge cache prune)",
        "other": count_of(row["other"]["count"], "part") + " of gnaforge itself",
        "damaged": f"{row['damaged']['count']:,} damaged (gnaforge cache prune)",
    }
    for name, text in texts.items():
        if row[name]["count"] or name == "kernels":
            yield text, row[name]["bytes"]


def _state(row: dict[str, object]) -> str:
    if not row["exists"]:
        return ": not there yet"
    return "" if row["trusted"] else f": NOT USED, it {row['mistrusted']}"


@app.command(cls=Command)
def clear(dry_run: DryRunOption = False) -> None:
    """Delete everything in the cache.

    Kernels compile again when they are needed. Processes that run keep what they have loaded; builds that run finish.
    Layers are not touched.

    Examples:
        gnaforge cache clear --dry-run
        gnaforge cache clear
    """
    from ..build_tools.cache import user_cache
    from ..build_tools.cache_care import all_artifacts

    _delete(all_artifacts(user_cache()), dry_run)


@app.command(cls=Command)
def prune(
    older_than: Annotated[
        float | None,
        typer.Option("--older-than", metavar="DAYS", min=0, max=1e6, help="Also what was not used for longer."),
    ] = None,
    keep_mb: Annotated[
        float | None,
        typer.Option(
            "--keep-mb", metavar="MB", min=0, max=1e9, help="Also the least recently used, until MB are left."
        ),
    ] = None,
    dry_run: DryRunOption = False,
) -> None:
    """Delete what is of no use.

    That is kernels made by another version of gnaforge, damaged ones, and leftovers of killed builds.

    Examples:
        gnaforge cache prune
        gnaforge cache prune --older-than 30 --keep-mb 500
    """
    from ..build.cache_report import is_stale
    from ..build_tools.cache import user_cache
    from ..build_tools.cache_care import to_prune

    doomed = to_prune(
        user_cache(),
        is_stale,
        older_than=None if older_than is None else older_than * 86400,
        keep_bytes=None if keep_mb is None else int(keep_mb * 1e6),
    )
    _delete(doomed, dry_run)


def _delete(doomed: list[Doomed], dry_run: bool) -> None:
    from ..build_tools.cache import user_cache
    from ..build_tools.cache_care import remove

    for item in doomed:
        say(item.folder.name + (f": {item.reason}" if item.reason else ""))
    if user_cache().exists() and not dry_run:
        remove(user_cache(), doomed)
    what = "would be deleted" if dry_run else "deleted"
    say(f"{count_of(len(doomed), 'folder')} {what}, {sum(item.size for item in doomed) / 1e6:.1f} MB")


@app.command(cls=Command)
def explain(
    key: Annotated[str, typer.Argument(metavar="KEY", help="A kernel's key, as gnaforge list prints it.")],
    json: JsonOption = False,
) -> None:
    """Say why a kernel is compiled again, or isn't.

    Prints every part of its cache key, and which part differs from the nearest entry of the cache.

    Examples:
        gnaforge cache explain gna_forward-cpu-r2-fp32-dany-q8x8-kv8x8
        gnaforge cache explain gna_forward-cpu-r2-fp32-dany-q8x8-kv8x8 --json
    """
    from ..build.cache_report import explain as explained
    from ..families import require_config

    config = require_config(key)
    found = explained(config)
    if json:
        from .inspecting import print_json

        paths = {name: str(getattr(found, name) or "") for name in ("found", "usable", "nearest")}
        print_json({**vars(found), **paths})
        return
    width = max(map(len, found.parts))
    for name, value in found.parts.items():
        say(f"{name:{width}}  {value}")
    say(f"{'digest':{width}}  {found.digest or '(needs a compiler)'}\n")
    for note in found.notes:
        say(note)
    if found.found:
        say(f"in the cache: {found.found}")
        return
    say("not in the cache" + (f"; calls take what another compiler made: {found.usable}" if found.usable else ""))
    if found.nearest:
        say(f"nearest entry: {found.nearest}")
        for name, (theirs, ours) in found.differences.items():
            say(f"  {name}: there {theirs or '(nothing)'}\n  {' ' * len(name)}  now   {ours or '(nothing)'}")


app.command("export", cls=Command)(export)
app.command("import", cls=Command)(import_)
