"""The pages of the documentation that are made from the schema and from the parsers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from onewan.config import leaves
from onewan.config.fields import schema_fields

ROOT = Path(__file__).resolve().parents[2]
DOCS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
NOT_SETTINGS = ("architecture.md", "coming-from.md")
"""Their dotted names are modules, and other trainers' settings."""


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import config_reference

    return config_reference.reference()


def test_every_field_has_one_anchor_a_type_and_a_description(reference: str) -> None:
    found = re.findall(r"^#+ `(\S+)` \{ #(\S+) \}\n\n(.*(?:\n.+)*)", reference, re.MULTILINE)
    names = [anchor for _, anchor, _ in found]
    assert sorted(names) == sorted(name.replace(".*", "") for name in schema_fields())
    texts = {shown.replace("[]", ".*"): text for shown, _, text in found}
    for name in leaves():
        first, _, description = texts[name].partition("\n")
        assert first, name
        assert re.search(r"default|required|One of these", first), name
        assert len(description) > 10 or "One of these" in first, name


def test_the_reference_says_what_the_schema_says(reference: str) -> None:
    def entry(name: str) -> str:
        return reference.partition(f"{{ #{name} }}\n\n")[2].partition("\n\n#")[0]

    assert entry("train.steps").startswith("*whole number (at least 1); default `2000`*")
    assert entry("model.variant").startswith("*`t2v-a14b`, `i2v-a14b`, ")
    assert "required*" in entry("model.variant")
    assert entry("train.save_every_minutes").startswith("*number (more than 0) or null; ")
    # Where members of a union differ, each has its own description.
    assert re.search(r"`lion`: \*number .*default `2e-05`\*", entry("optimizer.lr"))
    assert re.search(r"`lora`, `dora`, `loha`, `lokr`: \*whole number", entry("method.rank"))
    assert "`<fox>`" in entry("embeddings.placeholder") or "&lt;fox>" in entry(
        "embeddings.placeholder"
    )


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_settings_that_a_page_names_exist(page: Path) -> None:
    if page.name in NOT_SETTINGS:
        return
    fields = {name.replace(".*", "") for name in schema_fields()}
    sections = "|".join(sorted({name.partition(".")[0] for name in fields}))
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.M)
    named = re.findall(rf"`((?:{sections})\.[a-z_.\[\]]*[a-z_\]])[`=:]", text)
    unknown = {name for name in named if name.replace("[]", "") not in fields}
    assert not unknown


def test_the_page_of_options_has_every_command(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mkdocs")
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import site_hooks

    page = site_hooks.options_page()
    for command in ("train", "onetrainer", "sample-now", "import-config"):
        assert f"## onewan {command}\n\n```text\nusage: onewan {command} " in page


def test_every_picture_is_used_and_made_by_one_target(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import take_onetrainer_screenshots
    import take_pictures

    recipe = (ROOT / "Makefile").read_text("utf-8").partition("\npictures:")[2].partition("\n\n")[0]
    for script in ("take_pictures.py", "take_onetrainer_screenshots.py", "report.py --from"):
        assert script in recipe
    windows = {f"onetrainer_{name}.png" for name in take_onetrainer_screenshots.SHOWN}
    taken = windows | {
        *(f"{name}.png" for name in (*take_pictures.PAGES, *take_pictures.SCREENS)),
        f"{take_pictures.SHEET}.jpg",
    }
    used = {
        name
        for page in DOCS
        for name in re.findall(r"!\[[^\]]*\]\(images/([^)]+)\)", page.read_text(encoding="utf-8"))
    }
    folder = ROOT / "docs" / "images"
    pictures = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert pictures - used == set()
    others = pictures - taken
    assert all(name.startswith("performance/") for name in others), others
