"""The attention backend of a run: checked before loading, chosen before the first step, and kept.

Backends differ in the last bits, so a run keeps the one that it began with: it is saved with the
state, and a resumed run neither measures again nor takes another one.
"""

from __future__ import annotations

import torch

from onewan.config.schema import ResolvedRun
from onewan.data.clip import Clip
from onewan.devices import is_host
from onewan.dtypes import torch_dtype
from onewan.errors import ConfigError
from onewan.model.attention_backends import AttentionBackend, attention_backend, default_backend
from onewan.model.attention_choice import AttentionShape, Measured, fastest_backend, why_unusable
from onewan.runs.events import AttentionChosen
from onewan.train.run import Run
from onewan.train.saved_state import SavedAttention
from onewan.variants import Variant


def check_attention(config: ResolvedRun, device: torch.device, head_dim: int) -> None:
    """ConfigError if the backend that the run file names can't be used on `device`."""
    name = config.memory.attention
    if name == "auto":
        return
    dtype = torch_dtype(config.model.dtype)
    if reason := why_unusable(attention_backend(name), device, dtype, head_dim):
        message = (
            f"memory.attention: {name!r} can't be used on {device} in {config.model.dtype} with "
            f"{head_dim} channels per head ({reason}); choose auto"
        )
        raise ConfigError("run file", [message])


def first_attention(config: ResolvedRun, device: torch.device, head_dim: int) -> AttentionBackend:
    """The backend before `choose_attention`: the one that is named, or PyTorch's own choice."""
    if config.memory.attention != "auto":
        return attention_backend(config.memory.attention)
    return default_backend(device, torch_dtype(config.model.dtype), head_dim)


def choose_attention(run: Run) -> AttentionChosen:
    """Decide on the backend of `run`, use it and keep it in its state.

    It is the one that the run file names, or the one of the resumed state, or the fastest; on the
    CPU, PyTorch's own choice. The first process of a run chooses for all.
    """
    chosen = _chosen(run) if run.ranks.is_first else None
    name = run.ranks.from_first(None if chosen is None else chosen.backend.name)
    if chosen is None:
        assert name is not None
        chosen = Measured(backend=attention_backend(name))
    use_attention(run, chosen.backend)
    run.state.attention = SavedAttention(backend=chosen.backend.name, device=run.device.type)
    return AttentionChosen(
        backend=chosen.backend.name,
        milliseconds=chosen.milliseconds,
        unusable=chosen.unusable,
    )


def _chosen(run: Run) -> Measured:
    setting, kept = run.config.memory.attention, run.state.attention
    if setting != "auto":
        return Measured(backend=attention_backend(setting))
    if kept is not None:
        return Measured(backend=attention_backend(kept.backend))
    if is_host(run.device):
        return Measured(backend=_default(run))
    dtype = torch_dtype(run.config.model.dtype)
    return fastest_backend(run.device, dtype, _largest_shape(run))


def use_attention(run: Run, backend: AttentionBackend) -> None:
    """Let `run` and all of its transformers compute attention with `backend`."""
    run.attention = backend
    run.memory.use_attention(backend)


def resumed_attention(
    run: Run, saved: SavedAttention | None
) -> tuple[SavedAttention | None, str | None]:
    """What `run` continues with after a state that recorded `saved` (None: choose anew), and how
    that changes its results, if it does, in one line.

    On another type of device the results differ anyway, and the backend is chosen anew.
    """
    if saved is None:
        saved = SavedAttention(backend=_default(run).name, device=run.device.type)
    setting = run.config.memory.attention
    if saved.device != run.device.type:
        return None, None
    if setting not in ("auto", saved.backend):
        return None, f"memory.attention: was {saved.backend!r}, is {setting!r}"
    if reason := _why_missing(run, saved.backend):
        return None, f"memory.attention: was {saved.backend!r}, which can't be used here: {reason}"
    return saved, None


def _why_missing(run: Run, name: str) -> str | None:
    try:
        backend = attention_backend(name)
    except ConfigError as error:
        return "; ".join(error.problems)
    dtype = torch_dtype(run.config.model.dtype)
    return why_unusable(backend, run.device, dtype, _transformer_config(run)[1])


def _default(run: Run) -> AttentionBackend:
    dtype = torch_dtype(run.config.model.dtype)
    return default_backend(run.device, dtype, _transformer_config(run)[1])


def _transformer_config(run: Run) -> tuple[int, int]:
    """Heads, and channels of a head."""
    config = next(iter(run.state.experts.values())).transformer.config
    return config["num_attention_heads"], config["attention_head_dim"]


def _largest_shape(run: Run) -> AttentionShape:
    """The self-attention of the clip with the most tokens."""
    variant, batch = run.config.model.facts(), run.config.train.batch_size
    grids = (_token_grid(clip, variant) for clip in run.dataset.clips)
    frames, per_frame = max(grids, key=lambda grid: grid[0] * grid[1])
    heads, head_dim = _transformer_config(run)
    # Processes that share the tokens compute all of them, for some of the heads.
    heads //= run.division.sequence
    if not run.config.wan_config.use_temporal_attention:
        batch, frames = batch * frames, 1  # each frame attends to itself
    return AttentionShape(batch=batch, tokens=frames * per_frame, heads=heads, head_dim=head_dim)


def _token_grid(clip: Clip, variant: Variant) -> tuple[int, int]:
    """Latent frames, and tokens of each."""
    width, height = clip.size
    frames = (clip.frames - 1) // variant.temporal_compression + 1
    return frames, (width // variant.size_multiple) * (height // variant.size_multiple)
