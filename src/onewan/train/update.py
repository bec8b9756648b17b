"""`Updater`: the optimizer over one part's weights, whatever its kind, precision and moment.

With one optimizer over all weights it is a thin layer. Where each weight moves by itself, within
the backward pass (fused) or in float32 although it is stored in less (rounding), each has an
optimizer of its own; the numbers are the same.

A state is kept by the weights' names: what the optimizer keeps for the weight, and what has changed
in its group since it was built. So the settings of a resumed run are those of its run file, and a
state fits with or without the fused step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from onewan.config.optimizer import AdamW8bitOptimizer, Optimizer
from onewan.errors import ConfigError
from onewan.seeds import derive_seed
from onewan.train.optim import averages_itself, build_optimizer, needs_all_weights
from onewan.train.rounding import split, stochastic_round_

Rounding: TypeAlias = Literal["none", "stochastic", "kahan"]

_BASE_LR = "base_lr"
"""Entry of a group with its learning rate before the factor of the schedule."""
_GIVEN = frozenset({"params", "lr", _BASE_LR})
"""Entries of a group that are never part of a state."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterGroup:
    """Weights that share a learning rate."""

    names: tuple[str, ...]
    """One for each weight; no two weights of an `Updater` share one. States go by them."""
    parameters: tuple[nn.Parameter, ...]
    lr: float
    """The full rate; each step multiplies it by a factor."""


@dataclass(slots=True, kw_only=True)
class _Member:
    """One weight and what moves it."""

    name: str
    parameter: nn.Parameter
    subject: Tensor
    """What the optimizer moves: the weight itself, a float32 stand-in that has numbers only while
    it moves, or a copy in host memory."""
    optimizer: torch.optim.Optimizer
    """What holds the state of `subject`."""
    group: dict[str, Any]
    rest: Tensor | None = None
    """What rounding took off the weight (Kahan), in the weight's dtype."""

    on_host: bool = False
    """Whether `subject` is a copy that stays in host memory."""

    @property
    def stands_in(self) -> bool:
        """Whether `subject` has numbers only while it moves."""
        return self.subject is not self.parameter and not self.on_host

    @property
    def state(self) -> dict[str, Any]:
        """What the optimizer keeps for this weight; empty before the first step."""
        return self.optimizer.state.get(self.subject, {})


