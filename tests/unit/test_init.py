"""`onewan init`: the run files that it writes, and what it refuses."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import pytest
import recipe_table

from onewan.arithmetic.byte_sizes import parse_bytes
from onewan.cli import main
from onewan.cli.init import run_name
from onewan.config import json_schema, load_run
from onewan.config.method import LoraMethod
from onewan.config.optimizer import AdamWOptimizer
from onewan.config.schema import ResolvedRun, RunConfig, TrainSection
from onewan.demo.tiny_model import write_tiny_model
from onewan.formats.model_folder import ComponentName
from onewan.memory.plan import Bucket, find_machine, make_plan
from onewan.memory.plan.stored import assumed_model, read_stored_model, with_changes
from onewan.presets.recipes import PURPOSES, RECIPES, TRIGGER_WORD, PurposeName
from onewan.presets.starter import COMFYUI_FILES, METHODS, MethodKind, StarterRequest, starter
from onewan.variants import VARIANTS, VariantName

GB = 10**9


def loaded(folder: Path, text: str, *overrides: str) -> ResolvedRun:
    file = folder / "loaded.yaml"
    file.write_text(text, encoding="utf-8")
    return load_run(file, overrides)


def uncommented(text: str, *marks: str) -> str:
    """`text` with the lines that start with `marks` behind ``# `` made settings."""
    lines = text.splitlines()
    starts = tuple(f"# {mark}" for mark in marks)
    found = [
        line.replace("# ", "", 1) if line.lstrip().startswith(starts) else line for line in lines
    ]
    assert found != lines
    return "\n".join(found)


# ------------------------------------------------------------------------------------------ content


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_method_and_purpose_gives_a_run_file_that_loads(
    tmp_path: Path, variant: VariantName
) -> None:
    for method, purpose in itertools.product(METHODS, (None, *PURPOSES)):
        text = starter(StarterRequest(variant=variant, method=method, purpose=purpose))
        config = loaded(tmp_path, text)
        # Names of files are as long as they are.
        lines = [line for line in text.splitlines() if ".safetensors" not in line]
        assert max(map(len, lines)) <= 100
        assert config.model.variant == variant
        assert config.method.kind == method
        assert config.video_data.sources[0].path == tmp_path / "clips"


@pytest.mark.parametrize("variant", VARIANTS)
def test_without_a_purpose_the_values_are_the_official_ones(
    tmp_path: Path, variant: VariantName
) -> None:
    facts, text = VARIANTS[variant], starter(StarterRequest(variant=variant))
    config = loaded(tmp_path, text)
    assert text.startswith("# yaml-language-server: $schema=onewan.schema.json\n")
    assert config.model.path == facts.repository
    assert config.wan_config.max_frames == facts.frames
    assert f"multiples of {facts.size_multiple}" in text
    assert f"{facts.frames / facts.fps:.1f} s" in text
    assert ("experts:" in text) == (len(facts.experts) == 2)
    assert ("image:" in text) == facts.takes_image
    assert bool(config.sample.prompts) == (variant != "i2v-a14b")
    assert ("of a clip is its first frame" in text) == facts.needs_image


def test_defaults_that_are_written_are_those_of_the_run_file(tmp_path: Path) -> None:
    config = loaded(tmp_path, starter(StarterRequest(variant="t2v-a14b")))
    assert isinstance(config.method, LoraMethod)
    assert config.method.rank == LoraMethod().rank
    assert isinstance(config.optimizer, AdamWOptimizer)
    assert config.optimizer.lr == AdamWOptimizer().lr
    assert config.train.steps == TrainSection().steps
    assert config.output.dir == tmp_path / RunConfig.model_fields["output"].default.dir


@pytest.mark.parametrize("purpose", PURPOSES)
def test_a_purpose_sets_the_values_of_its_recipe(tmp_path: Path, purpose: PurposeName) -> None:
    recipe = RECIPES[purpose]
    text = starter(StarterRequest(variant="t2v-a14b", purpose=purpose))
    config = loaded(tmp_path, text)
    assert isinstance(config.method, LoraMethod)
    assert config.method.rank == recipe.rank
    assert config.train.steps == 2 * recipe.steps
    assert config.video_data.resolution == (recipe.side**2,)
    assert config.wan_config.max_frames == recipe.frames(16)
    assert config.per_expert.high.lr == (3e-5 if purpose == "photos" else None)
    assert config.per_expert.low.lr is None
    assert [prompt.prompt for prompt in config.sample.prompts] == [recipe.prompt]
    assert config.video_data.sources[0].trigger_word == TRIGGER_WORD
    assert TRIGGER_WORD in recipe.prompt and "trigger word" in recipe.captions
    single = loaded(tmp_path, starter(StarterRequest(variant="ti2v-5b", purpose=purpose)))
    assert single.train.steps == recipe.steps
    assert single.wan_config.max_frames == recipe.frames(24)


