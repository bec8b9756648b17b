"""What all screens of the page share."""

from __future__ import annotations

from pathlib import Path

import pytest
from nicegui import ui
from nicegui.testing.user import User

from onewan.web.frame import SECTIONS
from tests.support.page import with_user


@pytest.mark.parametrize(("title", "address"), SECTIONS)
def test_the_navigation_has_all_screens_and_marks_the_present_one(
    tmp_path: Path, title: str, address: str
) -> None:
    async def act(user: User) -> None:
        await user.open(address)
        links = user.find(ui.link).elements
        assert {name for name, _ in SECTIONS} <= {link.text for link in links}
        assert [link.text for link in links if link.props.get("aria-current")] == [title]

    with_user(tmp_path / "runs", act)
