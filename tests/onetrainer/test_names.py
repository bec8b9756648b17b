"""The names in docs/onetrainer.md, each imported first in an interpreter of its own."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
from support.onetrainer_configs import DEFAULTS
from support.onetrainer_runs import QUIET, Lab
from support.onetrainer_stub import write_checkout

from onewan.config.clips import WanTrainConfig
from onewan.data.decode import VideoSample
from onewan.onetrainer.install import overlay
from onewan.onetrainer.patches.configs import added_fields

DOCS = (Path(__file__).parents[2] / "docs" / "onetrainer.md").read_text(encoding="utf-8")

FIELDS = (
    *("tokenizer", "text_encoder", "vae", "transformer", "noise_scheduler"),
    *("embedding", "additional_embeddings", "text_encoder_lora", "transformer_lora"),
    *("frame_count", "temporal_compression", "spatial_compression"),
)
"""What a `WanModel` has before anything is loaded."""

FACTORY = """
def register(*keys): return lambda found: found
"""
MODEL_TYPE = """
from enum import Enum
class ModelType(Enum):
    HUNYUAN_VIDEO = "HUNYUAN_VIDEO"
    def is_flow_matching(self): return False
    def is_video_model(self): return False
    def supported_training_methods(self): return ()
    def supported_lora_formats(self): return []
    def supported_full_model_formats(self): return []
_MODEL_PARTS = {}
"""
BASE_MODEL = """
class BaseModel:
    def __init__(self, model_type): self.model_type = model_type
class BaseModelEmbedding:
    def __init__(self, **given): vars(self).update(given)
"""


def rows(heading: str) -> Iterator[list[str]]:
    """The rows of the table that begins with the column `heading`."""
    _, _, table = DOCS.partition(f"| {heading} |")
    for line in table.partition("\n\n")[0].splitlines()[2:]:
        yield [cell.strip() for cell in line.strip("|").split("|")]


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


NAMES = {
    module: [
        name for cell, where, _ in rows("name") if names(where) == [module] for name in names(cell)
    ]
    for _, where, _ in rows("name")
    for module in names(where)
}
IN_CHECKOUT = {m: found for m, found in NAMES.items() if m.startswith("modules.")}

EACH_FIRST = """
import importlib, json, os, sys, traceback
given, fields, preload = map(json.loads, sys.argv[1:4])
for module in preload:  # what takes seconds; nothing of OneTrainer or of the add-on in it
    importlib.import_module(module)
sys.path.insert(0, os.getcwd())
def check(module, names):
    found = importlib.import_module(module)
    for name in names:
        owner = found
        for part in name.split("."):
            owner = getattr(owner, part)
    if module.endswith(".WanModel"):
        from modules.util.enum.ModelType import ModelType
        model = found.WanModel(model_type=ModelType.WAN_2_2)
        for name in fields:
            assert getattr(model, name) in (None, 0, []), name
        embedding = found.WanModelEmbedding("u", None, "<fox>", is_output_embedding=True)
        assert vars(embedding.text_encoder_embedding)["placeholder"] == "<fox>"
for module, names in given.items():
    if os.fork() == 0:
        try:
            check(module, names)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        os._exit(0)
    if os.wait()[1]:
        sys.exit(f"{module} failed")
"""
PRELOAD = ("torch", "diffusers.models", "onewan.train.objective", "onewan.sample.generate")
PRELOAD += ("transformers.models.umt5.modeling_umt5", "onewan.onetrainer.clip_adapter")


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stand-in for a checkout, and for what of mgds is used, with the add-on in it."""
    root = tmp_path_factory.mktemp("stub")
    write_checkout(root)
    for name, source in {
        "modules/util/factory.py": FACTORY,
        "modules/util/enum/ModelType.py": MODEL_TYPE,
        "modules/model/BaseModel.py": BASE_MODEL,
        **{
            f"mgds/{path}.py": f"class {path.rpartition('/')[2]}: pass\n"
            for path in (
                "PipelineModule",
                "pipelineModules/MapData",
                "pipelineModuleTypes/RandomAccessPipelineModule",
            )
        },
    }.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
    for name, content in overlay().items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def import_each_first(python: str, root: Path) -> None:
    """Each module in a process of its own, in which no other of OneTrainer was imported."""
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    arguments = [json.dumps(argument) for argument in (IN_CHECKOUT, FIELDS, PRELOAD)]
    done = subprocess.run(
        [python, "-c", EACH_FIRST, *arguments],
        cwd=root,
        env={**os.environ, **QUIET},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Wan 2.2 is not available" not in done.stderr


def test_the_table_names_modules_of_the_overlay():
    own = {path.removesuffix(".py").replace("/", ".") for path in overlay()}
    assert len(NAMES) == 11
    assert {m for m in IN_CHECKOUT if m != "modules.util.enum.ModelType"} <= own


# On a stand-in, since a real checkout needs an environment of its own.
def test_each_name_can_be_imported_first(stub: Path):
    import_each_first(sys.executable, stub)


def test_each_name_can_be_imported_first_in_a_real_checkout(lab: Lab):
    import_each_first(lab.python, lab.checkout)


OF_DESIGN = {
    *("max_frames", "frame_sample_strategy", "temporal_consistency_weight"),
    *("transformer_layers_to_train", "use_temporal_attention"),
    *("spatial_compression_ratio", "temporal_compression_ratio"),
}
"""Fields of `wan_config` that the first design names. In OneTrainer a file is one clip, so the
fields for several clips of a file have no setting there."""


def test_names_outside_a_checkout_have_the_fields_of_the_design():
    for module, found in NAMES.items():
        if module not in IN_CHECKOUT:
            assert all(hasattr(import_module(module), name) for name in found)
    assert list(inspect.signature(VideoSample).parameters) == [
        *("frames", "prompt", "frame_count", "fps", "resolution", "duration")
    ]
    assert WanTrainConfig.model_fields.keys() >= OF_DESIGN


def test_every_field_has_its_setting():
    added = {field["name"] for field in added_fields()["train"]} | {"frames"}
    of_design = {f"wan_config.{name}" for name in OF_DESIGN}
    of_design |= {
        f"video_data.{name}"
        for name in (
            *("supported_formats", "target_fps", "max_duration"),
            *("min_resolution", "max_resolution"),
        )
    }
    told = {field: names(cell) for fields, cell in rows("run file") for field in names(fields)}
    assert told.keys() == of_design
    for setting in [name for found in told.values() for name in found if "." not in name]:
        assert setting in added and setting in DEFAULTS["train"]


def test_the_spec_files_are_those_of_the_design():
    for name, (architecture, title) in {
        "wan_2_2": ("WAN-2.2", "WAN 2.2"),
        "wan_2_2-lora": ("WAN-2.2/lora", "WAN 2.2 LoRA"),
    }.items():
        content = json.loads(overlay()[f"resources/sd_model_spec/{name}.json"])
        assert content == {
            "modelspec.sai_model_spec": "1.0.0",
            "modelspec.architecture": architecture,
            "modelspec.implementation": "https://github.com/huggingface/diffusers",
            "modelspec.title": title,
        }
