"""Accessibility faults of a page that is open in the browser, as axe-core finds them.

axe-core (MPL-2.0) comes from npm when the tests need it and is part of nothing that is shipped.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from support.browser import Tab
from support.npm import npm_modules

AXE = {"axe-core": "4.14.1"}


def accessibility_faults(tab: Tab, config: pytest.Config) -> list[str]:
    """What axe-core calls serious or critical, each as a sentence with the places in the page."""
    source = npm_modules(config, AXE) / "axe-core" / "axe.min.js"
    if not tab.value("typeof axe === 'object'"):
        tab.value(f"{source.read_text('utf-8')}; null")
    options = {"resultTypes": ["violations"]}
    found = tab.value(f"axe.run(document, {json.dumps(options)}).then((each) => each.violations)")
    grave = [fault for fault in found if fault["impact"] in ("serious", "critical")]
    return [_sentence(fault) for fault in grave]


def _sentence(fault: dict[str, Any]) -> str:
    places = "; ".join(f"{node['html'][:160]}: {node['failureSummary']}" for node in fault["nodes"])
    return f"{fault['impact']} {fault['id']}: {fault['help']}. {places}"
