"""`onewan cache --stats` and `--prune`: what a cache's folder holds, and removing what no run
needs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from onewan.arithmetic.byte_sizes import format_bytes
from onewan.cli.importing import run_file_of
from onewan.cli.output import complain, say
from onewan.config.load import load_run
from onewan.config.schema import ResolvedRun
from onewan.data.cache import EntryCache
from onewan.data.cache_use import KindUse, Needed, PartKind, cache_use, prune, total
from onewan.data.dataset import needed
from onewan.errors import ConfigError
from onewan.model.sources import ENCODERS, locate
from onewan.runs.layout import displayed
from onewan.train.run import sample_requests

_NAMES: dict[PartKind, str] = {
    "video": "clips",
    "condition": "conditions",
    "text": "captions",
    "mask": "masks",
    "preview": "small frames",
    "remote": "copies of remote files",
    "shards": "unpacked archives",
    "sheet": "pages of contact sheets",
}
_ALWAYS_SHOWN = ("video", "text", "mask", "preview")


def show_stats(runs: Sequence[Path], overrides: Sequence[str]) -> int:
    """Prints what the cache of the run files holds, and how much of it they use."""
    cache, _, use = _examined(runs, overrides)
    say(f"cache {displayed(cache.folder)}, and what {_of(runs)} of it")
    for kind, name in _NAMES.items():
        if kind in _ALWAYS_SHOWN or use[kind].number:
            say(_line(name, use[kind]))
    say(_line("together", total(use)))
    return 0


def prune_cache(runs: Sequence[Path], overrides: Sequence[str], *, yes: bool) -> int:
    """Deletes what none of the run files needs, after asking."""
    cache, used, use = _examined(runs, overrides)
    everything = total(use)
    number = everything.number - everything.needed_number
    if not number:
        say(f"cache {displayed(cache.folder)}: everything in it is needed")
        return 0
    for kind, name in _NAMES.items():
        if unneeded := use[kind].number - use[kind].needed_number:
            size = format_bytes(use[kind].bytes - use[kind].needed_bytes)
            complain(f"{name}: {unneeded} of {use[kind].number} are not needed ({size})")
    size = format_bytes(everything.bytes - everything.needed_bytes)
    if not yes and not _agrees(cache, runs, number, size):
        complain("nothing was deleted")
        return 0
    deleted = prune(cache, used)
    folder = displayed(cache.folder)
    say(f"cache {folder}: deleted {deleted} of {everything.number} items ({size})")
    return 0


def _examined(
    runs: Sequence[Path], overrides: Sequence[str]
) -> tuple[EntryCache, Needed, dict[PartKind, KindUse]]:
    """The cache that the run files share, what they need of it, and what it holds."""
    configs = [load_run(run_file_of(run), overrides) for run in runs]
    folders = dict.fromkeys(config.video_data.cache_dir for config in configs)
    if len(folders) > 1:
        names = ", ".join(str(displayed(folder)) for folder in folders)
        raise ConfigError(
            "video_data.cache_dir",
            [f"is not the same in all run files ({names}); name those of one"],
        )
    cache = EntryCache(next(iter(folders)))
    used = Needed.by_any(_needed(config) for config in configs)
    return cache, used, cache_use(cache, used)


def _needed(config: ResolvedRun) -> Needed:
    texts = {text for s in sample_requests(config) for text in (s.prompt, s.negative_prompt)}
    return needed(
        config,
        locate(config.model.sources(), ENCODERS).paths,
        extra_prompts=sorted(texts),
        encode_text_online=bool(config.embeddings),
    )


def _of(runs: Sequence[Path]) -> str:
    return f"{runs[0]} uses" if len(runs) == 1 else f"these {len(runs)} run files use"


def _line(name: str, use: KindUse) -> str:
    return (
        f"  {name}: {use.number} ({format_bytes(use.bytes)}), "
        f"{use.needed_number} used ({format_bytes(use.needed_bytes)})"
    )


def _agrees(cache: EntryCache, runs: Sequence[Path], number: int, size: str) -> bool:
    if not sys.stdin.isatty():
        raise ConfigError("--prune", ["asks before it deletes; add --yes in a script"])
    other = "" if len(runs) > 1 else " Name all run files that share it."
    complain(
        f"Delete {number} items ({size}) of {displayed(cache.folder)}, which are not needed by "
        f"{', '.join(map(str, runs))}?{other} [y/N]"
    )
    return sys.stdin.readline().strip().lower() in ("y", "yes")
