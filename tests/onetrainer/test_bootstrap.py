"""The patches of a running OneTrainer, on modules with its names and no code."""

from __future__ import annotations

import importlib
import pickle
import subprocess
import sys
from enum import Enum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from support.onetrainer_stub import write_checkout

from onewan.onetrainer.install import install
from onewan.onetrainer.patches import PATCHES, UnsupportedError, extended
from onewan.onetrainer.patches.configs import added_fields
from onewan.onetrainer.patches.views import SampleFrame

_ENUM = """
from enum import Enum
class ModelType(Enum):
    HUNYUAN_VIDEO = "HUNYUAN_VIDEO"
    def is_flow_matching(self): return False
    def is_video_model(self): return False
    def supported_training_methods(self): return ()
    def supported_lora_formats(self): return []
    def supported_full_model_formats(self): return []
_MODEL_PARTS = {ModelType.HUNYUAN_VIDEO: ("transformer", "vae")}
"""

_TOP_BAR = """
class TopBarController:
    def get_model_types(self): return [('Other', 1)]
    def load_preset_tree(self, dir="training_presets"): return [("#" + dir, dir), ("Z", [])]
"""


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The modules of a stand-in for OneTrainer, importable; forgotten afterwards."""
    write_checkout(tmp_path)
    (tmp_path / "modules/util/enum/ModelType.py").write_text(_ENUM, "utf-8")
    top_bar = tmp_path / "modules/ui/TopBarController.py"
    top_bar.write_text(_TOP_BAR, "utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if name.partition(".")[0] == "modules":
            del sys.modules[name]


def contents(load: Any) -> dict[str, Any]:
    """Everything that the patches may change, by name."""
    found: dict[str, Any] = {}
    for patch in PATCHES:
        for name in patch.names():
            module: ModuleType = load(name)
            for key, value in vars(module).items():
                found[f"{name}:{key}"] = dict(value) if isinstance(value, dict) else value
                if isinstance(value, type) and not key.startswith("__"):
                    for member, inner in vars(value).items():
                        copy = list(inner) if isinstance(inner, list) else inner
                        copy = dict(inner) if isinstance(inner, dict) else copy
                        found[f"{name}:{key}.{member}"] = copy
    return found


def applied(load: Any) -> Any:
    """The member of `ModelType` that the patches add."""
    with extended():
        return load("modules.util.enum.ModelType").ModelType["WAN_2_2"]


def test_the_member_behaves_like_one_of_the_enum(modules):
    wan = applied(modules)
    model_type = modules("modules.util.enum.ModelType").ModelType
    assert isinstance(wan, Enum) and wan is model_type["WAN_2_2"] is model_type("WAN_2_2")
    assert list(model_type)[-1] is wan and pickle.loads(pickle.dumps(wan)) is wan
    assert wan.is_wan() and wan.is_video_model() and wan.is_flow_matching()
    other = model_type["HUNYUAN_VIDEO"]
    assert not (other.is_wan() or other.is_video_model() or other.supported_training_methods())
    assert modules("modules.util.enum.ModelType")._MODEL_PARTS[wan][:2] == (
        "transformer",
        "transformer_2",
    )


def test_after_an_exception_in_the_block_everything_is_as_before(modules):
    """The block registers the classes of Wan, which needs more of OneTrainer and its packages."""
    before = contents(modules)
    with pytest.raises(ImportError, match="no name"), extended():
        assert contents(modules) != before
        raise ImportError("no name")
    assert contents(modules) == before


@pytest.mark.parametrize("name", ["WAN_2_2", "WAN22_T2V"])
def test_a_onetrainer_that_has_wan_itself_is_left_alone(modules, name, tmp_path):
    file = tmp_path / "modules/util/enum/ModelType.py"
    file.write_text(_ENUM.replace("    def", f"    {name} = 'its own'\n    def", 1), "utf-8")
    before = contents(modules)
    with (
        pytest.raises(UnsupportedError, match=f"has Wan 2.2 itself .ModelType.{name}.*uninstall"),
        extended(),
    ):
        pass
    assert contents(modules) == before


def test_a_failure_of_any_part_leaves_no_part_and_says_why_in_one_line(tmp_path):
    """In a process of its own, as OneTrainer starts; the last of the add-on's modules fails, as it
    does where a package has lost a name."""
    write_checkout(tmp_path)
    install(tmp_path)
    (tmp_path / "modules/util/enum/ModelType.py").write_text(_ENUM, "utf-8")
    for path in tmp_path.glob("modules/*/wan/*.py"):
        path.write_text("", "utf-8")
    failing = tmp_path / "modules/dataLoader/wan/WanBaseDataLoader.py"
    failing.write_text("raise ImportError('cannot import name X\\n from y')", "utf-8")
    code = """
