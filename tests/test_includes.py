"""The scanner that decides which headers a kernel depends on."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from gnaforge.build.identity import include_dir
from gnaforge.build_tools.includes import forget_headers, include_closure


@pytest.fixture
def headers(tmp_path: Path) -> Path:
    folder = tmp_path / "gnaforge"
    folder.mkdir()
    (folder / "a.h").write_text('#include "gnaforge/b.h"\n#if 0\n#  include <gnaforge/c.h>\n#endif\n')
    (folder / "b.h").write_text('#include "gnaforge/a.h"\n#include <vector>\n// #include "gnaforge/d.h"\n')
    (folder / "c.h").write_text("")
    (folder / "d.h").write_text("")
    forget_headers()
    return tmp_path


def test_closure_is_transitive_and_takes_conditional_includes(headers: Path) -> None:
    assert list(include_closure('#include "gnaforge/a.h"\n', headers)) == [
        "gnaforge/a.h",
        "gnaforge/b.h",
        "gnaforge/c.h",
    ]
    assert include_closure("#include <vector>\n", headers) == {}


def test_content_decides_and_time_stamps_do_not(headers: Path) -> None:
    source = '#include "gnaforge/c.h"\n'
    before = include_closure(source, headers)
    (headers / "gnaforge" / "c.h").touch()
    forget_headers()
    assert include_closure(source, headers) == before
    (headers / "gnaforge" / "c.h").write_text("// new\n")
    forget_headers()
    assert include_closure(source, headers) != before


def test_a_missing_header_is_an_error(headers: Path) -> None:
    with pytest.raises(FileNotFoundError):
        include_closure('#include "gnaforge/none.h"\n', headers)


def test_every_include_of_our_headers_is_found() -> None:
    """No header includes another in a way that the scanner would miss."""
    forget_headers()
    for header in include_dir().rglob("*.h"):
        text = header.read_text()
        includes = [line for line in text.splitlines() if "include" in line and line.lstrip().startswith("#")]
        ours = [line for line in includes if "<" not in line]
        assert all('"gnaforge/' in line for line in ours), f"{header}: {ours}"
        assert len(include_closure(text, include_dir())) >= len(set(ours))


# Which folders of headers each folder may include, itself apart. "" is gnaforge/ itself: the contract.
ROLES = {
    "": {"gna"},
    "gna": set(),
    "ptx": set(),
    "gpu": {"", "gna", "ptx"},
    "cpu": {"", "gna"},
    "sm90": {"", "gna", "ptx", "gpu"},
    "sm100": {"", "gna", "ptx", "gpu"},
}


def test_headers_include_only_what_their_role_allows() -> None:
    """An arch's headers never name another arch's."""
    for header in include_dir().rglob("*.h"):
        own = header.relative_to(include_dir() / "gnaforge").parts
        folder = own[0] if len(own) > 1 else ""
        allowed = ROLES[folder] | {folder}
        text = header.read_text()
        for name in re.findall(r'#include "gnaforge/([^"]+)"', text):
            assert (name.split("/")[0] if "/" in name else "") in allowed, f"{header} includes {name}"
        for other in {"cpu", "sm90", "sm100"} - {folder}:
            assert f"{other}::" not in text, f"{header} names {other}"
