"""The one table of data types agrees with PyTorch and with safetensors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from onewan.dtypes import (
    BYTES_PER_ELEMENT,
    FP8,
    WeightDtype,
    dtype_name,
    from_safetensors_name,
    safetensors_name,
    torch_dtype,
)


@pytest.mark.parametrize("name", BYTES_PER_ELEMENT)
def test_each_type_is_stored_by_safetensors_under_its_name_and_size(
    name: str, tmp_path: Path
) -> None:
    dtype = from_safetensors_name(name)
    assert dtype.itemsize == BYTES_PER_ELEMENT[name]
    assert safetensors_name(dtype) == name
    assert torch_dtype(dtype_name(dtype)) is dtype
    save_file({"a": torch.zeros(2, dtype=torch.uint8).to(dtype)}, tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert file.get_slice("a").get_dtype() == name
        assert file.get_tensor("a").dtype is dtype


def test_the_types_that_users_and_model_files_name_are_in_the_table() -> None:
    assert [torch_dtype(name) for name in get_args(WeightDtype)] == [
        torch.float32,
        torch.bfloat16,
        torch.float16,
    ]
    assert [from_safetensors_name(name) for name in FP8] == [
        torch.float8_e4m3fn,
        torch.float8_e5m2,
    ]


@pytest.mark.parametrize("name", ["float31", "Tensor", "complex64"])
def test_a_name_that_is_no_type_of_the_table_is_refused(name: str) -> None:
    with pytest.raises(KeyError, match=name):
        torch_dtype(name)


def test_the_names_are_known_without_torch() -> None:
    code = "import sys, onewan.dtypes; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
