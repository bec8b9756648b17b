"""The documentation that is shipped with onewan: as HTML, and searched.

HTML in the pages is text, links lead to other pages of the documentation or out of it, and pictures
are left out, so that nothing in a page is run or asked for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.token import Token

_FIRST = ("start", "page", "troubleshooting")
"""Pages that people look for first."""
_CONTEXT = 60
"""Characters of a text around what was found."""
_MOST_FOUND = 30


@dataclass(frozen=True)
class Section:
    """A part of a page below one heading."""

    page: str
    title: str
    anchor: str
    text: str

    @property
    def full_title(self) -> str:
        """Its heading, after that of its page."""
        first = pages()[self.page].title
        return self.title if self.title == first else f"{first}: {self.title}"

    @property
    def address(self) -> str:
        """Where the page shows it."""
        return f"/help/{self.page}" + (f"#{self.anchor}" if self.anchor else "")


@dataclass(frozen=True)
class DocPage:
    """A page of the documentation."""

    title: str
    html: str
    sections: tuple[Section, ...]


@dataclass(frozen=True)
class Hit:
    """A section that was found, with a part of its text."""

    section: Section
    excerpt: str


@lru_cache(maxsize=1)
def pages() -> Mapping[str, DocPage]:
    """All pages by name; those that people look for first are first."""
    folder = _folder()
    names = {file.stem: file for file in folder.glob("*.md")}
    made = {name: _page(name, file.read_text("utf-8"), names) for name, file in names.items()}
    order = sorted(made, key=lambda name: (name not in _FIRST, made[name].title.casefold()))
    first = [name for name in _FIRST if name in made]
    return {name: made[name] for name in (*first, *(n for n in order if n not in first))}


def contents() -> list[Hit]:
    """The beginnings of all pages."""
    return [Hit(page.sections[0], "") for page in pages().values()]


def find(words: str) -> list[Hit]:
    """The sections that have all words, those with a word in their heading first."""
    wanted = words.casefold().split()
    found = list[tuple[int, Hit]]()
    for page in pages().values() if wanted else ():
        for section in page.sections:
            title, body = section.title.casefold(), section.text.casefold()
            if all(word in title or word in body for word in wanted):
                in_title = sum(word in title for word in wanted)
                found.append((-in_title, Hit(section, _excerpt(section.text, wanted))))
    found.sort(key=lambda each: each[0])
    return [hit for _, hit in found[:_MOST_FOUND]]


def _folder() -> Path:
    """Where the pages are: in an installed package, or in the repository."""
    shipped = Path(str(files("onewan") / "resources" / "docs"))
    return shipped if shipped.is_dir() else Path(__file__).resolve().parents[3] / "docs"


def _page(name: str, text: str, names: Mapping[str, Any]) -> DocPage:
    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
    markdown.add_render_rule("table_open", lambda *_: _SCROLL + '<table class="ow-table">')
    markdown.add_render_rule("table_close", lambda *_: "</table></div>")
    tokens = markdown.parse(text)
    title = name
    if [token.type for token in tokens[:3]] == ["heading_open", "inline", "heading_close"]:
        title, tokens = _plain(tokens[1]), tokens[3:]  # the frame has the heading of the page
    sections = tuple(_sections(name, title, tokens))
    for token in tokens:
        if token.type == "inline":
            token.children = [_linked(each, names) for each in token.children or ()]
            token.children = [each for each in token.children if each.type != "image"]
    html = markdown.renderer.render(tokens, markdown.options, {})
    return DocPage(title, html.replace("<pre>", '<pre tabindex="0">'), sections)


_SCROLL = '<div class="ow-scroll" tabindex="0">'


def _sections(name: str, title: str, tokens: Sequence[Token]) -> list[Section]:
    """The parts of a page; gives its headings their anchors."""
    found = [Section(name, title, "", "")]
    words = list[str]()
    taken = set[str]()

    def close() -> None:
        last = found[-1]
        found[-1] = Section(name, last.title, last.anchor, " ".join(words))
        words.clear()

    for number, token in enumerate(tokens):
        if token.type == "heading_open":
            close()
            heading = _plain(tokens[number + 1])
            anchor = _anchor(heading, taken)
            token.attrSet("id", anchor)
            found.append(Section(name, heading, anchor, ""))
        elif token.type == "inline" and tokens[number - 1].type != "heading_open":
            words.append(_plain(token))
        elif token.type == "fence":
            words.append(" ".join(token.content.split()))
    close()
    return found


def _anchor(heading: str, taken: set[str]) -> str:
    """The anchor of a heading, as the documentation's site has it."""
    words = re.sub(r"[^\w\s-]", "", heading).strip().lower()
    anchor = first = re.sub(r"[-\s]+", "-", words)
    number = 1
    while anchor in taken:
        anchor = f"{first}_{number}"
        number += 1
    taken.add(anchor)
    return anchor


def _plain(token: Token) -> str:
    """The text of a line without its marks."""
    parts = [
        " " if each.type in ("softbreak", "hardbreak") else each.content
        for each in token.children or ()
        if each.type != "image"
    ]
    return "".join(parts)


def _linked(token: Token, names: Mapping[str, Any]) -> Token:
    """A link that leads to a page here, or out; others become text."""
    if token.type != "link_open":
        return token
    target = str(token.attrs.get("href", ""))
    path, _, anchor = target.partition("#")
    if path.endswith(".md") and path.removesuffix(".md") in names:
        token.attrs = {
            "href": f"/help/{path.removesuffix('.md')}" + (f"#{anchor}" if anchor else "")
        }
    elif target.startswith(("https://", "http://")):
        token.attrs = {"href": target, "target": "_blank", "rel": "noopener noreferrer"}
    elif path:
        token.attrs = {}
    return token


def _excerpt(text: str, wanted: Sequence[str]) -> str:
    """A part of `text` around the first of the words in it."""
    low = text.casefold()
    places = [low.find(word) for word in wanted if word in low]
    start = max(0, min(places, default=0) - _CONTEXT)
    end = start + 3 * _CONTEXT
    if start:
        start = text.find(" ", start) + 1
    return f"{'... ' if start else ''}{text[start:end]}{' ...' if end < len(text) else ''}"
