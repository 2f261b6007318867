"""Writing wheels: names, versions, and a zip file whose bytes depend on nothing but its content."""

from __future__ import annotations

import base64
import hashlib
import io
import keyword
import os
import re
import sys
import time
import zipfile
from collections.abc import Iterable, Mapping
from typing import BinaryIO

from .errors import InputError

_NAME = re.compile(r"[A-Za-z0-9]|[A-Za-z0-9][A-Za-z0-9._-]*[A-Za-z0-9]")  # PEP 508
_NUMBER = r"(?:0|[1-9]\d*)"
_VERSION = re.compile(  # canonical public versions of PEP 440, and local ones
    rf"(?:[1-9]\d*!)?{_NUMBER}(?:\.{_NUMBER})*(?:(?:a|b|rc){_NUMBER})?(?:\.post{_NUMBER})?(?:\.dev{_NUMBER})?"
    r"(?:\+[a-z0-9]+(?:\.[a-z0-9]+)*)?"
)
_TAKEN = frozenset({"gnaforge", "torch", "numpy", "natten"})
_ZIP_EPOCH = 315532800  # 1980-01-01: zip knows no earlier time


def package_name(name: str) -> str:
    """The name to import a wheel called ``name`` by.

    Raises:
        InputError: it is no name for a wheel, or the package's name is taken.
    """
    if not _NAME.fullmatch(name):
        raise InputError(f"--name {name!r}: a wheel's name is letters and digits, with single . _ or - between them")
    package = re.sub(r"[-_.]+", "_", name).lower()
    if not package.isidentifier() or keyword.iskeyword(package):
        raise InputError(f"--name {name!r}: the package would be called {package!r}, which can't be imported")
    if package in _TAKEN or package in sys.stdlib_module_names:
        raise InputError(f"--name {name!r}: there is a package {package!r} already, which this one would hide")
    return package


def check_version(version: str) -> None:
    """Whether ``version`` is a version in its canonical form.

    Raises:
        InputError: it isn't.
    """
    if not _VERSION.fullmatch(version):
        raise InputError(
            f"--version {version!r} is no canonical version (PEP 440); write for example 1.0, 1.0rc1, 1.0+cu130"
        )


def file_time() -> tuple[int, int, int, int, int, int]:
    """The time that every file of a wheel bears: ``SOURCE_DATE_EPOCH``, else the beginning of 1980.

    Raises:
        InputError: ``SOURCE_DATE_EPOCH`` is no number of seconds that a zip file can hold.
    """
    text = os.environ.get("SOURCE_DATE_EPOCH", "0")
    try:
        moment = time.gmtime(max(int(text), _ZIP_EPOCH))
    except (ValueError, OverflowError, OSError):
        raise InputError(f"SOURCE_DATE_EPOCH is {text!r}; it must be a number of seconds since 1970") from None
    if moment.tm_year > 2107:
        raise InputError(f"SOURCE_DATE_EPOCH is {text!r}, after the year 2107, which zip files can't say")
    return moment[:6]


def write_zip(target: BinaryIO, files: Iterable[tuple[str, bytes]]) -> None:
    """Writes a zip file with ``files``, in their order. Equal files and times give equal bytes, with one zlib."""
    moment = file_time()
    with zipfile.ZipFile(target, "w") as archive:
        for name, data in files:
            entry = zipfile.ZipInfo(name, moment)
            entry.create_system = 3  # Unix, whatever this is
            entry.external_attr = (0o100755 if name.endswith(".so") else 0o100644) << 16
            archive.writestr(entry, data, zipfile.ZIP_DEFLATED, 9)


def in_record(digest: bytes) -> str:
    """A file's sha256 in the form that RECORD has it in."""
    return "sha256=" + base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


def wheel_bytes(
    name: str, version: str, platform: str, package: Mapping[str, bytes], info: Mapping[str, bytes]
) -> bytes:
    """A wheel for every Python 3, after the binary distribution format (PEP 427).

    Args:
        name: the distribution's name, as `package_name` gives it.
        version: its version.
        platform: the platform tag.
        package: the files to install, by path.
        info: the files of its ``.dist-info`` beside WHEEL and RECORD, by path in there.
    """
    folder = f"{name}-{version}.dist-info"
    tags = f"Wheel-Version: 1.0\nGenerator: gnaforge\nRoot-Is-Purelib: false\nTag: py3-none-{platform}\n"
    own = {f"{folder}/{path}": data for path, data in {**info, "WHEEL": tags.encode()}.items()}
    files = {**dict(sorted(package.items())), **dict(sorted(own.items()))}  # installers like .dist-info to come last
    rows = [f"{path},{in_record(hashlib.sha256(data).digest())},{len(data)}" for path, data in sorted(files.items())]
    record = f"{folder}/RECORD"
    buffer = io.BytesIO()
    write_zip(buffer, {**files, record: "\n".join([*rows, f"{record},,", ""]).encode()}.items())
    return buffer.getvalue()
