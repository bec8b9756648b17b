"""A real OneTrainer for the tests that need one: `make test ONETRAINER=PATH`."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from support.onetrainer_runs import Lab, python_of
from support.tiny_models import TinyModels

from onewan.onetrainer.install import install


@pytest.fixture(scope="session")
def lab(real_checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A copy of the checkout with the add-on in it."""
    copy = tmp_path_factory.mktemp("onetrainer") / "OneTrainer"
    subprocess.run(["git", "clone", "-q", str(real_checkout), str(copy)], check=True)
    install(copy)
    with closing(Lab(copy, python_of(real_checkout))) as found:
        yield found


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    """Returns the folder of a tiny model of a variant."""
    return TinyModels(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two real clips and a picture."""
    good = Path(__file__).parents[3] / "shared" / "clips" / "good"
    if not good.is_dir():
        pytest.skip("needs ../shared/clips")
    folder = tmp_path_factory.mktemp("clips")
    for name in ("rabbit_stretches.mp4", "rabbit_crawls_out.mp4", "rabbit_portrait.png"):
        shutil.copy(good / name, folder)
        shutil.copy((good / name).with_suffix(".txt"), folder)
    return folder
