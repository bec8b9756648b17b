"""Full fine-tuning of streamed blocks: the bits of a fused step with everything on the device."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from support.accelerator import DEVICE, IS_SIMULATED, MEMORY, checked, simulated_only
from support.adapters import inputs
from support.optimizers import CHOICES, PER_WEIGHT, build, through_a_file, uncompiled
from support.streamed import assert_missing_call_is_caught, stream_blocks
from support.tiny_models import in_bfloat16, tiny_transformer
from torch import Tensor

from onewan.adapters.weights import train_weights
from onewan.config.optimizer import SgdOptimizer
from onewan.errors import TrainingError
from onewan.memory import copiers
from onewan.memory.activations import KeptActivations
from onewan.memory.block_backward import BlockComputation
from onewan.memory.block_runner import CheckpointedBlocks
from onewan.memory.block_weights import BlockWeights
from onewan.memory.copy_queue import StreamQueue
from onewan.memory.host_memory import HostMemory
from onewan.memory.residency import DeviceResidency
from onewan.memory.streamed_transformer import StreamedTransformer
from onewan.memory.streaming import BlockStream
from onewan.model.forward import predict_velocity
from onewan.model.transformer import WanTransformer
from onewan.train.optimizers.block_updates import BlockUpdates
from onewan.train.optimizers.library import with_tensors
from onewan.train.optimizers.parameters import ParameterGroup
from onewan.train.optimizers.per_weight import PerWeightOptimizer
from onewan.train.rounding import Rounding

if IS_SIMULATED:
    import simulated_gpu

__all__ = ["uncompiled"]
pytestmark = pytest.mark.usefixtures("accelerator")
LAYERS = 5
MORE_CHOICES = {**CHOICES, "sgd without momentum": SgdOptimizer(lr=0.3, momentum=0.0)}
HALF = {"stochastic", "kahan"}


@pytest.fixture(scope="module")
def base() -> Any:
    return tiny_transformer(LAYERS)


class FineTune:
    """Training of all weights of the blocks, and of one outside of them."""

    def __init__(
        self,
        base: Any,
        name: str = "adamw",
        rounding: Rounding = "stochastic",
        *,
        resident: int | None = None,
        copier: str = "pinned",
        device: torch.device = DEVICE,
    ) -> None:
        """`resident`: streamed, with that many resident blocks; None: all on the device."""
        self.device = device
        self.dtype = torch.bfloat16 if rounding in HALF else torch.float32
        self.model = in_bfloat16(base) if rounding in HALF else copy.deepcopy(base)
        names = [
            n for n, _ in self.model.named_parameters() if n.startswith(("blocks", "proj_out"))
        ]
        precision: Any = rounding if rounding in HALF else "float32"
        self.parameters = train_weights(self.model, names, precision)
        self.inputs = [tensor.to(device) for tensor in inputs()]
        self.stream: BlockStream | None = None
        if resident is None:
            self.model.to(device)
        else:
            host = HostMemory(device, pinned=copier == "pinned")
            blocks = list(self.model.blocks)
            weights = BlockWeights.take(blocks, host, trained=True)
            self.stream = BlockStream(device, host=host)
            stream_blocks(self.model, self.stream)
            self.placement = StreamedTransformer(
                self.model, weights, self.stream, resident=resident
            )
        group = ParameterGroup(
            names=tuple(self.parameters), parameters=tuple(self.parameters.values()), lr=0.01
        )
        built = build([group], MORE_CHOICES[name], rounding=rounding, fused=True, seed=3)
        assert isinstance(built, PerWeightOptimizer)
        self.optimizer = built
        if self.stream is not None:
            weights.training = BlockUpdates(self.optimizer, blocks, device, self.stream.settle)
            self.residency = DeviceResidency(device)
            self.residency.manage(self.model, self.optimizer, placement=self.placement)
            self.residency.bring(self.model)

    def train(self, steps: range) -> list[Tensor]:
        x, t, text = self.inputs
        losses = []
        for number in steps:
            step = self.optimizer.begin_step(number, 1.0)
            loss = predict_velocity(self.model, x, t, text, dtype=self.dtype).square().mean()
            loss.backward()
            losses += [loss.detach(), step.clip_grad_norm(None)]
            step.apply()
        return losses

    def weights(self) -> dict[str, Tensor]:
        if self.stream is not None:
            self.stream.settle()
        return {name: p.detach().cpu().clone() for name, p in self.parameters.items()}


def assert_equal(one: Any, two: Any) -> None:
    """All tensors in two containers have the same bits."""
    assert type(one) is type(two)
    if isinstance(one, Tensor):
        if hasattr(one, "__tensor_flatten__"):
            names, _ = one.__tensor_flatten__()
            for name in names:
                assert_equal(getattr(one, name), getattr(two, name))
        else:
            assert one.dtype == two.dtype and torch.equal(one.cpu(), two.cpu())
    elif isinstance(one, dict):
        assert one.keys() == two.keys()
        for key, value in one.items():
            assert_equal(value, two[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(two)
        for a, b in zip(one, two, strict=True):
            assert_equal(a, b)
    else:
        assert one == two


def assert_trained_alike(one: FineTune, two: FineTune, steps: range) -> None:
    assert_equal(one.train(steps), two.train(steps))
    assert_equal(one.weights(), two.weights())
    assert_equal(one.optimizer.state_dict(), two.optimizer.state_dict())


@pytest.mark.parametrize(
    ("name", "rounding"),
    [*((name, "kahan") for name in PER_WEIGHT), ("adamw", "none"), ("low_bit_8", "stochastic")],
)
def test_streamed_fine_tuning_has_the_bits_of_a_fused_step(base, name, rounding) -> None:
    resident = FineTune(base, name, rounding)
    streamed = FineTune(base, name, rounding, resident=1)
    assert_trained_alike(resident, streamed, range(3))


@pytest.mark.parametrize("copier", ["pinned", "staged"])
@pytest.mark.parametrize("resident", [0, 2, LAYERS])
def test_no_access_is_unordered(base, resident, copier, monkeypatch) -> None:
    monkeypatch.setattr(copiers, "PIECE_SIZE", 4096)
    plain = FineTune(base, rounding="kahan")
    expected = plain.train(range(3))
    with checked():
        streamed = FineTune(base, rounding="kahan", resident=resident, copier=copier)
        result = streamed.train(range(3))
        weights = streamed.weights()
    assert_equal(result, expected)
    assert_equal(weights, plain.weights())
    assert streamed.stream is not None and streamed.stream.misses == 0
    streamed.stream.close()


@pytest.mark.parametrize("keep_attention", [False, True])
def test_a_block_that_is_differentiated_in_parts_is_updated_once(base, keep_attention) -> None:
    """Its gradients are complete only after the last of its parts."""
    plain = FineTune(base, rounding="kahan")
    streamed = FineTune(base, rounding="kahan", resident=1)
    assert streamed.stream is not None
    for one in (plain, streamed):
        one.model.__class__ = WanTransformer
        for block in one.model.blocks:
            block.__dict__.pop("forward", None)  # that of `stream_blocks`
    plain.model.enable_gradient_checkpointing()
    plain.model.train()
    streamed.model.train()
    streamed.model.block_runner = CheckpointedBlocks(
        blocks=list(streamed.model.blocks),
        store=KeptActivations(DEVICE, lambda size: HostMemory(DEVICE).allocate(size).tensor),
        weights=streamed.stream,
        computation=BlockComputation(keep_attention=keep_attention),
    )
    assert_trained_alike(plain, streamed, range(3))
    # In chunks the feed-forward layer's gradients are sums of several.
    streamed.model.block_runner.computation = BlockComputation(chunks=3)
    losses = streamed.train(range(3, 5))
    assert all(loss.isfinite() for loss in losses)


@simulated_only
def test_weights_and_state_travel_once_and_nothing_waits(base) -> None:
    """Per step: 2 (S - ring) loads of weights, one of each block's state, and both back once."""
    streamed = FineTune(base, rounding="kahan", resident=1)
    assert streamed.stream is not None
    streamed.train(range(2))
    stream = streamed.stream
    trained = stream._trained[streamed.placement.weights]
    sizes = [state.layout.size for state in trained._states if state is not None]
    assert len(sizes) == LAYERS
    # Two float32 moments and a bfloat16 rest beside a bfloat16 weight.
    assert sizes[0] == pytest.approx(5 * streamed.placement.weights.size(0), rel=0.25)
    to_device, to_host = stream.bytes_to_device, stream.bytes_to_host
    simulated_gpu.reset_counters()
    streamed.train(range(2, 3))
    weights = streamed.placement.weights
    assert stream.bytes_to_host - to_host == sum(sizes) + weights.total_size
    loads = 2 * (LAYERS - 1 - 2)
    assert stream.bytes_to_device - to_device == sum(sizes) + loads * weights.size(0)
    counted = simulated_gpu.counters()
    assert counted["from_device_pinned"][1] == stream.bytes_to_host - to_host
    assert not [kind for kind in counted if kind.startswith("wait")]


