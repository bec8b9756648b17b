"""Plans of runs whose processes share blocks' weights (FSDP2, HSDP) or the tokens of clips."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from onewan.arithmetic.byte_sizes import format_bytes, parse_bytes
from onewan.arithmetic.collectives import Network
from onewan.arithmetic.durations import format_duration
from onewan.cli import main
from onewan.cli.plan import plan_of
from onewan.config.load import load_run
from onewan.config.schema import ResolvedRun
from onewan.errors import ConfigError, MemoryPlanError
from onewan.memory.plan import Plan, check_plan
from onewan.memory.plan.shapes import TransformerShape
from onewan.memory.plan.sharded import RankBytes, rank_bytes
from onewan.memory.plan.sharing import Sharing
from onewan.memory.plan.stored import assumed_model
from onewan.memory.plan.trained import trained_weights
from onewan.variants import VARIANTS

RUN = """
model: {path: Owner/Model, variant: t2v-a14b}
wan_config: {max_frames: 81}
video_data: {resolution: [832, 480]}
method: {kind: fine_tune}
validation: {clips: 0}
train: {steps: 2000, save_every: 500, switch_expert_every: 10, accumulation: 8}
"""
LORA = ("method={kind: lora, rank: 32}", "train.accumulation=1")
TOGETHER = "parallel.experts=together"
A14B = TransformerShape.of_variant(VARIANTS["t2v-a14b"])
LINEAR = A14B.block_matrix_weights + sum(out for out, _ in A14B.block_linears().values())
"""Numbers of a block that are sharded; 2, 4, 8 and 16 divide the rows of all of them."""
NETWORK = Network(within=300e9, between=50e9, machine_size=8)


@pytest.fixture
def run(tmp_path: Path):
    """`run("train.accumulation=4")` is the run file with overrides."""

    def build(*overrides: str) -> ResolvedRun:
        file = tmp_path / "run.yaml"
        file.write_text(RUN, encoding="utf-8")
        return load_run(file, overrides)

    return build


@pytest.fixture
def plan(run):
    """`plan(8, "parallel.experts=together")` is the plan on as many devices of 80 GB."""

    def build(gpus: int, *overrides: str, vram: str = "80GB", network: Network = NETWORK) -> Plan:
        host = gpus * parse_bytes("250GB")
        return plan_of(run(*overrides), parse_bytes(vram), host, gpus, network)

    return build


def of_rank(config: ResolvedRun, shards: int) -> RankBytes:
    stored = assumed_model(config).experts["high"]
    whole = trained_weights(config, stored.shape, config.model.facts().expert("high"))
    return rank_bytes(config, stored, whole, Sharing(shards=shards))


def test_each_process_has_its_shards_of_both_experts(plan, run) -> None:
    given, one = plan(8, TOGETHER), of_rank(run(), 8)
    assert given.fits and given.sharing == Sharing(shards=8, machine=8)
    device = given.worst.training.device
    assert device["shards of the blocks"] == 2 * one.shards == 2 * 2 * A14B.layers * LINEAR / 8
    assert device["weights that are not sharded"] == 2 * one.replicated
    assert device["optimizer state"] == 2 * one.state.device
    assert device["gradients"] == one.gradients  # those of the other one are dropped
    assert device["whole blocks, gathered"] == 2 * 2 * LINEAR
    assert device["whole gradients of blocks"] == (2 + 4 + 4 / 8) * LINEAR
    assert given.worst.settings.resident_blocks == 0
    assert {"weights of blocks", "optimizer state"}.isdisjoint(given.worst.training.pinned)
    loading = next(phase for phase in given.phases if phase.phase == "loading")
    assert loading.host_bytes > 2 * 2 * A14B.weights


def test_side_by_side_a_process_has_the_optimizer_state_of_its_expert(plan, run) -> None:
    given, one = plan(8), of_rank(run(), 4)
    assert given.sharing == Sharing(shards=4, machine=8, side_by_side=True)
    device = given.worst.training.device
    assert device["shards of the blocks"] == 2 * one.shards
    assert device["optimizer state"] == one.state.device


def test_more_processes_need_less_of_each(plan) -> None:
    fixed = (TOGETHER, "train.accumulation=16", "memory={keep_attention: no, offload_inputs: true}")
    plans = [plan(count, *fixed, "memory.feed_forward_chunks=1") for count in (4, 8, 16)]
    four, eight, sixteen = (found.peak.device_bytes for found in plans)
    # But for the buffers, a half of what depends on their number.
    assert four - eight == pytest.approx(2 * (eight - sixteen), rel=0.01)
    assert four - eight > 20e9


def test_averages_are_of_shards(plan, run) -> None:
    averaged = "train.ema={decay: 0.999, offload: false}"
    given, one = plan(8, TOGETHER, averaged), of_rank(run(averaged), 8)
    assert given.worst.training.device["averages"] == 2 * one.averages
    on_host = plan(8, TOGETHER, "train.ema={decay: 0.999, offload: true}").worst.training
    assert on_host.pinned["averages"] == 2 * one.averages and "averages" not in on_host.device


def test_shards_of_a_machine_are_those_of_its_processes(plan) -> None:
    per_machine = ("parallel.weights=sharded_per_machine", TOGETHER, "train.accumulation=16")
    assert plan(16, *per_machine).sharing.shards == 8
    small = Network(within=300e9, between=50e9, machine_size=4)
    assert plan(16, *per_machine, network=small).sharing.shards == 4
    assert plan(16, "parallel.weights=sharded", *per_machine[1:]).sharing.shards == 16
    # Each of 8 processes for an expert, on two machines of 4.
    assert plan(16, *per_machine[::2], network=small).sharing.shards == 4


def test_frozen_weights_are_sharded_where_the_run_file_asks_for_it(plan) -> None:
    whole = plan(4, LORA[0], TOGETHER)
    given = plan(4, LORA[0], TOGETHER, "parallel.weights=sharded")
    assert not whole.sharing.is_sharded and given.sharing.is_sharded
    device = given.worst.training.device
    assert device["shards of the blocks"] == 2 * 2 * A14B.layers * LINEAR / 4
    for name in ("trained weights", "optimizer state", "gradients"):
        assert device[name] == whole.worst.training.device[name]
    assert "whole gradients of blocks" not in device
    found = given.processes
    assert found is not None and found.gradient_bytes == device["gradients"]
    # In each of 2 clips' passes 79 times a block's weights, of which each has a fourth.
    assert found.weight_bytes == pytest.approx(2 * 79 * 2 * LINEAR * 3 / 4)
    assert whole.processes is not None and whole.processes.weight_bytes == 0


def test_samples_are_made_beside_the_shards(plan) -> None:
    prompts = "sample={prompts: [a fox], width: 832, height: 480, frames: 33}"
    averaged = "train.ema={decay: 0.999, offload: false}"
    given = plan(8, TOGETHER, averaged, prompts)
    training = given.worst.training.device
    sampling = [phase for phase in given.phases if phase.phase.startswith("sampling")]
    assert len(sampling) == 2
    for phase in sampling:
        assert phase.device["shards of the blocks"] == training["shards of the blocks"]
        assert {"gradients", "optimizer state", "averages"}.isdisjoint(phase.device)
        moved = training["optimizer state"] + training["averages"]
        assert phase.pinned["optimizer state"] == moved


def test_what_does_not_fit_is_refused_with_the_processes_that_would(plan) -> None:
    given = plan(4, TOGETHER, vram="48GB")
    assert not given.fits and given.enough is not None and given.enough > 4
    with pytest.raises(MemoryPlanError) as refused:
        check_plan(given)
    details = "\n".join(refused.value.details)
    assert "more than the 45.1 GB that a run may use" in details
    assert f"{given.enough} processes, with such a device and 250.0 GB" in details
    clips = f"train.accumulation={given.enough}"
    assert plan(given.enough, TOGETHER, clips, vram="48GB").fits
    assert not plan(given.enough // 2, TOGETHER, clips, vram="48GB").fits
    assert plan(8, TOGETHER).enough is None


def test_one_process_that_has_too_little_memory_is_told_how_many_would_do(run) -> None:
    small = plan_of(run("sample.prompts=[]"), parse_bytes("40GB"), parse_bytes("100GB"))
    assert not small.fits and small.enough is not None
    # Adapters are replicated: more processes do not make such a run fit.
    lora = plan_of(run(LORA[0]), parse_bytes("8GB"), parse_bytes("16GB"))
    assert not lora.fits and lora.enough is None


@pytest.mark.parametrize(
    ("gpus", "overrides", "vram", "refused", "suggested"),
    [
        (4, [], "64GB", "optimizer.name=adamw_8bit", "model.experts=low"),
        (
            *(2, [LORA[0], "parallel.weights=sharded"], "36GB"),
            *("memory.weights=fp8", "parallel.weights=replicated"),
        ),
    ],
)
def test_changes_that_the_division_refuses_are_not_suggested(
    plan, gpus: int, overrides: list[str], vram: str, refused: str, suggested: str
) -> None:
    given = plan(gpus, TOGETHER, *overrides, vram=vram)
    changes = {change for found in given.suggestions for change in found.change}
    assert suggested in changes and refused not in changes
    assert plan(gpus, TOGETHER, *overrides, suggested, vram=vram).fits
    with pytest.raises(ConfigError, match=refused.partition("=")[0]):
        plan(gpus, TOGETHER, *overrides, refused, vram=vram)


def test_settings_of_streamed_blocks_have_no_effect(plan) -> None:
    given = plan(8, TOGETHER, "memory.resident_blocks=10", "memory.host_weights=pageable")
    notes = [note for note in given.notes if "has no effect where weights are sharded" in note]
    assert len(notes) == 2
    assert given.worst == plan(8, TOGETHER).worst


# ------------------------------------------------------------------------------------------- time


def test_blocks_are_gathered_and_summed_while_others_compute(plan) -> None:
    def waiting(within: float) -> tuple[float, float]:
        network = Network(within=within, between=50e9, machine_size=8)
        found = plan(8, TOGETHER, network=network).processes
        assert found is not None
        return found.waiting, found.weight_bytes

    gathered, reduced = 2 * LINEAR * 7 / 8, 4 * LINEAR * 7 / 8
    fast, sent = waiting(300e9)
    assert sent == pytest.approx(79 * gathered + 40 * reduced)
    # Fast connections are waited for at the beginning and at the end only.
    assert fast == pytest.approx((gathered + reduced) / 300e9)
    # Slow ones are always busy, but while the first block computes.
    slow, _ = waiting(1e8)
    given = plan(8, TOGETHER)
    computing = given.worst.time.flops / 8 / given.machine.flops
    assert slow == pytest.approx(sent / 1e8 - computing, rel=1e-4)


def test_sums_over_machines_come_behind_those_within(plan) -> None:
    clips = "train.accumulation=16"
    found, within = (
        plan(16, TOGETHER, clips, f"parallel.weights={weights}").processes
        for weights in ("sharded_per_machine", "sharded")
    )
    assert found is not None and within is not None
    shard = 4 * LINEAR / 8
    gathered, reduced = 2 * LINEAR * 7 / 8, 7 * shard
    assert found.weight_bytes == pytest.approx(79 * gathered + 40 * (reduced + shard))
    first_and_last = (gathered + reduced) / 300e9
    assert found.waiting == pytest.approx(first_and_last + 8 * shard / 50e9)
    assert found.summing == within.summing > 0


def test_gradients_of_what_is_whole_are_summed_by_all(plan, run) -> None:
    found, one = plan(8, TOGETHER).processes, of_rank(run(), 8)
    whole = A14B.weights - A14B.layers * LINEAR
    assert found is not None and found.gradient_bytes == 4 * whole
    assert one.gradients == 2 * A14B.layers * LINEAR / 8 + one.replicated


# -------------------------------------------------------------------------------------- sequences


def test_processes_that_share_a_clip_have_parts_of_its_tokens(plan) -> None:
    alone = plan(1, *LORA, TOGETHER, "memory.keep_attention=device")
    shared = plan(8, *LORA, TOGETHER, "memory.keep_attention=device")
    assert shared.sharing == Sharing(sequence=8, machine=8)
    kept = "kept for the backward pass"
    one, eighth = (p.worst.training.device[kept] for p in (alone, shared))
    assert eighth == pytest.approx(one / 8, rel=1e-3)
    assert shared.worst.training.device["tokens that processes exchange"] == (
        4 * 2 * 32760 // 8 * A14B.width
    )
    # But for the text, of which each process projects all tokens.
    whole, part = alone.worst.time.flops, shared.worst.time.flops
    assert whole / 8 < part < 1.02 * whole / 8


@pytest.mark.parametrize(("keep", "exchanges"), [("device", 4 + 8), ("no", 4 + 9)])
def test_what_processes_exchange_that_share_a_clip(plan, keep: str, exchanges: int) -> None:
    found = plan(8, *LORA, TOGETHER, f"memory.keep_attention={keep}").processes
    assert found is not None and found.sequence == 8 and found.parts == 1
    own = 2 * 32760 // 8 * A14B.width
    patches = 4 * 64 * 32760 // 8
    blocks = A14B.layers * exchanges * own * 7 / 8
    assert found.token_bytes == pytest.approx(blocks + 7 * patches)
    assert found.exchanging == pytest.approx((blocks + 7 * patches) / 300e9)
    # The gradients of each are those of its own tokens.
    assert found.gradient_bytes > 0 and found.summing > 0
    assert found.step == pytest.approx(
        plan(8, *LORA, TOGETHER, f"memory.keep_attention={keep}").run_time.step
        + found.summing
        + found.exchanging
    )


def test_both_are_planned_together(plan) -> None:
    given = plan(8, TOGETHER, "train.accumulation=2")
    assert given.sharing == Sharing(shards=8, sequence=4, machine=8)
    found = given.processes
    assert found is not None and found.weight_bytes and found.token_bytes and given.fits


# ------------------------------------------------------------------------------------- the command


def test_the_command_says_what_was_chosen_and_why(
    run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run()
    command = ["plan", str(tmp_path / "run.yaml"), "--ram", "2TB", TOGETHER]
    assert main([*command, "--vram", "80GB", "--gpus", "8"]) == 0
    text = capsys.readouterr().out
    assert "the weights of blocks are sharded" in text
    assert "Weights are sharded since full fine-tuning has gradients" in text
    assert "a shard of each of 40 blocks stays on the device" in text
    assert "each process sends 97.8 GB in a step" in text
    assert main([*command, "--vram", "80GB", "--gpus", "8", "train.accumulation=2"]) == 0
    text = capsys.readouterr().out
    assert "Tokens are shared since a step has fewer clips" in text
    assert "For the tokens that 4 processes share" in text
    assert main([*command, "--vram", "48GB", "--gpus", "4"]) == 1
    assert "processes, with such a device and 500.0 GB of host memory each" in (
        capsys.readouterr().out
    )


def test_the_page_has_the_numbers_of_the_plan(run) -> None:
    page = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text(encoding="utf-8")
    table = re.search(r"<!-- sharded: begin -->\n(.*?)<!-- sharded: end -->", page, re.DOTALL)
    assert table
    rows = [re.split(r" *\| *", line)[1:-1] for line in table[1].splitlines()[2:]]
    assert len(rows) == 5
    for gpus, experts, memory, step, waiting, total in rows:
        config = run("train.save_every=250", f"parallel.experts={experts}")
        given = plan_of(config, parse_bytes("80GB"), int(gpus) * parse_bytes("125GB"), int(gpus))
        need, found = format_bytes(given.peak.device_bytes), given.processes
        if not given.fits:
            assert (memory, step, waiting, total) == (f"{need}: does not fit", "", "", "")
            continue
        assert found is not None and memory == need
        expected = format_duration(found.step) + (", two at a time" if found.side_by_side else "")
        assert step == expected
        assert (waiting, total) == (format_duration(found.waiting), format_duration(found.total))
