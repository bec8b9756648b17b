"""Files of the project that other programs read: its metadata, the citation and the issue forms.

`make lint` checks the latter two against their schemas.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from ruamel.yaml import YAML

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # of pytest

ROOT = Path(__file__).parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
FORM = ROOT / ".github" / "ISSUE_TEMPLATE" / "problem.yml"


def test_the_citation_has_the_version_and_licence_of_the_package() -> None:
    citation = YAML(typ="safe").load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]


def test_a_problem_is_reported_with_the_text_of_doctor() -> None:
    form = YAML(typ="safe").load(FORM.read_text("utf-8"))
    fields = {field["id"]: field for field in form["body"] if "id" in field}
    assert "onewan doctor" in fields["doctor"]["attributes"]["label"]
    assert fields["doctor"]["validations"]["required"] is True


def test_messages_name_extras_that_exist() -> None:
    named = {
        (extra, file.name)
        for folder in ("src", "docs")
        for file in (ROOT / folder).rglob("*")
        if file.suffix in (".py", ".md")
        for extra in re.findall(r"onewan\[(\w+)\]", file.read_text(encoding="utf-8"))
    }
    assert {"optimizers", "cuts"} <= {extra for extra, _ in named}
    assert not {entry for entry in named if entry[0] not in PROJECT["optional-dependencies"]}


def test_the_extra_all_holds_every_package_of_the_others() -> None:
    extras = PROJECT["optional-dependencies"]
    assert packages_of("all") == {
        package for extra in extras.keys() - {"dev", "docs"} for package in packages_of(extra)
    }


def packages_of(extra: str) -> set[str]:
    """The packages of an extra, those of the extras in it too."""
    found = set[str]()
    for requirement in map(Requirement, PROJECT["optional-dependencies"][extra]):
        inner = [p for name in requirement.extras for p in packages_of(name)]
        found |= set(inner) if requirement.name == "onewan" else {requirement.name}
    return found


def test_every_dependency_has_a_lower_bound() -> None:
    extras = PROJECT["optional-dependencies"].values()
    for text in [*PROJECT["dependencies"], *(text for extra in extras for text in extra)]:
        requirement = Requirement(text)
        operators = {part.operator for part in requirement.specifier}
        assert requirement.name == "onewan" or ">=" in operators, text
