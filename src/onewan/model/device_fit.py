"""Whether a device has the dtypes that a model is to have there, told before anything is loaded."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import torch

from onewan.devices import kind_of, supports
from onewan.dtypes import WeightStorage, from_safetensors_name, torch_dtype
from onewan.errors import ConfigError
from onewan.formats.model_folder import ComponentDescription, ComponentName
from onewan.formats.weights import ComponentFile

_OTHERS = "set it to bf16, int8 or nf4"


def check_dtypes(
    device: torch.device,
    dtype: str,
    storage: WeightStorage,
    described: Mapping[ComponentName, ComponentDescription],
    needed: Collection[str],
) -> None:
    """ConfigError with all dtypes that `device` has not, of a model whose weights are in `dtype`
    (PyTorch's name) or packed as `storage` says, by the headers of the components `needed`."""
    files = {name: found.file for name, found in described.items() if name in needed}
    if problems := [*_problems(device, dtype, storage, files)]:
        raise ConfigError("run file", problems)


def _problems(
    device: torch.device,
    dtype: str,
    storage: WeightStorage,
    files: Mapping[str, ComponentFile | None],
) -> Iterator[str]:
    where = f"{device} ({kind_of(device)}) has no"
    if not supports(device, torch_dtype(dtype)):
        yield f"model.dtype: {where} {dtype} here; set it to float32"
    if storage == "fp8" and not supports(device, from_safetensors_name("F8_E4M3")):
        yield f"memory.weights: {where} fp8; {_OTHERS}"
    if storage == "as_stored":
        for name, file in files.items():
            entries = () if file is None else file.entries.values()
            kept = {entry.info.dtype for entry in entries if entry.packing == "fp8"}
            if file and not all(supports(device, from_safetensors_name(name)) for name in kept):
                is_kept = f"as_stored keeps model.{name} in fp8, as {file.path} has it"
                yield f"memory.weights: {is_kept}, and {where} fp8; {_OTHERS}"
