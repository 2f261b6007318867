"""Runs code in children of a process that has imported torch, and nothing of gnaforge.

That is a fresh process without the seconds that importing torch takes. A job is a line of JSON on stdin: code, cwd,
environment, and files for stdout and stderr; the answer is the child's exit status.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from typing import Any

import torch


def run(job: dict[str, Any]) -> int:
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        os.dup2(os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    os.environ.clear()
    os.environ.update(job["environment"])
    os.chdir(job["cwd"])
    torch.set_num_threads(1)  # as in a DataLoader's worker: OpenMP's threads don't survive a fork
    status = 0
    try:
        exec(compile(job["code"], "<test>", "exec"), {"__name__": "__main__"})
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return status


def main() -> None:
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                status = run(json.loads(line))
            finally:
                os._exit(status)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


main()
