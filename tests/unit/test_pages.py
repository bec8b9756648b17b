"""Pages: nothing in them can end an element or run; their policy allows their own script alone."""

from __future__ import annotations

import base64
import hashlib
import json
import re

from onewan.pages.document import block, page, text

HOSTILE = '</script><script>alert(1)</script><!--<img src=x onerror="alert(2)">\u202e\x1b[31m'


def test_texts_and_data_stay_what_they_are() -> None:
    made = page(HOSTILE, [text(HOSTILE), block(f"a\n{HOSTILE}")], data={"plots": [HOSTILE]})
    assert made.count("<script") == 2 and made.count("</script>") == 2
    assert "<img" not in made and "<!--" not in made
    assert "\u202e" not in made and "\x1b" not in made
    found = re.search(r'<script type="application/json" id="plots">(.*?)</script>', made, re.S)
    assert found is not None and json.loads(found[1]) == [HOSTILE]


def test_the_policy_names_the_style_and_the_script_of_the_page() -> None:
    made = page("a page", [], styles=("plots.css",), scripts=("plots.js", "players.js"))
    for element in ("style", "script"):
        (content,) = re.findall(rf"<{element}>(.*?)</{element}>", made, re.S)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{element}-src 'sha256-{digest}'" in made
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', made)
    assert policy is not None and policy[1].startswith("default-src 'none'; ")
    assert "unsafe" not in policy[1] and "file:" not in policy[1] and "http" not in policy[1]
