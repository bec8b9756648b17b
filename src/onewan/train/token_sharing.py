"""Sequence parallelism in a run: whether its model and its clips allow it, and its beginning."""

from __future__ import annotations

from collections.abc import Sequence

from onewan.config.schema import ResolvedRun
from onewan.data.clip import Clip
from onewan.errors import ConfigError
from onewan.model.transformer import WanTransformer
from onewan.parallel.sequence import SequenceParallel
from onewan.train.memory import bucket_of
from onewan.train.run import Run

_FIELD = "parallel.sequence_parallel"


def check_heads(heads: int, sequence: int) -> None:
    """ConfigError if `sequence` processes can't share the attention heads of the model."""
    if heads % sequence:
        have = "1 attention head" if heads == 1 else f"{heads} attention heads"
        raise ConfigError(
            "run file",
            [
                f"{_FIELD}: {sequence} processes can't share the {have} of this model equally; "
                "choose a number that divides them, and give a step as many clips as are needed "
                "then (train.accumulation), or start fewer processes"
            ],
        )


def check_tokens(config: ResolvedRun, clips: Sequence[Clip], sequence: int) -> None:
    """ConfigError if one of the clips has fewer tokens than there are processes to share them."""
    variant = config.model.facts()
    for clip in clips:
        bucket = bucket_of(clip)
        if (tokens := bucket.tokens(variant)) < sequence:
            raise ConfigError(
                "run file",
                [
                    f"{_FIELD}: {sequence} processes can't share the {tokens} tokens of "
                    f"{clip.name} ({bucket}); choose a smaller number, or larger clips"
                ],
            )


def share_tokens(run: Run) -> None:
    """Let the processes of `run` that have the same clips share their tokens, if there are any."""
    if run.tokens.count == 1:
        return
    group = run.group.sharing_clips(run.ranks.rank)
    for name in run.group.experts:
        transformer = run.state.experts[name].transformer
        assert isinstance(transformer, WanTransformer)  # as `onewan.model.load` returns it
        transformer.sharing = SequenceParallel(ranks=run.ranks, group=group)
