"""Detects an adapter from its keys: kind (LoRA, DoRA, ...), key format, trainer, modules, ranks.

Works on keys and shapes from the header: no tensor is read and torch is not imported, so that
inspecting a file is fast. One table of prefixes, one of endings, and the official and diffusers'
names of modules cover every file that trainers write for Wan:

==================================  ======================================  ======================
prefix                              module                                  written by
==================================  ======================================  ======================
``diffusion_model.``                official, dotted                        ComfyUI, ai-toolkit,
                                                                            diffusion-pipe, onewan
``diffusion_model.transformer_1.``  the same, of the high expert (the low   ai-toolkit, both experts
                                    one under ``transformer_2.``)           in one file
``lora_unet_``                      official, dots as underscores           musubi-tuner, kohya
``lora_unet__``                     the same                                VideoX-Fun
``transformer.``                    diffusers' (low expert also under       diffusers, SimpleTuner,
                                    ``transformer_2.``)                     onewan
``base_model.model.``               as the model that PEFT wrapped          PEFT
``lycoris_``                        underscores                             LyCORIS, SimpleTuner
none                                official, dotted                        DiffSynth-Studio
==================================  ======================================  ======================

Distilled LoRAs for Wan 2.2 I2V were made from Wan 2.1's, so that they have keys for its CLIP
branch, and some have differences of the modulation tables. ComfyUI skips both; so does onewan, with
a notice (`AdapterLayout.skipped`).

Sources: the key lists in the programs' documentation and files that they wrote. Which program reads
which keys was measured (ComfyUI, diffusers, musubi-tuner, DiffSynth-Studio).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from onewan.formats.adapter_parts import AdapterKind, kind_of, rank_of, shape_error
from onewan.formats.backends import TensorInfo
from onewan.formats.key_maps import to_diffusers, to_official
from onewan.formats.untrusted import parse_json
from onewan.variants import VARIANTS, ExpertName

LoraFormat = Literal["comfyui", "no_alpha", "diffusers", "kohya"]
"""The formats that a user can choose. ``no_alpha`` has the keys of ``comfyui`` without the alphas,
whose scale is multiplied into the weights."""
KeyFormat = LoraFormat | Literal["official"]
"""``official`` has ComfyUI's keys without their prefix, ``blocks.0.self_attn.q.lora_A.weight``."""

LINEARS = (
    *(f"{attn}.{name}" for attn in ("attn1", "attn2") for name in ("to_q", "to_k", "to_v")),
    *(f"{attn}.to_out.0" for attn in ("attn1", "attn2")),
    "ffn.net.0.proj",
    "ffn.net.2",
)
"""The ten linear layers of a block, by diffusers' names: the usual layers for a LoRA."""

_NORMS = ("attn1.norm_q", "attn1.norm_k", "attn2.norm_q", "attn2.norm_k", "norm2")
_OUTSIDE_BLOCKS = (
    "patch_embedding",
    "proj_out",
    "condition_embedder.time_proj",
    *(
        f"condition_embedder.{embedded}_embedder.linear_{n}"
        for embedded in ("time", "text")
        for n in (1, 2)
    ),
)


def _flat(name: str) -> str:
    """`name` as kohya and LyCORIS write it."""
    return name.replace(".", "_")


# Tables, since names can't be split at underscores: ``cross_attn_norm_q`` has some of its own.
_FLAT_IN_BLOCK = {
    _flat(variant): name
    for name in (*LINEARS, *_NORMS)
    for variant in (name, to_official(f"blocks.0.{name}").removeprefix("blocks.0."))
}
_FLAT_OUTSIDE = {
    _flat(variant): name for name in _OUTSIDE_BLOCKS for variant in (name, to_official(name))
}
"""Diffusers' names of modules, by diffusers' and official names with underscores for dots."""


@dataclass(frozen=True, slots=True)
class _Prefix:
    text: str
    flat: bool = False
    """Whether dots are written as underscores."""
    expert: ExpertName | None = None
    """The expert that the prefix stands for in a file that holds both."""
    ambiguous: bool = False
    """Whether in a file without the other expert's prefix it may stand for any transformer."""


