"""A page as one document that refers to nothing outside itself.

Its content security policy names the page's own style and scripts by their hashes and forbids
everything else: not even a text that was not escaped could run or load something.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files

from onewan.errors import one_line


def page(
    title: str,
    body: Iterable[str],
    *,
    styles: Sequence[str] = (),
    scripts: Sequence[str] = (),
    data: Mapping[str, object] | None = None,
    local_media: bool = False,
    own_style: str = "",
) -> str:
    """The page as a document in UTF-8.

    `title` is plain text, `body` lines of HTML. `styles` and `scripts` name files of
    ``resources/pages`` that are put into it, after ``base.css``. `data` are JSON values that the
    scripts find in elements of these ids. With `local_media` videos may be files beside the page.
    `own_style` is CSS of a caller that has no file there.
    """
    style = "".join(_resource(name) for name in ("base.css", *styles)) + own_style
    script = "".join(_resource(name) for name in scripts)
    media = "data: 'self' file:" if local_media else "data:"
    policy = (
        f"default-src 'none'; img-src data:; media-src {media}; style-src {_hash(style)}; "
        f"script-src {_hash(script)}; base-uri 'none'; form-action 'none'"
    )
    return "\n".join(
        (
            "<!doctype html>",
            '<html lang="en">',
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            # Browsers ask for /favicon.ico of a page that names none.
            '<link rel="icon" href="data:,">',
            f"<title>{text(title)}</title>",
            f"<style>{style}</style>",
            "<main>",
            *body,
            "</main>",
            *(
                f'<script type="application/json" id="{name}">{_json(value)}</script>'
                for name, value in (data or {}).items()
            ),
            f"<script>{script}</script>",
            "</html>",
            "",
        )
    )


def text(content: object) -> str:
    """`content` of files and people, which may contain anything, as text of the page."""
    return escape(one_line(str(content)))


def block(content: str) -> str:
    """A text of several lines, such as a file, as it is."""
    return f"<pre>{escape(chr(10).join(one_line(line) for line in content.splitlines()))}</pre>"


def data_uri(kind: str, content: bytes) -> str:
    """`content`, of the media type `kind`, as an address."""
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def _resource(name: str) -> str:
    return (files("onewan") / "resources" / "pages" / name).read_text(encoding="utf-8")


def _hash(content: str) -> str:
    """The source expression that allows an element with exactly this text."""
    digest = base64.b64encode(hashlib.sha256(content.encode("utf-8")).digest())
    return f"'sha256-{digest.decode('ascii')}'"


def _json(value: object) -> str:
    # Without "<", nothing in a text can end the element.
    document = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return document.replace("<", "\\u003c")
