"""The run file that `onewan init` writes: a short commented text with values to start from.

It has what a user should look at; every other field has its default. The two ways of naming the
base model are both there, one of them commented out.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from onewan.arithmetic.buckets import sizes_for
from onewan.documents import to_yaml
from onewan.presets.recipes import RECIPES, TRIGGER_WORD, PurposeName, Recipe
from onewan.variants import VARIANTS, Variant, VariantName

if TYPE_CHECKING:
    from onewan.formats.model_folder import ComponentName

MethodKind = Literal["lora", "dora", "loha", "lokr", "oft", "fine_tune", "embedding"]

METHODS: tuple[MethodKind, ...] = get_args(MethodKind)

_TITLES: Mapping[MethodKind, str] = {
    "lora": "A LoRA",
    "dora": "A DoRA",
    "loha": "A LoHa",
    "lokr": "A LoKr",
    "oft": "An OFT adapter",
    "fine_tune": "Full fine-tuning",
    "embedding": "An embedding (textual inversion)",
}

COMFYUI_FILES: Mapping[VariantName, Mapping[ComponentName, str]] = {
    "t2v-a14b": {
        "transformer": "diffusion_models/wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors",
        "transformer_2": "diffusion_models/wan2.2_t2v_low_noise_14B_fp8_scaled.safetensors",
        "vae": "vae/wan_2.1_vae.safetensors",
        "text_encoder": "text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors",
    },
    "i2v-a14b": {
        "transformer": "diffusion_models/wan2.2_i2v_high_noise_14B_fp8_scaled.safetensors",
        "transformer_2": "diffusion_models/wan2.2_i2v_low_noise_14B_fp8_scaled.safetensors",
        "vae": "vae/wan_2.1_vae.safetensors",
        "text_encoder": "text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors",
    },
    "ti2v-5b": {
        "transformer": "diffusion_models/wan2.2_ti2v_5B_fp16.safetensors",
        "vae": "vae/wan2.2_vae.safetensors",
        "text_encoder": "text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors",
    },
    "fun-inp-a14b": {
        "transformer": "diffusion_models/wan2.2_fun_inpaint_high_noise_14B_fp8_scaled.safetensors",
        "transformer_2": "diffusion_models/wan2.2_fun_inpaint_low_noise_14B_fp8_scaled.safetensors",
        "vae": "vae/wan_2.1_vae.safetensors",
        "text_encoder": "text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors",
    },
    "fun-control-a14b": {
        "transformer": "diffusion_models/wan2.2_fun_control_high_noise_14B_fp8_scaled.safetensors",
        "transformer_2": "diffusion_models/wan2.2_fun_control_low_noise_14B_fp8_scaled.safetensors",
        "vae": "vae/wan_2.1_vae.safetensors",
        "text_encoder": "text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors",
    },
}
"""The files of ComfyUI's Wan 2.2 templates, in ComfyUI/models; on the Hugging Face hub they are in
split_files of Comfy-Org/Wan_2.2_ComfyUI_Repackaged (https://docs.comfy.org/tutorials/video/wan/wan2_2)."""

DOWNLOAD_GB: Mapping[VariantName, int] = {
    "t2v-a14b": 126,
    "i2v-a14b": 126,
    "ti2v-5b": 34,
    "fun-inp-a14b": 64,
    "fun-control-a14b": 64,
}
"""Size of the variant's repository on the hub."""

GENERAL = Recipe(
    title="",
    material="",
    seconds=0.0,  # the official frames are taken instead
    side=0,  # so is the default size
    steps=1000,
    rank=32,
    captions="",
    prompt=f"{TRIGGER_WORD} walks along a beach at sunset, waves roll in, the camera follows",
    initial_text="a person",
    sources=(),
)
"""Values for no particular purpose: the defaults of the run file."""


SHAPE = (832, 480)
"""Width and height of Wan's 480p, whose aspect ratio is assumed for clips and taken for samples."""

SMALLEST_SAMPLE = (448, 256)
"""Width and height of the smallest sample videos."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedValues:
    """The values that depend on the memory of a device."""

    vram: str
    """As the user wrote it."""
    ram: str = ""
    """Host memory that they fit with."""
    frames: int
    area: int | None = None
    """Pixels of a frame; None is the default, the area of 480p."""
    weights: str = "as_stored"
    text_encoder: str | None = None
    """Name of a smaller file of the text encoder, which is needed to fit."""
    sample_size: tuple[int, int] | None = None
    """Width and height of sample videos; None: about those of the training clips."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StarterRequest:
    """What a run file is asked for."""

    variant: VariantName
    method: MethodKind = "lora"
    purpose: PurposeName | None = None
    name: str | None = None
    """Name of the run; None: that of the run file."""
    file: str = "run.yaml"
    """The run file, as commands name it."""
    models: Mapping[ComponentName, Path] = field(default_factory=dict)
    """Files of the model that are there."""
    models_folder: str = "ComfyUI/models"
    """Where the commented lines expect ComfyUI's files."""
    fitted: FittedValues | None = None
    """None: the values of the purpose."""

    @property
    def facts(self) -> Variant:
        return VARIANTS[self.variant]

    @property
    def recipe(self) -> Recipe:
        return GENERAL if self.purpose is None else RECIPES[self.purpose]

    @property
    def values(self) -> FittedValues:
        return self.fitted or FittedValues(vram="", frames=self.frames, area=self.area)

    @property
    def frames(self) -> int:
        """Frames of a clip, where memory is no limit."""
        return self.facts.frames if self.purpose is None else self.recipe.frames(self.facts.fps)

    @property
    def area(self) -> int | None:
        """Pixels of a frame, where memory is no limit; None is the default."""
        return self.recipe.side**2 or None

    @property
    def experts(self) -> int:
        """Number of experts that are trained."""
        return 1 if self.method == "fine_tune" else len(self.facts.experts)

    @property
    def steps(self) -> int:
        # Embeddings are trained in every step, whichever expert it uses.
        return self.recipe.steps * self.experts

    @property
    def sample_size(self) -> tuple[int, int]:
        """Width and height of sample videos."""
        values = self.values
        if values.sample_size is not None:
            return values.sample_size
        if values.frames == 1:  # a video has many times the tokens of a photo
            return SMALLEST_SAMPLE
        area = values.area or self.facts.training_area
        return sizes_for(
            area, SHAPE[0] / SHAPE[1], self.facts.size_multiple, self.facts.sample_size
        )[0]

    @property
    def sample_frames(self) -> int:
        """Frames of sample videos: of photos too, to see whether the videos still move."""
        return 33 if self.values.frames == 1 else self.values.frames

    @property
    def word(self) -> str:
        """The word for what is learned, in captions and prompts."""
        return f"<{TRIGGER_WORD}>" if self.method == "embedding" else TRIGGER_WORD

    @property
    def word_kind(self) -> str:
        """What `word` is called."""
        return "placeholder" if self.method == "embedding" else "trigger word"

    def problem(self) -> str | None:
        """Why it can't be trained; None if it can."""
        if self.purpose == "photos" and self.variant == "i2v-a14b":
            return (
                "a photo teaches an image-to-video model nothing, since its only frame is given; "
                "use t2v-a14b or ti2v-5b, or clips"
            )
        return None

    @property
    def missing_files(self) -> tuple[ComponentName, ...]:
        return tuple(name for name in COMFYUI_FILES[self.variant] if name not in self.models)


def starter(request: StarterRequest) -> str:
    """The text of the run file, with "\\n" at the end of each line."""
    sections = (
        _head(request),
        _model(request),
        _frames(request),
        _video_data(request),
        _method(request),
        _optimizer(request),
        _train(request),
        _sample(request),
        _memory(request),
        _output(request),
    )
    return "\n\n".join("\n".join(lines) for lines in map(list, sections) if lines) + "\n"


def scalar(text: str) -> str:
    """`text` as a value in a run file, in quotes where YAML needs them."""
    return to_yaml({"value": text}).partition(": ")[2].rstrip("\n")


def _comment(text: str, indent: int = 0) -> Iterator[str]:
    """Comment lines of at most 100 characters."""
    start = " " * indent + "# "
    yield from textwrap.wrap(
        text,
        100,
        initial_indent=start,
        subsequent_indent=start,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _head(request: StarterRequest) -> Iterator[str]:
    title = _TITLES[request.method]
    if request.recipe.title:
        title += f" of {request.recipe.title}"
    yield "# yaml-language-server: $schema=onewan.schema.json"
    yield "# (completion and checks in your editor, after: onewan schema onewan.schema.json)"
    yield "#"
    yield f"# {title}, for {request.facts.title}."
    if request.values.vram:
        yield (
            f"# Its values fit a device of {request.values.vram} with {request.values.ram} of host "
            "memory."
        )
    yield "# A field that is left out has its default value."
    yield f"# onewan cache {request.file}    checks the clips and encodes them"
    yield f"# onewan train {request.file}    trains"
    yield "schema_version: 1"


def _model(request: StarterRequest) -> Iterator[str]:
    facts, files, folder = request.facts, COMFYUI_FILES[request.variant], request.models_folder
    yield "model:"
    yield f"  variant: {facts.name}"
    if len(facts.experts) > 1:
        if request.method == "fine_tune":
            yield "  experts: low  # detail; high: layout and motion. One per run needs less memory"
        else:
            yield "  experts: both  # or high (layout and motion), or low (detail)"
    size = DOWNLOAD_GB[request.variant]
    if not request.models:
        yield from _comment(
            f"Its name on the Hugging Face hub, from which the first run downloads {size} GB; or a "
            "folder, in the diffusers or the official layout:",
            2,
        )
        yield f"  path: {facts.repository}"
        yield from _smaller_text_encoder(request)
        yield from _comment(
            "Or ComfyUI's files, with which nothing is downloaded; then remove `path`:", 2
        )
        yield from (f"  # {name}: {folder}/{path}" for name, path in files.items())
        return
    yield "  # ComfyUI's files:"
    for name, path in request.models.items():
        yield f"  {name}: {scalar(path.as_posix())}"
    missing = request.missing_files
    if not missing:
        yield "  # Or the whole model from the Hugging Face hub, instead of the lines above:"
        yield f"  # path: {facts.repository}  # the first run downloads {size} GB"
        return
    yield from _comment(
        "These were not found. Give them as well, or the first run downloads them from the Hugging "
        "Face hub:",
        2,
    )
    yield from (f"  # {name}: {folder}/{files[name]}" for name in missing)
    yield f"  path: {facts.repository}"
    yield from _smaller_text_encoder(request)


def _smaller_text_encoder(request: StarterRequest) -> Iterator[str]:
    name = request.values.text_encoder
    if name is None:
        return
    yield from _comment(
        "The text encoder fits on this device in fp8 only. Put the file beside this one; it is in "
        "split_files/text_encoders of Comfy-Org/Wan_2.1_ComfyUI_repackaged on the hub.",
        2,
    )
    yield f"  text_encoder: {name}"


def _frames(request: StarterRequest) -> Iterator[str]:
    frames, fps = request.values.frames, request.facts.fps
    yield "wan_config:"
    if frames == 1:
        yield "  max_frames: 1  # photos"
        return
    yield (
        f"  max_frames: {frames}  # 4n+1; {frames} at {fps} fps are {frames / fps:.1f} s; "
        "fewer need less memory and time"
    )


def _video_data(request: StarterRequest) -> Iterator[str]:
    facts, recipe, area = request.facts, request.recipe, request.values.area
    yield "video_data:"
    yield "  sources:"
    if recipe.material:
        yield from _comment(f"{recipe.material[0].upper()}{recipe.material[1:]}.", 4)
    yield "    # clips/a.mp4 (or a.png) with its caption in clips/a.txt, and so on."
    if recipe.captions:
        captions = recipe.captions.replace("trigger word", request.word_kind)
        yield from _comment(f"Captions: {captions}", 4)
    if facts.needs_image:
        yield "    # The condition image of a clip is its first frame, or clips/a.condition.png."
    yield "    - path: clips"
    if recipe.captions or request.method == "embedding":
        yield f"      trigger_word: {request.word}  # put in front of captions without it"
    yield f"  # Sides are multiples of {facts.size_multiple}; each clip keeps its aspect ratio."
    if area is None:
        yield "  # resolution: 832x480  # default: the area of 480p"
    else:
        side = round(area**0.5)
        yield f"  resolution: {side}  # the area of {side}x{side}; also 480p, 832x480"


def _method(request: StarterRequest) -> Iterator[str]:
    kind, recipe = request.method, request.recipe
    yield "method:"
    if kind in ("lora", "dora", "loha", "lokr"):
        others = ", ".join(name for name in METHODS if name != kind)
        yield f"  kind: {kind}  # or {others}"
        yield f"  rank: {recipe.rank}  # a higher rank learns more, and needs more memory and disk"
    elif kind == "oft":
        yield "  kind: oft  # an orthogonal transformation of each layer's inputs"
        yield "  block_size: 32  # a larger block can learn more, and needs more memory"
    elif kind == "fine_tune":
        yield "  kind: fine_tune  # all weights of the expert; exports have their size"
        yield "  weights: stochastic  # rounding of bfloat16; or kahan, float32, with more memory"
        yield "  fused_step: true  # updates in the backward pass, which needs less memory"
    else:
        yield "  kind: embedding  # only the vectors below are trained"
        yield ""
        yield "embeddings:"
        yield f"  - placeholder: {request.word}  # stands for the vectors in captions and prompts"
        yield f"    initial_text: {recipe.initial_text}  # a few words for it, to start from"
        yield "    token_count: 4  # vectors; more can hold more, and take room from the prompt"


def _optimizer(request: StarterRequest) -> Iterator[str]:
    recipe = request.recipe
    yield "optimizer:"
    if request.method == "fine_tune":
        yield '  name: adamw_8bit  # a quarter of AdamW\'s state; pip install "onewan[lowbit]"'
        yield "  lr: 1e-5"
    elif request.method == "embedding":
        yield "  lr: 1e-3"
    else:
        yield f"  lr: {recipe.lr}"
        if recipe.high_lr is not None and request.experts > 1:
            yield ""
            yield "per_expert:"
            yield f"  high: {{lr: {recipe.high_lr}}}  # at more, it learns that photos stand still"


def _train(request: StarterRequest) -> Iterator[str]:
    halves = f"  # of both experts together, {request.recipe.steps} each"
    yield "train:"
    yield f"  steps: {request.steps}{halves if request.experts > 1 else ''}"
    if request.method == "fine_tune":
        yield "  max_grad_norm: null  # as fused_step needs"


def _sample(request: StarterRequest) -> Iterator[str]:
    facts, (width, height) = request.facts, request.sample_size
    prompt = request.recipe.prompt
    if request.method == "embedding":
        prompt = prompt.replace(TRIGGER_WORD, request.word)
    official = "x".join(map(str, (facts.frames, *reversed(facts.sample_size))))
    yield "sample:"
    # With the size of the training clips, a sample takes about as long as thirteen steps: it has 25
    # denoising steps of two passes, and a training step is worth four passes.
    yield f"  width: {width}  # small, so that samples cost little; the official size is {official}"
    yield f"  height: {height}"
    yield f"  frames: {request.sample_frames}"
    rest = ["  every: 250", "  prompts:  # in the words of your captions"]
    rest.append(f"    - prompt: {scalar(prompt)}")
    if facts.needs_image:
        # Commented out, since a run file that names a missing image can't be loaded.
        yield "  # Sample videos start from an image; put one beside this file, then uncomment."
        rest.append("      image: first_frame.png")
        rest = [f"  # {line[2:]}" for line in rest]
    elif facts.takes_image:
        rest.append("      # image: first_frame.png  # starts the video from it")
    yield from rest


def _memory(request: StarterRequest) -> Iterator[str]:
    values, lines = request.values, list[str]()
    if values.vram:
        lines.append(f"  vram: {values.vram}")
    if values.weights != "as_stored":
        lines.append(f"  weights: {values.weights}  # of the frozen blocks, packed while loading")
    elif request.method == "fine_tune" and request.models:
        lines.append("  weights: bf16  # of fp8 files too: packed weights can't be trained")
    if lines:
        yield f"memory:  # `onewan plan {request.file}` shows what the run needs"
        yield from lines


def _output(request: StarterRequest) -> Iterator[str]:
    yield "output:"
    if request.name is None:
        yield "  # name: my_lora  # of the run; default: the name of this file"
        yield "  dir: runs"
    else:
        yield f"  name: {scalar(request.name)}  # of the run, its folder in runs, and its files"
