"""Changes of OneTrainer, mgds and diffusers that break the add-on are each reported by name.

Each is made in the source of a stand-in, and of the real checkout where one is given.
"""

from __future__ import annotations

import ast
import os
import shutil
from pathlib import Path

import pytest
from support.onetrainer_stub import write_checkout, write_packages

from onewan.onetrainer.contract import check

PACKAGES = "venv/lib/python3/site-packages"


@pytest.fixture(scope="module", params=["stand-in", "checkout"])
def root(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("OneTrainer")
    if request.param == "stand-in":
        write_checkout(root)
    else:
        named = os.environ.get("ONETRAINER")
        if not named:
            pytest.skip("needs a OneTrainer checkout: make test ONETRAINER=PATH")
        shutil.copytree(Path(named) / "modules", root / "modules")
    write_packages(root / PACKAGES)
    assert not check(root).problems and not check(root).unseen
    return root


def body_of(tree: ast.Module, name: str) -> list[ast.stmt]:
    """The statements among which `name` (``Class.method``) is defined."""
    owner, dot, _ = name.rpartition(".")
    if not dot:
        return tree.body
    return next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == owner).body


def defined(tree: ast.Module, name: str):
    plain = name.rpartition(".")[2]
    return next(
        node
        for node in body_of(tree, name)
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == plain
    )


def statements(source: str) -> list[ast.stmt]:
    return ast.parse(source).body


def drop_base(tree, name):
    defined(tree, name).bases.pop(0)


def add_abstract(tree, name):
    defined(tree, name).body += statements("@abstractmethod\ndef brand_new(self): pass")


def rename(tree, name):
    """The definition, or every assignment to the attribute."""
    plain = name.rpartition(".")[2]
    for node in ast.walk(tree):
        for field in ("name", "attr", "id"):
            if getattr(node, field, None) == plain and not isinstance(node, ast.alias):
                setattr(node, field, f"{plain}_renamed")


def add_required(tree, name):
    arguments = defined(tree, name).args
    arguments.args.insert(len(arguments.args) - len(arguments.defaults), ast.arg("brand_new"))


def add_required_keyword(tree, name):
    arguments = defined(tree, name).args
    arguments.kwonlyargs.append(ast.arg("brand_new"))
    arguments.kw_defaults.append(None)


def add_optional_first(tree, name):
    """Before the others, which all become optional, so that none is missing."""
    arguments = defined(tree, name).args
    arguments.args.insert(1, ast.arg("brand_new"))
    arguments.defaults = [ast.Constant(None)] * (len(arguments.args) - 1)


def drop_default(tree, name):
    defined(tree, name).args.defaults.pop(0)


def rename_argument(tree, name):
    defined(tree, name).args.args[1].arg += "_renamed"


def drop_argument(tree, name):
    arguments = defined(tree, name).args
    arguments.args.pop()
    arguments.defaults = arguments.defaults[: len(arguments.args)]


def swap_arguments(tree, name):
    arguments = defined(tree, name).args.args
    arguments[1], arguments[2] = arguments[2], arguments[1]


def by_name_only(tree, name):
    arguments = defined(tree, name).args
    arguments.kwonlyargs.append(arguments.args.pop())
    arguments.kw_defaults.append(arguments.defaults.pop() if arguments.defaults else None)


def by_position_only(tree, name):
    arguments = defined(tree, name).args
    arguments.posonlyargs, arguments.args = arguments.args[:2], arguments.args[2:]


def decorate(tree, name):
    defined(tree, name).decorator_list.append(ast.Name("property"))


def undecorate(tree, name):
    defined(tree, name).decorator_list.clear()


def make_async(tree, name):
    body, node = body_of(tree, name), defined(tree, name)
    fields = {field: getattr(node, field) for field in node._fields}
    body[body.index(node)] = ast.AsyncFunctionDef(**fields)


def make_value(tree, name):
    body, node = body_of(tree, name), defined(tree, name)
    body[body.index(node)] = statements(f"{node.name} = 3")[0]


