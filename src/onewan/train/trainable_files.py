"""The files of a trainable in a training state, whole or sharded.

One process writes a file for each of weights, moving average and optimizer. Processes that have
shards write these with torch.distributed.checkpoint, as safetensors files in the folder
``NAME.shards`` (`HuggingFaceStorageWriter`: a pickle could run code), and the first of them writes
what else the optimizer has. Either can be read by any number of processes: each gets its own rows.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onewan.train.saved_state import (
    SavedOptimizer,
    check_finite_weights,
    read_optimizer,
    read_weights,
    reading,
    write_optimizer,
    write_weights,
)
from onewan.train.sharding import Sharding

_WEIGHTS, _AVERAGES, _RESIDUALS, _STATES = "weights", "averages", "residuals", "states"
"""What the names of sharded tensors begin with."""


def write_trainable(
    folder: Path,
    name: str,
    weights: Mapping[str, Tensor],
    averages: Mapping[str, Tensor] | None,
    optimizer: SavedOptimizer,
    sharding: Sharding | None,
) -> None:
    """Write the files of the trainable `name`. Where weights are sharded, all processes that have
    shards call this. OSError if a file can't be written."""
    if sharding is None:
        write_weights(folder / f"{name}.safetensors", weights)
        write_optimizer(folder / f"{name}_optimizer.pt", optimizer)
        if averages is not None:
            write_weights(folder / f"{name}_ema.safetensors", averages)
        return
    tensors: dict[str, Any] = {f"{_WEIGHTS}/{key}": value for key, value in weights.items()}
    tensors |= {f"{_AVERAGES}/{key}": value for key, value in (averages or {}).items()}
    tensors = {
        key: _sharded(sharding, key.partition("/")[2], value) for key, value in tensors.items()
    }
    entries = {
        key: _without_shards(sharding, key, entry, tensors)
        for key, entry in optimizer.weights.items()
    }
    _write_shards(_shards_of(folder, name), tensors, sharding)
    if sharding.group.ranks.rank == sharding.group.members[0]:
        rest = SavedOptimizer(optimizer=optimizer.optimizer, weights=entries)
        write_optimizer(folder / f"{name}_optimizer.pt", rest)


def saved_weights(folder: Path, name: str, sharding: Sharding | None) -> dict[str, Tensor]:
    """This process's rows of the trained weights. DamagedStateError if they can't be read."""
    return _tensors(folder, name, "", _WEIGHTS, sharding) or {}


def saved_averages(
    folder: Path, name: str, sharding: Sharding | None, *, required: bool
) -> dict[str, Tensor] | None:
    """The same of the moving average; None if there is none and it is not `required`."""
    return _tensors(folder, name, "_ema", _AVERAGES, sharding, required=required)


def saved_optimizer(folder: Path, name: str, sharding: Sharding | None) -> SavedOptimizer:
    """The same of the optimizer's state."""
    saved = read_optimizer(folder / f"{name}_optimizer.pt")
    entries: dict[Any, Any] = dict(saved.weights)
    shards = _shards_of(folder, name)
    if shards.is_dir():
        found = _read_shards(shards, (_STATES, _RESIDUALS), sharding)
        with reading(folder / f"{name}_optimizer.pt"):
            for key, tensor in found.items():
                kind, _, place = key.partition("/")
                if kind == _RESIDUALS:
                    entries[place] = {**entries[place], "rest": tensor}
                    continue
                place, _, part = place.rpartition("/")
                state = {**entries[place]["state"], part: tensor}
                entries[place] = {**entries[place], "state": state}
    if sharding is not None:
        with reading(folder / f"{name}_optimizer.pt"):
            entries = {key: sharding.local_entry(key, value) for key, value in entries.items()}
    return SavedOptimizer(optimizer=saved.optimizer, weights=entries)


def _tensors(
    folder: Path,
    name: str,
    suffix: str,
    kind: str,
    sharding: Sharding | None,
    *,
    required: bool = True,
) -> dict[str, Tensor] | None:
    shards = _shards_of(folder, name)
    if shards.is_dir():
        found = _read_shards(shards, (kind,), sharding)
        tensors = {key.partition("/")[2]: value for key, value in found.items()}
        check_finite_weights(shards, tensors)
        return tensors or (None if not required else {})
    file = folder / f"{name}{suffix}.safetensors"
    if not required and not file.exists():
        return None
    tensors = read_weights(file)
    if sharding is None:
        return tensors
    return {key: sharding.local(key, tensor) for key, tensor in tensors.items()}


def _shards_of(folder: Path, name: str) -> Path:
    return folder / f"{name}.shards"


def _sharded(sharding: Sharding, name: str, value: Tensor) -> Any:
    shape = sharding.shapes.get(name)
    return value if shape is None else sharding.group.sharded(value, shape)


def _without_shards(
    sharding: Sharding, name: str, entry: Mapping[str, Any], tensors: dict[str, Any]
) -> dict[str, Any]:
    """A weight's entry in an optimizer's state without what is sharded, which goes to `tensors`."""
    shape = sharding.shapes.get(name)
    if shape is None:
        return dict(entry)
    own = list(entry["shape"])
    state = dict(entry["state"])
    for key, value in entry["state"].items():
        if isinstance(value, Tensor) and list(value.shape) == own:
            tensors[f"{_STATES}/{name}/{key}"] = sharding.group.sharded(state.pop(key), shape)
    if entry["rest"] is not None:
        tensors[f"{_RESIDUALS}/{name}"] = sharding.group.sharded(entry["rest"], shape)
    return {**entry, "shape": list(shape), "state": state, "rest": None}


def _write_shards(folder: Path, tensors: Mapping[str, Any], sharding: Sharding) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        with sharding.group.communicating(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.save(
                dict(tensors), storage_writer=writer, process_group=sharding.group.process_group
            )
    except CheckpointException as error:
        reasons = "; ".join(
            f"{each[0]}" if isinstance(each, tuple) else f"{each}"
            for each in error.failures.values()
        )
        raise OSError(f"{folder}: can't be written; is the disk full? ({reasons})") from error


def _read_shards(
    folder: Path, kinds: tuple[str, ...], sharding: Sharding | None
) -> dict[str, Tensor]:
    """This process's rows of the tensors of `kinds` in `folder`, by their names there."""
    import torch.distributed.checkpoint as dcp

    with reading(folder), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it runs in a single process
        reader = dcp.HuggingFaceStorageReader(str(folder))
        wanted = dict[str, Any]()
        found: dict[str, Any] = dict(reader.read_metadata().state_dict_metadata)
        for key, tensor in found.items():
            kind, _, place = key.partition("/")
            if kind in kinds:
                name = place.rpartition("/")[0] if kind == _STATES else place
                wanted[key] = _empty(sharding, name, tensor.size, tensor.properties.dtype)
        if sharding is None:
            dcp.load(wanted, storage_reader=reader, no_dist=True)
        else:
            with sharding.group.communicating():
                dcp.load(wanted, storage_reader=reader, process_group=sharding.group.process_group)
    return {
        key: each.to_local() if hasattr(each, "to_local") else each for key, each in wanted.items()
    }


def _empty(sharding: Sharding | None, name: str, shape: torch.Size, dtype: torch.dtype) -> Any:
    """A tensor of the weight `name` to load into, of this process's rows where it is sharded."""
    if sharding is None or name not in sharding.shapes:
        return torch.empty(shape, dtype=dtype)
    whole = torch.empty(shape, dtype=dtype, device="meta")
    local = torch.empty(sharding.local(name, whole).shape, dtype=dtype)
    return sharding.group.sharded(local, shape)
