"""`WanModelSampler`: generates videos with a model, through diffusers' Wan pipelines.

The pipelines get the model's own objects, so a video shows the adapters in their present state.
This module adds what a training run needs: modules that do not fit on the device together
(`onewan.memory.residency`), bfloat16 in the transformers and float32 everywhere else, and a
guidance scale for each expert. Afterwards every module is on the device and in the mode (training
or evaluation) where it was before, also when the user interrupts. Nothing is drawn from the global
random generators.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from PIL import Image
from torch import Tensor, nn

from onewan.adapters.overlay import Overlay
from onewan.arithmetic.condition_shares import Given, given_by
from onewan.arithmetic.sample_request import file_errors, given_files, request_errors
from onewan.errors import CheckpointError, ConfigError
from onewan.media import write_video
from onewan.memory.residency import DeviceResidency, Residency, device_in_use
from onewan.model.conditioning import FunControlPipeline, GivenFramesPipeline
from onewan.model.inputs import to_device
from onewan.model.load import official_scheduler
from onewan.model.precision import compute_context
from onewan.model.text import pad_text
from onewan.model.transformer import WanTransformer
from onewan.model.wan import WanModel
from onewan.sample.distilled import distilled_scheduler
from onewan.sample.given_files import read_given_files
from onewan.variants import NUM_TRAIN_TIMESTEPS, ExpertName, Variant


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRequest:
    """One video to generate, with a value for every setting."""

    prompt: str
    negative_prompt: str
    image: Path | None
    """The first frame, needed by I2V-A14B, not possible with T2V-A14B."""
    width: int
    height: int
    frames: int
    """4n+1."""
    steps: int
    """Denoising steps."""
    guidance: tuple[float, ...]
    """Guidance scale of each expert, the high-noise one first; 1 means no guidance, which halves
    the cost."""
    shift: float
    """Shift of the noise schedule."""
    seed: int
    """Seed of the noise, which is drawn on the CPU and so the same on every device."""
    fps: float
    """Frame rate of the written file."""
    last_image: Path | None = None
    """The last frame, for the variants that take an image; I2V-A14B needs one of the two."""
    control: Path | None = None
    """The control video, for Fun-Control; without one, it is given zeros."""
    reference: Path | None = None
    """The reference image, for Fun-Control; without one, it is given zeros."""
    distilled: bool = False
    """Whether the sampler's distilled LoRAs are used, with their solver; steps, guidance and shift
    are then those that they were distilled for."""

    @property
    def given(self) -> Given:
        """Which frames of the video are given."""
        return given_by(first=self.image is not None, last=self.last_image is not None)

    def in_few_steps(self, steps: int, guidance: float, shift: float) -> SampleRequest:
        """The same video with distilled LoRAs."""
        scales = (guidance,) * len(self.guidance)
        return replace(self, steps=steps, guidance=scales, shift=shift, distilled=True)


@dataclass(frozen=True, slots=True)
class WanModelSampler:
    """Generates videos with `model`."""

    model: WanModel
    device: torch.device | str | None = None
    """Where the model runs; None: on the accelerator that already holds some of its weights."""
    residency: Residency | None = None
    """Owner of the device that moves the model's modules there, if it is a training run or another
    program; `device` is then not used."""
    distilled: Mapping[ExpertName, Overlay] = field(default_factory=dict[ExpertName, Overlay])
    """The distilled LoRA of each expert, for requests that ask for them."""

    def sample(
        self,
        request: SampleRequest,
        *,
        text: Callable[[str], Tensor] | None = None,
        on_step: Callable[[int, int], None] | None = None,
    ) -> np.ndarray:
        """The video as uint8 RGB [F, H, W, 3].

        `text` returns a prompt's embedding, [length, dim] without padding, for models without a
        text encoder; if it is None the model encodes the prompts, with its placeholders. `on_step`
        is called after each denoising step with the number of steps done and in total; an exception
        from it ends sampling. In any case every module is afterwards on the device and in the
        mode where it was before.
        ConfigError for a request that the variant can't fulfill, CheckpointError if a component of
        the model was not loaded, DataError for an image or a video that can't be read.
        """
        model = self.model
        check_request(request, model.variant)
        experts = [model.expert(expert) for expert in model.variant.experts]
        if model.vae is None:
            raise CheckpointError(f"{model.source}: the VAE was not loaded")
        given = read_given_files(
            given_files(request), request.frames, request.fps, (request.width, request.height)
        )
        modules = [m for m in (model.text_encoder, *experts, model.vae) if m is not None]
        residency = self.residency or DeviceResidency(self.device or device_in_use(modules))
        with _evaluation_mode(modules), residency.taking_turns(modules) as bring:
            if text is None and model.text_encoder is not None:
                bring(model.text_encoder)
            embed = model.encode_prompt if text is None else text
            guided = max(request.guidance) > 1
            prompts = [request.prompt, *([request.negative_prompt] if guided else [])]
            with torch.no_grad():  # the vectors of placeholders may require gradients
                text_1LD = [
                    to_device(pad_text([embed(prompt)]), residency.device) for prompt in prompts
                ]
            if given.any:
                bring(model.vae)
            reference_1CFhw = _encoded(model, given.reference)
            reference = None if reference_1CFhw is None else reference_1CFhw[:, :, 0]
            control = _encoded(model, given.control)
            overlays = self._overlays() if request.distilled else {}
            with _laid_over(overlays, bring, residency.device) as bring_expert:
                transformers = [
                    _Float32Transformer(
                        expert, bring_expert, residency.device, model.dtype, reference
                    )
                    for expert in experts
                ]
                latents = self._denoise(
                    request, transformers, text_1LD, given.images, control, on_step
                )
            # Decoded here and not by the pipeline, so that the transformers can leave the device.
            bring(model.vae)
            pixels_BCFHW = model.decode_video(latents)
        # In place: a second copy of a long video in float32 may be too much.
        pixels_CFHW = pixels_BCFHW[0].div_(2).add_(0.5).clamp_(0, 1).mul_(255).round_()
        return pixels_CFHW.to(torch.uint8).permute(1, 2, 3, 0).cpu().numpy()

    def sample_to(
        self,
        path: Path,
        request: SampleRequest,
        *,
        text: Callable[[str], Tensor] | None = None,
        on_step: Callable[[int, int], None] | None = None,
    ) -> Path:
        """Write `sample`'s video atomically to `path`, .mp4 or .webm. Returns `path`."""
        write_video(path, self.sample(request, text=text, on_step=on_step), request.fps)
        return path

    def _overlays(self) -> dict[nn.Module, Overlay]:
        """The distilled LoRAs by transformer."""
        variant = self.model.variant
        if missing := [e.name for e in variant.experts if e.name not in self.distilled]:
            raise CheckpointError(
                f"{self.model.source}: no distilled LoRA was loaded for {', '.join(missing)}"
            )
        return {self.model.expert(e): self.distilled[e.name] for e in variant.experts}

    def _denoise(
        self,
        request: SampleRequest,
        transformers: list[_Float32Transformer],
        text_1LD: list[Tensor],
        images: Mapping[str, Image.Image],
        control: Tensor | None,
        on_step: Callable[[int, int], None] | None,
    ) -> Tensor:
        """The denoised, normalized latents [1, C, F', h, w], by the pipeline for the request.

        `text_1LD`: the embedding of the prompt and, with guidance, of the negative prompt.
        `images`: those that are given, by the pipeline's names of them. `control`: the latents of
        the control video.
        """
        variant = self.model.variant
        pipeline = self._pipeline(request, transformers, control)
        inputs: dict[str, Any] = {**images}
        if isinstance(pipeline, GivenFramesPipeline):
            # The pipeline can't do without a first image; a gray one is like a frame that is not
            # given.
            inputs.setdefault("image", torch.full((1, 3, request.height, request.width), 0.5))

        def after_step(pipeline: Any, step: int, _timestep: Tensor, _tensors: object) -> dict:
            if on_step is not None:
                on_step(step + 1, request.steps)
            if step + 1 < request.steps:
                # The pipelines decide by the high-noise expert's scale alone whether to use
                # guidance. Setting it between steps is diffusers' documented way to change it.
                t = float(pipeline.scheduler.timesteps[step + 1]) / NUM_TRAIN_TIMESTEPS
                low = variant.boundary is not None and t < variant.boundary
                pipeline._guidance_scale = request.guidance[1 if low else 0]
            return {}

        (latents,) = pipeline(
            **inputs,
            prompt_embeds=text_1LD[0],
            negative_prompt_embeds=text_1LD[1] if len(text_1LD) > 1 else None,
            width=request.width,
            height=request.height,
            num_frames=request.frames,
            num_inference_steps=request.steps,
            guidance_scale=request.guidance[0],
            guidance_scale_2=request.guidance[1] if len(transformers) > 1 else None,
            generator=torch.Generator("cpu").manual_seed(request.seed),
            output_type="latent",
            return_dict=False,
            callback_on_step_end=after_step,  # pyright: ignore[reportArgumentType]  (their hint is wrong)
            callback_on_step_end_tensor_inputs=[],
        )
        return latents

    def _pipeline(
        self,
        request: SampleRequest,
        transformers: list[_Float32Transformer],
        control: Tensor | None,
    ) -> WanPipeline | GivenFramesPipeline:
        variant = self.model.variant
        components: dict[str, Any] = {
            # The prompts are encoded before, so that the text encoder can leave the device.
            "tokenizer": None,
            "text_encoder": None,
            "vae": self.model.vae,
            "scheduler": distilled_scheduler(request.shift)
            if request.distilled
            else official_scheduler(variant, request.shift),
            "transformer": transformers[0],
            "transformer_2": transformers[1] if len(transformers) > 1 else None,
            "boundary_ratio": variant.boundary,
            **self.model.conditioning.pipeline_options(),
        }
        pipeline = self.model.conditioning.sampling_pipeline(request.given)(**components)
        if isinstance(pipeline, GivenFramesPipeline):
            pipeline.given = request.given
        if isinstance(pipeline, FunControlPipeline):
            pipeline.control = control
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


