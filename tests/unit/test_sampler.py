"""`WanModelSampler` against diffusers' pipelines by themselves, and what it leaves behind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanImageToVideoPipeline, WanPipeline
from PIL import Image
from support.adapters import lora_config

from onewan.adapters.lora import adapter_parameters, attach_adapter
from onewan.config.load import load_run
from onewan.demo.tiny_model import write_tiny_model
from onewan.errors import CheckpointError, ConfigError, DataError, Interrupted
from onewan.media import Fit, probe, read_frames, read_image, write_video
from onewan.model.conditioning import ConditionPixels
from onewan.model.forward import predict_velocity
from onewan.model.load import WanModelLoader, official_scheduler
from onewan.model.wan import WanModel
from onewan.sample.generate import SampleRequest, WanModelSampler
from onewan.train.run import sample_requests
from onewan.variants import NEGATIVE_PROMPT, VARIANTS, VariantName

PROMPT = "a red square moves slowly across a dark background"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[VariantName], Path]:
    @cache
    def write(variant: VariantName) -> Path:
        return write_tiny_model(tmp_path_factory.mktemp(variant), variant, width=64, layers=2)

    return write


@pytest.fixture(scope="module")
def model(folder) -> Callable[[VariantName], WanModel]:
    return cache(lambda variant: WanModelLoader().load(folder(variant), variant))


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """A picture of exactly the requests' size."""
    pixels = np.random.default_rng(7).integers(0, 256, (32, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "first.png")
    return tmp_path / "first.png"


def request(variant: VariantName, **changes) -> SampleRequest:
    """A small video with different guidance for each expert, over both experts."""
    small = SampleRequest(
        prompt=PROMPT,
        negative_prompt="blue circle",
        image=None,
        width=64,
        height=32,
        frames=5,
        steps=4,
        guidance=(4.0, 2.0)[: len(VARIANTS[variant].experts)],
        shift=6.0,
        seed=11,
        fps=8.0,
    )
    return replace(small, **changes)


def plain_pipeline(folder: Path, sample_request: SampleRequest) -> np.ndarray:
    """The same video by diffusers alone, from its own loading to its own pixels."""
    kind = WanPipeline if sample_request.image is None else WanImageToVideoPipeline
    pipeline = kind.from_pretrained(folder)
    pipeline.scheduler = UniPCMultistepScheduler.from_config(
        pipeline.scheduler.config, flow_shift=sample_request.shift
    )
    pipeline.set_progress_bar_config(disable=True)
    images = {"image": sample_request.image, "last_image": sample_request.last_image}
    call = {name: Image.open(path) for name, path in images.items() if path is not None}
    video = pipeline(
        **call,
        prompt=sample_request.prompt,
        negative_prompt=sample_request.negative_prompt,
        width=sample_request.width,
        height=sample_request.height,
        num_frames=sample_request.frames,
        num_inference_steps=sample_request.steps,
        guidance_scale=sample_request.guidance[0],
        guidance_scale_2=sample_request.guidance[1] if len(sample_request.guidance) > 1 else None,
        generator=torch.Generator().manual_seed(sample_request.seed),
    ).frames[0]
    return (video * 255).round().astype(np.uint8)


def assert_same_video(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Equal except for rounding: no value differs by more than one level of 255, and few do."""
    assert ours.shape == theirs.shape and ours.dtype == np.uint8
    assert theirs.std() > 8, "too uniform to distinguish two videos"
    difference = np.abs(ours.astype(int) - theirs.astype(int))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-3


@pytest.mark.parametrize(
    ("variant", "with_image"),
    [("t2v-a14b", False), ("i2v-a14b", True), ("ti2v-5b", False), ("ti2v-5b", True)],
)
def test_a_sample_equals_that_of_diffusers_pipeline(folder, model, picture, variant, with_image):
    sample_request = request(variant, image=picture if with_image else None)
    ours = WanModelSampler(model(variant)).sample(sample_request)
    assert ours.shape == (5, 32, 64, 3)
    assert_same_video(ours, plain_pipeline(folder(variant), sample_request))


@pytest.fixture
def last_picture(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(8).integers(0, 256, (32, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "last.png")
    return tmp_path / "last.png"


def test_a_sample_between_two_images_equals_that_of_diffusers_pipeline(
    folder, model, picture, last_picture
):
    sample_request = request("i2v-a14b", image=picture, last_image=last_picture, frames=9)
    ours = WanModelSampler(model("i2v-a14b")).sample(sample_request)
    assert_same_video(ours, plain_pipeline(folder("i2v-a14b"), sample_request))
    without = WanModelSampler(model("i2v-a14b")).sample(replace(sample_request, last_image=None))
    assert (ours != without).mean() > 0.1  # where the two of the same video differ in 1e-3


@pytest.mark.parametrize("variant", ["i2v-a14b", "ti2v-5b"])
@pytest.mark.parametrize("given", ["both", "last"])
def test_a_sample_with_a_last_image_has_the_inputs_of_training(
    model, picture, last_picture, variant, given
):
    first = picture if given == "both" else None
    sample_request = request(variant, image=first, last_image=last_picture, frames=9)
    ours = WanModelSampler(model(variant)).sample(sample_request)
    assert_same_video(ours, by_definition(model(variant), sample_request))


def _pixels(path: Path | None) -> torch.Tensor | None:
    if path is None:
        return None
    image = torch.from_numpy(read_image(path, Fit(64, 32)))
    return image.permute(2, 0, 1)[None].float() / 127.5 - 1


def _control(sample_request: SampleRequest) -> torch.Tensor | None:
    if sample_request.control is None:
        return None
    times = [frame / sample_request.fps for frame in range(sample_request.frames)]
    frames = torch.from_numpy(read_frames(sample_request.control, times, Fit(64, 32)))
    return frames.permute(3, 0, 1, 2)[None].float() / 127.5 - 1


def _given(
    model: WanModel, sample_request: SampleRequest
) -> tuple[torch.Tensor | None, dict[int, torch.Tensor]]:
    """The channels of a condition and the clean latent frames, by their index."""
    given, conditioning = sample_request.given, model.conditioning
    pixels = ConditionPixels(
        shape=(1, 3, sample_request.frames, 32, 64),
        image=_pixels(sample_request.image),
        last=_pixels(sample_request.last_image),
        control=_control(sample_request),
    )
    wanted = [part for part in conditioning.parts(given) if part != "reference"]
    if pixels.control is None:
        wanted = [part for part in wanted if part != "control"]
    parts = {part: model.encode_part(part, pixels) for part in wanted}
    clean = {-1: parts["last_frame"][:, :, 0]} if "last_frame" in parts else {}
    if clean and pixels.image is not None:
        clean[0] = model.encode_video(pixels.image[:, :, None])[:, :, 0]
    latents = torch.zeros(1, model.variant.latent_channels, 1 + sample_request.frames // 4, 4, 8)
    return conditioning.channels(parts, given, latents), clean


@torch.no_grad()
def by_definition(model: WanModel, sample_request: SampleRequest) -> np.ndarray:
    """A video by the forward contract of training and the definition of guidance."""
    boundary, frames = model.variant.boundary or 0.0, sample_request.frames // 4 + 1
    condition, clean = _given(model, sample_request)
    image = _pixels(sample_request.reference)
    reference = None if image is None else model.encode_video(image[:, :, None])[:, :, 0]
    clean_frames = torch.zeros(1, frames, dtype=torch.bool)
    clean_frames[:, list(clean)] = True
    text, negative = (
        model.encode_text([p]) for p in (sample_request.prompt, sample_request.negative_prompt)
    )
    scheduler = official_scheduler(model.variant, sample_request.shift)
    scheduler.set_timesteps(sample_request.steps)
    side = model.variant.spatial_compression
    shape = (1, model.variant.latent_channels, frames, 32 // side, 64 // side)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(sample_request.seed))
    for timestep in scheduler.timesteps:
        t = timestep[None] / 1000
        low = bool(t < boundary)
        expert = model.transformer_2 if low else model.transformer
        noisy = _with_frames(x, clean)
        further = {
            "condition_BCFHW": condition,
            "clean_frames_BF": clean_frames if clean else None,
            "reference_BCHW": reference,
        }
        velocity = predict_velocity(expert, noisy, t, text, **further)
        if (scale := sample_request.guidance[low]) != 1:
            base = predict_velocity(expert, noisy, t, negative, **further)
            velocity = base + scale * (velocity - base)
        x = scheduler.step(velocity, timestep, x, return_dict=False)[0]
    x = _with_frames(x, clean)
    pixels = (model.decode_video(x)[0] / 2 + 0.5).clamp(0, 1) * 255
    return pixels.round().to(torch.uint8).permute(1, 2, 3, 0).numpy()


def _with_frames(x: torch.Tensor, clean: dict[int, torch.Tensor]) -> torch.Tensor:
    x = x.clone()
    for index, frame in clean.items():
        x[:, :, index] = frame
    return x


@pytest.mark.parametrize("guidance", [(4.0, 2.0), (1.0, 3.0), (3.0, 1.0), (1.0, 1.0)])
def test_each_expert_has_its_own_guidance(model, guidance):
    """diffusers looks at the first scale alone: if that is 1, it leaves the second out."""
    t2v = model("t2v-a14b")
    calls = {"transformer": 0, "transformer_2": 0}

    def count(name: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            calls[name] += 1

        return hook

    hooks = [getattr(t2v, name).register_forward_hook(count(name)) for name in calls]

    sample_request = request("t2v-a14b", guidance=guidance, steps=6, shift=6.0)
    ours = WanModelSampler(t2v).sample(sample_request)
    for hook in hooks:
        hook.remove()
    high = int((_timesteps(sample_request) >= 875).sum())
    assert 0 < high < 6
    # No guidance costs one pass a step, guidance two.
    assert calls["transformer"] == high * (1 + (guidance[0] > 1))
    assert calls["transformer_2"] == (6 - high) * (1 + (guidance[1] > 1))
    assert_same_video(ours, by_definition(t2v, sample_request))


def _timesteps(sample_request: SampleRequest) -> torch.Tensor:
    scheduler = official_scheduler(VARIANTS["t2v-a14b"], sample_request.shift)
    scheduler.set_timesteps(sample_request.steps)
    return scheduler.timesteps


def test_each_guidance_scale_changes_the_video(model):
    sampler = WanModelSampler(model("t2v-a14b"))
    videos = [
        sampler.sample(request("t2v-a14b", guidance=g))
        for g in ((1.0, 1.0), (4.0, 1.0), (1.0, 4.0))
    ]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert not np.array_equal(videos[i], videos[j])


def test_the_seed_decides_and_global_generators_are_not_used(model):
    sampler = WanModelSampler(model("ti2v-5b"))
    state = torch.get_rng_state()
    first = sampler.sample(request("ti2v-5b"))
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert np.array_equal(sampler.sample(request("ti2v-5b")), first)
    assert not np.array_equal(sampler.sample(request("ti2v-5b", seed=12)), first)


def test_the_image_is_scaled_to_cover_the_frame_and_cropped(model, tmp_path):
    """A tall picture gives what its centre, scaled down beforehand, gives."""
    pixels = np.random.default_rng(1).integers(0, 256, (300, 128, 3), dtype=np.uint8)
    tall, fitted = tmp_path / "tall.png", tmp_path / "fitted.png"
    Image.fromarray(pixels).save(tall)
    Image.fromarray(read_image(tall, Fit(width=64, height=32))).save(fitted)
    sampler = WanModelSampler(model("ti2v-5b"))
    videos = [sampler.sample(request("ti2v-5b", image=image)) for image in (tall, fitted)]
    assert np.array_equal(*videos)


def test_cached_text_embeddings_replace_the_text_encoder(folder, model):
    """With cached embeddings, unpadded, the text encoder need not be loaded."""
    whole = model("t2v-a14b")
    cached = {p: whole.encode_prompt(p) for p in (PROMPT, "blue circle")}
    bare = WanModelLoader().load(
        folder("t2v-a14b"), components=["transformer", "transformer_2", "vae"]
    )
    sample_request = request("t2v-a14b")
    ours = WanModelSampler(bare).sample(sample_request, text=cached.__getitem__)
    assert np.array_equal(ours, WanModelSampler(whole).sample(sample_request))
    with pytest.raises(CheckpointError, match="the text encoder was not loaded"):
        WanModelSampler(bare).sample(sample_request)


# -------------------------------------------------------------------------------- while training


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def training(folder, request) -> WanModel:
    """A model in the middle of LoRA training, with dropout and checkpointing on."""
    model = WanModelLoader().load(folder("t2v-a14b"), dtype=request.param)
    spec = lora_config(
        rank=2, alpha=4.0, dropout=0.5, modules=("attn1.to_q", "ffn.net.2"), layers=(0,)
    )
    generator = torch.Generator().manual_seed(4)
    for transformer in (model.transformer, model.transformer_2):
        attach_adapter(transformer, spec, seed=0, name="x")
        for parameter in adapter_parameters(transformer).values():
            parameter.data.normal_(0, 0.2, generator=generator)
        transformer.enable_gradient_checkpointing()
        transformer.train()
        transformer.blocks[1].eval()  # a mode of its own, to be kept
    model.transformer.patch_embedding.weight.grad = torch.ones_like(
        model.transformer.patch_embedding.weight
    )
    return model


def snapshot(model: WanModel) -> dict[str, object]:
    """All of a model's state that sampling could disturb."""
    parts = {
        "text_encoder": model.text_encoder,
        "vae": model.vae,
        "transformer": model.transformer,
        "transformer_2": model.transformer_2,
    }
    state: dict[str, object] = {}
    for part, module in parts.items():
        for name, child in module.named_modules():
            hooks = (*child._forward_hooks, *child._forward_pre_hooks, *child._backward_hooks)
            state[f"{part}.{name}"] = (type(child), child.training, hooks, child.__dict__.keys())
        for name, p in module.named_parameters():
            state[f"{part}.{name}"] = (id(p), p.dtype, p.device, p.requires_grad, p.grad is None)
        state[part] = getattr(module, "gradient_checkpointing", None)
    return state


def test_adapters_show_in_the_video_and_the_model_is_left_as_it_was(training, model):
    before = snapshot(training)
    sample_request = request("t2v-a14b")
    first = WanModelSampler(training).sample(sample_request)
    assert snapshot(training) == before
    # Dropout of a half would make every video another one.
    assert np.array_equal(WanModelSampler(training).sample(sample_request), first)
    base = WanModelSampler(model("t2v-a14b")).sample(sample_request)
    assert np.abs(first.astype(int) - base.astype(int)).max() > 5
    transformer = training.transformer
    loss = predict_velocity(
        transformer,
        torch.ones(1, 16, 2, 4, 8),
        torch.tensor([0.9]),
        torch.ones(1, 512, 64),
        dtype=training.dtype,
    ).sum()
    loss.backward()
    assert all(p.grad is not None for p in adapter_parameters(transformer).values())


@pytest.mark.parametrize("training", [torch.bfloat16], indirect=True)
def test_a_bfloat16_sample_is_near_the_float32_one(folder, training):
    """The solver and the latents stay float32; only the transformers round."""
    exact = WanModelLoader().load(folder("t2v-a14b"))
    spec = lora_config(
        rank=2, alpha=4.0, dropout=0.5, modules=("attn1.to_q", "ffn.net.2"), layers=(0,)
    )
    for name in ("transformer", "transformer_2"):
        attach_adapter(getattr(exact, name), spec, seed=0, name="x")
        theirs = adapter_parameters(getattr(training, name))
        for key, parameter in adapter_parameters(getattr(exact, name)).items():
            parameter.data.copy_(theirs[key].data)
    sample_request = request("t2v-a14b")
    ours, want = (WanModelSampler(m).sample(sample_request).astype(int) for m in (training, exact))
    assert 0 < np.abs(ours - want).mean() < 1.5


@pytest.mark.parametrize("training", [torch.float32], indirect=True)
@pytest.mark.parametrize("stop_at", [1, 3])
def test_an_interrupted_sample_leaves_the_model_as_it_was(training, stop_at):
    seen: list[tuple[int, int]] = []

    def on_step(step: int, steps: int) -> None:
        seen.append((step, steps))
        if step == stop_at:
            raise Interrupted

    before = snapshot(training)
    with pytest.raises(Interrupted):
        WanModelSampler(training).sample(request("t2v-a14b"), on_step=on_step)
    assert seen == [(n, 4) for n in range(1, stop_at + 1)]
    assert snapshot(training) == before


def test_experts_take_turns_on_the_device(folder, model, accelerator):
    name = accelerator.type
    there = WanModelLoader().load(folder("t2v-a14b"))
    there.transformer_2.to(accelerator)
    resident: set[tuple[bool, bool]] = set()

    def look(*_: object) -> None:
        resident.add((there.transformer.device.type, there.transformer_2.device.type))

    sample_request = request("t2v-a14b")
    ours = WanModelSampler(there, device=accelerator).sample(sample_request, on_step=look)
    assert resident == {(name, "cpu"), ("cpu", name)}
    assert (there.transformer.device.type, there.transformer_2.device.type) == ("cpu", name)
    assert there.vae.device.type == there.text_encoder.device.type == "cpu"
    cpu = WanModelSampler(model("t2v-a14b")).sample(sample_request)
    assert np.abs(ours.astype(int) - cpu.astype(int)).mean() < 1


# ------------------------------------------------------------------------------- requests and files


def test_a_run_file_gives_a_request_for_each_prompt(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    (tmp_path / "run.yaml").write_text(
        """
model: {path: x, variant: ti2v-5b}
sample:
  prompts:
    - a text
    - {prompt: another, negative_prompt: "", seed: 9, image: a.png, last_image: a.png}
  width: 64
  seed: 5
""",
        encoding="utf-8",
    )
    first, second = sample_requests(load_run(tmp_path / "run.yaml"))
    assert first == SampleRequest(
        prompt="a text",
        negative_prompt=NEGATIVE_PROMPT,
        image=None,
        width=64,
        height=480,
        frames=121,
        steps=25,
        guidance=(5.0,),
        shift=5.0,
        seed=5,
        fps=24.0,
    )
    assert second == replace(
        first,
        prompt="another",
        negative_prompt="",
        seed=9,
        image=tmp_path / "a.png",
        last_image=tmp_path / "a.png",
    )


def test_impossible_requests_are_refused_with_all_reasons(model, picture):
    wrong = request("t2v-a14b", image=picture, width=72, frames=6, steps=0, guidance=(0.5, 3.0))
    with pytest.raises(ConfigError) as caught:
        WanModelSampler(model("t2v-a14b")).sample(wrong)
    fields = [problem.partition(":")[0] for problem in caught.value.problems]
    assert fields == ["width", "frames", "steps", "guidance", "image"]
    with pytest.raises(ConfigError, match="image: i2v-a14b starts from an image"):
        WanModelSampler(model("i2v-a14b")).sample(request("i2v-a14b"))
    with pytest.raises(ConfigError, match=r"last_image: t2v-a14b takes no image"):
        WanModelSampler(model("t2v-a14b")).sample(request("t2v-a14b", last_image=picture))
    with pytest.raises(ConfigError, match=r"last_image: a sample of one frame"):
        one = request("ti2v-5b", image=picture, last_image=picture, frames=1)
        WanModelSampler(model("ti2v-5b")).sample(one)
    with pytest.raises(ConfigError, match=r"guidance: .* expert of ti2v-5b, \[scale\]"):
        WanModelSampler(model("ti2v-5b")).sample(request("ti2v-5b", guidance=(5.0, 5.0)))


def test_sample_to_writes_a_video(model, tmp_path):
    path = WanModelSampler(model("ti2v-5b")).sample_to(tmp_path / "a.mp4", request("ti2v-5b"))
    info = probe(path)
    assert (info.width, info.height, info.frames_at(8.0)) == (64, 32, 5)


@pytest.fixture
def control(tmp_path: Path) -> Path:
    """A control video of 9 frames, at the requests' rate."""
    frames = np.random.default_rng(9).integers(0, 256, (9, 32, 64, 3), dtype=np.uint8)
    write_video(tmp_path / "control.mp4", frames, 8)
    return tmp_path / "control.mp4"


@pytest.mark.parametrize("given", ["none", "both"])
@pytest.mark.parametrize("variant", ["fun-inp-a14b", "fun-control-a14b"])
def test_a_sample_of_fun_has_the_inputs_of_training(
    model, picture, last_picture, control, variant, given
):
    images = {} if given == "none" else {"image": picture, "last_image": last_picture}
    if variant == "fun-control-a14b":
        images |= {"control": control, "reference": picture}
    sample_request = request(variant, frames=9, **images)
    ours = WanModelSampler(model(variant)).sample(sample_request)
    assert_same_video(ours, by_definition(model(variant), sample_request))
    if variant == "fun-control-a14b":
        for name in ("control", "reference"):
            without = replace(sample_request, **{name: None})
            other = WanModelSampler(model(variant)).sample(without)
            assert (ours != other).mean() > 0.1, name  # where the same video differs in 1e-3
        assert model(variant).transformer.reference is None


def test_a_control_video_that_does_not_fit_is_refused(model, control, picture):
    sampler = WanModelSampler(model("fun-control-a14b"))
    with pytest.raises(DataError, match=r"control\.mp4: is too short as a control video .* 13"):
        sampler.sample(request("fun-control-a14b", control=control, frames=13))
    with pytest.raises(DataError, match=r"first\.png: is an image, and the sample has 5 frames"):
        sampler.sample(request("fun-control-a14b", control=picture))
    with pytest.raises(ConfigError, match=r"control: i2v-a14b takes no control video"):
        WanModelSampler(model("i2v-a14b")).sample(
            request("i2v-a14b", image=picture, control=control)
        )
    with pytest.raises(ConfigError, match=r"reference: fun-inp-a14b takes no reference image"):
        WanModelSampler(model("fun-inp-a14b")).sample(request("fun-inp-a14b", reference=picture))
