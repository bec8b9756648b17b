"""Captions that are empty, shared by several files, or longer than the text encoder reads."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

from onewan.config.schema import ResolvedRun
from onewan.data.clip import Clip
from onewan.doctor.finding import Finding
from onewan.documents import shortened
from onewan.errors import CheckpointError
from onewan.variants import TEXT_LENGTH

_NAMED = 3
"""Files named in a finding about several."""
_SHARED_NAMED = 5
"""Captions shared by several files that are named one by one."""
_LETTERS_PER_TOKEN = 4
"""Of words in the Latin alphabet, about; UMT5's vocabulary holds the common words whole."""

Counter = Callable[[str], int]


def caption_findings(clips: Sequence[Clip], config: ResolvedRun) -> Iterator[Finding]:
    """What the user should know about the captions of `clips`."""
    files = {clip.path: clip for clip in clips}  # several clips of a file have the same captions
    for path, clip in files.items():
        if not any(clip.captions):
            text = "its caption is empty, so it is trained without text"
            yield Finding(severity="note", kind="empty caption", path=path, text=text)
    yield from _shared(files)
    yield from _too_long(files, config)


def _shared(files: dict[Path, Clip]) -> Iterator[Finding]:
    groups: dict[tuple[str, ...], list[Path]] = {}
    for path, clip in files.items():
        groups.setdefault(clip.captions, []).append(path)
    shared = [(texts, paths) for texts, paths in groups.items() if len(paths) > 1 and any(texts)]
    for texts, paths in shared[:_SHARED_NAMED]:
        names = ", ".join(path.name for path in paths[:_NAMED])
        more = f" and {len(paths) - _NAMED} others" if len(paths) > _NAMED else ""
        yield Finding(
            severity="note",
            kind="shared caption",
            text=f"{len(paths)} files have the same caption, '{shortened(texts[0])}': "
            f"{names}{more}",
        )
    if (others := len(shared) - _SHARED_NAMED) > 0:
        text = f"{others} other captions are those of several files each"
        yield Finding(severity="note", kind="shared caption", text=text)


def _too_long(files: dict[Path, Clip], config: ResolvedRun) -> Iterator[Finding]:
    lengths = CaptionLengths(config)
    for path, clip in files.items():
        if note := lengths.note(max(clip.captions, key=len)):
            yield Finding(severity="note", kind="long caption", path=path, text=note)


class CaptionLengths:
    """Which captions are longer than the text encoder reads; counted by the run's tokenizer if that
    is on this machine, else estimated."""

    def __init__(self, config: ResolvedRun) -> None:
        self._config = config

    def note(self, text: str) -> str | None:
        """What the user should know about the length of `text`; None if it is not too long."""
        # A token is a character at least, and the beginning of a word may be one of its own.
        if len(text) + len(text.split()) < TEXT_LENGTH:
            return None
        counter = self._counter
        count = counter(text) if counter else estimated_tokens(text)
        if count <= TEXT_LENGTH:
            return None
        about = "" if counter else "about "
        source = "" if counter else " (an estimate: the tokenizer is not on this machine)"
        return (
            f"a caption has {about}{count} tokens{source}; the text encoder reads the first "
            f"{TEXT_LENGTH}, so shorten it"
        )

    @cached_property
    def _counter(self) -> Counter | None:
        return _counter(self._config)


def estimated_length_note(text: str) -> str:
    """What the user should know about the length of captions, one a line; "" if none is too long.
    For a text that is being typed: nothing is loaded for it."""
    longest = max(estimated_tokens(line) for line in text.split("\n"))
    if longest <= TEXT_LENGTH:
        return ""
    return f"about {longest} tokens; the text encoder reads the first {TEXT_LENGTH}"


def estimated_tokens(text: str) -> int:
    """About how many tokens UMT5's tokenizer makes of `text`."""
    count = 1  # the end of the text
    for word in re.findall(r"[^\W_]+|[^\w\s]", text):
        latin = sum(ord(letter) < 0x250 for letter in word)
        # Chinese and Japanese have no spaces between words, which have two characters or so.
        count += -(-latin // _LETTERS_PER_TOKEN) + round(0.6 * (len(word) - latin))
    return count


def _counter(config: ResolvedRun) -> Counter | None:
    """Counts tokens by the run's own tokenizer; None if it is not on this machine."""
    try:
        path = _local_tokenizer(config)
        if path is None:
            return None
        # Here, since transformers takes seconds to import, and few data sets have such captions.
        from onewan.model.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(path)
    except CheckpointError:  # reported when the run starts; here an estimate will do
        return None
    return lambda text: len(tokenizer(text).input_ids)


def _local_tokenizer(config: ResolvedRun) -> Path | None:
    """Where the run's tokenizer is, without a download."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    from onewan.formats.model_folder import find_components

    given = config.model.sources()
    for component in ("tokenizer", "text_encoder", "path"):
        if component not in given:
            continue
        path = Path(given[component]).expanduser()
        if not path.exists():
            try:
                path = Path(snapshot_download(given[component], local_files_only=True))
            except (LocalEntryNotFoundError, HFValidationError, OSError):
                continue
        found = find_components(path)
        return found.get("tokenizer") or found.get("text_encoder") or path
    return None
