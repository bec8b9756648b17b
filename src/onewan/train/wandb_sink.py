"""Sends a run's curves and sample videos to Weights & Biases (W&B), if the run file asks for it.

The package wandb is imported only then. `check_wandb` refuses early what would fail, or ask for an
account on the terminal, after hours of encoding.
"""

# What wandb's annotations say depends on its version.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import importlib
import queue
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from onewan.config.schema import ResolvedRun
from onewan.errors import ConfigError
from onewan.files import replacing
from onewan.runs.events import Event, Sampled, StepDone, Validated
from onewan.runs.layout import RunLayout, displayed
from onewan.train.curves import curve_values

_INIT_SECONDS = 60
"""How long the first event may wait for W&B's server; training goes on without it then."""
_FINISH_SECONDS = 300
"""How long the end of a run may wait for it, which sends what was not yet sent."""


def check_wandb(config: ResolvedRun) -> None:
    """ConfigError if the run file asks for W&B and its package or an account is missing."""
    section = config.logging.wandb
    if section is None:
        return
    wandb = _package()
    # With no key, wandb would ask for one on the terminal.
    if section.mode == "online" and not wandb.api.api_key:
        problem = (
            "logging.wandb: no W&B account is set up on this machine; run `wandb login`, set the "
            "environment variable WANDB_API_KEY, or set logging.wandb.mode to offline"
        )
        raise ConfigError("run file", [problem])


def _package() -> Any:
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        problem = (
            f"logging.wandb: needs the package wandb ({error}); install it with `pip install "
            "wandb`, or set logging.wandb to false"
        )
        raise ConfigError("run file", [problem]) from error


class WandbSink:
    """The curves of each expert by step (`onewan.train.curves`), and the sample videos.

    A resumed run continues the same run of W&B, whose id is kept in the run's folder. A thread of
    its own talks to W&B: training must not wait for the network.
    """

    label = "W&B"
    required = False

    def __init__(
        self, config: ResolvedRun, layout: RunLayout, notify: Callable[[str], object]
    ) -> None:
        """`notify` is called, by `write`, with a line that says where the curves are."""
        self._config = config
        self._layout = layout
        self._notify = notify
        self._events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._begin = time.monotonic()
        self._place: str | None = None
        """Where the curves are, once the run of W&B is open."""
        self._is_open = False
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._work, name="onewan-wandb", daemon=True)
        self._thread.start()

    def write(self, event: Event) -> None:
        if self._error is not None:
            raise self._error
        if not self._is_open and time.monotonic() - self._begin > _INIT_SECONDS:
            raise TimeoutError(f"no answer of its server in {_INIT_SECONDS} s")
        self._say_where()
        if isinstance(event, StepDone | Validated | Sampled):
            self._events.put(event)

    def close(self) -> None:
        """Send what is left. TimeoutError if that takes too long."""
        self._events.put(None)
        opening = max(0.0, _INIT_SECONDS - (time.monotonic() - self._begin))
        self._thread.join(_FINISH_SECONDS if self._is_open else opening)
        self._say_where()
        if self._error is not None:
            self._notify(f"W&B: failed ({self._error})")
        elif self._thread.is_alive():
            raise TimeoutError("its server does not answer")

    def _say_where(self) -> None:
        if self._place is not None:
            place, self._place = self._place, None
            self._notify(place)

    def _work(self) -> None:
        try:
            run = self._open()
            self._is_open = True
            while (event := self._events.get()) is not None:
                # "step" is the axis of all curves. W&B's own counter can't be used: it takes no
                # step twice, while a run that was killed repeats those after its last saved state.
                run.log(_values(event))
            run.finish()
        except Exception as error:  # noqa: BLE001  (reported by the next call of `write`)
            self._error = error

    def _open(self) -> Any:
        wandb, section = _package(), self._config.logging.wandb
        assert section is not None
        if section.mode == "online":
            _reach(wandb.api.settings("base_url"))
        run = wandb.init(
            project=section.project,
            entity=section.entity,
            name=section.name or self._config.output.name,
            mode=section.mode,
            id=_run_id(self._layout.wandb / "id.txt"),
            resume="allow" if section.mode == "online" else None,  # `wandb sync` joins by the id
            dir=str(self._layout.root),
            config=self._config.model_dump(mode="json"),
            settings=wandb.Settings(silent=True, console="off"),
        )
        run.define_metric("step", hidden=True)
        run.define_metric("*", step_metric="step")
        if section.mode == "online":
            self._place = f"W&B: {run.url}"
        else:
            folder = displayed(Path(run.dir).parent)
            self._place = f"W&B: offline; send the curves later with: wandb sync {folder}"
        return run


def _reach(url: str) -> None:
    """OSError if there is no server at `url`. `wandb.init` would wait for it without end, and so
    would Python's exit."""
    try:
        urllib.request.urlopen(url, timeout=_INIT_SECONDS / 2).close()
    except urllib.error.HTTPError:  # it has answered
        return
    except OSError as error:
        raise OSError(f"{url} can't be reached: {getattr(error, 'reason', error)}") from error


def _values(event: Event) -> dict[str, Any]:
    """What W&B gets of an event."""
    if isinstance(event, Sampled):
        format = event.file.suffix.lstrip(".")
        video = _package().Video(str(event.file), caption=event.prompt, format=format)
        return {"step": event.step, f"samples/{event.file.stem}": video}
    assert isinstance(event, StepDone | Validated)
    return {"step": event.step, **curve_values(event)}


def _run_id(file: Path) -> str:
    """The id in `file`, or a new one that is written there."""
    if file.is_file():
        return file.read_text(encoding="utf-8").strip()
    file.parent.mkdir(parents=True, exist_ok=True)
    new = uuid.uuid4().hex[:12]
    with replacing(file) as temporary:
        temporary.write_text(f"{new}\n", encoding="utf-8")
    return new
