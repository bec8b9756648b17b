"""Where `onewan sample` takes the model and its settings from: a run's folder, a run file, a model,
or components one by one."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from onewan.cli.importing import run_file_of
from onewan.config.load import RESOLVED_NAME, load_run
from onewan.config.method import FineTuneMethod
from onewan.config.schema import COMPONENTS, ResolvedRun
from onewan.dtypes import WeightStorage
from onewan.errors import CheckpointError, ConfigError
from onewan.runs.exports import ExportedWeights, choose_weights, exported_weights
from onewan.runs.layout import RunLayout, displayed
from onewan.variants import ExpertName, VariantName

_RUN_FILE_ENDINGS = (".yaml", ".yml", ".json")


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleSource:
    """What is sampled with, before anything of it is loaded."""

    components: Mapping[str, str]
    """What `WanModelLoader` takes: a path for each component, and ``path`` for the others."""
    config: ResolvedRun | None = None
    """Settings of the run; None for a model."""
    layout: RunLayout | None = None
    """Only where the source is the folder of a run."""
    weights: ExportedWeights | None = None
    """The run's own weights; None for the base model."""
    variant: VariantName | None = None
    """None: inferred from the files."""
    boundary: float | None = None
    dtype: str = "bfloat16"
    device: str = "auto"
    storage: WeightStorage = "as_stored"
    check_file_names: bool = True
    notices: list[str] = field(default_factory=list[str])
    """For the user, a line each."""

    @property
    def is_local(self) -> bool:
        """Whether nothing of the model has to be downloaded."""
        return all(Path(path).expanduser().exists() for path in self.components.values())

    @property
    def adapters(self) -> Mapping[ExpertName, Path]:
        """The run's adapters; those of full fine-tuning are components."""
        fine_tuned = self.config is not None and isinstance(self.config.method, FineTuneMethod)
        return {} if self.weights is None or fine_tuned else self.weights.experts


def sample_source(options: argparse.Namespace) -> SampleSource:
    """The source that the options name. ConfigError or CheckpointError for one that is not there,
    and for options that it does not take."""
    given = {name: getattr(options, name) for name in COMPONENTS if getattr(options, name)}
    source = None if options.source is None else Path(options.source)
    if source is not None and (source / RESOLVED_NAME).is_file():
        return _with_options(_of_run_folder(source, options, given), options)
    _refuse_options_of_runs(options)
    if source is not None and source.suffix.lower() in _RUN_FILE_ENDINGS and not source.is_dir():
        return _with_options(_of_run_file(source, given), options)
    if source is None and not given:
        raise ConfigError(
            "sample",
            [
                "nothing to sample with; give the folder of a run, a run file, a model's folder or "
                "its name on the hub, or --transformer, --transformer-2, --vae and --text-encoder"
            ],
        )
    _refuse_folder_of_runs(source)
    components = given if source is None else {"path": options.source, **given}
    return _with_options(SampleSource(components=components), options)


def lora_files(path: Path) -> list[Path]:
    """`path` itself, or for the folder of a run, or the folder of its weights, the newest LoRAs."""
    roots = [p for p in (path, path.parent) if path.is_dir() and (p / RESOLVED_NAME).is_file()]
    if not roots or path not in (roots[0], RunLayout(roots[0]).weights_dir):
        return [path]
    config = load_run(roots[0])
    chosen = choose_weights(config, RunLayout(roots[0]), "newest")
    if isinstance(config.method, FineTuneMethod) or not chosen.experts:
        raise CheckpointError(
            f"{path}: holds no LoRAs, since the run trains others ({config.method.kind}); sample "
            f"from the run itself: onewan sample {displayed(roots[0])}"
        )
    return list(chosen.experts.values())


def _of_run_folder(
    folder: Path, options: argparse.Namespace, given: Mapping[str, str]
) -> SampleSource:
    config, layout = load_run(folder), RunLayout(folder)
    weights = None
    if options.weights != "none":
        choice = "newest" if options.weights is None else options.weights
        weights = choose_weights(config, layout, choice, averaged=options.ema)
    elif options.ema:
        raise ConfigError("sample", ["--ema: is of trained weights; leave out --weights none"])
    components = config.model.sources()
    if weights is not None and isinstance(config.method, FineTuneMethod):
        for expert in config.model.facts().experts:
            if expert.name in weights.experts:
                components[expert.component] = str(weights.experts[expert.name])
    return _of_config(config, {**components, **given}, layout=layout, weights=weights)


def _of_run_file(path: Path, given: Mapping[str, str]) -> SampleSource:
    config = load_run(run_file_of(path))
    source = _of_config(config, {**config.model.sources(), **given})
    layout = RunLayout(config.output.dir / config.output.name)
    if layout.resolved.is_file() and exported_weights(config, layout):
        folder = displayed(layout.root)
        source.notices.append(
            f"the base model is sampled; for the weights that the run has trained: onewan sample "
            f"{folder}"
        )
    return source


def _of_config(
    config: ResolvedRun,
    components: Mapping[str, str],
    *,
    layout: RunLayout | None = None,
    weights: ExportedWeights | None = None,
) -> SampleSource:
    return SampleSource(
        components=components,
        config=config,
        layout=layout,
        weights=weights,
        variant=config.model.variant,
        boundary=config.model.boundary,
        dtype=config.model.dtype,
        device=config.model.device,
        storage=config.memory.weights,
        check_file_names=config.model.check_file_names,
    )


def _with_options(source: SampleSource, options: argparse.Namespace) -> SampleSource:
    """`source` with the options that were given in place of its own values."""
    if source.config is not None and options.variant not in (None, source.variant):
        raise ConfigError(
            "sample", [f"--variant: the run is one of {source.variant}; leave the option out"]
        )
    names = ("variant", "boundary", "dtype", "device", "storage")
    changes = {n: value for n in names if (value := getattr(options, n)) is not None}
    return replace(source, **changes)


def _refuse_options_of_runs(options: argparse.Namespace) -> None:
    given = {"--weights": options.weights is not None, "--ema": options.ema}
    problems = [
        f"{name}: needs the folder of a run, such as runs/NAME, as SOURCE"
        for name, is_given in given.items()
        if is_given
    ]
    if problems:
        raise ConfigError("sample", problems)


def _refuse_folder_of_runs(source: Path | None) -> None:
    """ConfigError with the names of the runs if `source` is a folder of runs."""
    if source is None or not source.is_dir():
        return
    runs = sorted(str(path.parent) for path in source.glob(f"*/{RESOLVED_NAME}"))
    if runs:
        raise ConfigError(
            str(source), [f"is a folder of runs; give one of them: {', '.join(runs[:8])}"]
        )
    if (source.parent / RESOLVED_NAME).is_file():
        raise ConfigError(
            str(source), [f"is in the folder of a run; give that one: {source.parent}"]
        )
