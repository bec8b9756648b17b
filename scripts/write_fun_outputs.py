"""Writes ``tests/golden/fun_transformer.safetensors`` and ``fun_conditions.safetensors``: what
VideoX-Fun's transformer computes, and what its pipelines give it.

    python scripts/write_fun_outputs.py PATH_OF_VIDEOX_FUN

PATH_OF_VIDEOX_FUN is a checkout of github.com/aigc-apps/VideoX-Fun (the file was written with
804a425); its code is run, not copied. Weights follow from the names of the tensors
(`tests/support/named_weights.py`), so the files hold only outputs. `einops` must be
installed. Packages of VideoX-Fun that the transformer does not use are left out, since they need a
GPU's compiler.
"""

from __future__ import annotations

import importlib
import sys
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.configuration_utils import FrozenDict
from safetensors.torch import save_file

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.support.fun_inputs import CASES, FRAMES, SIZE, fun_pixels  # noqa: E402
from tests.support.named_weights import named_tensor, named_weights  # noqa: E402
from tests.support.stand_in_vae import StandInVae  # noqa: E402

FILE = ROOT / "tests" / "golden" / "fun_transformer.safetensors"
CONDITIONS = ROOT / "tests" / "golden" / "fun_conditions.safetensors"
SIZES = {"fun-inp-a14b": 36, "fun-control-a14b": 52}
LATENTS = (1, 16, 3, 4, 6)


def main(checkout: Path) -> None:
    classes = _transformer_module(checkout)
    tensors: dict[str, torch.Tensor] = {}
    for variant, channels in SIZES.items():
        has_reference = variant == "fun-control-a14b"
        transformer = classes.Wan2_2Transformer3DModel(
            model_type="i2v",
            in_dim=channels,
            dim=64,
            ffn_dim=128,
            freq_dim=256,
            text_dim=32,
            text_len=512,
            out_dim=16,
            num_heads=2,
            num_layers=2,
            add_ref_conv=has_reference,
        )
        shapes = {name: tuple(tensor.shape) for name, tensor in transformer.state_dict().items()}
        transformer.load_state_dict(named_weights(shapes))
        latents = named_tensor("latents", LATENTS)
        condition = named_tensor("condition", (1, channels - 16, *LATENTS[2:]))
        reference = named_tensor("reference", (1, 16, *LATENTS[3:]))
        text = named_tensor("text", (7, 32))
        cases = {"": None}
        if has_reference:
            cases = {".reference": reference, ".no_reference": torch.zeros_like(reference)}
        for name, image in cases.items():
            for t in (12.5, 950.0):
                with torch.no_grad():
                    output = transformer(
                        x=latents,
                        t=torch.tensor([t]),
                        context=[text],
                        seq_len=LATENTS[2] * LATENTS[3] * LATENTS[4] // 4,
                        y=condition,
                        full_ref=image,
                    )
                tensors[f"{variant}{name}.t{t:g}"] = output.float().contiguous()
    save_file(tensors, FILE)
    print(f"{FILE}: {', '.join(tensors)}")
    conditions = _conditions(checkout)
    save_file(conditions, CONDITIONS)
    print(f"{CONDITIONS}: {', '.join(conditions)}")


class _RecordedError(Exception):
    """Ends a pipeline at its first call of the transformer, whose inputs it has."""

    def __init__(self, inputs: dict[str, Any]) -> None:
        self.inputs = inputs


class _Recorder(torch.nn.Module):
    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, has_reference: bool = False) -> None:
        super().__init__()
        self.config = FrozenDict(patch_size=(1, 2, 2), add_ref_conv=has_reference)

    def forward(self, **inputs: Any) -> None:
        raise _RecordedError(inputs)


def _conditions(checkout: Path) -> dict[str, torch.Tensor]:
    """The inputs `y` and `full_ref` of each case."""
    torch.cuda.device = lambda **_: nullcontext()  # type: ignore[assignment,misc]
    torch.cuda.amp.autocast = lambda **_: nullcontext()  # type: ignore[assignment,misc]
    pipelines = {
        "fun-inp-a14b": _pipeline_module(checkout, "inpaint").Wan2_2FunInpaintPipeline,
        "fun-control-a14b": _pipeline_module(checkout, "control").Wan2_2FunControlPipeline,
    }
    found: dict[str, torch.Tensor] = {}
    for name, (variant, given, controlled, referenced) in CASES.items():
        recorder = _Recorder(variant == "fun-control-a14b")
        pipeline = pipelines[variant](
            tokenizer=None,
            text_encoder=_Recorder(),
            vae=StandInVae(),
            transformer=recorder,
            transformer_2=recorder,
            scheduler=FlowMatchEulerDiscreteScheduler(),
        )
        pixels = {key: (value + 1) / 2 for key, value in fun_pixels().items()}
        mask = torch.full((1, 1, FRAMES, *SIZE), 255.0)
        frames = {"first": [0], "last": [-1], "both": [0, -1], "none": []}[given]
        mask[:, :, frames] = 0
        further: dict[str, Any] = {}
        if controlled:
            further["control_video"] = pixels["control"]
        if referenced:
            further["ref_image"] = pixels["reference"]
        try:
            pipeline(
                prompt_embeds=torch.zeros(1, 7, 32),
                height=SIZE[0],
                width=SIZE[1],
                num_frames=FRAMES,
                video=pixels["clip"],
                mask_video=mask,
                guidance_scale=1.0,
                **further,
            )
        except _RecordedError as recorded:
            found[f"{name}.y"] = recorded.inputs["y"].contiguous()
            if recorder.config["add_ref_conv"]:
                found[f"{name}.full_ref"] = recorded.inputs["full_ref"].contiguous()
    return found


def _pipeline_module(checkout: Path, kind: str) -> Any:
    """A module of VideoX-Fun's pipelines, without the models that it only names in hints."""
    package: Any = ModuleType("videox_fun.pipeline")
    package.__path__ = [str(checkout / "videox_fun" / "pipeline")]
    models: Any = sys.modules["videox_fun.models"]
    for name in ("AutoencoderKLWan", "AutoTokenizer", "CLIPModel", "WanT5EncoderModel"):
        setattr(models, name, object)
    models.Wan2_2Transformer3DModel = object
    sys.modules[package.__name__] = package
    for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional"):
        sys.modules.setdefault(name, ModuleType(name))
    return importlib.import_module(f"videox_fun.pipeline.pipeline_wan2_2_fun_{kind}")


def _transformer_module(checkout: Path) -> Any:
    """VideoX-Fun's module of the transformer, without the imports of its packages."""
    package = checkout / "videox_fun"
    for name in ("", ".models", ".utils", ".dist"):
        module = ModuleType(f"videox_fun{name}")
        module.__path__ = [str(package / name.removeprefix("."))]
        sys.modules[module.__name__] = module
    several_devices: Any = sys.modules["videox_fun.dist"]
    for name in (
        "get_sequence_parallel_rank",
        "get_sequence_parallel_world_size",
        "get_sp_group",
        "usp_attn_forward",
        "xFuserLongContextAttention",
    ):
        setattr(several_devices, name, None)
    kernels: Any = ModuleType("videox_fun.models.attention_kernel")  # Triton's
    kernels._sparse_linear_attention = kernels.get_block_map = None
    sys.modules[kernels.__name__] = kernels
    utilities: Any = sys.modules["videox_fun.utils"]
    utilities.cfg_skip = importlib.import_module("videox_fun.utils.cfg_optimization").cfg_skip
    return importlib.import_module("videox_fun.models.wan_transformer3d")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
