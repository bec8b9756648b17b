"""The command caption: asks a server for the captions that clips lack, and reports once."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from onewan.captioning.captioner import Captioner, CaptionReport, as_data, problem_data
from onewan.captioning.prompts import TEMPLATES, Template
from onewan.captioning.server import Address, ChatServer, ServerFailure
from onewan.captioning.tasks import CaptionPlan, CaptionTask, TaskPlanner
from onewan.cli.importing import run_file_of
from onewan.cli.output import complain, say, write_json
from onewan.cli.progress import Progress
from onewan.config.clips import is_url
from onewan.config.load import RESOLVED_NAME, load_run, run_of_settings
from onewan.config.schema import ResolvedRun
from onewan.data.clip import ClipSource
from onewan.data.report import ClipProblem, count
from onewan.data.sources.read import kind_of
from onewan.doctor.captions import CaptionLengths
from onewan.documents import decode_text, text_problem
from onewan.errors import ConfigError, Interrupted
from onewan.files import read_input, remove_abandoned
from onewan.variants import VARIANTS

_MOST_PROMPT_BYTES = 64 << 10
_NAMED = 10
"""Models of the server, and files with the same note, that are named in a line."""


def caption(options: argparse.Namespace, key: str) -> int:
    """Write the captions; `key` is that of the server. Returns 0 if every clip has one now, else
    1."""
    template = _template(options)
    server = ChatServer(
        address=_address(options.server),
        model=options.model or "",
        key=key,
        timeout=options.timeout,
        retries=options.retries,
        max_tokens=options.max_tokens,
    )
    planner = TaskPlanner(
        config=_config(options.source, options.overrides),
        frames=options.frames,
        longest_side=options.frame_size,
        for_review=options.review,
    )
    plan = planner.plan()
    captioner = Captioner(
        server=server,
        template=template,
        trigger_word=options.trigger_word.strip(),
        parallel=options.parallel,
    )
    if template.needs_trigger_word and not all(captioner.trigger(task) for task in plan.tasks):
        raise ConfigError("--prompt", ["contains {trigger_word}: give one with --trigger-word"])
    if options.dry_run:
        return _dry_run(captioner, plan, as_json=options.json)
    # What a call left that was killed between writing a file and giving it its name.
    remove_abandoned(plan.folders)
    report, left = CaptionReport(), None
    try:
        if plan.tasks:
            _ask(captioner, plan, report, as_json=options.json)
    except (KeyboardInterrupt, OSError) as error:  # such as a full disk; reported at the end
        left = error
    report.problems[:0] = plan.problems
    notes = [*plan.notes, *_notes(report, planner.config)]
    if options.json:
        head = {"server": str(server.address), "model": server.model}
        counts = {"had_captions": plan.captioned, "given_by_sources": plan.given}
        write_json({**head, **counts, **as_data(report), "notes": notes})
    else:
        for line in _lines(plan, report, notes):
            say(line)
    if left is not None:
        raise Interrupted if isinstance(left, KeyboardInterrupt) else left
    return 0 if report.is_complete else 1


def _config(source: str, overrides: list[str]) -> ResolvedRun:
    """The run that `source` is, or one with the default settings and the clips in `source`."""
    path = Path(source)
    if is_url(source):
        problem = "is an address; captions are written beside clips on this machine"
        raise ConfigError(source, [problem])
    if not path.exists():
        problem = "there is no such file or folder; give a folder of clips, a table, or a run file"
        raise ConfigError(source, [problem])
    kind = path.suffix.lower()
    is_run_file = kind in (".yaml", ".yml") or (kind == ".json" and not _is_list(path))
    if (path.is_file() and is_run_file) or (path / RESOLVED_NAME).is_file():
        return load_run(run_file_of(path), overrides)
    if path.is_file() and kind_of(ClipSource(path=path)) == "auto":
        problem = "is neither a folder of clips nor a table of them (csv, tsv, jsonl, parquet)"
        raise ConfigError(source, [problem])
    settings = {
        "model": {"path": VARIANTS["t2v-a14b"].repository, "variant": "t2v-a14b"},
        # Without the cache, nothing but captions is written; clips of any size are captioned.
        "video_data": {
            "sources": [{"path": os.path.abspath(path)}],
            "cache": False,
            "min_resolution": [1, 1],
        },
    }
    return run_of_settings(settings, source, overrides)


def _is_list(file: Path) -> bool:
    """Whether a JSON file has a list, as OneTrainer's concepts are one; a run file has none."""
    with file.open("rb") as opened:
        return opened.read(100).lstrip(b"\xef\xbb\xbf \r\n\t").startswith(b"[")


def _template(options: argparse.Namespace) -> Template:
    """What the model is asked; ConfigError if the user's own text can't be used."""
    if options.prompt_file is not None:
        try:
            text = decode_text(read_input(options.prompt_file, _MOST_PROMPT_BYTES))
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise ConfigError(str(options.prompt_file), [f"can't be read: {reason}"]) from None
    elif options.prompt is not None:
        text = options.prompt
    else:
        return TEMPLATES[options.template]
    if not text.strip():
        raise ConfigError("--prompt", ["is empty; write what the model is to do"])
    if problem := text_problem(text):
        raise ConfigError("--prompt", [problem])
    return Template(text=text.strip())


