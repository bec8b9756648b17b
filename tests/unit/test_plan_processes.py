"""The plan of several processes: their division, the time of a step and of the run, memory."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from onewan.arithmetic.byte_sizes import format_bytes, parse_bytes
from onewan.arithmetic.collectives import Network
from onewan.arithmetic.durations import format_duration
from onewan.cli import main
from onewan.cli.plan import plan_of
from onewan.config.load import load_run
from onewan.errors import ConfigError
from onewan.memory.plan import Plan, Processes
from onewan.parallel.run_division import division_of

RUN = """
model: {{path: Owner/Model, variant: {variant}}}
wan_config: {{max_frames: 33}}
video_data: {{resolution: [832, 480]}}
validation: {{clips: 0}}
train: {{steps: 2000, save_every: 500, switch_expert_every: 1, accumulation: 1, batch_size: 1}}
"""


@pytest.fixture
def plan(tmp_path: Path):
    """`plan("ti2v-5b", 4, "train.accumulation=4")` is the plan of a run on 4 devices of 80 GB."""

    def build(variant: str, gpus: int, *overrides: str, ram: str = "4TB") -> Plan:
        file = tmp_path / "run.yaml"
        file.write_text(RUN.format(variant=variant), encoding="utf-8")
        return plan_of(load_run(file, overrides), parse_bytes("80GB"), parse_bytes(ram), gpus)

    return build


def processes(plan: Plan) -> Processes:
    assert plan.processes is not None
    return plan.processes


def test_one_process_has_the_plan_that_it_had(plan) -> None:
    assert plan("t2v-a14b", 1).processes is None


def test_two_experts_at_the_same_time_take_half_of_the_time(plan) -> None:
    found = processes(plan("t2v-a14b", 2))
    assert found.side_by_side and found.parts == 1
    assert found.summing == found.gradient_bytes == 0
    assert found.alone / found.total == pytest.approx(2)


@pytest.mark.parametrize(
    ("overrides", "times"),
    [
        # Blocks as long as the interval at which a state is saved: one expert trains, one waits.
        (["train.switch_expert_every=500"], 1),
        (["train.switch_expert_every=100"], 10 / 6),  # 100 + 100 + 200 of 500 steps: 300 at a time
        (["train.switch_expert_every=250"], 2),
        (["train.high_expert_share=0.25"], 4 / 3),
        (["changes=[{step: 1, settings: {optimizer.lr: 5e-5}}]"], 2000 / 1001),
    ],
)
def test_processes_of_two_experts_wait_where_something_is_due(
    plan, overrides: list[str], times: float
) -> None:
    found = processes(plan("t2v-a14b", 2, *overrides))
    assert found.alone / found.total == pytest.approx(times)
    assert found.unpaired_steps == round(found.steps * (2 / times - 1))


def test_parts_of_a_step_divide_its_time_but_for_the_sums(plan) -> None:
    given = plan("ti2v-5b", 4, "train.accumulation=4")
    found = processes(given)
    assert (found.side_by_side, found.parts, found.clips, found.clips_of_each) == (False, 4, 4, 1)
    assert found.gradient_bytes == given.worst.training.device["gradients"]
    # In a ring each device sends 3/4 of the bytes to be summed, and 3/4 of them summed.
    assert found.summing == pytest.approx(1.5 * found.gradient_bytes / given.machine.bus)
    assert found.step == pytest.approx(given.run_time.step / 4 + found.summing)
    assert 3.8 < found.alone / found.total < 4


def test_sums_take_as_long_as_the_slowest_connection_of_their_processes(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(RUN.format(variant="t2v-a14b"), encoding="utf-8")
    network = Network(within=400e9, between=50e9, machine_size=8)

    def summing(gpus: int, experts: str) -> tuple[float, float]:
        overrides = [f"train.accumulation={gpus}", f"parallel.experts={experts}"]
        memory = parse_bytes("80GB"), parse_bytes("100TB")
        found = processes(plan_of(load_run(file, overrides), *memory, gpus, network))
        return found.summing, found.gradient_bytes

    # Two experts side by side on two machines are summed within each; together, between them.
    for gpus, experts, sent, rate in [
        *((8, "together", 14 / 8, 400e9), (16, "side_by_side", 14 / 8, 400e9)),
        *((16, "together", 30 / 16, 50e9), (32, "side_by_side", 30 / 16, 50e9)),
    ]:
        seconds, gradients = summing(gpus, experts)
        assert seconds == pytest.approx(sent * gradients / rate)


@pytest.mark.parametrize(
    ("gpus", "overrides", "each"),
    [
        (2, ["train.accumulation=3"], 2),
        (4, ["train.accumulation=2", "train.batch_size=3"], 2),
        (3, ["train.accumulation=1", "train.batch_size=6"], 2),
    ],
)
def test_a_step_takes_as_long_as_its_largest_part(
    plan, gpus: int, overrides: list[str], each: int
) -> None:
    given = plan("ti2v-5b", gpus, *overrides)
    found = processes(given)
    assert found.clips_of_each == each
    without_sums = found.step - found.summing
    assert without_sums == pytest.approx(given.run_time.step * each / found.clips, rel=0.01)


def test_both_ways_together_multiply(plan) -> None:
    found = processes(plan("t2v-a14b", 8, "train.accumulation=4"))
    assert found.side_by_side and found.parts == 4
    assert found.division == (
        "8 processes, both experts trained at the same time, 4 for each expert with a part of "
        "every step's clips"
    )
    assert 7.8 < found.alone / found.total < 8


def test_validation_is_divided_by_experts_and_clips(plan) -> None:
    without, rest = (
        processes(plan("t2v-a14b", 4, "train.accumulation=2", f"validation.clips={clips}"))
        for clips in (0, 3)
    )
    added_alone, added = rest.alone - without.alone, rest.total - without.total
    assert added == pytest.approx(added_alone / 2 * 2 / 3)


@pytest.mark.parametrize(("videos", "at_a_time"), [(1, 1), (4, 2), (3, 1.5)])
def test_sample_videos_are_made_at_the_same_time(plan, videos: int, at_a_time: float) -> None:
    prompts = ", ".join("abcd"[:videos])
    sampled = plan("t2v-a14b", 2, f"sample.prompts=[{prompts}]")
    found, without = processes(sampled), processes(plan("t2v-a14b", 2))
    added_alone, added = found.alone - without.alone, found.total - without.total
    # Sampling has an expert's weights on the device beside what is trained, in either case.
    assert added_alone / added == pytest.approx(at_a_time, rel=0.01)


def _blocks_on_host(given: Plan) -> int:
    return given.host_peak.pinned["weights of blocks"]


def test_processes_share_the_host_memory(plan) -> None:
    """It has frozen weights once, and all else for each process."""
    one, two = (plan("t2v-a14b", count, ram="512GB") for count in (1, 2))
    assert _blocks_on_host(two) == pytest.approx(_blocks_on_host(one) / 2)
    assert processes(two).host_bytes == 2 * two.host_peak.host_bytes
    assert processes(two).host_bytes < 1.2 * one.host_peak.host_bytes
    # What each process converts, it has while it loads.
    packed = [plan("t2v-a14b", count, "memory.weights=fp8", ram="512GB") for count in (1, 2)]
    assert _blocks_on_host(packed[0]) == _blocks_on_host(packed[1]) > 0
    crowded = plan("t2v-a14b", 4, "memory.weights=fp8", "train.accumulation=2", ram="96GB")
    assert not crowded.fits and "host memory" in crowded.problems()[-1]


@pytest.mark.parametrize(
    ("variant", "gpus", "overrides", "message"),
    [
        ("ti2v-5b", 5, [], "train.accumulation: a step has 1 clip .* 5 processes can't share"),
        (
            *("t2v-a14b", 8, ["parallel.sequence_parallel=1", "train.batch_size=2"]),
            "a step has 2 clips .* which 4 processes",
        ),
        (
            *("t2v-a14b", 6, ["parallel.sequence_parallel=3"]),
            "3 has to divide the 3 processes .* 40 attention heads; choose one of 1, or auto",
        ),
        ("t2v-a14b", 3, ["parallel.experts=side_by_side"], "3 processes can't be divided"),
        ("ti2v-5b", 2, ["parallel.experts=side_by_side"], "trains one expert only"),
        (
            *("t2v-a14b", 2),
            ["parallel.experts=side_by_side", "embeddings=[{placeholder: <fox>, initial_text: a}]"],
            "both experts train the same embeddings",
        ),
        (
            *("t2v-a14b", 4),
            [
                *("method={kind: fine_tune, fused_step: true}", "train.max_grad_norm=null"),
                "train.batch_size=2",
            ],
            "method.fused_step: updates weights in the backward pass",
        ),
        (
            *("ti2v-5b", 2),
            ["optimizer={name: adamw_cpu_offload}", "train.batch_size=2"],
            "optimizer.name: 'adamw_cpu_offload' copies gradients to host memory in the backward",
        ),
    ],
)
def test_a_plan_refuses_what_the_run_would(
    plan, variant: str, gpus: int, overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(variant, gpus, *overrides)


def test_fused_steps_need_no_sums_with_one_process_for_each_expert(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(RUN.format(variant="t2v-a14b"), encoding="utf-8")
    fused = ["method={kind: fine_tune, fused_step: true}", "train.max_grad_norm=null"]
    assert division_of(load_run(file, fused), 2).side_by_side


def test_the_page_has_the_numbers_of_the_plan(plan) -> None:
    page = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text(encoding="utf-8")
    table = re.search(r"<!-- gpus: begin -->\n(.*?)<!-- gpus: end -->", page, re.DOTALL)
    assert table
    rows = [re.split(r" *\| *", line)[1:-1] for line in table[1].splitlines()[2:]]
    assert len(rows) == 6
    for gpus, experts, step, total, times, host in rows:
        given = plan(
            *("t2v-a14b", int(gpus), "wan_config.max_frames=81", "train.accumulation=8"),
            *("train.switch_expert_every=10", "train.save_every=250"),
            *("sample.prompts=[]", f"parallel.experts={experts}"),
            ram="1TB",
        )
        if gpus == "1":
            seconds, run, host_bytes = given.run_time.step, given.run_time.total, given.host_peak
            faster, needed, side_by_side = "1", host_bytes.host_bytes, False
        else:
            found = processes(given)
            seconds, run, needed = found.step, found.total, found.host_bytes
            faster, side_by_side = f"{found.alone / found.total:.2f}", found.side_by_side
        assert step == format_duration(seconds) + (", two at a time" if side_by_side else "")
        assert (total, times, host) == (format_duration(run), faster, format_bytes(needed))
        assert given.fits


def test_the_command_prints_what_several_devices_give(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(RUN.format(variant="t2v-a14b"), encoding="utf-8")
    command = ["plan", str(file), "--vram", "80GB", "--ram", "512GB", "--gpus", "4"]
    assert main([*command, "train.accumulation=2"]) == 0
    text = capsys.readouterr().out
    assert "each of 4 processes, which have a device each and share 512.0 GB" in text
    assert "With 4 devices: 4 processes, both experts trained at the same time, 2 for each" in text
    assert "with 1 clip of its 2 on each device" in text
    assert "times as fast" in text
    assert "of 2,000 steps are trained while" not in text
    assert main([*command, "train.accumulation=2", "train.switch_expert_every=500"]) == 0
    assert "2,000 of 2,000 steps are trained while" in capsys.readouterr().out
    assert main([*command, "train.accumulation=2", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)["processes"]
    assert data["count"] == 4 and data["alone"] > data["total"] > 0


@pytest.mark.parametrize("value", ["0", "-1", "two"])
def test_the_number_of_devices_is_checked(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["plan", "run.yaml", f"--gpus={value}"])
    assert end.value.code == 2
    assert "should be a number from 1 on" in capsys.readouterr().err
