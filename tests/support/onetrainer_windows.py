"""Opens OneTrainer's window, chooses Wan 2.2, sets values in its widgets, and takes screenshots.

    python onetrainer_windows.py qt|tk OUT [again]

Works from the root of a checkout, by OneTrainer's own interpreter, without a display for Qt and
under Xvfb for Tk. OUT/facts.json lists the widgets found; with `again` nothing is set, and the
values that the last session left are reported. It serves the tests and the pictures of
docs/onetrainer.md.
"""

import json
import os
import subprocess
import sys
import time

os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")
sys.path[:0] = [os.getcwd()]

KIT, OUT = sys.argv[1], sys.argv[2]
AGAIN = "again" in sys.argv[3:]
os.makedirs(OUT, exist_ok=True)
TABS = ("model", "training", "sampling", "LoRA")

VALUES = {
    "model": {
        "Override Low-Noise Transformer": os.path.abspath(f"{OUT}/low.safetensors"),
        "Low-Noise Transformer Data Type": "float8 (W8)",
    },
    "training": {
        "High-Noise Share": "0.25",
        "Steps per Expert": "7",
        "Expert Boundary": "0.9",
        "Frames per Second": "12",
        "Frames from": "random",
        "Longest Clip (s)": "4.5",
        "Temporal Consistency": "1.5",
        "Transformer Blocks": "0-3, 5",
        "Temporal Attention": False,
        "Validation Levels": "3",
        "Low-Noise Transformer Learning Rate": "0.0002",
        "High-Noise Transformer Learning Rate": "0.0001",
        "Train High-Noise Transformer": True,
        "Train Low-Noise Transformer": False,
        "Frames": "49",
    },
    "LoRA": {"Low-Noise LoRA Rank": "8"},
}


class Qt:
    def __init__(self):
        from PySide6.QtWidgets import QApplication

        self.app = QApplication([])
        from modules.ui.PySide6TrainUIView import PySide6TrainView

        self.window = PySide6TrainView()
        self.window.resize(1500, 1000)
        self.window.show()
        self.update()

    def update(self):
        for _ in range(5):
            self.app.processEvents()
            time.sleep(0.02)

    @property
    def config(self):
        return self.window.controller.train_config

    def _lists(self, text, inside=None):
        from PySide6.QtWidgets import QComboBox

        found = (inside or self.window).findChildren(QComboBox)
        return [c for c in found if c.findText(text) >= 0 and (inside or c.isVisible())]

    def items(self, text):
        box = self._lists(text)[0]
        return [box.itemText(i) for i in range(box.count())]

    def choose(self, among, text):
        self._lists(among)[0].setCurrentText(text)
        self.update()

    def open(self, tab):
        self.page = self.window._tab_widgets[tab]
        self.window.tabview.setCurrentWidget(self.page)
        self.update()

    def labels(self):
        from PySide6.QtWidgets import QLabel

        return [w.text() for w in self.page.findChildren(QLabel) if w.text() and w.isVisible()]

    def _beside(self, label):
        from PySide6.QtWidgets import QLabel

        (found,) = [
            w for w in self.page.findChildren(QLabel) if w.text() == label and w.isVisible()
        ]
        layout = found.parentWidget().layout()
        row, column, _, _ = layout.getItemPosition(layout.indexOf(found))
        return layout.itemAtPosition(row, column + 1).widget()

    def set(self, label, value):
        from PySide6.QtWidgets import QCheckBox, QComboBox, QLineEdit

        widget = self._beside(label)
        inner = [widget, *widget.findChildren(QLineEdit)]
        match next(w for w in inner if isinstance(w, (QCheckBox, QComboBox, QLineEdit))):
            case QCheckBox() as box:
                box.setChecked(value)
            case QComboBox() as box:
                assert box.findText(value) >= 0, (label, value)
                box.setCurrentText(value)
            case QLineEdit() as line:
                line.setFocus()
                line.clear()
                line.insert(value)
                line.textEdited.emit(value)
                line.editingFinished.emit()
        self.update()

    def shot(self, name):
        self.update()
        self.window.grab().save(f"{OUT}/{KIT}_{name}.png")

    def sample_frame(self, model_type):
        from modules.ui.PySide6SampleFrameView import PySide6SampleFrameView
        from modules.ui.SampleFrameController import SampleFrameController
        from modules.util.config.SampleConfig import SampleConfig
        from modules.util.ui.PySide6UIState import PySide6UIState as State
        from PySide6.QtWidgets import QLabel

        sample = SampleConfig.default_values(model_type)
        controller = SampleFrameController(sample, model_type)
        view = PySide6SampleFrameView(None, controller, State(sample))
        view.resize(800, 500)
        view.show()
        self.update()
        view.grab().save(f"{OUT}/{KIT}_sample.png")
        return [w.text() for w in view.findChildren(QLabel)]

    def convert_types(self):
        from modules.ui.ConvertModelUIController import ConvertModelUIController
        from modules.ui.PySide6ConvertModelUIView import PySide6ConvertModelUIView

        controller = ConvertModelUIController(model_type=self.config.model_type)
        view = controller.create_window(self.window, PySide6ConvertModelUIView)
        self.update()
        box = self._lists("Hunyuan Video", view)[0]
        return [box.itemText(i) for i in range(box.count())], box.currentText()

    def save(self):
        self.window.top_bar_component.save_default()

    def close(self):
        self.window.close()
        self.update()