_PREFIXES = (
    _Prefix("diffusion_model."),
    _Prefix("model.diffusion_model."),
    _Prefix("diffusion_model.transformer_1.", expert="high"),
    _Prefix("diffusion_model.transformer_2.", expert="low"),
    _Prefix("lora_unet_", flat=True),
    _Prefix("lora_unet__", flat=True),
    _Prefix("transformer.", expert="high", ambiguous=True),
    _Prefix("transformer_2.", expert="low"),
    _Prefix("lora_transformer_", flat=True, expert="high", ambiguous=True),
    _Prefix("lora_transformer_2_", flat=True, expert="low"),
    _Prefix("pipe.dit.", expert="high", ambiguous=True),
    _Prefix("pipe.dit2.", expert="low"),
    _Prefix("base_model.model."),
    _Prefix("lycoris_", flat=True),
    _Prefix(""),  # matches every key, so it is chosen only if no other prefix explains as many
)

_ENDINGS: dict[str, str] = {
    **{f"{name}.weight": "lora_A" for name in ("lora_A", "lora_down", "lora.down")},
    **{f"{name}.weight": "lora_B" for name in ("lora_B", "lora_up", "lora.up")},
    **{f"{name}.bias": "lora_B.bias" for name in ("lora_B", "lora_up")},
    "lora_A": "lora_A",
    "lora_B": "lora_B",
    "alpha": "alpha",
    **dict.fromkeys(
        ("dora_scale", "lora_magnitude_vector", "lora_magnitude_vector.weight"), "magnitude"
    ),
    **{name: name for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")},
    **{f"lokr_w{n}{factor}": f"lokr_w{n}{factor}" for n in (1, 2) for factor in ("", "_a", "_b")},
    "oft_blocks": "oft_blocks",
    "oft_R": "oft_R",
    "oft_R.weight": "oft_R",
    "diff": "diff",
    "w_norm": "diff",
    "diff_b": "diff_b",
    "b_norm": "diff_b",
}
"""`ModuleAdapter`'s name of a tensor by the ending of its key. PEFT's name of the adapter,
``.default``, is removed before."""

_CONVOLUTIONS = ("hada_t1", "hada_t2", "lokr_t2", "lora_mid.weight")
"""Endings of adapters on convolutions, which Wan's blocks do not have."""

_SKIPPED = (
    r"(cross_attn[._](k_img|v_img|norm_k_img)|attn2[._](add_k_proj|add_v_proj|norm_added_k))[._]",
    r"(^|[._])(img_emb|image_embedder)[._]",
    r"\.diff_m$",
)
"""Patterns of keys that Wan 2.2 has no weights for, and ComfyUI skips: Wan 2.1's CLIP branch
(official and diffusers' names), and differences of modulation tables."""

_OTHER_ARCHITECTURES = (
    (r"[kv]_img\b|[kv]_img\.|img_emb|add_[kv]_proj|image_embedder", "Wan 2.1 I2V (CLIP branch)"),
    (r"vace_", "Wan VACE"),
    (r"(double|single)_(transformer_)?blocks", "Flux or HunyuanVideo"),
    (
        r"lora_te|text_model|(down|up|input|output)_blocks|mid(dle)?_block",
        "Stable Diffusion",
    ),
    (r"transformer_blocks|joint_blocks", "another video or image transformer"),
)
"""Patterns in the keys of other models' adapters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterLayout:
    """An adapter as described by the keys and shapes in a header."""

    prefix: str
    """The prefix of the keys."""
    names: Literal["official", "diffusers"]
    """Whether the keys contain official or diffusers' names of modules."""
    trainer: str | None
    """The program that wrote the file; None if it can't be inferred."""
    experts: tuple[ExpertName, ...]
    """The experts that the keys name: none, one, or both in one file."""
    modules: dict[str, dict[str, str]]
    """Keys by module (``blocks.0.attn1.to_q``) and `ModuleAdapter`'s name (``lora_A``)."""
    kinds: dict[str, AdapterKind]
    """By module; damaged modules are left out."""
    ranks: dict[str, int]
    """By module, where the kind has one."""
    skipped: tuple[str, ...] = ()
    """Keys without a counterpart in Wan 2.2 that are skipped, in alphabetical order: beside modules
    that it has, and as other programs do. The rest of the adapter means the same without them."""
    unknown: tuple[str, ...]
    """Keys that belong to no adapter for Wan 2.2, in alphabetical order."""
    magnitude_by_input: bool | None = None
    """Whether DoRA's magnitudes have one value per input of a layer; None if there are none, or of
    both kinds."""
    module_errors: tuple[str, ...]
    """One line for each damaged module: what is wrong with its tensors."""

    @property
    def key_format(self) -> str:
        """The key format: the name of one that onewan writes, otherwise prefix and names."""
        written: dict[tuple[str, str], LoraFormat] = {
            ("diffusion_model.", "official"): "comfyui",
            ("transformer.", "diffusers"): "diffusers",
            ("lora_unet_", "official"): "kohya",
        }
        known = written.get((self.prefix, self.names))
        return known or f"{self.prefix or 'no prefix'}, {self.names} names"

    @property
    def other_architecture(self) -> str | None:
        """The model that the unknown keys belong to, in words."""
        for pattern, model in _OTHER_ARCHITECTURES:
            if any(re.search(pattern, key) for key in self.unknown):
                return model
        return None


def layout_of(
    tensors: Mapping[str, TensorInfo],
    metadata: Mapping[str, str],
    expert: ExpertName | None = None,
) -> AdapterLayout | None:
    """The layout of the adapter in a header; None if no key belongs to an adapter.

    Where a file holds the adapters of both experts, `expert` selects one.
    """
    endings = {key: ending for key in tensors if (ending := split_key(key)) is not None}
    if not endings:
        return None
    under = {p: _modules_under(p, endings) for p in _PREFIXES}
    # Prefixes overlap. `max` takes the first of those that match the most keys.
    best = max(_PREFIXES, key=lambda p: len(under[p]))
    pair = [p for p in _PREFIXES if p.expert and under[p]] if best.expert else []
    experts: tuple[ExpertName, ...] = tuple(
        name for name in ("high", "low") if name in {p.expert for p in pair}
    )
    if len(experts) == 2:
        best = next((p for p in pair if p.expert == expert), best)
    elif experts == ("high",) and best.ambiguous:
        experts = ()  # either expert, or the only transformer of the 5B
    elsewhere = {key for p in pair if p.expert != best.expert for key in under[p]}
    modules: dict[str, dict[str, str]] = {}
    module_errors: list[str] = []
    for key, (module, part) in under[best].items():
        if part in modules.setdefault(module, {}):
            module_errors.append(f"{module} has {part} twice")
        modules[module][part] = key
    kinds: dict[str, AdapterKind] = {}
    ranks: dict[str, int] = {}
    for module, parts in modules.items():
        found = {part: tensors[key] for part, key in parts.items()}
        if error := shape_error(found):
            module_errors.append(f"{module} {error}")
            continue
        kinds[module] = kind_of(found)
        if rank := rank_of(found):
            ranks[module] = rank
    official = any(_is_official(key, best) for key in under[best])
    skipped, unknown = _without_counterpart(tensors.keys() - under[best].keys() - elsewhere)
    if not modules:  # nothing would be left of the adapter
        skipped, unknown = (), tuple(sorted({*skipped, *unknown}))
    return AdapterLayout(
        prefix=best.text,
        names="official" if official else "diffusers",
        trainer=_trainer(tensors, metadata, best),
        experts=experts,
        modules=modules,
        kinds=kinds,
        ranks=ranks,
        skipped=skipped,
        unknown=unknown,
        magnitude_by_input=_magnitude_by_input(tensors, modules),
        module_errors=tuple(module_errors),
    )


def _without_counterpart(keys: Iterable[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(keys to skip, unknown keys) among those that name no module of Wan 2.2."""
    skipped = {
        key
        for key in keys
        if (split_key(key) or key.endswith(".diff_m")) and any(re.search(p, key) for p in _SKIPPED)
    }
    return tuple(sorted(skipped)), tuple(sorted(set(keys) - skipped))


def _magnitude_by_input(
    tensors: Mapping[str, TensorInfo], modules: Mapping[str, Mapping[str, str]]
) -> bool | None:
    shapes = [
        tensors[parts["magnitude"]].shape for parts in modules.values() if "magnitude" in parts
    ]
    by_input = {len(shape) == 2 and shape[0] == 1 for shape in shapes}
    return by_input.pop() if len(by_input) == 1 else None


def module_key(module: str, format: KeyFormat) -> str:
    """The key of diffusers' `module` in `format`: the part before ``.lora_A.weight``."""
    if format == "diffusers":
        return f"transformer.{module}"
    official = to_official(module)
    if format == "kohya":
        return f"lora_unet_{_flat(official)}"
    return official if format == "official" else f"diffusion_model.{official}"


@dataclass(frozen=True, slots=True, kw_only=True)
class WanShape:
    """The sizes of a transformer that determine its linear layers."""

    width: int
    ffn_width: int
    num_layers: int

    @staticmethod
    def of_config(config: Mapping[str, Any]) -> WanShape:
        """From the configuration of diffusers' ``WanTransformer3DModel``."""
        return WanShape(
            width=config["num_attention_heads"] * config["attention_head_dim"],
            ffn_width=config["ffn_dim"],
            num_layers=config["num_layers"],
        )

    @staticmethod
    def of_width(width: int) -> WanShape | None:
        """The shape of the Wan 2.2 transformer of this width; None if there is none."""
        for variant in VARIANTS.values():
            if variant.num_attention_heads * variant.attention_head_dim == width:
                return WanShape(
                    width=width, ffn_width=variant.ffn_dim, num_layers=variant.num_layers
                )
        return None

    def linears(self) -> dict[str, tuple[int, int]]:
        """(outputs, inputs) of each linear layer in the blocks, by diffusers' names."""
        wide, ffn = self.width, self.ffn_width
        sizes = {"ffn.net.0.proj": (ffn, wide), "ffn.net.2": (wide, ffn)}
        return {
            f"blocks.{n}.{name}": sizes.get(name, (wide, wide))
            for n in range(self.num_layers)
            for name in LINEARS
        }


# ------------------------------------------------------------------------------------------- names


def split_key(key: str) -> tuple[str, str] | None:
    """(prefix and module, `ModuleAdapter`'s name of the tensor) of a key; None if its ending is not
    one of an adapter."""
    steps = [step for step in key.split(".") if step != "default"]
    # The longest ending first: ``lora.down.weight`` before ``weight`` alone.
    for length in (3, 2, 1):
        part = _ENDINGS.get(".".join(steps[-length:])) if len(steps) > length else None
        if part is not None:
            return ".".join(steps[:-length]), part
    if any(key.endswith("." + ending) for ending in _CONVOLUTIONS):
        return ".".join(steps[:-1]), "convolution"
    return None


def _modules_under(
    prefix: _Prefix, endings: Mapping[str, tuple[str, str]]
) -> dict[str, tuple[str, str]]:
    """(module, tensor) of the keys that name a module of Wan after `prefix`."""
    found: dict[str, tuple[str, str]] = {}
    for key, (before, part) in endings.items():
        if not before.startswith(prefix.text) or part == "convolution":
            continue
        name = before.removeprefix(prefix.text)
        module = _from_flat(name) if prefix.flat else _from_dotted(name)
        if module is not None:
            found[key] = (module, part)
    return found


def _from_dotted(name: str) -> str | None:
    """Diffusers' name of a module from its official or diffusers' name; None if Wan 2.2 has no
    such module."""
    # The key maps translate names of weights and of blocks' insides too; those are not modules.
    if name.endswith((".weight", ".bias")) or (
        name.startswith("blocks.") and not re.match(r"blocks\.\d{1,4}\.", name, re.ASCII)
    ):
        return None
    try:
        return to_diffusers(name)
    except KeyError:
        pass
    try:
        to_official(name)
    except KeyError:
        return None
    return name


def _from_flat(name: str) -> str | None:
    """The same for a name with underscores instead of dots."""
    block = re.fullmatch(r"blocks_(\d{1,4})_(.+)", name, re.ASCII)
    if block is None:
        return _FLAT_OUTSIDE.get(name)
    module = _FLAT_IN_BLOCK.get(block[2])
    return None if module is None else f"blocks.{int(block[1])}.{module}"


def _is_official(key: str, prefix: _Prefix) -> bool:
    rest = _flat(key.removeprefix(prefix.text))
    return bool(re.search(r"(self|cross)_attn_|ffn_[02]_|ffn_[02]$", rest))


def _trainer(
    tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str], prefix: _Prefix
) -> str | None:
    """The program that wrote the file, detected by metadata and keys that only it writes."""
    # Checked first, since onewan keeps the entries of other trainers when it converts a file.
    if "onewan.version" in metadata:
        return "onewan"
    if any(name.startswith("ot_") for name in metadata):
        return "OneTrainer"
    if "software" in metadata:
        try:
            return str(parse_json(metadata["software"])["name"])[:40]
        except (ValueError, KeyError, TypeError):
            return metadata["software"][:40]
    if any(name.startswith("ss_network") for name in metadata):
        return "musubi-tuner"
    if prefix.text == "" and any(".default." in key for key in tensors):
        return "DiffSynth-Studio"
    by_prefix = {"lycoris_": "LyCORIS", "base_model.model.": "PEFT", "lora_unet__": "VideoX-Fun"}
    by_prefix |= {f"diffusion_model.transformer_{n}.": "ai-toolkit" for n in (1, 2)}
    return by_prefix.get(prefix.text)
