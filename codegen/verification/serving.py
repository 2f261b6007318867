"""Serves requests in a process that kernels may take along: one JSON request per line of standard input, one reply per
line of standard output. Needs no torch."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

LOST = 3
"""The exit status after a reply that says that the process can't go on."""


def serve(answer: Callable[[dict[str, Any]], dict[str, Any]], jobs: Path | None = None) -> None:
    """Serves until the requests end, or a reply holds ``ended``: then the process ends.

    Args:
        answer: the reply to a request.
        jobs: a file to read the requests from, instead of standard input.
    """
    # Kernels print to standard output, which is for replies only; so do C code and child processes.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    for line in jobs.read_text().splitlines() if jobs else sys.stdin:
        reply = answer(json.loads(line))
        print(json.dumps(reply), file=replies, flush=True)
        if reply.get("ended"):
            sys.exit(LOST)
