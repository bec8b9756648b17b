"""Counts the bytes of all live tensors of a program, by device, without allocating them.

The program runs on fake tensors (`torch._subclasses.FakeTensorMode`): every operator computes
shapes, dtypes and devices only, so that a training step of a 14B model at its true size takes
seconds on a CPU. `LiveBytes` notes when each storage is created and when the last reference to it
is dropped, and so knows what `torch.cuda.max_memory_allocated` would report:

    with fake_device() as device, LiveBytes() as live:
        train_step(...)                       # creates all of its tensors here
    print(live.peak(device.type))
    for storage in live.at_peak(device.type)[:10]:
        print(storage.bytes, storage.operator, storage.place)

The device is the simulated accelerator `sim` of `tests/simulated_gpu`, so that tensors in host
memory and on the device have different devices, and streams and events work. Sizes are rounded up
to 512 bytes, as CUDA's allocator does. Not counted: the allocator's fragmentation, and what a
kernel allocates inside itself, but for the workspaces in `WORKSPACES`.

`true_size.py` counts the phases of a run with it.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from measuring import simulated_device
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ALLOCATION_BYTES = 512
"""CUDA's allocator rounds each request up to a multiple of this
(``c10/core/AllocatorConfig.h``, kMinBlockSize)."""

_LIBRARIES = tuple(
    str(Path(sys.modules[name].__file__ or "").parent) for name in ("torch",) if name in sys.modules
)


@dataclass(slots=True)
class Storage:
    """One allocation: its life and where it came from."""

    bytes: int
    """Rounded up to `ALLOCATION_BYTES`."""
    device: str
    """The device's type."""
    shape: tuple[int, ...]
    """Of the first tensor that used it."""
    dtype: torch.dtype
    operator: str
    """The operator that returned it, with the autograd node in a backward pass."""
    place: str
    """``file:line function`` of the nearest frame outside of PyTorch."""
    born: int
    """Index of the event at which it was allocated."""
    died: int | None = None
    """Index of the event at which it was freed; None while it is alive."""


