"""Whose files may be loaded as code: those that nobody but you and root can write, or put others in the place of.

The check of a path is that of sshd's StrictModes. Each folder on the way was looked at after the one above it, and
nobody else could change an entry of a folder that passed, so the whole path stays what it was when it was checked.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

_MOST_LINKS = 40  # on one path, as Linux itself follows


def mistrust(info: os.stat_result, *, or_root: bool = True) -> str:
    """Why code may not be loaded from a file or folder that others could change; empty if it may."""
    if info.st_uid != os.getuid() and not (or_root and info.st_uid == 0):
        return f"belongs to user {info.st_uid}, not to you"
    return "can be written by others" if info.st_mode & 0o022 else ""


def mistrust_of_way(path: Path) -> str:
    """Why somebody else could put another file in the place of ``path``; empty if nobody can.

    All folders above it, also those that symbolic links lead through, must belong to you or root, and be writable by
    nobody else unless they are sticky. The links themselves must belong to you or root. What isn't there yet passes.
    """
    # Where a user namespace has no root (Apptainer, bubblewrap), root's folders seem to be the overflow user's.
    owners = {0, os.getuid(), Path("/").stat().st_uid}
    folder, links = "", 0  # as text, since every lookup comes through here
    pending = os.fspath(path.absolute().parent).split("/")[::-1]
    try:
        while pending:
            part = pending.pop()
            if part == ".." or (part in ("", ".") and folder):
                folder = folder.rpartition("/")[0] if part == ".." else folder
                continue
            entry = f"{folder}/{part}" if part else "/"
            info = os.lstat(entry)
            if not stat.S_ISLNK(info.st_mode):
                if reason := _mistrust_of_folder(info, owners):
                    return f"is in {entry}, which {reason}"
                folder = "" if entry == "/" else entry
                continue
            links += 1
            if links > _MOST_LINKS:
                return "leads through too many symbolic links"
            if info.st_uid not in owners:
                return f"leads through {entry}, a symbolic link that belongs to user {info.st_uid}, not to you"
            target = os.fspath(Path(entry).readlink())
            if target.startswith("/"):
                folder = ""
            pending += target.split("/")[::-1]
        return ""
    except (FileNotFoundError, NotADirectoryError):
        return ""  # whoever makes or opens it says so
    except OSError as error:
        return f"can't be reached: {error.strerror}"


def _mistrust_of_folder(info: os.stat_result, owners: set[int]) -> str:
    if info.st_uid not in owners:
        return f"belongs to user {info.st_uid}, not to you"
    others = info.st_mode & 0o022
    if not others or info.st_mode & stat.S_ISVTX or (others == 0o020 and _is_private(info.st_gid)):
        return ""
    return "can be written by others"


def _is_private(group: int) -> bool:
    """Whether a group is this user's own, as systems with umask 002 make one for each user."""
    import grp
    import pwd

    try:
        user, own = pwd.getpwuid(os.getuid()), grp.getgrgid(group)
    except KeyError:
        return False
    return group == user.pw_gid and own.gr_name == user.pw_name and set(own.gr_mem) <= {user.pw_name}


def make_private(folder: Path) -> None:
    """Makes a folder, and those above it that are missing, for this user alone (0700), whatever the umask.

    Raises:
        OSError: one can't be made. That a folder is there already is no error.
    """
    missing = []
    while not folder.exists() and not folder.is_symlink():
        missing.append(folder)
        folder = folder.parent
    for each in reversed(missing):
        try:
            each.mkdir(mode=0o700)
        except FileExistsError:
            continue  # another process was faster
        if each.stat().st_mode & 0o777 != 0o700:
            each.chmod(0o700)  # a umask that takes rights from the owner, or a group's id inherited
