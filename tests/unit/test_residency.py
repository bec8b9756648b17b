"""Which modules are on the device, the order of moves, and what is restored afterwards."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch
from support.accelerator import DEVICE, IS_SIMULATED, simulated_only
from torch import nn

from onewan.memory.residency import DeviceResidency, WholeModule, device_in_use

if IS_SIMULATED:
    import simulated_gpu


class Recorded:
    """A placement that writes down what it is asked, and can fail to enter."""

    def __init__(self, name: str, log: list[str], *, is_ready: bool = False) -> None:
        self.name = name
        self.log = log
        self.is_ready = is_ready
        self.fails = False

    def enter(self) -> None:
        self.log.append(f"{self.name} enters")
        if self.fails:
            raise MemoryError(self.name)
        self.is_ready = True

    def leave(self, *, trained: bool = True) -> None:
        self.log.append(f"{self.name} leaves" + ("" if trained else ", what is trained stays"))
        self.is_ready = False


class Companion:
    def __init__(self, name: str, log: list[str]) -> None:
        self.name = name
        self.log = log

    def to(self, device: torch.device) -> None:
        self.log.append(f"{self.name} to {device.type}")


class Scene:
    """Two experts with optimizers, and a VAE, of which the first `ready` are on the device."""

    def __init__(self, ready: str = "", *, alternating: bool = True, parked: bool = True) -> None:
        self.log: list[str] = []
        self.residency = DeviceResidency("meta")
        self.high, self.low, self.vae = nn.Identity(), nn.Identity(), nn.Identity()
        self.placements: dict[nn.Module, Recorded] = {}
        for name in ("high", "low", "vae"):
            placement = Recorded(name, self.log, is_ready=name in ready.split())
            is_expert = name != "vae"
            self.residency.manage(
                getattr(self, name),
                *([Companion(f"{name}'s optimizer", self.log)] if is_expert else []),
                alternating=alternating and is_expert,
                parked=parked,
                placement=placement,
            )
            self.placements[getattr(self, name)] = placement

    def ready(self) -> set[str]:
        return {p.name for p in self.placements.values() if p.is_ready}


def test_an_expert_leaves_with_its_optimizer_before_the_other_enters() -> None:
    scene = Scene("high vae")
    scene.residency.bring(scene.low)
    assert scene.log == [
        "high leaves",
        "high's optimizer to cpu",
        "low enters",
        "low's optimizer to meta",
    ]
    assert scene.ready() == {"low", "vae"}


def test_what_is_trained_stays_where_it_is_not_parked() -> None:
    """Until others need the whole device; it comes back with its expert."""
    scene = Scene("high", parked=False)
    scene.residency.bring(scene.low)
    assert scene.log == [
        "high leaves, what is trained stays",
        "low enters",
        "low's optimizer to meta",
    ]
    scene.log.clear()
    with scene.residency.taking_turns([scene.low, scene.vae]):
        assert scene.log == ["high leaves", "high's optimizer to cpu", "low's optimizer to cpu"]
    scene.log.clear()
    scene.residency.bring(scene.high)
    assert scene.log[-2:] == ["high enters", "high's optimizer to meta"]


def test_a_module_that_is_ready_is_not_moved_again() -> None:
    scene = Scene("high")
    scene.residency.bring(scene.high)
    assert scene.log == []


def test_modules_brought_together_stay_together() -> None:
    scene = Scene()
    scene.residency.bring(scene.high, scene.low)
    assert scene.ready() == {"high", "low"}
    scene.residency.bring(scene.high)
    assert scene.ready() == {"high", "low"}


def test_experts_that_do_not_alternate_stay() -> None:
    scene = Scene("high", alternating=False)
    scene.residency.bring(scene.low)
    assert scene.ready() == {"high", "low"}
    assert scene.log == ["low enters", "low's optimizer to meta"]


def test_taking_turns_keeps_one_on_the_device_without_companions() -> None:
    scene = Scene("high")
    with scene.residency.taking_turns([scene.high, scene.low, scene.vae]) as bring:
        for module in (scene.vae, scene.high, scene.low, scene.low):
            bring(module)
            assert scene.ready() == {scene.placements[module].name}
        during = list(scene.log)
    assert during == [
        "high's optimizer to cpu",
        "high leaves",
        "vae enters",
        "vae leaves",
        "high enters",
        "high leaves",
        "low enters",
    ]
    assert scene.ready() == {"high"}
    assert scene.log[-2:] == ["high enters", "high's optimizer to meta"]


def test_modules_outside_of_the_turns_stay() -> None:
    scene = Scene("high vae")
    with scene.residency.taking_turns([scene.high, scene.low]) as bring:
        bring(scene.low)
        assert scene.ready() == {"low", "vae"}


def test_modules_that_are_ready_together_stay_together() -> None:
    scene = Scene("high low vae")
    with scene.residency.taking_turns([scene.high, scene.low, scene.vae]) as bring:
        for module in (scene.vae, scene.high, scene.low):
            bring(module)
    assert not any("enters" in line and "leaves" in line for line in scene.log)
    assert scene.ready() == {"high", "low", "vae"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_everything_is_restored_after_an_exception(error) -> None:
    """Those that leave go first, so that there is room for those that return."""
    scene = Scene("low")
    modules = [scene.low, scene.high, scene.vae]
    with pytest.raises(error), scene.residency.taking_turns(modules) as bring:
        bring(scene.high)
        scene.log.clear()
        raise error
    assert scene.log == ["high leaves", "vae leaves", "low enters", "low's optimizer to meta"]
    assert scene.ready() == {"low"}


def test_a_module_that_failed_to_enter_is_sent_back() -> None:
    scene = Scene("low")
    scene.placements[scene.high].fails = True
    with (
        pytest.raises(MemoryError),
        scene.residency.taking_turns([scene.high, scene.low]) as bring,
    ):
        bring(scene.high)
    assert scene.ready() == {"low"}
    assert scene.log[-3:] == ["high leaves", "low enters", "low's optimizer to meta"]


def test_an_unmanaged_module_is_moved_whole(accelerator: torch.device) -> None:
    residency = DeviceResidency(accelerator)
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    assert not residency.is_ready(module)
    residency.bring(module)
    assert residency.is_ready(module)
    assert {t.device.type for t in (*module.parameters(), *module.buffers())} == {DEVICE.type}


def test_frozen_weights_return_without_a_copy_unless_they_were_changed(sim: torch.device) -> None:
    """In place, or by another tensor in their place."""
    residency = DeviceResidency(sim)
    module = nn.ParameterList(torch.randn(8, 8) for _ in range(3)).requires_grad_(False)
    weights = list(module.parameters())
    originals = [weight.data for weight in weights]
    values = [weight.clone() for weight in weights]
    residency.bring(module)
    weights[1].add_(1)
    weights[2].data = weights[2].data + 2
    simulated_gpu.reset_counters()
    residency.release(module)
    assert weights[0].data_ptr() == originals[0].data_ptr()
    assert simulated_gpu.counters()["from_device_pinned"][1] == 2 * 8 * 8 * 4
    for weight, value, added in zip(weights, values, (0, 1, 2), strict=True):
        assert torch.equal(weight, value + added)
    residency.bring(module)
    assert torch.equal(weights[2].cpu(), values[2] + 2)


def test_what_has_left_is_in_host_memory_once_it_is_settled(sim: torch.device) -> None:
    """The host does not wait for it before; a late copy is all NaN until then."""
    residency = DeviceResidency(sim)
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    for module in (first, second):
        residency.manage(module, alternating=True)
    value = first.weight.detach().clone()
    with simulated_gpu.late_copies():
        residency.bring(first)
        with torch.no_grad():
            first.weight.mul_(2)
        with simulated_gpu.trace() as trace:
            residency.bring(second)
        assert not trace.waits()
        assert first.weight.device.type == "cpu" and first.weight.isnan().all()
        residency.settle()
        assert torch.equal(first.weight, 2 * value)


def test_a_module_with_one_weight_elsewhere_is_not_ready() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    assert not WholeModule(module, torch.device("meta")).is_ready
    assert not WholeModule(module, torch.device("cpu")).is_ready


def test_on_the_cpu_nothing_has_to_leave() -> None:
    residency = DeviceResidency("cpu")
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    for module in (first, second):
        residency.manage(module, alternating=True)
    residency.bring(first)
    residency.bring(second)
    assert residency.is_ready(first) and residency.is_ready(second)
    residency.release(first)
    assert residency.is_ready(first)


def test_the_device_in_use_is_the_first_that_is_not_host_memory() -> None:
    on_host, elsewhere = nn.Linear(2, 2), nn.Linear(2, 2, device="meta")
    assert device_in_use([on_host, elsewhere]).type == "meta"
    assert device_in_use([on_host]) == torch.device("cpu")
    assert device_in_use([nn.Identity()]) == torch.device("cpu")


# ------------------------------------------------------------------ real moves between two memories


@pytest.fixture
def on_device(accelerator: torch.device) -> ModuleType:
    """`support.residency_on_device`, which can be imported where the accelerator is."""
    del accelerator
    return import_module("support.residency_on_device")


def test_alternating_experts_never_meet_on_the_device(on_device: ModuleType) -> None:
    """The peak is one expert with its optimizer state, and where the other is, is host memory."""
    found = on_device.training()
    assert found["peak"] <= found["one expert"]
    there = DEVICE.type
    expected = [[there, "cpu"], ["cpu", there], [there, "cpu"]]
    assert found["devices"] == found["optimizer devices"] == expected
    assert found["weights are the same"] and found["parameters are the same objects"]


@simulated_only
def test_a_ready_module_costs_no_transfer(on_device: ModuleType) -> None:
    assert on_device.training()["transfers of a second bring"] == 0


def test_sampling_needs_no_more_room_than_the_largest_module(on_device: ModuleType) -> None:
    found = on_device.sampling()
    assert found["peak"] <= found["largest module"]
    assert found["devices after"] == found["devices before"]


@simulated_only
def test_sampling_out_of_memory_leaves_every_module_in_its_place(on_device: ModuleType) -> None:
    found = on_device.out_of_memory()
    assert found["error"] == "OutOfMemoryError"
    assert found["devices after"] == found["devices before"] == [DEVICE.type, "cpu", "cpu"]
    assert found["weights are the same"]


def test_a_sample_is_the_cpus_and_modules_return(on_device: ModuleType, tmp_path: Path) -> None:
    """`WanModelSampler` with a tiny model whose low-noise expert is on the device."""
    found = on_device.sampler(tmp_path)
    assert found["residents"] == sorted([["cpu", DEVICE.type], [DEVICE.type, "cpu"]])
    assert found["devices after"] == found["devices before"]
    assert found["modes are the same"]
    assert found["mean difference to the CPU"] < 1


def test_a_run_keeps_only_the_expert_of_the_step_on_the_device(
    on_device: ModuleType, tmp_path: Path
) -> None:
    """The VAE has left after encoding. Adapters, optimizer state and averages stay on the device,
    since the plan parks them only where memory is short."""
    found = on_device.run(tmp_path)
    assert found["automatic device"] == str(DEVICE)
    assert found["devices before the first step"] == ["cpu", "cpu", "cpu"]
    # The low-noise expert is there after its step, so it is not asked to move at first.
    assert found["moves"] == [[], [("high", DEVICE.type)], [], [("low", DEVICE.type)]]
    assert found["devices"] == ["cpu", DEVICE.type]
    assert found["adapter devices"] == [DEVICE.type] * 2
    assert found["optimizer devices"] == [[DEVICE.type]] * 2
