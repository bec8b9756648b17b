"""Groups and patterns of the run file -> names in the transformer."""

from __future__ import annotations

import pytest
from diffusers import WanTransformer3DModel
from torch import nn

from onewan.adapters.select import select_layers, select_linears, select_weights
from onewan.arithmetic.layer_names import block_of
from onewan.config.method import ADAPTER_GROUPS, WEIGHT_GROUPS
from onewan.errors import ConfigError

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
FFN = ("ffn.net.0.proj", "ffn.net.2")


@pytest.fixture(scope="module")
def transformer() -> WanTransformer3DModel:
    return WanTransformer3DModel(
        num_attention_heads=1, attention_head_dim=32, text_dim=16, ffn_dim=64, num_layers=12
    )


def layers_of(names: tuple[str, ...]) -> set[str]:
    """Names without the block's number."""
    return {name.split(".", 2)[2] for name in names}


@pytest.mark.parametrize(
    ("group", "layers"),
    [
        ("self_attention", {f"attn1.{n}" for n in ATTENTION}),
        ("cross_attention", {f"attn2.{n}" for n in ATTENTION}),
        ("attention", {f"attn{k}.{n}" for k in (1, 2) for n in ATTENTION}),
        ("ffn", set(FFN)),
    ],
)
def test_a_group_selects_its_linear_layers(transformer, group, layers):
    names = select_linears(transformer, [group], None)
    assert layers_of(names) == layers
    assert len(names) == 12 * len(layers)
    weights = select_weights(transformer, [group], None)
    assert set(weights) == {f"{n}.{which}" for n in names for which in ("weight", "bias")}


def test_all_linears_includes_layers_outside_the_blocks(transformer):
    names = select_linears(transformer, ["all_linears"], None)
    assert names == tuple(n for n, m in transformer.named_modules() if isinstance(m, nn.Linear))
    assert "proj_out" in names and "condition_embedder.text_embedder.linear_1" in names
    inside = select_linears(transformer, ["all_linears"], [3])
    assert len(inside) == 10 and all(n.startswith("blocks.3.") for n in inside)


def test_all_norms_and_biases_select_weights(transformer):
    every = tuple(n for n, _ in transformer.named_parameters())
    assert select_weights(transformer, ["all"], None) == every
    norms = select_weights(transformer, ["norms"], [0])
    assert set(norms) == {
        *(f"blocks.0.attn{k}.norm_{which}.weight" for k in (1, 2) for which in "qk"),
        "blocks.0.norm2.weight",
        "blocks.0.norm2.bias",
    }
    biases = select_weights(transformer, ["biases"], None)
    assert biases == tuple(n for n in every if n.endswith(".bias"))
    assert "patch_embedding.bias" in biases
    assert "blocks.5.scale_shift_table" in select_weights(transformer, ["all"], [5])


def test_every_group_of_the_run_file_is_known(transformer):
    for group in ADAPTER_GROUPS:
        assert select_linears(transformer, [group], [0])
    for group in WEIGHT_GROUPS:
        assert select_weights(transformer, [group], [0])


def test_patterns_match_a_name_or_its_end(transformer):
    one = ("blocks.1.attn1.to_q",)
    assert select_linears(transformer, ["blocks.1.attn1.to_q"], None) == one
    q = select_linears(transformer, ["attn1.to_q"], None)
    assert q == tuple(f"blocks.{n}.attn1.to_q" for n in range(12))
    assert select_linears(transformer, ["attn1.to_q"], [1]) == one
    tens = select_linears(transformer, ["blocks.1?.attn1.to_[qk]"], None)
    assert {block_of(n) for n in tens} == {10, 11} and len(tens) == 4
    tables = select_weights(transformer, ["*scale_shift_table"], None)
    assert len(tables) == 13 and block_of(tables[0]) is None
    assert select_weights(transformer, ["norm2.weight"], [7]) == ("blocks.7.norm2.weight",)


def test_a_pattern_matches_from_a_dot_on(transformer):
    with pytest.raises(ConfigError):
        select_linears(transformer, ["ttn1.to_q"], None)


def test_names_are_unique_and_in_the_models_order(transformer):
    names = select_linears(transformer, ["ffn", "blocks.0.*", "self_attention"], [1, 0])
    order = [n for n, _ in transformer.named_modules()]
    assert [order.index(n) for n in names] == sorted({order.index(n) for n in names})
    assert {block_of(n) for n in names} == {0, 1}


def test_a_selection_of_nothing_is_refused_with_similar_names(transformer):
    with pytest.raises(ConfigError) as error:
        select_linears(transformer, ["self_atention", "ffn", "blocks.99.*"], None)
    first, second = error.value.problems
    assert first.startswith(
        "method.modules: 'self_atention' selects nothing; did you mean self_attention? The "
        "groups are self_attention, cross_attention, attention, ffn, all_linears; each block has "
        "attn1.to_q, attn1.to_k"
    )
    assert second.startswith("method.modules: 'blocks.99.*' selects nothing; ")
    with pytest.raises(ConfigError, match=r"method\.per_module\.0\.modules: 'x'"):
        select_weights(transformer, ["x"], None, "method.per_module.0.modules")
    with pytest.raises(
        ConfigError, match=r"'proj_out' selects nothing in the blocks of wan_config\.transformer_l"
    ):
        select_linears(transformer, ["proj_out"], [0])
    with pytest.raises(ConfigError, match="'norms' selects nothing"):
        select_linears(transformer, ["norms"], None)


def test_blocks_that_do_not_exist_are_refused(transformer) -> None:
    assert select_layers(None, 3) == (0, 1, 2)
    assert select_layers([2, 0], 3) == (0, 2)
    with pytest.raises(ConfigError, match="has no block 3; the model's blocks are 0 to 2"):
        select_layers([1, 3], 3)
    with pytest.raises(ConfigError, match="has no block 12; the model's blocks are 0 to 11"):
        select_linears(transformer, ["ffn"], [12])
