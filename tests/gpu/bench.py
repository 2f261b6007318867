#!/usr/bin/env python3
"""`gnaforge.runtime.bench` over the problems and kernels that prepare.py left in carried/."""

from __future__ import annotations

import argparse
import datetime
import os
from pathlib import Path

from paths import BENCH_LIBRARY, CARRIED, HERE, set_up

set_up()

from gnaforge.runtime import bench  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=400)
    out = Path(os.environ.get("OUT", HERE / "results")) / f"bench-{datetime.date.today()}.json"
    parser.add_argument("--out", type=Path, default=out)
    options, rest = parser.parse_known_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    bench.main(
        [
            f"--problems={CARRIED / 'problems.json'}",
            f"--library={BENCH_LIBRARY}",
            f"--seconds={options.seconds}",
            f"--report={options.out}",
            *rest,
        ]
    )


if __name__ == "__main__":
    main()
