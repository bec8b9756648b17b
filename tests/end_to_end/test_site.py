"""The documentation as a site: it opens from disk, is searched there, and asks no other host."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.browser import WINDOWS, open_page

ROOT = Path(__file__).resolve().parents[2]
SEARCH = """
  const box = document.querySelector("input.md-search__input");
  box.focus();
  box.value = "gradient checkpointing";
  box.dispatchEvent(new KeyboardEvent("keyup"));
  await until(() => document.querySelector(".md-search-result__item a"));
  const found = [...document.querySelectorAll(".md-search-result__item a")];
  note("found", found.map((link) => link.href).join(" "));
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    return folder


@pytest.mark.long
def test_no_page_loads_anything_from_another_host(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe|video|source)[^>]* src=\"?([^\"\s>]+)", text)
        loaded += [
            link
            for tag in re.findall(r"<link [^>]*>", text)
            if re.search(r"rel=\"?(?:stylesheet|icon|preload|preconnect)", tag)
            for link in re.findall(r"href=\"?([^\"\s>]+)", tag)
        ]
        assert [name for name in loaded if re.match(r"(?:https?:)?//", name)] == [], page.name
    for sheet in site.rglob("*.css"):
        assert "url(http" not in sheet.read_text(encoding="utf-8"), sheet.name


@pytest.mark.long
@pytest.mark.parametrize("window", WINDOWS)
def test_the_site_is_searched_from_disk(site: Path, tmp_path: Path, window: str) -> None:
    opened = open_page(site / "index.html", tmp_path / "profile", window, SEARCH)
    assert "configuration.html" in opened.noted["found"], opened.noted
    assert all(name.startswith(("file:", "blob:")) for name in opened.requests), opened.requests
    assert not opened.noted["overflow"]
    assert not opened.console