@simulated_only  # which allocates exactly what it is asked for
def test_device_memory_is_that_of_a_few_blocks(base) -> None:
    """Of weights, states and gradients together, at any time of a step."""
    gc.collect()
    start = MEMORY.memory_allocated()
    streamed = FineTune(base, rounding="none", resident=0)
    assert streamed.stream is not None
    streamed.train(range(2))
    used = MEMORY.memory_allocated() - start
    block = streamed.placement.weights.size(0)
    in_blocks = {id(tensor) for tensor in streamed.placement.weights.tensors()}
    tensors = [*streamed.model.parameters(), *streamed.model.buffers(), *streamed.inputs]
    outside = sum(t.nbytes for t in tensors if id(t) not in in_blocks)
    small = 300 * 512  # norms of gradients, moments outside of the blocks
    alive: list[int] = []
    for parameter in streamed.parameters.values():
        parameter.register_post_accumulate_grad_hook(
            lambda _: alive.append(
                sum(p.grad is not None for b in streamed.model.blocks for p in b.parameters())
            )
        )
    streamed.train(range(2, 3))
    in_a_block = len(list(streamed.model.blocks[0].parameters()))
    assert 0 < max(alive) <= in_a_block
    # The ring, and two states of two float32 moments each.
    buffers = streamed.stream.device_bytes
    assert buffers == pytest.approx(2 * block + 2 * 2 * block, rel=0.02)
    assert buffers + outside <= used <= buffers + outside + small