def remove(tree, name):
    body_of(tree, name).remove(defined(tree, name))


def change_value(tree, name):
    for node in body_of(tree, name):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name.partition(".")[2]:
            node.value = ast.Constant("changed")


def unsave(tree, name):
    plain = name.partition(".")[2]
    for node in ast.walk(tree):
        if isinstance(node, ast.Tuple) and len(node.elts) == 4:
            first = node.elts[0]
            if isinstance(first, ast.Constant) and first.value == plain:
                first.value = f"{plain}_renamed"


def break_syntax(tree, _):
    tree.body[:] = [ast.Expr(ast.Name("class def"))]


MODULES = "modules."
SETUP, MODEL = "modules.modelSetup.BaseModelSetup", "modules.model.BaseModel"
CONFIG, CONCEPT = "modules.util.config.TrainConfig", "modules.util.config.ConceptConfig"
ITEMS = "mgds.pipelineModuleTypes.RandomAccessPipelineModule"
TRANSFORMER = "diffusers.models.transformers.transformer_wan"
TEXTS = "modules.dataLoader.mixin.DataLoaderText2ImageMixin"

# fmt: off
PLANTED = [
    (drop_base, SETUP, "BaseModelSetup", "no longer derived from TimedActionMixin"),
    (drop_base, "modules.modelSaver.mixin.LoRASaverMixin", "LoRASaverMixin", "no longer derived"),
    (add_abstract, SETUP, "BaseModelSetup", "abstract method brand_new"),
    (add_abstract, TEXTS, "DataLoaderText2ImageMixin", "abstract method brand_new"),
    (add_abstract, "mgds.PipelineModule", "PipelineModule", "abstract method brand_new"),
    (rename, SETUP, "BaseModelSetup._setup_model_part", "is not there"),
    (rename, "modules.util.optimizer_util", "init_model_parameters", "is not there"),
    (remove, MODEL, "BaseModel.materialize_only", "is not there"),
    (remove, "modules.util.ModelNames", "ModelNames.all_embedding", "is not there"),
    (add_required, SETUP, "BaseModelSetup.setup_train_device", "also requires brand_new"),
    (add_required_keyword, SETUP, "BaseModelSetup.predict", "also requires brand_new"),
    (add_required_keyword, "modules.util.checkpointing_util", "enable_checkpointing", "brand_new"),
    (add_optional_first, "modules.util.ui.pyside6_components", "label", "at other places"),
    (drop_default, "modules.util.ui.pyside6_components", "label", "which could be left out"),
    (rename_argument, SETUP, "BaseModelSetup.calculate_loss", "no longer takes model"),
    (drop_argument, "modules.util.factory", "import_dir", "no longer takes"),
    (swap_arguments, SETUP, "BaseModelSetup.setup_model", "in another order"),
    (by_name_only, "modules.util.factory", "import_dir", "by name only"),
    (by_position_only, SETUP, "BaseModelSetup.setup_model", "by position only"),
    (decorate, "modules.util.config.TrainConfig", "TrainConfig.model_names", "is a property"),
    (undecorate, CONFIG, "TrainConfig.default_values", "was a staticmethod"),
    (make_async, SETUP, "BaseModelSetup.setup_model", "is a async"),
    (make_value, "modules.util.torch_util", "state_dict_has_prefix", "is a value"),
    (rename, MODEL, "BaseModel.train_progress", "is not there"),
    (rename, "modules.util.TrainProgress", "TrainProgress.global_step", "is not there"),
    (rename, CONFIG, "TrainConfig.mse_strength", "is not there"),
    (unsave, CONFIG, "TrainConfig.mse_strength", "no longer a field"),
    (unsave, CONCEPT, "ConceptImageConfig.enable_crop_jitter", "no longer a field"),
    (change_value, "modules.util.enum.ModelFormat", "ModelFormat.COMFY_LORA", "was 'COMFY_LORA'"),
    (rename, "modules.util.enum.TimestepDistribution", "TimestepDistribution.BETA", "not there"),
    (rename, "mgds.PipelineModule", "PipelineModule._get_previous_item", "is not there"),
    (rename, "mgds.pipelineModules.DiskCache", "DiskCache.cache_dir", "is not there"),
    (swap_arguments, ITEMS, "RandomAccessPipelineModule.get_item", "in another order"),
    (rename_argument, TRANSFORMER, "WanTransformer3DModel.forward", "no longer takes"),
    (rename, TRANSFORMER, "WanTransformer3DModel._keep_in_fp32_modules", "is not there"),
    (break_syntax, "modules.util.path_util", "modules.util.path_util", "not valid Python"),
]
# fmt: on