def _encoded(model: WanModel, frames_FHWC: np.ndarray | None) -> Tensor | None:
    """Normalized latents [1, C, F', h, w] of uint8 frames; None of none."""
    if frames_FHWC is None:
        return None
    frames = torch.from_numpy(frames_FHWC)
    return model.encode_video(frames.permute(3, 0, 1, 2)[None].float() / 127.5 - 1)


@contextmanager
def _laid_over(
    overlays: Mapping[nn.Module, Overlay], bring: Callable[[nn.Module], None], device: torch.device
) -> Iterator[Callable[[nn.Module], None]]:
    """A context that yields a function which brings a transformer, with its overlay on `device`
    while it is the latest one."""
    if not overlays:
        yield bring
        return
    latest: nn.Module | None = None

    def bring_expert(transformer: nn.Module) -> None:
        nonlocal latest
        if transformer is latest:
            return
        # First, so that it neither takes part in the transformer's move nor in its memory.
        if latest is not None:
            overlays[latest].detach()
        bring(transformer)
        overlays[transformer].attach(device)
        latest = transformer

    try:
        # Compiled code would not notice the overlays' hooks, or keep them.
        with torch.compiler.set_stance("force_eager"):
            yield bring_expert
    finally:
        for overlay in overlays.values():
            overlay.detach()