@pytest.mark.parametrize("name", ["adamw", "low_bit_8", "adamw_schedule_free"])
def test_a_resumed_run_has_the_same_bits_with_other_resident_blocks(base, name) -> None:
    first = FineTune(base, name, "kahan", resident=1)
    first.train(range(2))
    weights, state = first.weights(), through_a_file(first.optimizer.state_dict())
    for resident in (None, 0, 3):
        again = FineTune(base, name, "kahan", resident=resident)
        again.train(range(1))  # leads elsewhere, with weights and states on the device
        if again.stream is not None:
            again.stream.settle()
        with torch.no_grad():
            for key, parameter in again.parameters.items():
                parameter.copy_(weights[key])
        again.optimizer.load_state_dict(state)
        expected = FineTune(base, name, "kahan")
        expected.train(range(2))
        assert_trained_alike(expected, again, range(2, 4))


def test_the_state_of_streamed_weights_is_saved_from_where_it_is(base) -> None:
    def addresses(one: FineTune) -> tuple[list[int], Any]:
        state = one.optimizer.state_dict()
        found: list[int] = []
        with_tensors(state, lambda tensor: found.append(tensor.data_ptr()) or tensor)
        return found, state  # which keeps the memory of copies

    streamed, plain = FineTune(base, rounding="kahan", resident=0), FineTune(base, rounding="kahan")
    for one in (streamed, plain):
        one.train(range(1))
    first, again = addresses(streamed), addresses(streamed)
    in_blocks = sum(map(int.__eq__, first[0], again[0]))
    # Three tensors of each weight but those outside of the blocks: two moments and the residual.
    assert in_blocks >= 3 * sum(len(list(b.parameters())) for b in streamed.model.blocks)
    copies, others = addresses(plain), addresses(plain)
    assert not any(map(int.__eq__, copies[0], others[0]))