from modules.util.enum.ModelType import ModelType
from modules.util.config.TrainConfig import TrainConfig
before = dict(vars(TrainConfig))
import modules.modelSampler.WanSampler, modules.modelLoader.WanModelLoader
import modules.dataLoader.WanBaseDataLoader
assert dict(vars(TrainConfig)) == before
print([member.name for member in ModelType])
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout == "['HUNYUAN_VIDEO']\n", done.stderr
    said = "Wan 2.2 is not available: ImportError: cannot import name X from y\n"
    assert done.stderr == said
    # A method that OneTrainer's base class has got since is found before a model is chosen.
    text = (
        "import abc\nclass WanLoader(abc.ABC):\n    @abc.abstractmethod\n    def new(self): pass\n"
    )
    failing.write_text(text, "utf-8")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout == "['HUNYUAN_VIDEO']\n", done.stderr
    assert "TypeError: WanLoader has no new, which this OneTrainer needs" in done.stderr
    failing.write_text("", "utf-8")
    done = subprocess.run(
        [*command[:2], code.replace("assert ", "")], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout == "['HUNYUAN_VIDEO', 'WAN_2_2']\n" and not done.stderr


def test_configs_get_the_added_fields_with_their_types(modules):
    config_module = modules("modules.util.config.TrainConfig")

    class Config:
        def __init__(self) -> None:
            self.types: dict[str, Any] = {}
            self.nullables: dict[str, Any] = {}
            self.default_values: dict[str, Any] = {}

    config_module.TrainConfig.default_values = staticmethod(Config)
    config_module.TrainModelPartConfig.default_values = staticmethod(SimpleNamespace)
    applied(modules)
    config = config_module.TrainConfig.default_values()
    names = [field["name"] for field in added_fields()["train"]]
    assert set(config.types) == {"transformer_2", *names}
    assert config.wan_expert_block == 10 and config.types["wan_expert_block"] is int
    assert config.wan_boundary is None and config.nullables["wan_boundary"]
    assert not config.nullables["wan_layers"]
    assert config.transformer_2.stop_training_after == 0


def test_a_config_of_wan_without_a_version_is_not_migrated(modules):
    """Presets have none, and OneTrainer takes a config without one for the oldest."""
    base, seen = modules("modules.util.config.BaseConfig").BaseConfig, []
    base.from_dict = lambda self, data, migrate=True: seen.append((self, data, migrate))
    applied(modules)
    config = modules("modules.util.config.TrainConfig").TrainConfig()
    config.from_dict({"model_type": "WAN_2_2"}, migrate=False)
    config.from_dict({"model_type": "WAN_2_2", "__version": 12})
    config.from_dict({"model_type": "FLUX_DEV_1"})
    assert seen == [
        (config, {"model_type": "WAN_2_2", "__version": 11}, False),
        (config, {"model_type": "WAN_2_2", "__version": 12}, True),
        (config, {"model_type": "FLUX_DEV_1"}, True),
    ]


def test_the_list_of_model_types_ends_with_wan(modules):
    wan = applied(modules)
    controller = modules("modules.ui.TopBarController").TopBarController()
    assert controller.get_model_types() == [("Other", 1), ("Wan 2.2", wan)]


def test_presets_of_wan_are_offered_only_where_it_is_available(modules):
    controller = modules("modules.ui.TopBarController").TopBarController()
    without = [("#training_presets", "training_presets"), ("Z", [])]
    assert controller.load_preset_tree() == without
    applied(modules)
    group = "Wan 2.2", [("#resources/wan_presets", "resources/wan_presets"), ("Z", [])]
    assert controller.load_preset_tree() == [without[0], group, without[1]]
    assert controller.load_preset_tree("training_presets/Z") == [
        ("#training_presets/Z", "training_presets/Z"),
        ("Z", []),
    ]


def test_a_missing_name_is_reported_before_anything_is_changed(modules):
    del modules("modules.ui.BaseTrainingTabView").BaseTrainingTabView.build
    before = contents(modules)
    with (
        pytest.raises(UnsupportedError, match=r"has no BaseTrainingTabView\.build\. .*23df3832"),
        extended(),
    ):
        pass
    assert contents(modules) == before


def test_a_patch_that_fails_leaves_onetrainer_unpatched(modules, monkeypatch):
    before = contents(modules)

    # The last patch fails, after all others have been applied.
    monkeypatch.setattr(SampleFrame, "target", "BaseSampleFrameView.renamed")
    monkeypatch.setattr(SampleFrame, "missing", lambda _: [])
    with pytest.raises(AttributeError, match="renamed"), extended():
        pass
    assert contents(modules) == before
    assert "WAN_2_2" not in modules("modules.util.enum.ModelType").ModelType.__members__
