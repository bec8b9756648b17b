"""The screens Files and Help in Chromium: accessibility, errors, other hosts, narrow windows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from support.axe import accessibility_faults
from support.browser import Tab, browse
from support.page import served

pytestmark = pytest.mark.long


@pytest.mark.parametrize(("window", "dark"), [("desktop", False), ("phone", True)])
def test_the_screens_have_no_faults(
    window: str, dark: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    name = "a_lora_with_a_rather_long_name_for_a_narrow_window_<b>bold</b>.safetensors".replace(
        "/", ""
    )
    key = "diffusion_model.blocks.0.self_attn.q"
    (tmp_path / "runs").mkdir()
    save_file(
        {
            f"{key}.lora_A.weight": np.ones((4, 64), np.float32),
            f"{key}.lora_B.weight": np.ones((64, 4), np.float32),
        },
        tmp_path / name,
        {"<script>alert(1)</script>": "<img src=x onerror=alert(1)>"},
    )

    def look(tab: Tab) -> None:
        assert accessibility_faults(tab, request.config) == []
        assert tab.console == [] and tab.foreign_requests() == []
        assert not tab.overflows() and tab.layout_shift() < 0.1

    with (
        served(tmp_path / "runs", "--data", str(tmp_path)) as page,
        browse(tmp_path / "profile") as browser,
    ):
        tab = browser.tab(window, dark=dark)
        tab.open(f"{page.root}/files")
        tab.wait("li", "a_lora")
        look(tab)
        tab.fill("input[aria-label='Search']", "nothing like it")
        tab.wait("[role=status]", "Nothing matches")
        tab.fill("input[aria-label='Search']", "LORA bold")
        tab.wait("[role=status]", "1 file,")
        tab.click("li a", "a_lora")
        tab.wait("h2", "Convert")
        assert tab.has("h1", "<b>bold<b>")
        tab.click(".q-expansion-item", "Header: 1 value")
        tab.wait("th", "<script>")
        look(tab)
        tab.open(f"{page.root}/help")
        tab.fill("input[aria-label='Search the documentation']", "force stop")
        tab.wait("[role=status]", "found")
        look(tab)
        tab.click("li a", "The page")
        tab.wait(".ow-doc")
        look(tab)
