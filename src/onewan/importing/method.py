"""OneTrainer's training method, adapter and embedding settings -> `method` and `embeddings`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from onewan.documents import format_value
from onewan.importing.table import OMIT, Condition, Context, Row, convert, copied, mapped, path
from onewan.onetrainer.settings import SettingError

_ADAPTERS = {"LORA": "lora", "LOHA": "loha", "LOKR": "lokr", "OFT_2": "oft"}

_LAYERS = {
    "attn1": "self_attention",
    "attn2": "cross_attention",
    "attn": "attention",
    "ffn": "ffn",
    "ff.net": "ffn",
}
"""Layer filters that name a whole group of onewan's."""


def adapter_kind(context: Context) -> str | None:
    """`method.kind` of an adapter; None for the other training methods and an unknown adapter."""
    if context["training_method"] != "LORA":
        return None
    kind = _ADAPTERS.get(context["peft_type"])
    return "dora" if kind == "lora" and context["lora_decompose"] else kind


def _kind(value: Any, context: Context) -> str:
    if value in ("FINE_TUNE", "EMBEDDING"):
        return value.lower()
    if value != "LORA":
        raise SettingError(
            f"is {format_value(value)}; only LORA, FINE_TUNE and EMBEDDING can be imported"
        )
    return adapter_kind(context) or "lora"


def _check_adapter(value: Any, _: Context) -> Any:
    if value not in _ADAPTERS:
        raise SettingError(f"is {format_value(value)}; only {', '.join(_ADAPTERS)} can be imported")
    return OMIT  # `_kind` has it


def _modules(value: Any, context: Context) -> list[str]:
    """OneTrainer's filters are parts of names; onewan's are groups and patterns."""
    text = str(value)
    if context["layer_filter_regex"] and text.strip():
        context.notice(
            f"{format_value(text)} is a regular expression; onewan takes groups and patterns, so "
            "all layers are trained; set method.modules"
        )
        text = ""
    # An empty filter selects every weight; adapters exist for linear layers only.
    special = {"": "all"}
    if context["training_method"] == "LORA":
        special = {"": "all_linears", "blocks": "blocks.*"}
    names = (part.strip() for part in text.split(","))
    return [special.get(name) or _LAYERS.get(name) or f"*{name}*" for name in names]


def _init_from(value: Any, context: Context) -> Any:
    return [path(value, context)] if value else OMIT


def _only(reason: str, *kinds: str) -> Condition:
    return Condition(lambda context: adapter_kind(context) in kinds, f"used by {reason} only")


_WEIGHTS = mapped(FLOAT_32="float32")
_ADAPTER = Condition(lambda c: c["training_method"] == "LORA", "used by adapters only")
_LORA = _only("LoRA and DoRA", "lora", "dora")
_LORA_RANK = _only("LoRA, DoRA and LoHa", "lora", "dora", "loha")
_LOKR = _only("LoKr", "lokr")
_OFT = _only("OFT_2", "oft")
_HAS_RANK = _only("adapters with a rank", "lora", "dora", "loha", "lokr")
_LOW_RANK = Condition(
    lambda c: c.has_two_experts and _HAS_RANK.holds(c),
    "used by adapters with a rank on a model with two experts only",
)
_FINE_TUNE = Condition(
    lambda c: c["training_method"] == "FINE_TUNE", "base weights keep the precision of their files"
)
_HAS_LAYERS = Condition(lambda c: c["training_method"] != "EMBEDDING", "no layer is trained")

ROWS = (
    Row("training_method", "method.kind", "FINE_TUNE", _kind),
    Row("peft_type", "method.kind", "LORA", _check_adapter, _ADAPTER),
    Row("lora_decompose", "method.kind", False, None, _LORA),
    Row("oft_block_size", "method.block_size", 32, copied(), _OFT),
    Row("lora_rank", "method.rank", 16, lambda value, _: int(value), _LORA_RANK),
    Row("lokr_dim", "method.rank", 16, lambda value, _: int(value), _LOKR),
    Row("lora_alpha", "method.alpha", 1.0, lambda value, _: float(value), _HAS_RANK),
    Row("lokr_decompose_factor", "method.factor", -1, copied(-1), _LOKR),
    Row("lokr_decompose_both", "method.decompose_both", False, copied(False), _LOKR),
    Row("dropout_probability", "method.dropout", 0.0, copied(0.0), _LORA),
    Row("layer_filter", "method.modules", "", _modules, _HAS_LAYERS),
    Row("layer_filter_regex", "method.modules", False, None, _HAS_LAYERS),
    Row("transformer.weight_dtype", "method.weights", "FLOAT_32", _WEIGHTS, _FINE_TUNE),
    Row("lora_model_name", "method.init_from", "", _init_from, _ADAPTER),
    Row("wan_low_lora_rank", "per_expert.low.rank", None, copied(), _LOW_RANK),
    Row("wan_low_lora_alpha", "per_expert.low.alpha", None, copied(), _LOW_RANK),
)

# --------------------------------------------------------------------------------------- embeddings

_IS_NEW = Condition(lambda item: not item["model_name"], "read from the embedding's file")
_IS_ADDITIONAL = Condition(
    lambda item: item.prefix != "embedding.", "the embedding of the EMBEDDING method always trains"
)

EMBEDDING_ROWS = (
    Row("placeholder", "placeholder", "<embedding>", copied()),
    Row("token_count", "token_count", 1, copied(), _IS_NEW),
    Row("initial_embedding_text", "initial_text", "*", copied("*"), _IS_NEW),
    Row("is_output_embedding", "is_output_embedding", False, copied(False)),
    Row("model_name", "init_from", "", path),
    Row("train", "train", True, lambda value, _: OMIT if value else False, _IS_ADDITIONAL),
)
EMBEDDING_RATE = Row("embedding_learning_rate", "lr", None, copied())
"""OneTrainer has one learning rate for all embeddings."""


def embeddings(additional: list[dict[str, Any]], context: Context) -> list[dict[str, Any]]:
    """The sections of `embeddings`: the one of the EMBEDDING method, and the additional ones."""
    given = {f"additional_embeddings.{n}.": item for n, item in enumerate(additional)}
    if context["training_method"] == "EMBEDDING":
        given = {"embedding.": context.given.get("embedding") or {}, **given}
    rate = convert((EMBEDDING_RATE,), context) if given else {}
    rows = {row.key: row for row in EMBEDDING_ROWS}
    items = [replace(context, given=g, rows=rows, prefix=p) for p, g in given.items()]
    return [
        {**convert(EMBEDDING_ROWS, item, within="embeddings"), **rate}
        for item in items
        if not item.has_wrong_values()
    ]