def test_frames_of_a_purpose_are_those_of_its_seconds() -> None:
    frames = {name: (r.frames(16), r.frames(24)) for name, r in RECIPES.items()}
    assert frames == {
        "character": (33, 49),
        "style": (33, 49),
        "motion": (81, 121),
        "photos": (1, 1),
    }


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("purpose", [None, *PURPOSES])
def test_a_sample_costs_at_most_about_as_much_as_fifty_steps(
    tmp_path: Path, variant: VariantName, purpose: PurposeName | None
) -> None:
    config = loaded(tmp_path, starter(StarterRequest(variant=variant, purpose=purpose)))
    (area,) = config.video_data.resolution
    assert isinstance(area, int)
    sample, frames = config.sample, config.wan_config.max_frames
    # By tokens: two passes of each denoising step, against four of a step with checkpointing.
    passes = 2 * sample.steps * (sample.frames // 4 + 1) * sample.width * sample.height
    assert passes <= 50 * 4 * (frames // 4 + 1) * area


def test_it_knows_every_method_of_the_run_file() -> None:
    schema = json_schema()["$defs"]
    kinds = {d["properties"]["kind"]["const"] for n, d in schema.items() if n.endswith("Method")}
    assert kinds == {*METHODS}


@pytest.mark.parametrize("method", METHODS)
def test_a_method_has_its_own_settings(tmp_path: Path, method: MethodKind) -> None:
    text = starter(StarterRequest(variant="t2v-a14b", method=method))
    config = loaded(tmp_path, text)
    assert ("rank:" in text) == (method in ("lora", "dora", "loha", "lokr"))
    assert bool(config.embeddings) == (method == "embedding")
    if method == "embedding":
        placeholder = config.embeddings[0].placeholder
        assert placeholder in config.sample.prompts[0].prompt
        assert placeholder == config.video_data.sources[0].trigger_word
        assert "trigger word" not in text
    if method == "fine_tune":
        assert config.model.experts == "low"
        assert config.train.max_grad_norm is None


@pytest.mark.parametrize("variant", ["i2v-a14b", "ti2v-5b"])
def test_the_commented_lines_about_images_are_valid(tmp_path: Path, variant: VariantName) -> None:
    (tmp_path / "first_frame.png").touch()
    text = starter(StarterRequest(variant=variant))
    marks = ("every:", "prompts:", "  - prompt:", "    image:", "image:", "resolution:")
    config = loaded(tmp_path, uncommented(text, *marks))
    assert config.sample.prompts[0].image == tmp_path / "first_frame.png"
    assert config.video_data.resolution == ("832x480",)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_commented_files_of_comfyui_replace_the_repository(
    tmp_path: Path, variant: VariantName
) -> None:
    text = starter(StarterRequest(variant=variant))
    names = tuple(COMFYUI_FILES[variant])
    without = text.replace(f"  path: {VARIANTS[variant].repository}\n", "")
    config = loaded(tmp_path, uncommented(without, *names))
    assert config.model.path is None
    assert set(config.model.sources()) == {*names}


# ----------------------------------------------------------------------------------------- the file


def test_it_writes_a_file_in_utf_8_with_the_same_line_ends_on_every_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init", "dög.yaml", "--purpose", "character"]) == 0
    content = (tmp_path / "dög.yaml").read_bytes()
    assert b"\r" not in content
    assert '  name: "dög"  #' in content.decode("utf-8")
    assert load_run(tmp_path / "dög.yaml").output.name == "dög"
    out = capsys.readouterr().out
    assert "dög.yaml: written\n" in out
    commands = [line.split("  ")[1] for line in out.splitlines() if line.startswith("  onewan")]
    assert commands == [f"onewan {word} dög.yaml" for word in ("plan", "cache", "train")]


@pytest.mark.parametrize("words", [[], ["-"]])
def test_without_a_file_it_prints_the_run_file_and_nothing_else(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["init", *words, "--variant", "ti2v-5b"]) == 0
    printed = capsys.readouterr()
    assert printed.out == starter(StarterRequest(variant="ti2v-5b"))
    assert printed.err == ""


def test_a_file_is_replaced_only_with_force(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "dog.yaml"
    file.write_text("mine", encoding="utf-8")
    assert main(["init", str(file)]) == 1
    assert file.read_text(encoding="utf-8") == "mine"
    message = f"{file}: exists already; give another name, or --force to replace it"
    assert message in capsys.readouterr().err
    assert main(["init", str(file), "--force"]) == 0
    assert load_run(file).output.name == "dog"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["dog.json"], "dog.json: a run file with comments is YAML; end its name in .yaml"),
        (["absent/dog.yaml"], "there is no folder absent; make it first"),
        (["."], "is a folder; give the name of a file in it"),
        (["--variant", "i2v-a14b", "--purpose", "photos"], "teaches an image-to-video model"),
        (["--models", "absent"], "absent: there is no such folder"),
        (["--models", "."], "holds no files of t2v-a14b; it should be ComfyUI/models with"),
        (
            ["--vram", "2GB", "--ram", "64GB"],
            "the smallest clips of t2v-a14b fit with lora",
        ),
    ],
)
def test_what_can_t_be_written_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init", *words]) == 1
    printed = capsys.readouterr()
    assert message in printed.err and printed.out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("dog.yaml", "dog"),
        ("cats/run.yaml", "cats"),
        ("cats/my dog.v2.yaml", "my dog.v2"),
        ("cats/.hidden.yaml", "hidden"),
    ],
)
def test_the_run_is_named_after_its_file_or_folder(tmp_path: Path, file: str, name: str) -> None:
    (tmp_path / "cats").mkdir()
    path = tmp_path / file
    assert run_name(path) == name
    assert main(["init", str(path)]) == 0
    assert load_run(path).output.name == name


