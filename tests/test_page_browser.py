"""Pages for a browser in headless Chromium: sorting, stepping through queries, and where boxes are on the screen."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from gnaforge.page.page import Page, Table, render_page
from gnaforge.page.pattern import pattern_of
from gnaforge.runtime.problem import Problem
from gnaforge.simulator.cost import Tiles

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on PATH: apt-get install chromium-headless-shell")

TABLE = Table(["name", "speed-up"], [["ten", 10.0], ["nine", 9.0], ["none", None], ["more", 1e3]])
PROBLEM = Problem((20, 30), (8, 10))
TILES = Tiles((4, 5), (4, 5))

# Does what a user does, and keeps what is on the screen after each step.
STEPS = """{
const found = {};
const names = () => [...document.querySelectorAll("tbody tr")].map((row) => row.cells[0].textContent);
const head = document.querySelectorAll("th button")[1];
const placed = (kind) => [...document.querySelectorAll("svg ." + kind)].map((box) => {
  const place = box.getBoundingClientRect(), all = document.querySelector("svg").getBoundingClientRect();
  const share = (value, begin, size) => (value - begin) / size;
  return [share(place.top, all.top, all.height), share(place.left, all.left, all.width),
          share(place.bottom, all.top, all.height), share(place.right, all.left, all.width)];
});
const look = () => ({ facts: document.querySelector(".facts").textContent, query: placed("query"),
  inputs: [...document.querySelectorAll("input")].map((input) => input.value),
  window: placed("window"), tiles: placed("interior").length + placed("shell").length });
head.click();
found.up = names();
head.click();
found.down = names();
found.sorted = head.closest("th").getAttribute("aria-sort");
found.begin = look();
const input = document.querySelector("input");
input.value = 0;
input.dispatchEvent(new Event("input"));
found.typed = look();
input.value = 99;
input.dispatchEvent(new Event("input"));
found.refused = look();
const svg = document.querySelector("svg"), place = svg.getBoundingClientRect();
svg.setPointerCapture = () => {};  // an event that no pointer made can't be captured
svg.dispatchEvent(new PointerEvent("pointerdown", { clientX: place.left + place.width * 22.5 / 30,
  clientY: place.top + place.height * 7.5 / 20 }));
found.pointed = look();
input.value = 0;
input.dispatchEvent(new Event("input"));
const list = document.querySelector("select");
list.value = "cut";
list.dispatchEvent(new Event("change"));
found.cut = look();
found.overflow = document.documentElement.scrollWidth - innerWidth;
document.body.append(Object.assign(document.createElement("pre"), { id: "found", textContent: JSON.stringify(found) }));
}"""


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], dict[str, Any]]:
    """What the steps find in a window of a width in pixels."""
    folder = tmp_path_factory.mktemp("page")
    page = render_page(Page("A page", ["A line."], [TABLE], {"a pattern": pattern_of(PROBLEM, TILES) or {}}, []))
    (folder / "page.html").write_text(page.replace("</body>", f"<script>{STEPS}</script></body>"))

    def look(width: int) -> dict[str, Any]:
        assert BROWSER is not None
        profile = f"--user-data-dir={folder / 'profile'}"
        options = ["--headless", "--no-sandbox", "--disable-gpu", profile, f"--window-size={width},900", "--dump-dom"]
        command = [BROWSER, *options, (folder / "page.html").as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=dict(_environment(folder)))
        text = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
        assert text is not None, done.stderr[-2000:]
        found: dict[str, Any] = json.loads(unescape(text[1]))
        return found

    return look


def _environment(home: Path) -> dict[str, str]:
    """So that a browser writes nothing into the user's own home."""
    return {"HOME": str(home), "PATH": "/usr/bin:/bin"}


def tokens(box: list[float]) -> list[int]:
    """The first and last (y, x) of a box on the screen, in tokens."""
    top, left, bottom, right = box
    return [round(top * 20), round(left * 30), round(bottom * 20) - 1, round(right * 30) - 1]


def test_what_is_on_the_screen(seen: Callable[[int], dict[str, Any]]) -> None:
    found = seen(1000)
    assert found["up"] == ["nine", "ten", "more", "none"] and found["down"] == ["more", "ten", "nine", "none"]
    assert found["sorted"] == "descending"
    for state, query in (("begin", (10, 15)), ("typed", (0, 15)), ("refused", (0, 15)), ("pointed", (7, 22))):
        shown = found[state]
        assert shown["facts"].startswith(f"The query ({query[0]}, {query[1]}) sees 80 keys. "), state
        assert tokens(shown["query"][0]) == [*query, *query], state
        begin = [
            min(max(at - window // 2, 0), n - window) for at, window, n in zip(query, (8, 10), (20, 30), strict=True)
        ]
        assert tokens(shown["window"][0]) == [*begin, begin[0] + 7, begin[1] + 9], state
        assert f"visits {shown['tiles']} KV tiles" in shown["facts"], state
    assert found["cut"]["facts"].startswith("The query (0, 22) sees 40 keys. ")  # half of the window is left
    assert tokens(found["cut"]["window"][0]) == [0, 17, 3, 26]
    assert found["refused"]["inputs"] == ["99", "15"] and found["pointed"]["inputs"] == ["7", "22"]


@pytest.mark.parametrize("width", [500, 1600])
def test_nothing_is_wider_than_the_window(width: int, seen: Callable[[int], dict[str, Any]]) -> None:
    assert seen(width)["overflow"] <= 0