class Tk:
    def __init__(self):
        from modules.ui.CtkTrainUIView import CtkTrainUIView

        self.window = CtkTrainUIView()
        self.window.geometry("1500x1000+0+0")
        self.update()

    def update(self):
        for _ in range(4):
            self.window.update()
            time.sleep(0.05)

    @property
    def config(self):
        return self.window.controller.train_config

    def _all(self, widget):
        yield widget
        for child in widget.winfo_children():
            yield from self._all(child)

    def _menu(self, text, inside=None):
        import customtkinter as ctk

        found = self._all(inside or self.window)
        return next(
            w for w in found if isinstance(w, ctk.CTkOptionMenu) and text in w.cget("values")
        )

    def items(self, text):
        return self._menu(text).cget("values")

    def choose(self, among, text):
        self._menu(among)._dropdown_callback(text)
        self.update()

    def open(self, tab):
        self.window.tabview.set(tab)
        self.page = self.window.tabview.tab(tab)
        self.update()

    def labels(self):
        import customtkinter as ctk

        return [
            w.cget("text")
            for w in self._all(self.page)
            if isinstance(w, ctk.CTkLabel) and w.cget("text")
        ]

    def set(self, label, value):
        import customtkinter as ctk

        (found,) = [
            w
            for w in self._all(self.page)
            if isinstance(w, ctk.CTkLabel) and w.cget("text") == label
        ]
        cell = found.grid_info()
        beside = found.master.grid_slaves(row=cell["row"], column=int(cell["column"]) + 1)[0]
        kinds = (ctk.CTkSwitch, ctk.CTkOptionMenu, ctk.CTkEntry)
        widget = next(w for w in self._all(beside) if isinstance(w, kinds))
        if isinstance(widget, ctk.CTkSwitch):
            if bool(widget.get()) != value:
                widget.toggle()
        elif isinstance(widget, ctk.CTkOptionMenu):
            assert value in widget.cget("values"), (label, value)
            widget._dropdown_callback(value)
        else:
            widget.delete(0, "end")
            widget.insert(0, value)
            widget._entry.event_generate("<FocusOut>")
        self.update()

    def shot(self, name):
        self.update()
        subprocess.run(["import", "-window", "root", f"{OUT}/{KIT}_{name}.png"], check=True)

    def sample_frame(self, _model_type):
        return []

    def convert_types(self):
        from modules.ui.ConvertModelUIController import ConvertModelUIController
        from modules.ui.CtkConvertModelUIView import CtkConvertModelUIView

        controller = ConvertModelUIController(model_type=self.config.model_type)
        view = controller.create_window(self.window, CtkConvertModelUIView)
        self.update()
        menu = self._menu("Hunyuan Video", view)
        return menu.cget("values"), menu.get()

    def save(self):
        top = getattr(self.window, "top_bar_component", None) or self.window.top_bar
        top.save_default()

    def close(self):
        self.window.destroy()


def main():
    kit = {"qt": Qt, "tk": Tk}[KIT]()
    facts = {}
    if not AGAIN:
        facts["types"] = kit.items("Hunyuan Video")
        facts["presets"] = dict(kit.window.top_bar_component.preset_tree)["Wan 2.2"]
        kit.choose("Hunyuan Video", "Wan 2.2")
        facts["methods"] = kit.items("LoRA")
        kit.choose("LoRA", "LoRA")
        open(f"{OUT}/low.safetensors", "w").close()  # the window asks whether it is there
        for tab in TABS:
            kit.open(tab)
            facts[f"labels of {tab}"] = kit.labels()
            for label, value in VALUES.get(tab, {}).items():
                kit.set(label, value)
            kit.shot(tab)
        facts["labels of a sample"] = kit.sample_frame(kit.config.model_type)
        facts["convert"], facts["convert shows"] = kit.convert_types()
        kit.choose("LoRA", "Fine Tune")
        kit.open("training")
        facts["labels of fine-tuning"] = kit.labels()
        kit.choose("LoRA", "Embedding")
        facts["labels of an embedding"] = kit.labels()
        kit.choose("LoRA", "LoRA")
        kit.save()
    else:
        for tab in TABS:
            kit.open(tab)
            facts[f"labels of {tab}"] = kit.labels()
            kit.shot(tab)
        kit.sample_frame(kit.config.model_type)
    facts["config"] = kit.config.to_dict()
    with open(f"{OUT}/facts.json", "w") as file:
        json.dump(facts, file, indent=1, default=str)
    kit.close()


main()