@pytest.mark.parametrize("name", ["1", "no", "a #b", "null", "1e3"])
def test_a_name_that_looks_like_yaml_is_read_back(tmp_path: Path, name: str) -> None:
    config = loaded(tmp_path, starter(StarterRequest(variant="ti2v-5b", name=name)))
    assert config.output.name == name


# ------------------------------------------------------------------------------------ what fits


@pytest.mark.parametrize("purpose", [None, "motion"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("vram", ["8GB", "12GB", "24GB", "80GB"])
def test_the_values_for_a_device_fit_it(
    tmp_path: Path,
    variant: VariantName,
    vram: str,
    purpose: PurposeName | None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["--variant", variant, "--vram", vram, "--ram", "64GB"]
    assert main(["init", *words, *(["--purpose", purpose] if purpose else [])]) == 0
    text = capsys.readouterr().out
    # As if the user had a text encoder in fp8 beside the run file.
    encoder = "model.text_encoder=umt5_xxl_fp8_e4m3fn_scaled.safetensors"
    config = loaded(tmp_path, text, *([encoder] if "\n  text_encoder: " in text else []))
    assert config.memory.vram == vram
    wanted = StarterRequest(variant=variant, purpose=purpose)
    (area,) = config.video_data.resolution
    assert isinstance(area, int)
    assert config.wan_config.max_frames <= wanted.frames
    assert area <= (wanted.area or VARIANTS[variant].training_area)
    # Of the size of a 16:9 clip, which a clip of another shape does not exceed by much.
    side = int(area**0.5) // 32 * 32
    bucket = Bucket(frames=config.wan_config.max_frames, width=side, height=side)
    machine = find_machine(parse_bytes(vram), 64 * GB)
    stored = with_changes(assumed_model(config), config)
    assert make_plan(config, [bucket], machine, stored).problems() == []


def test_the_values_for_a_device_are_the_most_that_fits(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def lines(*words: str) -> list[str]:
        assert main(["init", "--variant", "t2v-a14b", *words]) == 0
        return [line.split("#")[0].strip() for line in capsys.readouterr().out.splitlines()]

    official = lines()
    assert "max_frames: 81" in official and "memory:" not in official
    large = lines("--vram", "80GB", "--ram", "256GB")
    assert "max_frames: 81" in large and not any(line.startswith("weights:") for line in large)
    assert [line for line in large if line and line not in official] == ["memory:", "vram: 80GB"]
    little_host = lines("--vram", "80GB", "--ram", "48GB")
    assert "weights: nf4" in little_host or "weights: fp8" in little_host
    # What a motion needs is its length: smaller frames come before fewer ones.
    motion = lines("--vram", "8GB", "--ram", "64GB", "--purpose", "motion")
    assert "max_frames: 81" in motion


# -------------------------------------------------------------------------------- files of ComfyUI


@pytest.fixture(scope="module")
def comfyui(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ComfyUI/models with tiny files under the names of the template for T2V-A14B."""
    folder = tmp_path_factory.mktemp("comfyui")
    write_tiny_model(folder / "model", "t2v-a14b", width=128, layers=2)
    for name, file in COMFYUI_FILES["t2v-a14b"].items():
        (source,) = (folder / "model" / name).glob("*.safetensors")
        target = folder / "models" / file
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)
    return folder / "models"


def init_with(models: Path, file: Path, *words: str) -> ResolvedRun:
    assert main(["init", str(file), "--models", str(models), *words]) == 0
    return load_run(file)


def test_files_of_comfyui_are_found_and_nothing_is_downloaded(
    comfyui: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = init_with(comfyui, tmp_path / "dog.yaml")
    expected = {name: str(comfyui / file) for name, file in COMFYUI_FILES["t2v-a14b"].items()}
    assert config.model.sources() == expected
    out = capsys.readouterr().out
    assert all(f"{name}: " in out for name in expected) and "not found" not in out


def test_paths_are_relative_where_the_models_lie_beside_the_run_file(comfyui: Path) -> None:
    file = comfyui.parent / "dog.yaml"
    init_with(comfyui, file)
    text = file.read_text(encoding="utf-8")
    assert f"\n  vae: models/{COMFYUI_FILES['t2v-a14b']['vae']}\n" in text


def copied(comfyui: Path, folder: Path) -> Path:
    return Path(shutil.copytree(comfyui, folder / "models"))


def test_files_with_other_names_are_told_by_their_headers(comfyui: Path, tmp_path: Path) -> None:
    models = copied(comfyui, tmp_path)
    renamed: dict[ComponentName, str] = {
        "transformer": "unet/wan-HighNoise.safetensors",
        "transformer_2": "unet/sub/wan-LowNoise.safetensors",
        "vae": "vae/a.safetensors",
        "text_encoder": "clip/t5.safetensors",
    }
    for name, other in renamed.items():
        (models / other).parent.mkdir(parents=True, exist_ok=True)
        (models / COMFYUI_FILES["t2v-a14b"][name]).rename(models / other)
    shutil.rmtree(models / "diffusion_models")
    shutil.rmtree(models / "text_encoders")
    (models / "vae" / "another.safetensors").write_bytes(b"not a model")
    config = init_with(models, tmp_path / "dog.yaml")
    assert config.model.sources() == {n: str(models / other) for n, other in renamed.items()}


def test_what_is_missing_or_unreadable_is_said_and_comes_from_the_hub(
    comfyui: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = copied(comfyui, tmp_path)
    files = COMFYUI_FILES["t2v-a14b"]
    (models / files["vae"]).unlink()
    damaged = models / files["text_encoder"]
    damaged.write_bytes(damaged.read_bytes()[:1000])
    config = init_with(models, tmp_path / "dog.yaml")
    assert config.model.path == VARIANTS["t2v-a14b"].repository
    assert set(config.model.sources()) == {"path", "transformer", "transformer_2"}
    out = capsys.readouterr().out
    assert f"vae: not found; expected models/{files['vae']}" in out
    assert f"{damaged}: " in out


def test_swapped_experts_are_not_taken(comfyui: Path, tmp_path: Path) -> None:
    models = copied(comfyui, tmp_path)
    (models / COMFYUI_FILES["t2v-a14b"]["transformer"]).unlink()
    config = init_with(models, tmp_path / "dog.yaml")
    assert "transformer" not in config.model.sources()
    assert "transformer_2" in config.model.sources()


def test_a_plan_counts_the_files_that_are_there(comfyui: Path, tmp_path: Path) -> None:
    """Two gigabytes are enough for the tiny model, not for what is downloaded otherwise."""
    file = tmp_path / "dog.yaml"
    config = init_with(comfyui, file, "--vram", "2GB", "--ram", "16GB", "--purpose", "photos")
    bucket = Bucket(frames=1, width=768, height=768)
    plan = make_plan(config, [bucket], find_machine(2 * GB, 16 * GB), read_stored_model(config))
    assert plan.problems() == []


# --------------------------------------------------------------------------------------------- docs


def test_the_tables_of_recipes_in_the_documentation_are_current() -> None:
    # `python benchmarks/recipe_table.py` writes them.
    begin, end = (f"<!-- {recipe_table.TABLE}: {word} -->" for word in ("begin", "end"))
    for document, with_sources in recipe_table.DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        table = recipe_table.table(with_sources=with_sources)
        assert text.partition(f"{begin}\n")[2].partition(f"\n{end}")[0] == table