def flash_backward_workspace(arguments: tuple[Any, ...]) -> tuple[int, ...]:
    """Bytes that flash attention's backward pass allocates inside itself.

    The float32 gradient of the queries, which blocks of keys add to, and one float32 a row and
    head; both with the number of queries rounded up to 128 and the head's size to 32
    (``aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp``, mha_bwd).
    """
    query_BHND = arguments[1]
    batch, heads, tokens, size = query_BHND.shape
    rows = batch * heads * (-(-tokens // 128) * 128)
    return rows * (-(-size // 32) * 32) * 4, rows * 4


WORKSPACES: dict[str, Callable[[tuple[Any, ...]], tuple[int, ...]]] = {
    "aten._scaled_dot_product_flash_attention_backward.default": flash_backward_workspace,
}
"""What large kernels allocate inside themselves, by operator."""


class LiveBytes(TorchDispatchMode):
    """Counts live bytes by device while it is active; see the module's docstring.

    With `workspaces`, what the kernels in `WORKSPACES` allocate inside themselves counts as alive
    together with their results. Tensors that existed before are counted once an operator returns
    them or `add` is called with them.
    """

    def __init__(self, *, workspaces: bool = True) -> None:
        super().__init__()
        self.storages: list[Storage] = []
        self._workspaces = workspaces
        self._live: dict[int, tuple[Storage, weakref.ref[Any]]] = {}
        self._current: dict[str, int] = {}
        self._events: list[tuple[str, int]] = []  # device, its live bytes after the event
        self._marks: list[tuple[str, int]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        del types
        result = func(*args, **(kwargs or {}))
        operator = str(func)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._track(leaf, operator)
        if self._workspaces and operator in WORKSPACES:
            device = next(x for x in tree_leaves(args) if isinstance(x, Tensor)).device.type
            sizes = [_rounded(size) for size in WORKSPACES[operator](args)]
            for size in sizes:
                born = self._event(device, size)
                self.storages.append(
                    Storage(
                        size, device, (size,), torch.uint8, f"inside {operator}", _place(), born
                    )
                )
            for storage in self.storages[-len(sizes) :]:
                storage.died = self._event(device, -storage.bytes)
        return result

    def add(self, *tensors: Tensor) -> None:
        """Count tensors that existed before this mode was active."""
        for tensor in tensors:
            self._track(tensor, "existed before")

    def mark(self, name: str) -> None:
        """Begin the part `name` of the program, whose peak `peaks` reports."""
        self._marks.append((name, len(self._events)))

    def current(self, device: str) -> int:
        """Bytes that are alive now on devices of this type."""
        return self._current.get(device, 0)

    def peak(self, device: str) -> int:
        """The highest number of bytes that were alive together on devices of this type."""
        return max((total for kind, total in self._events if kind == device), default=0)

    def peaks(self, device: str) -> dict[str, int]:
        """The peak within each part that `mark` began; parts of the same name together."""
        found: dict[str, int] = {}
        ends = [start for _, start in self._marks[1:]] + [len(self._events)]
        for (name, start), end in zip(self._marks, ends, strict=True):
            # What is alive at the beginning of a part counts, though nothing be allocated in it.
            before = next((t for kind, t in reversed(self._events[:start]) if kind == device), 0)
            totals = (total for kind, total in self._events[start:end] if kind == device)
            found[name] = max(found.get(name, 0), before, *totals, 0)
        return found

    def at_peak(self, device: str, part: str | None = None) -> list[Storage]:
        """What is alive at the peak (that of `part`, if given), largest first."""
        index = self._peak_index(device, part)
        alive = [
            s
            for s in self.storages
            if s.device == device and s.born <= index and (s.died is None or s.died > index)
        ]
        return sorted(alive, key=lambda storage: -storage.bytes)

    def _peak_index(self, device: str, part: str | None) -> int:
        spans = [(0, len(self._events))]
        if part is not None:
            ends = [start for _, start in self._marks[1:]] + [len(self._events)]
            marks = zip(self._marks, ends, strict=True)
            spans = [(max(start - 1, 0), end) for (name, start), end in marks if name == part]
        indices = (i for start, end in spans for i in range(start, end))
        of_device = (i for i in indices if self._events[i][0] == device)
        return max(of_device, key=lambda i: self._events[i][1], default=0)

    def _track(self, tensor: Tensor, operator: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live:
            self._resize(key, storage.nbytes())
            return
        kind = tensor.device.type
        if kind == "meta":
            return
        if (node := torch._C._current_autograd_node()) is not None:
            operator = f"{operator} in {node.name()}"
        size = _rounded(storage.nbytes())
        record = Storage(
            size, kind, tuple(tensor.shape), tensor.dtype, operator, _place(),
            self._event(kind, size),
        )  # fmt: skip
        self.storages.append(record)
        self._live[key] = (record, weakref.ref(storage, lambda _: self._free(key)))

    def _resize(self, key: int, size: int) -> None:
        record, _ = self._live[key]
        if (change := _rounded(size) - record.bytes) != 0:
            self._event(record.device, change)
            record.bytes += change

    def _free(self, key: int) -> None:
        record, _ = self._live.pop(key)
        record.died = self._event(record.device, -record.bytes)

    def _event(self, device: str, change: int) -> int:
        self._current[device] = self._current.get(device, 0) + change
        self._events.append((device, self._current[device]))
        return len(self._events) - 1


def _rounded(size: int) -> int:
    return -(-size // ALLOCATION_BYTES) * ALLOCATION_BYTES


def _place() -> str:
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if name != __file__ and not name.startswith((*_LIBRARIES, "<")):
            return f"{Path(name).name}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return ""


class _FusedRmsNorm(torch.autograd.Function):
    """The tensors of ``aten._fused_rms_norm``, which CUDA has and other devices take apart: it
    saves its input and one number for each row, and its backward pass allocates the gradients."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor | None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        rows = torch.empty(input.shape[:-1], device=input.device)
        ctx.save_for_backward(input, weight, rows)
        return torch.empty_like(input)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        input, weight, _ = ctx.saved_tensors
        assert grad.shape == input.shape
        if weight is None or not ctx.needs_input_grad[1]:
            return torch.empty_like(input), None
        return torch.empty_like(input), torch.empty_like(weight)


class _MovableFakes(FakeTensorMode):
    """A mode in which ``tensor.data = other`` may change the device of a fake tensor, as it may for
    real ones: onewan binds weights to buffers on the device, and back to host memory, that way."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten._has_compatible_shallow_copy_type.default:
            # Asked before the data is replaced. PyTorch then takes over everything except the
            # device, which is an attribute of the Python object.
            tensor, other = args
            tensor.fake_device = other.fake_device
            return True
        return super().__torch_dispatch__(func, types, args, kwargs)


@contextmanager
def fake_device(*, fused_kernels: bool = True) -> Iterator[torch.device]:
    """A context in which all tensors are fake; returns the accelerator to create them on.

    With `fused_kernels`, attention in half precision is flash attention's operator and RMSNorm is
    one kernel, as on CUDA and ROCm, and not what the simulated accelerator has for them.
    """
    device = simulated_device()
    swap = torch.utils.swap_tensors
    mode = _MovableFakes()

    def swap_tensors(one: Tensor, other: Tensor) -> None:
        # `Module.to` swaps fake parameters, which it refuses while a weak reference to one exists.
        # The only ones are those of this cache, whose entries are made again when needed.
        mode.fake_tensor_converter.meta_converter.tensor_memo.clear()
        swap(one, other)

    attention: Any = F.scaled_dot_product_attention

    def flash(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        inputs, kind = (query, key, value), query.device.type
        if kind == "sim" and torch.is_autocast_enabled(kind):
            inputs = tuple(tensor.to(torch.get_autocast_dtype(kind)) for tensor in inputs)
        if inputs[0].dtype == torch.float32 or args or kwargs.get("attn_mask") is not None:
            return attention(query, key, value, *args, **kwargs)
        operator = torch.ops.aten._scaled_dot_product_flash_attention
        return operator(*inputs, scale=kwargs.get("scale"))[0]

    rms_norm: Any = F.rms_norm

    def fused_rms_norm(
        input: Tensor, shape: list[int], weight: Tensor | None = None, eps: float | None = None
    ) -> Tensor:
        kind = input.device.type
        if kind != "sim":
            return rms_norm(input, shape, weight, eps)
        if torch.is_autocast_enabled(kind):  # which computes it in float32
            input, weight = input.float(), None if weight is None else weight.float()
        return _FusedRmsNorm.apply(input, weight)  # pyright: ignore[reportReturnType]

    torch.utils.swap_tensors = swap_tensors
    if fused_kernels:
        # Not by a mode for functions: those are off while a backward pass recomputes.
        F.scaled_dot_product_attention = flash
        F.rms_norm = fused_rms_norm
    try:
        with mode:
            yield device
    finally:
        torch.utils.swap_tensors = swap
        F.scaled_dot_product_attention = attention
        F.rms_norm = rms_norm
