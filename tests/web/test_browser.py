"""What tests use to look at pages in Chromium sees what is wrong with a page."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from support.axe import accessibility_faults
from support.browser import WINDOWS, Browser, browse

pytestmark = pytest.mark.long

PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>A page</title>
<meta name="viewport" content="width=device-width">
<style>
  body { background: white; color: black }
  @media (prefers-color-scheme: dark) { body { background: black; color: white } }
</style></head>
<body><main><h1>A page</h1>
<label>Name <input id="name"></label>
<button id="later" disabled>Greet</button>
<p id="answer"></p>
</main>
<script>
  const answer = document.getElementById("answer");
  setTimeout(() => { document.getElementById("later").disabled = false; }, 100);
  document.getElementById("later").onclick = () => {
    answer.textContent = "Hello " + document.getElementById("name").value;
  };
  addEventListener("keydown", (event) => {
    if (event.key === "Escape") answer.textContent = "";
    if (event.ctrlKey && event.key === "s") answer.textContent = "saved";
  });
</script></body></html>
"""

FAULTY = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Faults</title>
<meta name="viewport" content="width=device-width"></head>
<body><main><h1>Faults</h1><input><button></button>
<div style="width: 3000px; height: 10px"></div>
<img src="http://localhost:9/other.png" alt="">
<p id="low">moves</p>
</main>
<script>
  console.error("an error of the page");
  setTimeout(() => {
    const above = document.createElement("div");
    above.style.height = "300px";
    document.querySelector("h1").before(above);
    document.body.dataset.moved = "yes";
  }, 700);
</script></body></html>
"""


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("pages")
    (folder / "good.html").write_text(PAGE, encoding="utf-8")
    (folder / "faulty.html").write_text(FAULTY, encoding="utf-8")
    (folder / "favicon.ico").write_bytes(b"")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    with browse(tmp_path / "profile") as browser:
        yield browser


def test_a_page_is_used_as_a_person_would(
    browser: Browser, address: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    tab = browser.tab("phone", dark=True)
    tab.open(f"{address}/good.html")
    assert tab.value("[innerWidth, getComputedStyle(document.body).backgroundColor]") == [
        390,
        "rgb(0, 0, 0)",
    ]
    tab.fill("input", "Fix")
    tab.fill("input", "Fox")
    tab.click("button", "Greet")
    tab.wait("#answer", "Hello Fox")
    tab.press("ctrl+s")
    assert tab.text("#answer") == "saved"
    tab.press("Escape")
    tab.wait_until_gone("#answer", "saved")
    tab.picture(tmp_path / "page.png")
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")
    assert accessibility_faults(tab, request.config) == []
    assert tab.console == [] and tab.foreign_requests() == []
    assert not tab.overflows() and tab.layout_shift() == 0


@pytest.mark.parametrize("window", WINDOWS)
def test_faults_of_a_page_are_seen(
    window: str, browser: Browser, address: str, request: pytest.FixtureRequest
) -> None:
    tab = browser.tab(window)
    tab.open(f"{address}/faulty.html")
    tab.until("document.body.dataset.moved")
    tab.value("new Promise((done) => setTimeout(done, 300))")
    assert "an error of the page" in " ".join(tab.console)
    assert tab.foreign_requests() == ["http://localhost:9/other.png"]
    assert tab.overflows() and tab.layout_shift() > 0.01
    found = " ".join(accessibility_faults(tab, request.config))
    assert "critical button-name" in found and "critical label" in found
    with pytest.raises(AssertionError, match="not yet"):
        tab.click("button", "Nothing", seconds=0.2)
