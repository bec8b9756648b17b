"""The screen Help: the documentation with its links and search, and the report on the machine."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from nicegui import ui
from nicegui.testing.user import User
from support.page import with_user

from onewan.doctor.diagnosis import Diagnosis, environment_report
from onewan.serving import documentation
from onewan.serving.documentation import find, pages
from onewan.web.screens import help

DOCS = Path(__file__).resolve().parents[2] / "docs"

PAGE = """# A page

<script>alert(1)</script> and <img src=x onerror=alert(1)>

See [the run folder](other.md#a-part), [elsewhere](https://example.org/),
[a file](../configs/run.yaml), [the part](#a-part), [none](javascript:alert(1)).

![A picture](images/a.png)

## A part

First text with `code`.

## A part

| a | b |
| --- | --- |
| needle | <b>bold</b> |

```bash
onewan train run.yaml
```
"""


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The HTML of `PAGE`."""
    (tmp_path / "a.md").write_text(PAGE, encoding="utf-8")
    (tmp_path / "other.md").write_text("# The run folder\n\nText.\n", encoding="utf-8")
    monkeypatch.setattr(documentation, "_folder", lambda: tmp_path)
    pages.cache_clear()
    yield pages()["a"].html
    pages.cache_clear()


def test_html_in_a_page_is_text_and_nothing_is_loaded(made: str) -> None:
    tags = set(re.findall(r"<(\w+)", made))
    table = {"div", "table", "thead", "tbody", "tr", "th", "td"}
    assert tags == {"p", "a", "h2", "code", "pre", *table}
    assert "&lt;script&gt;" in made and "&lt;b&gt;" in made


def test_links_lead_to_pages_here_or_out(made: str) -> None:
    links = re.findall(r"<a([^>]*)>([^<]*)</a>", made)
    assert links == [
        (' href="/help/other#a-part"', "the run folder"),
        (
            ' href="https://example.org/" target="_blank" rel="noopener noreferrer"',
            "elsewhere",
        ),
        ("", "a file"),
        (' href="#a-part"', "the part"),
    ]
    assert "javascript:" in made  # as a text, since it is no link
    assert re.findall(r'id="([^"]*)"', made) == ["a-part", "a-part_1"]


def test_search_finds_texts_tables_and_commands_with_headings_first(made: str) -> None:
    del made
    assert [(hit.section.anchor, hit.excerpt) for hit in find("needle")] == [
        ("a-part_1", "a b needle <b>bold</b> onewan train run.yaml")
    ]
    assert [hit.section.anchor for hit in find("first part")] == ["a-part"]
    assert find("train needle")[0].section.anchor == "a-part_1"
    assert [hit.section.title for hit in find("text")] == ["A part", "The run folder"]
    assert find("nothing like that") == [] and find("  ") == []


def test_all_pages_of_the_documentation_are_there_and_their_links_lead_to_anchors() -> None:
    pages.cache_clear()
    assert set(pages()) == {file.stem for file in DOCS.glob("*.md")}
    assert next(iter(pages())) == "start"
    ids = {name: set(re.findall(r' id="([^"]*)"', page.html)) for name, page in pages().items()}
    for name, page in pages().items():
        assert page.title != name
        for target, anchor in re.findall(r'href="/help/([\w-]+)#([^"]+)"', page.html):
            assert anchor in ids[target], f"{name}: {target}#{anchor}"
        for anchor in re.findall(r'href="#([^"]+)"', page.html):
            assert anchor in ids[name], f"{name}: #{anchor}"


def test_the_documentation_is_read_and_searched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Looking at the machine takes seconds, and is tested below.
    monkeypatch.setattr(help, "environment_report", lambda: "what the machine is")

    async def act(user: User) -> None:
        await user.open("/help")
        await user.should_see("Troubleshooting", retries=100)
        user.find("Search the documentation").type("gradient checkpointing")
        await user.should_see("found", retries=100)
        await user.should_see("The settings", retries=100)
        user.find("Search the documentation").clear().type("xylophone")
        await user.should_see("Nothing has all of these words.", retries=100)
        await user.open("/help/start")
        assert "onewan train" in next(iter(user.find(ui.html).elements)).content
        assert (await user.http_client.get("/help/nothing")).status_code == 404
        assert (await user.http_client.get("/help/..%2fREADME")).status_code == 404

    with_user(tmp_path / "runs", act)


def test_the_machine_is_described_as_doctor_does_and_only_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment_report.cache_clear()

    async def act(user: User) -> None:
        await user.open("/help")
        await user.should_see("Environment (can be pasted into a bug report)", retries=600)
        await user.should_see("packages", retries=100)
        await user.open("/help")
        await user.should_see("packages", retries=100)
        await user.should_see("Look again", retries=100)
        assert environment_report.cache_info().misses == 1
        monkeypatch.setattr(Diagnosis, "lines", lambda _: ["looked at again"])
        user.find("Look again").click()
        await user.should_see("looked at again", retries=100)
        await user.should_see("Copy the report", retries=100)
        await user.should_see("What the keys do", retries=100)
        environment_report.cache_clear()

    with_user(tmp_path / "runs", act)
