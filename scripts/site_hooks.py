"""MkDocs hooks: pages that are made from other files, and links from settings to their reference.

The home page is README.md, and others are CONTRIBUTING.md, CHANGELOG.md, SECURITY.md and
configs/README.md, with their links rewritten, so that each text exists once. `configuration.md`
is made from the schema and `options.md` from the parsers of the command line.
"""

from __future__ import annotations

import argparse
import html
import os
import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import config_reference
from mkdocs.structure.files import File, Files

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
COPIES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "configs/README.md": "configs.md",
}
"""Files beside the documentation that are pages of the site."""
CONFIGURATION = "configuration.md"
OPTIONS = "options.md"
_LINK = re.compile(r"\]\(([^)\s:#]+)((?:#[^)\s]*)?)\)")
_CODE = re.compile(r"<code>([a-z0-9_]+(?:\.[a-z0-9_]+|\[\])+)(?:[:=][^<]*)?</code>")
"""A setting, alone or with a value."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the generated pages."""
    pages = {CONFIGURATION: config_reference.reference(), OPTIONS: options_page()}
    for name, page in COPIES.items():
        if (ROOT / name).is_file():
            pages[page] = page_of(ROOT / name)
    for file in (ROOT / "configs").rglob("*.yaml"):
        pages[file.relative_to(ROOT).as_posix()] = file.read_text(encoding="utf-8")
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def page_of(file: Path) -> str:
    """A text from outside of docs as a page: links lead to pages of the site and to run files, and
    those to other files become code."""
    folder = file.parent.relative_to(ROOT).as_posix()

    def rewritten(match: re.Match[str]) -> str:
        target, anchor = match.groups()
        path = posixpath.normpath(posixpath.join(folder, target))
        page = COPIES.get(path) or path.removeprefix("docs/")
        return f"]({page}{anchor})"

    text = file.read_text(encoding="utf-8")
    text = re.sub(r"\[([^\]]+)\]\((LICENSE|CITATION\.cff|[\w/]+/)\)", r"`\1`", text)
    return _LINK.sub(rewritten, text)


def on_page_markdown(markdown: str, **_: object) -> str:
    """Links of the pages in docs to files above it, which are pages too, lead to these pages."""
    for name, page in COPIES.items():
        markdown = markdown.replace(f"](../{name}", f"]({page}")
    return markdown


def options_page() -> str:
    """The options of every command, as `onewan COMMAND --help` prints them."""
    from onewan.cli.parser import _parser  # as the tests do: the parser has no public name

    os.environ["COLUMNS"] = "80"  # the width of a page
    lines = [
        "# Options of all commands",
        "",
        "What `onewan COMMAND --help` prints. [Commands in scripts and shells](commands.md) has",
        "exit statuses, completion, and what `--json` prints.",
        "",
    ]
    for name, parser in _commands(_parser()):
        lines += [f"## onewan {name}", "", "```text", parser.format_help().rstrip(), "```", ""]
    return "\n".join(lines)


def _commands(parser: argparse.ArgumentParser, prefix: str = "") -> Any:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, inner in action.choices.items():
                nested = list(_commands(inner, f"{prefix}{name} "))
                yield from nested or [(f"{prefix}{name}", inner)]


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links each setting that a page names, such as `train.steps`, to its reference."""
    del config, files
    known = {anchor for anchor in config_reference.anchors() if "." in anchor}

    def linked(match: re.Match[str]) -> str:
        anchor = match[1].replace("[]", "")
        if anchor not in known:
            return match[0]
        return f'<a href="configuration.html#{html.escape(anchor)}">{match[0]}</a>'

    if page.file.src_uri in (CONFIGURATION, "architecture.md", "contributing.md"):
        return content
    parts = re.split(r"(<h\d.*?</h\d>|<pre.*?</pre>|<a .*?</a>)", content, flags=re.DOTALL)
    return "".join(p if i % 2 else _CODE.sub(linked, p) for i, p in enumerate(parts))
