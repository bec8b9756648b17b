"""`onewan report` and `onewan compare`: what their pages have, and how they behave in a browser."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from made_runs import MadeRun, write_run
from support.browser import WINDOWS, open_page
from support.runs import RunFile, layout_of, recorder

from onewan.cli import main
from onewan.errors import CheckpointError, DataError
from onewan.report.page import reporting, write_report
from onewan.report.videos import VideoChoice
from onewan.runs.events import Started
from onewan.runs.layout import RunLayout
from onewan.train.trainer import WanTrainer

HOSTILE = '</script><script>alert("x")</script>\u202e<img src=x onerror=alert(1)>'


def page_of(folder: Path) -> str:
    return write_report(folder).read_text(encoding="utf-8")


def plots_of(page: str) -> dict[str, dict[str, object]]:
    found = re.search(r'<script type="application/json" id="plots">(.*?)</script>', page, re.S)
    assert found is not None
    return json.loads(found[1])


def addresses(page: str) -> list[str]:
    """What the page refers to."""
    found = list[str]()

    class Parser(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            assert tag not in ("iframe", "object", "embed", "base", "form")
            assert not any(name.startswith("on") for name, _ in attrs)
            names = ("src", "href", "poster", "action", "srcset", "style")
            found.extend(value or "" for name, value in attrs if name in names)

    Parser().feed(page)
    style = page[page.index("<style>") : page.index("</style>")]
    assert "url(" not in style and "@import" not in style
    return found


def test_the_page_of_a_run_has_everything_in_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = MadeRun(steps=400, sample_steps=(0, 200, 400), prompts=(HOSTILE, "a fox"))
    layout = write_run(tmp_path / "runs" / "dog", made)
    assert main(["report", str(layout.root)]) == 0
    assert capsys.readouterr().out == f"{layout.report}: written; open it in a browser\n"
    page = layout.report.read_text(encoding="utf-8")
    outside = [a for a in addresses(page) if not a.startswith(("data:", "#"))]
    assert outside == []
    assert page.count("<script>") == 1 and "alert(&quot;x&quot;)" in page and "\\u202e" in page
    for words in (
        "finished",
        "400 of 400",
        "200 high, 200 low",
        "against the base model, step ",
        ">20.8 GB<",
        "of 24.0 GB, 21.4 GB by the plan",
        "colors without tags",
        "clip number 2",
        "bad.mp4: is empty (0 bytes)",
        "NVIDIA RTX 4090, 24.0 GB",
        "lora of rank 32",
        "base model (step 0)",
        "All videos are in this page",
    ):
        assert words in page, words
    plots = plots_of(page)
    assert [*plots] == [
        "plot-loss",
        "plot-validation",
        "plot-lr",
        "plot-grad-norm",
        "plot-timesteps",
        "plot-loss-by-timestep",
        "plot-seconds",
        "plot-step-memory-peak",
        "plot-tflops",
    ]
    assert page.count("data:video/mp4;base64,") == 6 == page.count(' poster="data:image/jpeg')


def test_videos_that_are_too_many_are_links_that_work_from_where_the_page_is(
    tmp_path: Path,
) -> None:
    layout = write_run(tmp_path / "runs" / "a dog", MadeRun(steps=40, sample_steps=(10, 20, 40)))
    first = layout.samples(40) / "0.mp4"
    room = first.stat().st_size + (layout.samples(40) / "1.mp4").stat().st_size
    page = write_report(
        layout.root, tmp_path / "pages" / "dog.html", VideoChoice(most_bytes=room)
    ).read_text(encoding="utf-8")
    assert page.count("data:video/mp4;base64,") == 2  # those of the last step
    linked = [a for a in addresses(page) if a.endswith(".mp4")]
    assert linked == [f"../runs/a%20dog/samples/0000{s}/{n}.mp4" for n in (0, 1) for s in (10, 20)]
    assert "2 videos are in this page" in page and "the other 4 are links" in page
    assert main(["report", str(layout.root), "--link"]) == 0
    page = layout.report.read_text(encoding="utf-8")
    assert "samples/000010/0.mp4" in addresses(page) and "data:video" not in page
    first.unlink()
    assert "This file is no longer there." in page_of(layout.root)


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (MadeRun(steps=20, end="failed"), ["Why it failed", "the loss is not finite"]),
        (MadeRun(steps=20, end="stopped"), ["stopped"]),
        (MadeRun(steps=20, end=""), ["It may have been killed", "may have died", "--resume=auto"]),
        (
            MadeRun(steps=0, validate_every=0, end=""),
            ["No step is done yet", "No sample is there yet"],
        ),
        (
            MadeRun(steps=30, experts=("single",), validate_every=0, prompts=(), on_device=False),
            ["Wan 2.2 TI2V-5B", "the model", "The run makes no samples", "mean of its last 3"],
        ),
    ],
    ids=["failed", "stopped", "killed", "no step", "one expert on a CPU"],
)
def test_pages_of_runs_of_every_kind(tmp_path: Path, made: MadeRun, words: list[str]) -> None:
    page = page_of(write_run(tmp_path / "run", made).root)
    for expected in words:
        assert expected in page, expected
    parts = [address[1:] for address in addresses(page) if address.startswith("#")]
    assert len(parts) > 5 and all(f'id="{part}"' in page for part in parts)
    if not made.on_device:
        assert "Device memory" not in page and "plot-step-memory-peak" not in page


def test_a_damaged_run_folder_gives_a_page_that_says_what_is_missing(tmp_path: Path) -> None:
    layout = write_run(tmp_path / "run", MadeRun(steps=20, sample_steps=(20,)))
    lines = layout.events.read_bytes().splitlines(keepends=True)
    layout.events.write_bytes(b"".join([*lines[:9], b"\xff\xfe\n", *lines[10:-2], lines[-2][:60]]))
    layout.clips.write_text('{"line": "clip"', encoding="utf-8")
    layout.resolved.write_text("model: [\n", encoding="utf-8")
    (layout.samples(20) / "0.mp4").write_bytes(b"no video")
    page = page_of(layout.root)
    assert "events.jsonl: 1 line is damaged and left out (line 10)" in page
    assert "clips.jsonl: 1 damaged line" in page and "resolved.yaml: can&#x27;t be read" in page
    assert "This video can't be played here." in page and "20 of 20" in page
    layout.events.unlink()
    assert "nothing is known of the run&#x27;s steps" in page_of(layout.root)


def test_a_page_that_can_not_be_written_is_a_line_and_no_error(tmp_path: Path) -> None:
    layout = write_run(tmp_path / "run", MadeRun(steps=2))
    layout.report.mkdir()
    (layout.report / "a file").touch()
    lines = list[str]()
    with pytest.raises(DataError, match="the first"), reporting(print, lines.append) as listen:
        listen(Started(run=layout.root, steps=2))
        raise DataError("the first")
    assert len(lines) == 1 and lines[0].startswith("the report can't be written (")
    assert lines[0].endswith(f"; try: onewan report {layout.root}")


def test_a_wrong_folder_is_named_with_the_runs_that_there_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(Path("runs/dog"), MadeRun(steps=2))
    write_run(Path("runs/new"), MadeRun(steps=0, validate_every=0))
    shown = str(Path("runs/dog")), str(Path("runs/new"))
    for wrong, what in (("cat", "there is no such run"), ("runs", "is not the folder of a run")):
        assert main(["report", wrong]) == 1
        error = capsys.readouterr().err
        assert error.startswith(f"onewan: {wrong}: {what}; there are ")
        assert all(run in error for run in shown)
    assert main(["report", "dog"]) == 0 and Path("runs/dog/report.html").is_file()
    capsys.readouterr()
    assert main(["compare", *shown, "cat", str(Path("runs/dog"))]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "onewan: compare: 3 problems"
    assert [line.split(":")[0].strip() for line in lines[1:]] == [shown[0], shown[1], "cat"]
    assert "has no step yet" in lines[2] and not Path("comparison.html").exists()
    with pytest.raises(SystemExit, match="2"):
        main(["compare", shown[0]])
    assert "name two runs or more" in capsys.readouterr().err


@pytest.fixture
def two_runs(tmp_path: Path) -> tuple[RunLayout, RunLayout]:
    """Two runs with one prompt in common, one step with samples of both, and the same name."""
    one = MadeRun(steps=400, sample_steps=(200, 400), prompts=("a fox", HOSTILE))
    two = MadeRun(
        steps=200, sample_steps=(200,), prompts=("a cat", "a fox"), lr=5e-5, rank=16, seed=1
    )
    return write_run(tmp_path / "a" / "dog", one), write_run(tmp_path / "b" / "dog", two)


def test_the_comparison_aligns_prompts_steps_and_settings(
    tmp_path: Path, two_runs: tuple[RunLayout, RunLayout]
) -> None:
    runs = [str(layout.root) for layout in two_runs]
    out = tmp_path / "c.html"
    assert main(["compare", *runs, "--out", str(out), "--embed", "all"]) == 0
    page = out.read_text(encoding="utf-8")
    assert [a for a in addresses(page) if not a.startswith(("data:", "#"))] == []
    settings = page[page.index('id="settings"') : page.index('id="training"')]
    rows = re.findall(r'<tr><th scope="row">(\S+)\n<td>(.*?)\n<td>(.*?)\n', settings)
    assert rows == [
        ("method.rank", "32", "16"),
        ("optimizer.lr", "0.0001", "5e-05"),
        ("train.steps", "400", "200"),
        ("train.seed", "0", "1"),
        ("sample.prompts.0.prompt", "a fox", "a cat"),
        (rows[-1][0], rows[-1][1], "a fox"),
    ]
    assert "<b>" not in page and "a/dog" in page and "b/dog" in page
    prompts = page.split('<div class="prompt together">')[1:]
    assert len(prompts) == 3
    fox = next(part for part in prompts if "<h3>a fox" in part)
    # The last step that both runs have is the one that is open.
    assert re.findall(r"<details( open)?><summary>step (\d+)", fox) == [
        (" open", "200"),
        ("", "400"),
    ]
    assert fox.count("<video") == 3 and fox.count("No sample of this step.") == 1
    titles = [name for name in plots_of(page) if "loss-" in name and "timestep" not in name]
    assert titles == ["plot-loss-high-expert", "plot-loss-low-expert"]


@pytest.mark.long
def test_training_ends_with_the_page_of_the_run(run_file: RunFile) -> None:
    config = run_file("t2v-a14b", "train.steps=2", "train.switch_expert_every=1")
    lines, seen = list[str](), list[dict[str, object]]()
    with reporting(recorder(seen), lines.append) as listen:
        WanTrainer(config, listen=listen).fit()
    layout = layout_of(config)
    assert lines == [f"report: {layout.report}"]
    page = layout.report.read_text(encoding="utf-8")
    assert "finished" in page and "2 of 2" in page and "red_square.mp4" in page
    assert f"torch         {__import__('torch').__version__}" in page
    assert "run_000002_high_noise.safetensors" in page
    # A run that fails has a page too; one that can't begin, since its name is taken, has none.
    lines.clear()
    empty = run_file("t2v-a14b", "video_data.sources=[]", name="empty")
    with pytest.raises(DataError), reporting(recorder(seen), lines.append) as listen:
        WanTrainer(empty, listen=listen).fit()
    assert lines == [f"report: {layout_of(empty).report}"]
    assert "Why it failed" in layout_of(empty).report.read_text(encoding="utf-8")
    with pytest.raises(CheckpointError), reporting(recorder(seen), lines.append) as listen:
        WanTrainer(config, listen=listen).fit()
    assert len(lines) == 1


# ---------------------------------------------------------------------------------- in a browser

_LOOK = """
const figures = [...document.querySelectorAll("figure.plot")];
await until(() => figures.every((figure) => figure.querySelector("path, .point")));
const canvases = figures.map((figure) => figure.querySelector(".canvas svg"));
note("plots", canvases.filter((canvas) => canvas.getBoundingClientRect().height > 100).length);
const loss = figures[0], svg = loss.querySelector(".canvas svg");
const before = loss.querySelector(".axis").textContent;
svg.focus();
for (const key of ["ArrowRight", "ArrowRight", "+"]) {
  svg.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
  if (key === "ArrowRight") note("tip", loss.querySelector(".tip").textContent);
}
note("zoomed", loss.querySelector(".axis").textContent !== before);
svg.dispatchEvent(new KeyboardEvent("keydown", { key: "Escape", bubbles: true }));
note("whole", loss.querySelector(".axis").textContent === before);
loss.querySelector(".log").click();
note("log", loss.querySelector(".axis").textContent !== before);
const smoother = loss.querySelector("select");
const line = () => loss.querySelector(".line").getAttribute("d");
if (smoother.hidden) note("smoothed", "no choice");
else {
  const usual = line();
  smoother.value = "0";
  smoother.dispatchEvent(new Event("change"));
  note("smoothed", smoother.selectedOptions[0].textContent);
  if (line() === usual) note("smoothed", "nothing changed");
}
const drawn = loss.querySelectorAll(".series").length;
loss.querySelector(".legend button").click();
note("series", `${drawn} ${loss.querySelectorAll(".series").length}`);
const texts = [...svg.querySelectorAll(".axis text")].map((text) => text.getBoundingClientRect());
const beside = (a, b) => a.left >= b.right || b.left >= a.right;
const overlap = (a, b) => !beside(a, b) && a.top < b.bottom && b.top < a.bottom;
note("overlapping", texts.filter((a, i) => texts.some((b, j) => i < j && overlap(a, b))).length);
const group = document.querySelector(".together"), [button] = group.querySelectorAll("button");
button.click();
const isShown = (video) => !video.closest("details:not([open])");
const videos = [...group.querySelectorAll("video")].filter(isShown);
await until(() => videos.every((video) => video.currentTime > 0.3));
const times = videos.map((video) => video.currentTime);
note("apart", Math.max(...times) - Math.min(...times));
note("playing", `${videos.length} ${videos.filter((video) => !video.paused).length}`);
button.click();
const slider = group.querySelector("input[type=range]");
slider.value = 500;
slider.dispatchEvent(new Event("input"));
await until(() => videos.every((video) => Math.abs(video.currentTime - video.duration / 2) < 0.02));
note("paused", videos.every((video) => video.paused));
const middle = videos[0].currentTime;
group.querySelectorAll("button.frame")[1].click();
await until(() => videos.every((video) => video.currentTime > middle));
note("frame", Math.max(...videos.map((video) => video.currentTime)) - middle);
const find = document.getElementById("find");
if (find) {
  find.value = "number 2";
  find.dispatchEvent(new Event("input"));
  note("found", document.getElementById("shown").textContent);
}
"""
"""Looks at a page as a reader does: plots by keyboard, samples that play together, and the list."""


@pytest.mark.long
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("kind", ["report", "compare"])
def test_pages_work_in_a_browser_without_an_error_or_a_request(
    tmp_path: Path, two_runs: tuple[RunLayout, RunLayout], kind: str, window: str
) -> None:
    page = tmp_path / "page.html"
    runs = [str(layout.root) for layout in two_runs][: 1 if kind == "report" else 2]
    assert main([kind, *runs, "--out", str(page)]) == 0
    opened = open_page(page, tmp_path / "profile", window, _LOOK)
    noted = opened.noted
    assert not opened.console and not opened.requests and not noted["overflow"]
    assert noted["plots"] == page.read_text(encoding="utf-8").count('<figure class="plot')
    assert noted["tip"].startswith("step ") and noted["overlapping"] == 0
    assert [noted[name] for name in ("zoomed", "whole", "log")] == [True] * 3
    drawn, left = map(int, noted["series"].split())
    assert drawn == 4 and left == 3  # training and validation, of two experts or two runs
    assert noted["smoothed"] == "each step"
    assert 0 < noted["frame"] < 2 / 16
    assert noted["playing"] == "2 2" and noted["apart"] < 0.1
    assert noted["paused"]
    if kind == "report":
        assert noted["found"] == "1 of 3 clips"


@pytest.mark.long
def test_linked_videos_play_from_the_run_folder(
    tmp_path: Path, two_runs: tuple[RunLayout, RunLayout]
) -> None:
    root = two_runs[0].root
    assert main(["report", str(root), "--link"]) == 0
    play = """
    document.querySelector(".together button").click();
    const videos = [...document.querySelector(".together").querySelectorAll("video")];
    await until(() => videos.every((video) => video.currentTime > 0.2));
    note("played", videos.length);
    """
    opened = open_page(root / "report.html", tmp_path / "profile", "desktop", play)
    assert not opened.console and opened.noted["played"] == 2
    assert {Path(name).name for name in opened.requests} == {"0.mp4"}
    assert all(name.startswith(root.as_uri()) for name in opened.requests)
    shutil.rmtree(root / "samples")
    broken = """
    document.querySelector(".together button").click();
    await until(() => document.querySelectorAll(".broken").length === 2);
    note("shown", document.querySelector(".broken .gone").getClientRects().length);
    """
    opened = open_page(root / "report.html", tmp_path / "profile2", "desktop", broken)
    assert opened.noted["shown"] == 1
