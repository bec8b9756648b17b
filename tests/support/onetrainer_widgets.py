"""Lists the widgets that OneTrainer's views make for Wan, without a window or a toolkit.

    python onetrainer_widgets.py

Works from the root of a checkout. Prints, for each base model and training method, the labels and
fields of each tab with what an entry shows while it is empty.
"""

import json
import os
import sys

sys.path[:0] = [os.getcwd()]

from modules.ui.BaseLoraTabView import BaseLoraTabView
from modules.ui.BaseModelTabView import BaseModelTabView
from modules.ui.BaseSampleFrameView import BaseSampleFrameView
from modules.ui.BaseTrainingTabView import BaseTrainingTabView
from modules.ui.LoraTabController import LoraTabController
from modules.ui.ModelTabController import ModelTabController
from modules.ui.SampleFrameController import SampleFrameController
from modules.ui.TrainingTabController import TrainingTabController
from modules.util import create  # noqa: F401  (lets the add-on in)
from modules.util.config.SampleConfig import SampleConfig
from modules.util.config.TrainConfig import TrainConfig
from modules.util.enum.ModelType import ModelType, PeftType
from modules.util.enum.TrainingMethod import TrainingMethod


class Components:
    """A toolkit that records what is made: kind, label or field, and the text of an empty entry."""

    def __init__(self):
        self.made = []

    def __getattr__(self, name):
        def make(*args, **kwargs):
            texts = [value for value in args if isinstance(value, str)]
            shown = [*texts[:1], *map(str, args[3]), *texts[1:]] if name == "options" else texts
            self.made.append([name, *shown[:20], kwargs.get("placeholder") or ""])
            return None, {"component": None, "button_component": None}

        return make


class Variable:
    def get(self):
        return "CONSTANT"


class State:
    def __init__(self):
        self.traces = {}

    def get_var(self, _name):
        return Variable()

    def add_var_trace(self, name, command):
        self.traces.setdefault(name, []).append(command)


class TrainingTab(BaseTrainingTabView):
    builds = 0

    def restore_optimizer_config(self, variable): ...
    def open_optimizer_params(self): ...
    def restore_scheduler(self, variable): ...
    def open_scheduler_params(self): ...
    def open_timestep_distribution(self): ...
    def refresh_ui(self):
        self.builds += 1


class ModelTab(BaseModelTabView):
    def _make_svd_frames(self, parent, row):  # noqa: ARG002
        return None, None


def widgets(build):
    components = Components()
    build(components)
    return components.made


def main():
    found = {}
    config = TrainConfig.default_values()
    config.model_type = ModelType.WAN_2_2
    state, tab = State(), TrainingTab(Components())
    for base in ("org/unknown", "Wan2.2-T2V-A14B", "Wan2.2-I2V-A14B", "Wan2.2-TI2V-5B"):
        for method in ("LORA", "FINE_TUNE", "EMBEDDING"):
            config.base_model_name, config.training_method = base, TrainingMethod[method]
            tab.components = Components()
            tab.build(None, None, None, TrainingTabController(config), state)
            made = {"training": tab.components.made}
            made["model"] = widgets(
                lambda kit: ModelTab(kit).build_content(None, ModelTabController(config), State())
            )
            for kind in ("LORA", "LOKR", "OFT_2"):
                made[kind] = widgets(
                    lambda kit, kind=kind: BaseLoraTabView(kit).build_lora_options(
                        None, LoraTabController(config), State(), PeftType[kind]
                    )
                )
            sample = SampleConfig.default_values(ModelType.WAN_2_2)
            controller = SampleFrameController(sample, ModelType.WAN_2_2)
            made["sample"] = widgets(
                lambda kit, to=controller: BaseSampleFrameView(kit).build_content(
                    None, None, State(), to, True, True
                )
            )
            found[f"{base} {method}"] = made
    before = tab.builds
    for name in ("base_model_name", "training_method"):
        for command in state.traces[name]:
            command()
    unchanged = tab.builds - before
    config.base_model_name = "Wan2.2-T2V-A14B"
    for command in state.traces["base_model_name"]:
        command()
    found["refreshed"] = [unchanged, tab.builds - before]
    found["sample"] = SampleConfig.default_values(ModelType.WAN_2_2).to_dict()
    print("WIDGETS " + json.dumps(found))


main()
