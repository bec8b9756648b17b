"""The sample videos of a run by prompt and step, and those of several runs side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from onewan.report.parts import text
from onewan.report.record import RunRecord, SampleVideo
from onewan.report.steps import number
from onewan.report.videos import PageVideos, VideoChoice, first_and_last_first, some_steps
from onewan.variants import VARIANTS

MOST_STEPS = 24
"""Videos of one prompt; browsers play about 75 at once, those of phones fewer."""
_MOST_PROMPTS = 40


def report_samples(record: RunRecord, folder: Path, choice: VideoChoice) -> Iterator[str]:
    """The samples of one run: a row for each prompt, with the steps from left to right."""
    yield '<section id="samples"><h2>Samples</h2>'
    if not record.samples:
        asked = record.setting("sample.prompts")
        yield f"<p>{'No sample is there yet.' if asked else 'The run makes no samples.'}</p>"
        yield "</section>"
        return
    rows = _rows(record.samples)
    shown = {
        place: _at(videos, some_steps([video.step for video in videos], MOST_STEPS))
        for place, videos in list(rows.items())[:_MOST_PROMPTS]
    }
    chosen = first_and_last_first([video for videos in shown.values() for video in videos])
    page = PageVideos(choice, folder, chosen)
    yield f"<p>{text(page.note)}</p>"
    if len(rows) > _MOST_PROMPTS:
        yield f"<p>The first {_MOST_PROMPTS} of {len(rows)} prompts are shown.</p>"
    for place, videos in shown.items():
        yield from _row(page, place, videos, len(rows[place]), frames_per_second(record))
    yield "</section>"


def frames_per_second(record: RunRecord) -> float:
    """Those of the sample videos of a run."""
    given = number(record.setting("sample.fps"))
    if given > 0:
        return given
    variant = record.setting("model.variant")
    return VARIANTS[variant].fps if variant in VARIANTS else 16.0


def _rows(samples: Sequence[SampleVideo]) -> dict[str, list[SampleVideo]]:
    """The videos by their number among the prompts, or by a prompt that was given while the run
    trained; each in the order of steps."""
    rows: dict[str, list[SampleVideo]] = {}
    for sample in sorted(samples, key=lambda each: (each.number.zfill(12), each.step)):
        row = f"requested: {sample.prompt}" if sample.is_requested else sample.number
        rows.setdefault(row, []).append(sample)
    return rows


def _at(videos: Sequence[SampleVideo], steps: Sequence[int]) -> list[SampleVideo]:
    return [video for video in videos if video.step in set(steps)]


def _row(
    page: PageVideos, place: str, videos: Sequence[SampleVideo], available: int, fps: float
) -> Iterator[str]:
    # A prompt may have been changed when the run was resumed: the newest one is named.
    prompt = videos[-1].prompt or f"prompt {place}"
    how = " (with distilled LoRAs)" if videos[-1].is_distilled else ""
    yield '<div class="prompt together">'
    yield f"<h3>{text(prompt)}{how}</h3>"
    if len(videos) < available:
        yield f'<p class="soft">{len(videos)} of {available} steps are shown.</p>'
    yield f'<div class="controls" data-name="{text(prompt)}" data-fps="{fps:g}"></div>'
    yield '<div class="strip" tabindex="0" role="group" aria-label="videos by step">'
    for video in videos:
        caption = f"step {video.step:,}" if video.step else "base model (step 0)"
        yield from page.html(video, caption, f"{prompt}, {caption}")
    yield "</div></div>"


def compared_samples(
    records: Sequence[RunRecord], names: Sequence[str], folder: Path, choice: VideoChoice
) -> Iterator[str]:
    """The samples of several runs: for each prompt and step, those of all runs beside each other,
    with the last step that they have in common open."""
    yield '<section id="samples"><h2>Samples</h2>'
    prompts = _prompts(records)
    if not prompts:
        yield "<p>None of the runs has a sample yet.</p></section>"
        return
    page = PageVideos(choice, folder, _by_importance(prompts))
    yield f"<p>{text(page.note)}</p>"
    for (prompt, is_distilled), by_step in prompts.items():
        how = " (with distilled LoRAs)" if is_distilled else ""
        yield '<div class="prompt together">'
        yield f"<h3>{text(prompt)}{how}</h3>"
        fps = frames_per_second(records[0])
        yield f'<div class="controls" data-name="{text(prompt)}" data-fps="{fps:g}"></div>'
        opened = _opened(by_step)
        for step, videos in by_step.items():
            label = f"step {step:,}" if step else "base model (step 0)"
            yield f"<details{' open' if step == opened else ''}><summary>{label}</summary>"
            yield '<div class="beside">'
            for index, name in enumerate(names):
                if index in videos:
                    yield from page.html(videos[index], name, f"{prompt}, {name}, {label}")
                else:
                    yield '<figure class="cell"><p class="gone">No sample of this step.</p>'
                    yield f"<figcaption>{text(name)}</figcaption></figure>"
            yield "</div></details>"
        yield "</div>"
    yield "</section>"


_Steps = dict[int, dict[int, SampleVideo]]
"""Videos by step, ascending, and by the index of their run."""


def _prompts(records: Sequence[RunRecord]) -> dict[tuple[str, bool], _Steps]:
    """The samples by prompt: runs may have the same ones in another order."""
    found: dict[tuple[str, bool], _Steps] = {}
    for index, record in enumerate(records):
        for video in record.samples:
            key = (video.prompt or f"prompt {video.number}", video.is_distilled)
            if key in found or len(found) < _MOST_PROMPTS:
                found.setdefault(key, {}).setdefault(video.step, {})[index] = video
    return {
        key: {step: by_step[step] for step in some_steps(sorted(by_step), MOST_STEPS)}
        for key, by_step in found.items()
    }


def _opened(by_step: _Steps) -> int:
    """The last of the steps that most runs have."""
    most = max(len(videos) for videos in by_step.values())
    return max(step for step, videos in by_step.items() if len(videos) == most)


def _by_importance(prompts: dict[tuple[str, bool], _Steps]) -> list[SampleVideo]:
    every = [
        video for by in prompts.values() for videos in by.values() for video in videos.values()
    ]
    opened = [video for by_step in prompts.values() for video in by_step[_opened(by_step)].values()]
    return list(dict.fromkeys([*opened, *first_and_last_first(every)]))