def test_averages_are_put_into_streamed_weights_and_taken_out_again(base) -> None:
    plain = FineTune(base, "adamw_schedule_free", "stochastic")
    streamed = FineTune(base, "adamw_schedule_free", "stochastic", resident=1)
    assert_trained_alike(plain, streamed, range(2))
    x, t, text = (tensor.to(DEVICE) for tensor in inputs())
    outputs = []
    for one in (plain, streamed):
        with one.optimizer.evaluating(), torch.no_grad():
            outputs.append(predict_velocity(one.model, x, t, text, dtype=one.dtype))
    assert torch.equal(outputs[0], outputs[1])
    assert_trained_alike(plain, streamed, range(2, 3))


def test_streamed_fine_tuning_on_the_cpu_has_the_same_bits(base) -> None:
    cpu = torch.device("cpu")
    resident = FineTune(base, "adamw", "stochastic", device=cpu)
    streamed = FineTune(base, "adamw", "stochastic", resident=1, device=cpu)
    assert_trained_alike(resident, streamed, range(3))


def test_an_optimizer_that_makes_new_state_is_refused(base) -> None:
    streamed = FineTune(base, rounding="none", resident=0)
    streamed.train(range(1))
    training = streamed.placement.weights.training
    assert training is not None
    plain = training.update

    def update(index: int) -> None:
        plain(index)
        for managed in streamed.optimizer.parameters:
            if "exp_avg" in managed.state:
                managed.state["exp_avg"] = managed.state["exp_avg"].clone()

    training.update = update  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(TrainingError, match="makes new state tensors"):
        streamed.train(range(1, 2))


def test_trained_weights_can_not_be_mapped(base) -> None:
    with pytest.raises(ValueError, match="masters"):
        BlockWeights.take(
            list(copy.deepcopy(base).blocks), HostMemory(DEVICE), mapped=True, trained=True
        )


@simulated_only
@pytest.mark.parametrize(
    ("owner", "method", "caller", "copier"),
    [
        (StreamQueue, "copy_out_after", "store", "pinned"),
        (StreamQueue, "copy_out_after", "_copy_out", "staged"),
        (StreamQueue, "compute_after", "_to_host", "pinned"),
        (StreamQueue, "compute_after", "wait_until_stored", "pinned"),
        (StreamQueue, "compute_after", "wait_until_loaded", "pinned"),
        (StreamQueue, "copied_out", "store", "pinned"),
        (StreamQueue, "copied_out", "_copy_out", "staged"),
        (StreamQueue, "copy_in_after", "load", "pinned"),
        (StreamQueue, "host_after", "settle", "pinned"),
        (copiers.Piece, "wait_until_copied", "_empty", "staged"),
    ],
)
def test_a_missing_wait_is_caught(base, monkeypatch, owner, method, caller, copier) -> None:
    monkeypatch.setattr(copiers, "PIECE_SIZE", 4096)

    def exercise() -> tuple[list[Tensor], list[str]]:
        with simulated_gpu.sanitizer() as found, simulated_gpu.late_copies():
            result: list[Tensor] = []
            # One with state, and one without, whose blocks nothing else orders.
            for name, resident in (("adamw", 1), ("sgd without momentum", LAYERS)):
                streamed = FineTune(base, name, resident=resident, copier=copier)
                result += streamed.train(range(2))
                result += streamed.weights().values()
                assert streamed.stream is not None
                streamed.stream.close()
        return result, list(found)

    assert_missing_call_is_caught(monkeypatch, exercise, owner, method, caller)