@contextmanager
def _evaluation_mode(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Put `modules` into evaluation mode, without dropout, and restore each submodule's mode.

    A frozen block may be in evaluation mode within a model in training mode, hence the mode of
    every submodule.
    """
    modes = {module: module.training for root in modules for module in root.modules()}
    try:
        for root in modules:
            root.eval()
        yield
    finally:
        for root in modules:
            root.train(modes[root])  # some classes do more in `train` than set the flag
        for module, training in modes.items():
            module.training = training


class _Float32Transformer(nn.Module):
    """A transformer with float32 inputs and outputs and `dtype` in its matrix products.

    Autocast covers the transformer only: around the whole pipeline it would apply to the VAE, which
    encodes the image there. And a pipeline whose transformer reports bfloat16 rounds the latents
    too, which adds a tenth to the error (0.00128 against 0.00118, ten steps of a tiny model).
    """

    dtype = torch.float32

    def __init__(
        self,
        transformer: WanTransformer3DModel,
        bring: Callable[[nn.Module], None],
        device: torch.device,
        dtype: torch.dtype,
        reference: Tensor | None,
    ) -> None:
        """`reference`: latents of the reference image, [1, C, h, w], for Fun-Control."""
        super().__init__()
        self.transformer = transformer
        self._reference = reference
        self.device = device
        self.config = transformer.config
        self._bring = bring
        self._compute_dtype = dtype

    def cache_context(self, *args: Any, **kwargs: Any) -> AbstractContextManager[None]:
        return self.transformer.cache_context(*args, **kwargs)

    def forward(self, **inputs: Any) -> tuple[Tensor]:
        self._bring(self.transformer)
        with self._given_reference(), compute_context(self._compute_dtype, self.device):
            (prediction,) = self.transformer(**inputs)
        return (prediction.float(),)

    @contextmanager
    def _given_reference(self) -> Iterator[None]:
        """The transformer has the reference image only while it is sampled."""
        if self._reference is None:
            yield
            return
        assert isinstance(self.transformer, WanTransformer)
        self.transformer.reference = to_device(self._reference, self.device)
        try:
            yield
        finally:
            self.transformer.reference = None


def check_request(request: SampleRequest, variant: Variant) -> None:
    """ConfigError with everything in `request` that `variant` can't do."""
    errors = dict(
        request_errors(
            variant,
            width=request.width,
            height=request.height,
            frames=request.frames,
            steps=request.steps,
            guidance=request.guidance,
        )
    )
    errors |= dict(file_errors(variant, given_files(request), request.frames))
    if errors:
        problems = [f"{field}: {error}" for field, error in errors.items()]
        raise ConfigError(f"sample {request.prompt!r}", problems)
