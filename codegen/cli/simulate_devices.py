"""`gnaforge simulate --devices`: problems whose tokens are divided over devices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..simulator.devices import Divided, Links, simulate_devices
from ..simulator.passes import Passes
from .simulate_text import box, describe_problem, seconds
from .tables import print_table, say
from .waiting import steps

if TYPE_CHECKING:
    from ..simulator.simulation import Simulation


def simulate_on_devices(
    problems: Sequence[Simulation | Passes], devices: str, gigabytes: float, latency_us: float, as_json: bool
) -> None:
    """Prints each problem on each of some numbers of devices.

    Raises:
        InputError: the numbers are wrong.
    """
    from .problem_options import parse_numbers

    counts = parse_numbers("devices", devices)
    links = Links(gigabytes, latency_us)
    cases = [(one, count) for one in problems for count in counts]
    found = [simulate_devices(one, count, links) for one, count in steps("dividing tokens", cases)]
    if as_json:
        from json import dumps

        say(dumps([{**each.problem.as_json(), **each.as_json()} for each in found], indent=1))
        return
    for i, one in enumerate(problems):
        kernels = one.kernels if isinstance(one, Passes) else {"": one}
        tiles = ", ".join(f"{op.removeprefix('gna_')} {found.tiles}".strip() for op, found in kernels.items())
        say(f"{describe_problem(one.problem)}; {tiles}")
        _print_rows(found[i * len(counts) : (i + 1) * len(counts)])
    first = next(iter(found[0].kernels.values()))
    direction = problems[0].direction if isinstance(problems[0], Passes) else "forward"
    passes = {"forward": "in a forward pass", "backward": "in a backward pass"}.get(direction, "in a training step")
    say(
        f"\nOf the device whose links carry most, {passes}. "
        f"Links: {gigabytes:g} GB/s each way, {latency_us:g} us an exchange. Bytes are exact, times a model of "
        f"{first.family.time_constants().device}, no measurement. Overlap: the share of exchanges beside which inner "
        "queries, which need no halo, are computed. Bound: over one device."
    )


_HEADS = ("devices", "mesh", "mode", "shard", "receives", "sends", "peers", "inner", "kernels", "exchange", "overlap")


def _print_rows(found: Sequence[Divided]) -> None:
    print_table(
        (*_HEADS, "all", "bound"),
        (
            (
                f"{each.devices:,}",
                box(each.division.shards.parts),
                each.division.mode,
                box(each.shape),
                _bytes(each.bytes_received),
                _bytes(each.bytes_sent),
                str(each.peers),
                f"{each.inner_share:.0%}",
                seconds(each.inner_seconds + each.border_seconds),
                seconds(each.exchange_seconds),
                f"{each.overlap:.0%}",
                seconds(each.seconds),
                f"{each.speedup:,.2f}x",
            )
            for each in found
        ),
    )


def _bytes(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} B"