class Updater:
    """Moves the weights of one part (`name`) as the run file's `optimizer` section says.

    `rounding` is for weights in bfloat16 (Kahan's also float16): they move in float32 and are
    written back so that small updates survive; float32 weights among them simply move. `fused`
    moves each weight as soon as its gradient is complete, in the backward pass, and drops the
    gradient. `seed` is the run's; draws depend on it, `name`, the weight's name and the step.

    ConfigError if the optimizer can't do what is asked.
    """

    def __init__(
        self,
        groups: Sequence[ParameterGroup],
        choice: Optimizer,
        *,
        rounding: Rounding = "none",
        fused: bool = False,
        seed: int = 0,
        name: str = "high",
    ) -> None:
        weights = [p for group in groups for p in group.parameters]
        names = [n for group in groups for n in group.names]
        if not weights or len(names) != len(weights) or len(set(names)) != len(names):
            raise ValueError("an Updater needs weights, each with a name of its own")
        if not any(map(_is_low, weights)):
            rounding = "none"
        _check(choice, weights, rounding, fused)
        self._choice, self._rounding, self._fused = choice, rounding, fused
        self._seed, self._name = seed, name
        self._whole: torch.optim.Optimizer | None = None
        """The optimizer over all weights, where they don't move one by one."""
        if fused or rounding != "none":
            self._members = [
                self._alone(own, parameter, group.lr)
                for group in groups
                for own, parameter in zip(group.names, group.parameters, strict=True)
            ]
        else:
            self._whole, self._members = _together(groups, choice, name)
        self._groups = {id(m.group): m.group for m in self._members}
        self._built = {key: _changing(group) for key, group in self._groups.items()}
        self._step: int | None = None
        self._factor = 1.0
        self._norms: dict[str, Tensor] = {}  # of gradients that the fused step has used
        self._host_copies_are_old = True
        if fused:
            for member in self._members:
                member.parameter.register_post_accumulate_grad_hook(self._hook(member))

    @property
    def lr(self) -> float:
        """The first group's learning rate now, times what the optimizer itself found (Prodigy)."""
        group = self._members[0].group
        return group[_BASE_LR] * self._factor * group.get("d", 1.0)

    def begin(self, step: int, factor: float) -> None:
        """Before the backward pass of `step`: the rates are those of the groups times `factor`."""
        self._step, self._factor = step, factor
        self._norms.clear()
        for group in self._groups.values():
            rate = group[_BASE_LR] * factor
            if isinstance(group["lr"], Tensor):  # torchao's, so that it is not compiled in
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        if self._choice.name == "adamw_cpu_offload" and self._host_copies_are_old:
            # The weights may have been read from a file since the copies were made.
            for member in self._members:
                if member.on_host:
                    member.subject.data.copy_(member.parameter.data)
            self._host_copies_are_old = False

    @torch.no_grad()
    def norm(self, limit: float | None) -> Tensor:
        """The norm of all gradients, 0-d float32; if it is above `limit` they are scaled to it.

        After a fused step they are used up: it is their norm, and a limit is a ValueError.
        """
        if self._fused:
            if limit is not None:
                raise ValueError("a fused step can't limit the norm of all gradients")
            used = [self._norms[m.name] for m in self._members if m.name in self._norms]
            return nn.utils.get_total_norm(used)
        gradients = [m.parameter.grad for m in self._members if m.parameter.grad is not None]
        norm = nn.utils.get_total_norm([_norm(gradient) for gradient in gradients])
        if limit is not None:
            nn.utils.clip_grads_with_norm_([m.parameter for m in self._members], limit, norm)
            self._limit_on_host()
        return norm

    @torch.no_grad()
    def step(self) -> None:
        """Move the weights, those that a fused step has not moved yet, and drop the gradients."""
        if self._step is None:
            raise RuntimeError("begin() comes before step()")
        if self._whole is not None:
            self._whole.step()
        else:
            for member in self._members:
                # Also those without a gradient: their groups' counters go on with every step.
                if member.name not in self._norms:
                    self._move(member)
        for member in self._members:
            member.parameter.grad = None
        self._step = None

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """The weights to use, where they are not those to train (schedule-free optimizers).

        Afterwards the weights to train are back to the bit, which the library's own way back is
        not: they are kept in host memory meanwhile. Does nothing for other optimizers.
        """
        if not averages_itself(self._choice):
            yield
            return
        kept = [m.parameter.detach().to("cpu", copy=True) for m in self._members]
        try:
            self._average()
            yield
        finally:
            with torch.no_grad():
                for member, values in zip(self._members, kept, strict=True):
                    member.parameter.copy_(values)

    def to(self, device: torch.device) -> None:
        """Move what is kept for the weights, not the weights; the numbers stay the same."""
        for member in self._members:
            if member.on_host:
                continue
            if member.rest is not None:
                member.rest = member.rest.to(device)
            state = member.state
            for key, value in state.items():
                if not hasattr(value, "is_paged"):  # bitsandbytes pages those to the GPU itself
                    state[key] = self._placed(member, key, value, device, copy=False)

    def state_dict(self) -> dict[str, Any]:
        """Copies in host memory and plain containers, for torch.save and weights_only loading."""
        cpu = torch.device("cpu")
        return {
            member.name: {
                "shape": list(member.parameter.shape),
                "state": _copied(member.state, cpu),
                "group": _copied(self._evolved(member.group), cpu),
                "rest": _copied(member.rest, cpu),
            }
            for member in self._members
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take over a state, to the bit; call it after the weights have been read.

        ValueError if it is not one of these weights. What Kahan's rounding took off is 0 where the
        state has none, and is dropped if this run rounds in another way.
        """
        own = {member.name: member for member in self._members}
        if saved.keys() != own.keys():
            odd = sorted(saved.keys() ^ own.keys())
            side = "the state" if odd[0] in saved else "this run"
            raise ValueError(f"the state is of other weights: {odd[0]} is only in {side}")
        for name, member in own.items():
            shape = tuple(member.parameter.shape)
            if tuple(saved[name]["shape"]) != shape:
                raise ValueError(
                    f"{name}: the state is of shape {saved[name]['shape']}, not {shape}"
                )
        for key, group in self._groups.items():
            for entry in group.keys() - _GIVEN - self._built[key].keys():
                del group[entry]
            group.update(_copied(self._built[key], None))
        for name, member in own.items():
            entry = saved[name]
            device = torch.device("cpu") if member.on_host else member.parameter.device
            member.group.update(_copied(entry["group"], device))
            if entry["state"]:
                member.optimizer.state[member.subject] = {
                    key: self._placed(member, key, value, device, copy=True)
                    for key, value in entry["state"].items()
                }
            else:
                member.optimizer.state.pop(member.subject, None)
            if member.rest is not None and entry["rest"] is not None:
                member.rest.copy_(entry["rest"])
        self._host_copies_are_old = True

    def _alone(self, name: str, parameter: nn.Parameter, lr: float) -> _Member:
        """A weight with an optimizer of its own."""
        low = self._rounding != "none" and _is_low(parameter)
        subject = nn.Parameter(_nothing(parameter.shape, parameter.device)) if low else parameter
        optimizer = build_optimizer([_group([subject], lr, self._name)], self._choice)
        return _Member(
            name=name,
            parameter=parameter,
            subject=subject,
            optimizer=optimizer,
            group=optimizer.param_groups[0],
            rest=torch.zeros_like(parameter) if low and self._rounding == "kahan" else None,
        )

    def _placed(
        self, member: _Member, key: str, value: Any, device: torch.device, *, copy: bool
    ) -> Any:
        """Entry `key` of a state on `device`, unless it is one that stays in host memory."""
        group = member.group
        if key == "step" and not (group.get("fused") or group.get("capturable")):
            return _copied(value, torch.device("cpu"), copy=copy)  # counted there, as torch does
        if (
            isinstance(self._choice, AdamW8bitOptimizer)
            and self._choice.paged
            and device.type == "cuda"
            and key in {"state1", "state2"}
        ):
            library: Any = member.optimizer
            like = torch.zeros((), device=device).expand(value.shape)
            return library.get_state_buffer(like, dtype=value.dtype).copy_(value)
        return _copied(value, device, copy=copy)

    def _limit_on_host(self) -> None:
        """Gradients that an offloading optimizer's hooks have taken before they were limited."""
        for member in self._members:
            if member.on_host and member.parameter.grad is not None:
                torch.cuda.synchronize(member.parameter.device)  # the hooks' copies are under way
                assert member.subject.grad is not None
                member.subject.grad.copy_(member.parameter.grad)

    @torch.no_grad()
    def _average(self) -> None:
        """Put a schedule-free optimizer's averages into the weights."""
        if self._whole is not None:
            units = [(self._whole, self._members)]
        else:
            units = [(member.optimizer, [member]) for member in self._members]
        for optimizer, members in units:
            with _filled(members):
                schedule_free: Any = optimizer  # `eval` and `train` are not torch's
                schedule_free.eval()
                averages = [  # in host memory: a second set of weights may not fit on the device
                    (m.parameter, m.subject.detach().to("cpu", m.parameter.dtype, copy=True))
                    for m in members
                ]
                schedule_free.train()  # needs the numbers too, so it can't wait for the end
            for parameter, average in averages:
                parameter.copy_(average)

    def _evolved(self, group: dict[str, Any]) -> dict[str, Any]:
        """Entries of `group` that are no longer what they were when it was built."""
        built = self._built[id(group)]
        return {
            key: value
            for key, value in group.items()
            if key not in _GIVEN
            and (key not in built or isinstance(value, Tensor) or value != built[key])
        }

    def _hook(self, member: _Member) -> Callable[[Tensor], None]:
        def move(parameter: Tensor) -> None:
            if self._step is None:
                raise RuntimeError("begin() comes before the backward pass of a fused step")
            if member.name in self._norms:
                raise RuntimeError("a fused step takes one backward pass; this is another")
            assert parameter.grad is not None  # it has just been accumulated
            self._norms[member.name] = _norm(parameter.grad)
            self._move(member)
            parameter.grad = None

        return move

    @torch.no_grad()
    def _move(self, member: _Member) -> None:
        """One step of a weight that has an optimizer of its own."""
        assert self._step is not None
        gradient = member.parameter.grad
        if not member.stands_in or gradient is None:
            member.optimizer.step()
            return
        with _filled([member]):
            # Only now: where the weight was when the stand-in was last empty may be another device,
            # and torch takes no gradient of another device.
            member.subject.grad = gradient.float()
            member.optimizer.step()
            moved = member.subject.detach()
            if member.rest is not None:
                high, rest = split(moved, member.parameter.dtype)
                member.parameter.copy_(high)
                member.rest.copy_(rest)
            else:
                generator = torch.Generator(moved.device).manual_seed(
                    derive_seed(self._seed, "rounding", self._name, member.name, self._step)
                )
                stochastic_round_(member.parameter.data, moved, generator)
        member.subject.grad = None


def _together(
    groups: Sequence[ParameterGroup], choice: Optimizer, part: str
) -> tuple[torch.optim.Optimizer, list[_Member]]:
    """One optimizer over all weights, and where it keeps what."""
    optimizer = build_optimizer([_group(g.parameters, g.lr, part) for g in groups], choice)
    copies: Mapping[Tensor, Tensor] = {}
    holders = [optimizer]
    if choice.name == "adamw_cpu_offload":
        offload: Any = optimizer  # its parts have no names in torch's base class
        copies = offload.param_d2h_map
        holders = [h for h in (*offload.optim_dict.values(), offload.d_opt) if h is not None]
    places = {
        id(parameter): (holder, group)
        for holder in holders
        for group in holder.param_groups
        for parameter in group["params"]
    }
    members = []
    for given in groups:
        for name, parameter in zip(given.names, given.parameters, strict=True):
            subject = copies.get(parameter, parameter)
            holder, group = places[id(subject)]
            members.append(
                _Member(
                    name=name,
                    parameter=parameter,
                    subject=subject,
                    optimizer=holder,
                    group=group,
                    on_host=subject is not parameter,
                )
            )
    return optimizer, members


def _group(parameters: Sequence[nn.Parameter], lr: float, part: str) -> dict[str, Any]:
    """A group for `build_optimizer`, of weights of the part of that name."""
    own = {"embeddings": True} if part == "embeddings" else {}
    return {"params": list(parameters), "lr": lr, _BASE_LR: lr, **own}


def _check(
    choice: Optimizer, weights: Sequence[nn.Parameter], rounding: Rounding, fused: bool
) -> None:
    """ConfigError if the optimizer or the weights can't do what is asked."""
    problems = []
    reason = needs_all_weights(choice)
    if reason is not None:
        asked = [f"method.weights: {rounding}"] if rounding != "none" else []
        asked += ["method.fused_step: true"] if fused else []
        problems += [
            f"{one} moves each weight by itself, and optimizer.name {choice.name!r} can't: "
            f"{reason}; take another optimizer, or "
            + ("method.weights: float32" if one.startswith("method.weights") else "leave it out")
            for one in asked
        ]
    odd = {p.dtype for p in weights if _is_low(p)} - {torch.bfloat16}
    if rounding == "stochastic" and odd:
        problems.append(
            f"method.weights: stochastic rounding is for bfloat16, and the weights are "
            f"{str(odd.pop()).removeprefix('torch.')}; take model.dtype bfloat16, or kahan"
        )
    if problems:
        raise ConfigError("run file", problems)


def _is_low(parameter: Tensor) -> bool:
    return parameter.dtype in {torch.bfloat16, torch.float16}


def _nothing(shape: torch.Size, device: torch.device) -> Tensor:
    """Float32 zeros of that shape that take no memory; not to be written to."""
    return torch.zeros((), device=device).expand(shape)


def _norm(gradient: Tensor) -> Tensor:
    """0-d float32, computed in float32 for every dtype."""
    return torch.linalg.vector_norm(gradient, dtype=torch.float32)


@contextmanager
def _filled(members: Sequence[_Member]) -> Iterator[None]:
    """Stand-ins have their weights' numbers meanwhile, and none afterwards."""
    stand_ins = [member for member in members if member.stands_in]
    for member in stand_ins:
        numbers = member.parameter.detach().float()
        member.subject.data = numbers if member.rest is None else numbers + member.rest
    try:
        yield
    finally:
        for member in stand_ins:
            member.subject.data = _nothing(member.parameter.shape, member.parameter.device)


def _changing(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copied(value, None) for key, value in group.items() if key not in _GIVEN}


def _copied(value: Any, device: torch.device | None, *, copy: bool = True) -> Any:
    """`value`, nested as it may be, with its tensors on `device` (None: where each is).

    Dtypes stay, which torch's own `load_state_dict` would cast to that of the weight.
    """
    if isinstance(value, Tensor):
        if is_traceable_wrapper_subclass(value):  # torchao's, which can't be cloned as a whole
            inner, context = value.__tensor_flatten__()
            parts = {name: _copied(getattr(value, name), device, copy=copy) for name in inner}
            return type(value).__tensor_unflatten__(parts, context, value.size(), value.stride())
        return value.detach().to(value.device if device is None else device, copy=copy)
    if isinstance(value, dict):
        return {key: _copied(entry, device, copy=copy) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(entry, device, copy=copy) for entry in value)
    return value
