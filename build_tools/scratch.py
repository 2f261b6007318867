"""Names of private folders that say who made them, so that what a dead process left behind can be told from the rest.

No lock is asked: on a network file system a lock may be seen by one host only.
"""

from __future__ import annotations

import os
import re
import tempfile
from functools import lru_cache
from pathlib import Path

PREFIX = ".build-"
_NAME = re.compile(r"\.build-(?P<home>[0-9a-f]{8}(?:[0-9a-f]{4})+-\d+)-(?P<pid>\d+)-(?P<start>\d+)-\w+")
_LONG = 7 * 86400.0  # seconds: no build of another machine or container takes longer


@lru_cache(maxsize=1)
def _home() -> str:
    """The running kernel and the name space of process numbers: among processes of one home a number means one."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip().replace("-", "")
        return f"{boot}-{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        return f"{os.urandom(16).hex()}-0"  # nobody's: others go by the age


def _start(pid: int | str) -> str:
    """When a process started, in ticks since its kernel did; empty if there is none of this number."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def make_scratch(root: Path) -> Path:
    """Makes a private folder in ``root``."""
    pid = os.getpid()
    prefix = f"{PREFIX}{_home()}-{pid}-{_start(pid) or 0}-"
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=root))
    folder.chmod(0o700)  # whatever the umask
    return folder


def abandoned_folders(root: Path, beside: Path) -> list[Path]:
    """Private folders in ``root`` whose process has died; those of other machines after a week.

    ``beside`` was made just now on the same file system, whose clock alone tells the age.
    """
    now = beside.stat().st_mtime
    found = []
    for folder in root.glob(f"{PREFIX}*"):
        match = _NAME.fullmatch(folder.name)
        if match is None or folder.is_symlink():
            continue
        if match["home"] == _home():
            dead = _start(match["pid"]) != match["start"]
        else:
            try:
                dead = now - folder.stat().st_mtime > _LONG
            except OSError:
                continue
        if dead:
            found.append(folder)
    return found
