"""Processes that share the tokens of clips have the results of one process, but for the order in
which gradients are added."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support import shared_tokens
from support.equal_runs import (
    Trainer,
    assert_close,
    distance,
    events,
    failure_with_a_damaged_clip,
    first_gradients,
    first_gradients_in_small_messages,
    notes,
)
from support.runs import PLACEHOLDER, SMALL_SAMPLE, RunFile, layout_of
from support.shared_tokens import DIVIDES, Case, alone_and_together, bytes_sent, results
from support.tiny_models import TinyModels
from support.torchrun import together

from onewan.data.dataset import survey
from onewan.data.loader import StepBatches
from onewan.errors import ConfigError
from onewan.parallel.ranks import Alone
from onewan.parallel.sequence import SequenceParallel
from onewan.train.run import Run
from onewan.train.setup import WanModelSetup
from onewan.train.speed import step_speed

# ------------------------------------------------------------------- a forward and a backward pass

CASES = {
    "tokens that divide": Case(size=DIVIDES),
    "tokens that do not": Case(),
    "adapters": Case(train="adapters"),
    "the text alone": Case(train="text"),
    "kept attention": Case(train="adapters", how={"keep_attention": True}),
    "clean first frame": Case(clean=(0,)),
    "clean frames, chunks": Case(clean=(0, 2), how={"chunks": 3, "keep_attention": True}),
    "frames apart": Case(size=DIVIDES, how={"frames_apart": True, "keep_attention": True}),
    "no checkpointing": Case(checkpointing=False),
    "no checkpointing, frames apart": Case(
        checkpointing=False, clean=(0,), how={"frames_apart": True}
    ),
    "two batches": Case(batches=2, clean=(0,), how={"keep_attention": True}),
    "reference image": Case(reference=True),
}
BFLOAT16 = {
    "bfloat16": Case(dtype=torch.bfloat16),
    "bfloat16, adapters": Case(
        dtype=torch.bfloat16, train="adapters", clean=(0,), how={"keep_attention": True}
    ),
}


def far(found: dict[str, tuple[torch.Tensor, torch.Tensor]], *, predictions: bool) -> float:
    """The relative distance of all predictions together, or of all gradients."""
    names = [name for name in sorted(found) if name.startswith("prediction") == predictions]
    assert names
    one, other = (torch.cat([found[name][i].flatten() for name in names]) for i in (0, 1))
    return distance(one, other)


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.long)])
def test_results_and_gradients_are_those_of_one_process(processes: int) -> None:
    first, *others = together(processes, alone_and_together, {**CASES, **BFLOAT16})
    for name, found in first.items():
        for other in others:  # all of them get the whole prediction
            assert all(torch.equal(found[n][1], other[name][n][1]) for n in found), name
    for name in CASES:
        assert far(first[name], predictions=True) < 1e-6, name
        assert far(first[name], predictions=False) < 1e-6, name
        for one, shared in first[name].values():  # and of each weight
            assert distance(one, shared) < 1e-5, name
    for name, case in BFLOAT16.items():
        # What is rounded in another order is no further away than from unrounded results.
        exact = results(case, dtype=torch.float32)
        for predictions in (True, False):
            rounded = {n: (exact[n], one) for n, (one, _) in first[name].items()}
            limit = far(rounded, predictions=predictions)
            assert 0 < limit < 0.05, name
            assert far(first[name], predictions=predictions) < limit, name


def test_a_process_sends_the_bytes_that_the_documentation_says() -> None:
    kept = Case(size=DIVIDES, how={"keep_attention": True})
    own, samples, number = 12, 2, 4  # of its tokens; bytes of a float32
    exchange = samples * own * shared_tokens.WIDTH * number // 2
    prediction = samples * own * shared_tokens.CHANNELS * 2 * 2 * number
    for tensors, sent in zip(
        (12, 13), together(2, bytes_sent, [kept, Case(size=DIVIDES)])[0], strict=True
    ):
        assert sent == shared_tokens.LAYERS * tensors * exchange + prediction


def test_a_forward_pass_of_a_sampler_is_not_shared() -> None:
    """`WanTransformer.forward`, as pipelines call it, has the result of a process that shares
    nothing."""
    model = shared_tokens._model(Case(), torch.float32)
    x, t, text = torch.randn(1, 16, 1, 4, 4), torch.tensor([500.0]), torch.zeros(1, 512, 24)
    with torch.no_grad():
        expected = model(x, t, text).sample
        # The other process is not there: what it has would be wrong.
        model.sharing = SequenceParallel(ranks=Alone(), group=(0, 1))
        assert torch.equal(model(x, t, text).sample, expected)
    model.block_runner = None
    with pytest.raises(ValueError, match="have a runner"):
        shared_tokens.predict_velocities(model, [shared_tokens._batch(Case(), 0)])


def test_tokens_and_heads_that_can_not_be_shared() -> None:
    few = SequenceParallel(ranks=Alone(), group=(0, 1, 2))
    with pytest.raises(ValueError, match="3 processes can't share 2 tokens"):
        few.of(2)
    with pytest.raises(ValueError, match="3 processes can't share 4 attention heads"):
        few.of(9).to_heads(torch.zeros(1, 3, 4, 8))


# ------------------------------------------------------------------------------------------- runs

SHARED = "parallel.sequence_parallel=2"
OPTIMIZER = ["optimizer.lr=0.002", "optimizer.eps=1e-6"]
"""Adam takes steps of full size along gradients that are rounding error, unless `eps` is larger."""
MORE = ["train.batch_size=2", *OPTIMIZER]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """The setting with a model of a variant, whose two attention heads can be shared."""
    models = TinyModels(tmp_path_factory.mktemp("heads"), width=64, layers=2)
    return lambda variant: f"model.path={models(variant).as_posix()}"  # pyright: ignore[reportArgumentType]


def of_this_rank(run: Run, step: StepBatches) -> dict[str, torch.Tensor]:
    speed = step_speed(run, step, 1.0, 1e12)
    numbers = [speed.tokens_per_second, speed.tflops, speed.mfu or 0.0]
    return {
        "speed": torch.tensor(numbers),
        "seed": torch.tensor(torch.initial_seed() % 2**31),
        "warned": torch.tensor(sum("share the tokens" in line for line in run.warnings)),
    }


@pytest.mark.parametrize(
    ("variant", "processes"),
    [
        ("ti2v-5b", 2),
        pytest.param("ti2v-5b", 4, marks=pytest.mark.long),
        pytest.param("t2v-a14b", 4, marks=pytest.mark.long),
    ],
)
def test_gradients_of_a_step_are_those_of_one_process(
    run_file: RunFile,
    tmp_path: Path,
    footage: list[str],
    model: Callable[[str], str],
    variant: str,
    processes: int,
) -> None:
    """Of four processes two share the tokens of one clip, and two those of the other one."""
    settings = [*footage, *MORE, model(variant), "parallel.experts=together"]
    run_file(variant, *settings)
    path = tmp_path / "run.yaml"
    one = first_gradients(path, settings, of_this_rank)
    arguments = (path, [*settings, SHARED], of_this_rank)
    first, *others = together(processes, first_gradients_in_small_messages, *arguments)
    of_rank = {"speed", "seed", "warned"}
    assert first.keys() == one.keys() and len(one) > 10
    for other in others:
        assert all(torch.equal(first[name], other[name]) for name in one.keys() - of_rank)
    for names in ({"loss"}, one.keys() - {"loss"} - of_rank):
        whole, summed = (
            torch.cat([of[name].flatten() for name in sorted(names)]) for of in (one, first)
        )
        assert distance(whole, summed) < 1e-5
    total = sum(found["speed"] for found in (first, *others))
    torch.testing.assert_close(total, one["speed"])


EVERYTHING = [
    "train.steps=6",
    "train.save_every=2",
    "train.ema={decay: 0.9}",
    "train.keep_best=true",
    "validation={clips: 2, every: 3}",
]
RUNS = {
    "four processes": (4, "ti2v-5b", []),
    "four processes, side by side": (4, "t2v-a14b", ["train.switch_expert_every=1"]),
    "weights": (
        2,
        "ti2v-5b",
        [
            "method={kind: fine_tune}",
            "parallel.weights=replicated",
            "optimizer.lr=0.0002",
            "video_data.sources.0.class_word=''",
            "video_data.sources.1.target=data",
        ],
    ),
    "embeddings": (
        2,
        "ti2v-5b",
        [
            PLACEHOLDER,
            "video_data.sources.0.trigger_word=<shape>",
            "video_data.sources.0.class_word=''",
        ],
    ),
}


@pytest.mark.long
@pytest.mark.parametrize("case", RUNS)
def test_a_run_is_that_of_one_process(
    run_file: RunFile,
    tmp_path: Path,
    footage: list[str],
    model: Callable[[str], str],
    case: str,
) -> None:
    """With masks, prior clips and kept predictions, averages, validation, best weights, states and
    exports."""
    processes, variant, own = RUNS[case]
    settings = [*footage, *MORE, *EVERYTHING, model(variant), *own]
    trainer = Trainer(run_file=run_file, folder=tmp_path, variant=variant, settings=settings)
    one = trainer.train("one")
    several = trainer.train("several", processes, SHARED)
    assert any("2 of them share the tokens of a clip" in note for note in notes(several))
    assert len(events(several, "validation")) >= 3
    assert_close(one, several, 1e-5)


@pytest.mark.long
def test_a_run_that_changes_its_number_of_processes_is_that_of_one(
    run_file: RunFile, tmp_path: Path, footage: list[str], model: Callable[[str], str]
) -> None:
    """Two processes share the tokens of a step's only clip, as `auto` chooses it. One of them makes
    the sample video, in which the other one has no part."""
    sample = {**SMALL_SAMPLE, "every": 24}
    settings = [
        *footage,
        *EVERYTHING,
        *OPTIMIZER,
        model("ti2v-5b"),
        "train.steps=24",
        "validation.every=12",
        *(f"sample.{name}={value}" for name, value in sample.items()),
    ]
    trainer = Trainer(run_file=run_file, folder=tmp_path, variant="ti2v-5b", settings=settings)
    one = trainer.train("one")
    trainer.train("changing", 2, stop_after=16)
    trainer.train("changing", 1, resume=True, stop_after=20)
    changing = trainer.train("changing", 2, resume=True)
    assert notes(changing).count("2 processes, 2 of them share the tokens of a clip") == 2
    for config in (one, changing):
        assert len(list(layout_of(config).root.glob("samples/*/*.mp4"))) == 1
    assert_close(one, changing, 1e-5)


def test_dropout_differs_between_processes_that_share_tokens(
    run_file: RunFile, tmp_path: Path, model: Callable[[str], str]
) -> None:
    settings = [model("ti2v-5b"), "wan_config.max_frames=5", "method.dropout=0.5", SHARED]
    run_file("ti2v-5b", *settings)
    runs = [
        together(2, first_gradients, tmp_path / "run.yaml", settings, of_this_rank)
        for _ in range(2)
    ]
    for first, second in runs:
        assert first["seed"] != second["seed"]
        assert first["warned"] == 1
    for name, gradient in runs[0][0].items():
        assert torch.equal(gradient, runs[1][0][name])  # and the same again in a resumed run


def test_a_loss_that_is_not_finite_names_the_clip_in_all_processes_that_have_it(
    run_file: RunFile, tmp_path: Path, model: Callable[[str], str]
) -> None:
    settings = [model("ti2v-5b"), "train.save_every=1", f"output.dir={tmp_path.as_posix()}"]
    config = run_file("ti2v-5b", *settings)
    errors = together(2, failure_with_a_damaged_clip, tmp_path / "run.yaml", settings, 0, 1)
    for error in errors:
        assert error.startswith("step 2 (single expert): the loss is not finite with "), error
        assert ". Look at that clip" in error
    assert layout_of(config).saved_steps() == [1]


class First(Alone):
    """The first of several processes, of which the others are not there."""

    def __init__(self, count: int) -> None:
        self.count = count


def test_a_model_whose_heads_can_not_be_shared_is_refused_before_anything_is_encoded(
    run_file: RunFile, model: Callable[[str], str]
) -> None:
    for settings, have in (([], "1 attention head"), ([model("ti2v-5b")], "2 attention heads")):
        config = run_file("ti2v-5b", *settings, "parallel.sequence_parallel=4")
        with pytest.raises(ConfigError, match=f"sequence_parallel: 4 .* share the {have} of this"):
            WanModelSetup(config, ranks=First(4)).check()


def test_clips_with_fewer_tokens_than_processes_are_refused_before_they_are_encoded(
    run_file: RunFile, workshop: Path
) -> None:
    source = (workshop / "clips").as_posix()
    config = run_file(
        "ti2v-5b", f"video_data.sources=[{{path: {source}}}]", "video_data.resolution=4096"
    )
    clips = survey(config).clips
    setup = WanModelSetup(config, ranks=First(24))
    with pytest.raises(ConfigError, match=r"24 processes can't share the 12 tokens of \S+ \("):
        setup.check_clips(clips)
