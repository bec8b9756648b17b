"""`division_of`: how the run of a run file is divided among processes. Pure."""

from __future__ import annotations

from onewan.config.method import FineTuneMethod
from onewan.config.optimizer import AdamWOffloadOptimizer
from onewan.config.resolve import trained_experts
from onewan.config.schema import RunConfig
from onewan.errors import ConfigError
from onewan.parallel.division import Division, divide


def division_of(config: RunConfig, ranks: int) -> Division:
    """What each of `ranks` processes does in the run `config`.

    ConfigError, with all problems, if the run file asks for what so many processes can't do.
    """
    try:
        division = divide(
            [expert.name for expert in trained_experts(config)],
            ranks,
            config.parallel.experts,
            shared=any(embedding.train for embedding in config.embeddings),
        )
    except ValueError as error:
        problem = f"parallel.experts: can't be side_by_side: {error}; choose auto"
        raise ConfigError("run file", [problem]) from error
    parts = division.parts
    clips = config.train.batch_size * config.train.accumulation
    problems = list[str]()
    if parts > clips:
        have = "1 clip" if clips == 1 else f"{clips} clips"
        problems.append(
            f"train.accumulation: a step has {have} (train.batch_size times train.accumulation), "
            f"which {parts} processes can't share; give a step at least {parts} clips, or start "
            "fewer processes"
        )
    if parts > 1 and isinstance(config.method, FineTuneMethod) and config.method.fused_step:
        problems.append(
            "method.fused_step: updates weights in the backward pass, before the gradients of "
            f"{parts} processes are summed; set it to false, or start one process per expert"
        )
    if parts > 1 and isinstance(config.optimizer, AdamWOffloadOptimizer):
        problems.append(
            f"optimizer.name: {config.optimizer.name!r} copies gradients to host memory in the "
            f"backward pass, before those of {parts} processes are summed; choose adamw or "
            "adamw_8bit, or start one process per expert"
        )
    if problems:
        raise ConfigError("run file", problems)
    return division