def _address(url: str) -> Address:
    try:
        return Address.of(url)
    except ValueError as error:
        # Not the address itself, which may have a password in it.
        raise ConfigError("--server", [f"{error}, such as http://127.0.0.1:8000/v1"]) from None


def _only_model(models: list[str], address: Address) -> str:
    if len(models) != 1:
        what = f"{address} has {_few(models)}" if models else f"{address} lists no models"
        raise ConfigError("--model", [f"{what}; name one"])
    return models[0]


def _few(names: list[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} others" if more > 0 else "")


def _introduction(server: ChatServer, total: int) -> Iterator[str]:
    """What will be sent where."""
    yield f"{count(total, 'clip')} to caption by {server.model} at {server.address}"
    if not server.address.is_local:
        is_plain = server.address.scheme == "http"
        plain = f", without encryption{' (the key too)' if server.key else ''}" if is_plain else ""
        yield f"their frames are sent to {server.address.host}{plain}"


def _ask(captioner: Captioner, plan: CaptionPlan, report: CaptionReport, *, as_json: bool) -> None:
    """Run the captioner, with a display of how far it is unless stdout is for JSON."""
    server, total, shown = captioner.server, len(plan.tasks), list[str]()
    try:
        models = server.models()
    except ServerFailure as failure:
        raise ConfigError("--server", [str(failure)]) from None
    server.model = server.model or _only_model(models, server.address)
    for line in _introduction(server, total):
        complain(line) if as_json else say(line)
    if as_json:
        captioner.run(plan.tasks, report, lambda _: None)
    else:
        with Progress() as progress:

            def advance(done: int) -> None:
                # The first one as it is: a wrong request is seen before thousands are made.
                for first in report.written[: 1 - len(shown)]:
                    shown.append(first.text)
                    progress.line(f"the first caption, of {first.task.name}: {first.text}")
                progress.advance("captioning", done, total, unit="clip")

            captioner.run(plan.tasks, report, advance)
    if report.stopped and models and server.model not in models:
        report.stopped += f"; the models of the server are {_few(models)}"


def _notes(report: CaptionReport, config: ResolvedRun) -> Iterator[str]:
    """What the user should know about captions that were written."""
    lengths = CaptionLengths(config)
    for written in report.written:
        if note := lengths.note(written.text):
            yield f"{written.task.name}: {note}"
    if thinking := sum(each.had_thinking for each in report.written):
        yield f"{count(thinking, 'answer')} had thinking in front, which was taken off"
    if report.kept:
        names = _few([task.target.name for task in report.kept])
        yield f"written by somebody else meanwhile, and left as it is: {names}"


def _lines(plan: CaptionPlan, report: CaptionReport, notes: list[str]) -> Iterator[str]:
    """The report."""
    yield f"{count(len(report.written), 'caption')} written{_before(plan)}"
    yield from _remarks(report.problems, notes)
    if report.stopped:
        yield f"stopped: {report.stopped}"
    if report.not_asked:
        yield f"{count(report.not_asked, 'clip')} left; the same command does the rest"


def _before(plan: CaptionPlan) -> str:
    """How many files had captions before, in parentheses."""
    had = [f"{plan.captioned} had a caption file"] if plan.captioned else []
    had += [f"{plan.given} have captions in a table"] if plan.given else []
    return f" ({', '.join(had)})" if had else ""


def _remarks(problems: Sequence[ClipProblem], notes: Sequence[str]) -> Iterator[str]:
    if problems:
        yield f"{count(len(problems), 'file')} without a new caption:"
        yield from (f"  {problem}" for problem in problems)
    if notes:
        yield "Notes:"
        yield from (f"  {note}" for note in notes)


def _dry_run(captioner: Captioner, plan: CaptionPlan, *, as_json: bool) -> int:
    """Print what would be sent. Returns 1 if there are files that can't be captioned, else 0."""
    server = str(captioner.server.address)
    if as_json:
        tasks = [
            {
                "path": str(task.path),
                "caption_file": str(task.target),
                "times": [time for time, _ in task.moments],
                "width": task.size[0],
                "height": task.size[1],
                "request": captioner.request(task),
            }
            for task in plan.tasks
        ]
        problems = [problem_data(problem) for problem in plan.problems]
        write_json({"server": server, "tasks": tasks, "problems": problems, "notes": plan.notes})
    else:
        for task in plan.tasks:
            say(_task_line(task))
        for task in plan.tasks[:1]:
            say(f"asked of {task.name}: {captioner.request(task)}")
        for line in _remarks(plan.problems, plan.notes):
            say(line)
        requests = count(len(plan.tasks), "request")
        say(f"{requests} would go to {server}{_before(plan)}; nothing was sent")
    return 1 if plan.problems else 0


def _task_line(task: CaptionTask) -> str:
    size = f"{task.size[0]}x{task.size[1]}"
    if not task.seconds:
        return f"{task.name}: {size} -> {task.target.name}"
    span = f"{task.moments[0][0]:.2f} s to {task.moments[-1][0]:.2f} s"
    frames = count(len(task.moments), "frame")
    return f"{task.name}: {frames} of {size} from {span} -> {task.target.name}"
