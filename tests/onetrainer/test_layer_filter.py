"""OneTrainer's layer filter, on the names of a Wan transformer."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from support.tiny_models import tiny_transformer
from torch import nn

from onewan.errors import ConfigError
from onewan.onetrainer.layer_filter import check_layer_filter

NAMES = [n for n, m in tiny_transformer().named_modules() if isinstance(m, nn.Linear)]


def config(layer_filter: str, *, regex: bool = False, blocks: str = "") -> SimpleNamespace:
    return SimpleNamespace(layer_filter=layer_filter, layer_filter_regex=regex, wan_layers=blocks)


@pytest.mark.parametrize(
    "chosen",
    [
        config(""),
        config("attn1, attn2,ffn"),
        config("blocks"),
        config(r"attn[12]\.to_q$", regex=True),
        config("ffn", blocks="1"),
        config("proj_out"),
    ],
    ids=lambda chosen: f"{chosen.layer_filter} {chosen.wan_layers}",
)
def test_filters_that_select_layers_are_accepted(chosen: SimpleNamespace):
    check_layer_filter(chosen, NAMES)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (
            config("transformer_block"),
            r"'transformer_block' selects nothing; .*each block has attn1",
        ),
        (config("attn1,ff.net"), r"'ff\.net' selects nothing; did you mean ffn\.net\.2\?"),
        (config("^attn1", regex=True), r"'\^attn1' selects nothing; did you mean attn1"),
        (config("(", regex=True), r"'\(' is no regular expression"),
        (config("proj_out", blocks="0"), "'proj_out' selects nothing"),
        (config("attn1", blocks="7"), "wan_layers: is '7'; give blocks 0 to 1"),
    ],
    ids=lambda value: getattr(value, "layer_filter", ""),
)
def test_filters_that_select_nothing_are_refused(chosen: SimpleNamespace, message: str):
    with pytest.raises(ConfigError, match=message):
        check_layer_filter(chosen, NAMES)