@pytest.mark.parametrize(
    ("change", "module", "name", "said"),
    PLANTED,
    ids=[f"{change.__name__}-{name}" for change, _, name, _ in PLANTED],
)
def test_a_change_is_reported_by_name(root: Path, change, module: str, name: str, said: str):
    base = root if module.startswith(MODULES) else root / PACKAGES
    path = base / (module.replace(".", "/") + ".py")
    before = path.read_text("utf-8")
    tree = ast.parse(before)
    change(tree, name)
    path.write_text(ast.unparse(ast.fix_missing_locations(tree)), "utf-8")
    try:
        problems = [str(problem) for problem in check(root).problems]
    finally:
        path.write_text(before, "utf-8")
    assert any(f" {name}: " in problem and said in problem for problem in problems), problems
    # What a name is renamed from may be used by others of the file; else nothing more is said.
    assert len(problems) == 1 or change is rename, problems


def test_an_abstract_method_of_a_base_in_another_file_is_reported(root: Path):
    path = root / "modules/dataLoader/mixin/DataLoaderMgdsMixin.py"
    user = root / "modules/dataLoader/BaseDataLoader.py"
    before, used = path.read_text("utf-8") if path.exists() else None, user.read_text("utf-8")
    source = "class DataLoaderMgdsMixin:\n    @abc.abstractmethod\n    def brand_new(self): pass\n"
    path.write_text(source, "utf-8")
    line = "from modules.dataLoader.mixin.DataLoaderMgdsMixin import DataLoaderMgdsMixin\n"
    user.write_text(line + used.replace("class DataLoaderMgdsMixin: pass", ""), "utf-8")
    try:
        (problem,) = check(root).problems
    finally:
        user.write_text(used, "utf-8")
        if before is None:
            path.unlink()
        else:
            path.write_text(before, "utf-8")
    assert "BaseDataLoader: also has the abstract method brand_new" in str(problem)


def test_a_missing_file_is_reported_with_all_its_names(root: Path):
    path = root / "modules/util/multi_gpu_util.py"
    held = path.read_bytes()
    path.unlink()
    try:
        problems = check(root).problems
    finally:
        path.write_bytes(held)
    assert {p.name for p in problems} == {"rank", "world_size"}
    assert all("the file is not there" in str(p) for p in problems)


def test_harmless_changes_are_not_reported(root: Path):
    """A new optional argument at the end, a new method, a new base, a new field, an abstract method
    of a class that the add-on only calls."""
    changed = {
        "modules/modelSetup/BaseModelSetup.py": "BaseModelSetup",
        "modules/ui/BaseModelTabView.py": "BaseModelTabView",
    }
    held = {name: (root / name).read_text("utf-8") for name in changed}
    for name, owner in changed.items():
        tree = ast.parse(held[name])
        node = defined(tree, owner)
        node.bases.append(ast.Name("object"))
        node.body += statements("brand_new = 1\ndef brand_new_too(self): pass")
        if owner == "BaseModelTabView":
            add_abstract(tree, owner)
        else:
            arguments = defined(tree, f"{owner}.setup_model").args
            arguments.args.append(ast.arg("brand_new"))
            arguments.defaults.append(ast.Constant(1))
        (root / name).write_text(ast.unparse(ast.fix_missing_locations(tree)), "utf-8")
    try:
        assert check(root).problems == ()
    finally:
        for name, text in held.items():
            (root / name).write_text(text, "utf-8")
