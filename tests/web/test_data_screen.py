"""The screen Data: what is shown of clips, captions changed in place, and who may see what."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from nicegui import ui
from nicegui.elements.mixins.text_element import TextElement
from nicegui.testing.user import User
from nicegui.testing.user_interaction import UserInteraction

from onewan.media import write_video
from onewan.serving import clips as clip_sets
from onewan.serving.clips import ClipQuery
from tests.support.page import with_user

MODEL = "Wan-AI/Wan2.2-T2V-A14B-Diffusers"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of clips with a run file beside it; nothing is examined unless it is asked for."""
    monkeypatch.setattr(clip_sets, "_EXAMINED_AT_ONCE", 0)
    clips = tmp_path / "clips"
    clips.mkdir()
    for number, name in enumerate(("ball", "cube", "fox")):
        frames = np.full((9, 64, 96, 3), 60 * number, np.uint8)
        frames[:, 10:30, 10 : 30 + 10 * number] = 200
        write_video(clips / f"{name}.mp4", frames, 16)
        (clips / f"{name}.txt").write_text(f"a {name} jumps", encoding="utf-8")
    write_run_file(tmp_path)
    return tmp_path


def write_run_file(folder: Path, sources: str = "[clips]") -> None:
    text = (
        f"model: {{variant: t2v-a14b, path: {MODEL}}}\n"
        "wan_config: {max_frames: 9}\n"
        f"video_data: {{sources: {sources}, resolution: 64x64, cache_dir: {folder / 'cache'}}}\n"
    )
    (folder / "run.yaml").write_text(text, encoding="utf-8")


def address(folder: Path) -> str:
    return f"/data?file={folder / 'run.yaml'}"


def key(folder: Path) -> str:
    return ClipQuery(file=str(folder / "run.yaml")).key


async def until(condition: Callable[[], object]) -> None:
    for _ in range(1200):
        if condition():
            return
        await asyncio.sleep(0.05)
    raise AssertionError("it did not happen")


async def opened(user: User, folder: Path) -> User:
    await user.open(address(folder))
    await user.should_see(content="kept", retries=50)
    return user


def area(user: User, name: str) -> ui.textarea:
    [found] = [
        each
        for each in user.find(ui.textarea).elements
        if each.props["aria-label"] == f"Caption of {name}"
    ]
    return found


def trigger(user: User, element: ui.element, event: str) -> None:
    UserInteraction(user, {element}, None).trigger(event)


def write(user: User, name: str, text: str) -> None:
    """Type a caption, and leave its field."""
    field = area(user, name)
    with user:
        field.value = text
    trigger(user, field, "blur")


def choose(user: User, label: str, value: str) -> None:
    """Give the field with this label a value."""
    fields = [*user.find(ui.select).elements, *user.find(ui.input).elements]
    [field] = [each for each in fields if each.props.get("label") == label]
    with user:
        field.value = value


def names(user: User) -> set[str]:
    """The clips and files that the grid has."""
    areas = user.find(ui.textarea).elements
    return {str(each.props["aria-label"]).removeprefix("Caption of ") for each in areas}


def shown(user: User, text: str) -> bool:
    """Whether a label says that."""
    return any(text in label.text for label in user.find(ui.label).elements)


def caption(folder: Path, name: str) -> str:
    return (folder / "clips" / f"{name}.txt").read_text(encoding="utf-8")


def test_clips_are_shown_with_reasons_and_found_by_filters(folder: Path) -> None:
    (folder / "clips" / "broken.mp4").write_bytes(b"no video")
    (folder / "clips" / "broken.txt").write_text("a broken one", encoding="utf-8")
    shutil.copy(folder / "clips" / "fox.mp4", folder / "clips" / "new.mp4")

    async def act(user: User) -> None:
        await opened(user, folder)
        await user.should_see("3 clips kept, 2 files refused")
        await user.should_see(content="is not a video")
        await user.should_see(content="has no caption")
        await user.should_see(f"onewan doctor {folder / 'run.yaml'}")
        assert names(user) == {"ball.mp4", "cube.mp4", "fox.mp4", "broken.mp4", "new.mp4"}
        choose(user, "State", "refused")
        assert names(user) == {"broken.mp4", "new.mp4"}
        choose(user, "State", "kept")
        choose(user, "Bucket", "9 frames at 64x64")
        assert names(user) == {"ball.mp4", "cube.mp4", "fox.mp4"}
        choose(user, "Search names and captions", "CUBE j")
        assert names(user) == {"cube.mp4"}
        # A file without a caption is refused until one is written here.
        for label in ("State", "Bucket", "Search names and captions"):
            choose(user, label, "")
        write(user, "new.mp4", "a new fox")
        await until((folder / "clips" / "new.txt").exists)
        user.find("Read the files again").click()
        await user.should_see("4 clips kept, 1 file refused", retries=50)

    with_user(folder / "runs", act)


def test_a_caption_is_changed_in_place_and_back(folder: Path) -> None:
    odd = "a <b>fox</b> & \x07\u2028<script>alert(1)</script>\nsecond line"

    async def act(user: User) -> None:
        await opened(user, folder)
        write(user, "fox.mp4", odd)
        await until(lambda: caption(folder, "fox") == odd)
        await user.should_see("Saved")
        assert area(user, "fox.mp4").value == odd
        user.find("Undo").click()
        await until(lambda: caption(folder, "fox") == "a fox jumps")
        await until(lambda: area(user, "fox.mp4").value == "a fox jumps")
        user.find("Redo").click()
        await until(lambda: caption(folder, "fox") == odd)
        await opened(user, folder)
        assert area(user, "fox.mp4").value == odd
        write(user, "fox.mp4", "word " * 600)
        await user.should_see(content="tokens; the text encoder reads the first 512")

    with_user(folder / "runs", act)


@pytest.mark.parametrize(
    ("choice", "text"), [("Write yours", "a red fox"), ("Take the other", "a blue fox")]
)
def test_the_second_tab_that_changes_a_caption_is_told(
    folder: Path, choice: str, text: str
) -> None:
    async def act(first: User) -> None:
        second = User(first.http_client)
        await opened(first, folder)
        await opened(second, folder)
        write(first, "fox.mp4", "a blue fox")
        await until(lambda: caption(folder, "fox") == "a blue fox")
        write(second, "fox.mp4", "a red fox")
        # As in a browser, where the dialog takes the cursor from the field.
        trigger(second, area(second, "fox.mp4"), "keydown.ctrl.enter")
        trigger(second, area(second, "fox.mp4"), "blur")
        await second.should_see("This caption was changed meanwhile", retries=20)
        await second.should_see(kind=TextElement, content="a red fox")
        await second.should_see(kind=TextElement, content="a blue fox")
        assert caption(folder, "fox") == "a blue fox"
        assert len(second.find("This caption was changed meanwhile").elements) == 1
        second.find(choice).click()
        await until(lambda: caption(folder, "fox") == text)
        await until(lambda: area(second, "fox.mp4").value == text)
        await second.should_not_see("Not saved yet")
        # Undo is that of the tab: the first one takes back its own edit only while that stands.
        first.find("Undo").click()
        wanted = "a fox jumps" if choice == "Take the other" else "a red fox"
        await until(lambda: caption(folder, "fox") == wanted)

    with_user(folder / "runs", act)


def test_a_text_is_replaced_in_all_captions_after_a_look(folder: Path) -> None:
    async def act(user: User) -> None:
        await opened(user, folder)
        (folder / "clips" / "cube.txt").write_text("a cube rolls", encoding="utf-8")
        user.find(kind=ui.button, content="Find and replace").click()
        await user.should_see("Type what to look for", retries=20)
        choose(user, "Find", "JUMPS")
        choose(user, "Replace with", "<i>")
        await user.should_see("2 captions change")
        await user.should_see("a ball <i>")
        assert caption(folder, "ball") == "a ball jumps"
        user.find("Replace in 2").click()
        await until(lambda: caption(folder, "fox") == "a fox <i>")
        assert caption(folder, "ball") == "a ball <i>"
        assert caption(folder, "cube") == "a cube rolls"
        await user.should_see("Undo (2)", retries=20)
        user.find("Undo (2)").click()
        await until(lambda: caption(folder, "fox") == "a fox jumps")

    with_user(folder / "runs", act)


def test_a_clip_is_opened_with_what_is_taken_of_it(folder: Path) -> None:
    write_run_file(folder, "[{path: clips, augment: {flip: 1, crop: 0.3}}]")

    async def act(user: User) -> None:
        await opened(user, folder)
        [button] = [
            each
            for each in user.find(ui.element).elements
            if each.props.get("aria-label") == "Open ball.mp4, variant 1"
        ]
        trigger(user, button, "click")
        await user.should_see(content="mirrored")
        await user.should_see(content="9 frames at 16 fps")
        await user.should_see("The file, with the crop")
        sources = [
            each.props["src"] for each in user.find(ui.element).elements if each.tag == "video"
        ]
        assert len(sources) == 2
        for source in sources:
            answer = await user.http_client.get(source, headers={"range": "bytes=0-99"})
            assert (answer.status_code, len(answer.content)) == (206, 100)
            assert answer.headers["content-type"] == "video/mp4"
        for name in ("Findings", "Duplicates", "Buckets", "Contact sheet"):
            user.find(kind=ui.tab, content=name).click()
        await user.should_see("9 frames at 64x64")
        await user.should_see("Duplicates are found when all frames are examined.")
        user.find("Draw the contact sheet").click()
        sheet = f"/clips/{key(folder)}/sheet/0"
        await until(
            lambda: any("sheet" in str(e.props.get("src")) for e in user.find(ui.element).elements)
        )
        assert (await user.http_client.get(sheet)).headers["content-type"] == "image/jpeg"

    with_user(folder / "runs", act)


def test_doctor_examines_all_frames_in_its_own_process(folder: Path) -> None:
    shutil.copy(folder / "clips" / "fox.mp4", folder / "clips" / "twin.mp4")
    (folder / "clips" / "twin.txt").write_text("the same", encoding="utf-8")
    (folder / "clips" / "ball.txt").write_text("", encoding="utf-8")
    (folder / "clips" / "lost.txt").write_text("of no video", encoding="utf-8")

    async def act(user: User) -> None:
        await opened(user, folder)
        user.find("Examine all frames").click()
        await user.should_see("Examine all frames again", retries=400)
        await user.should_see("fox.mp4 and twin.mp4: the same content")
        await user.should_see(content="frozen")
        # What concerns the machine is not said here, and nothing is said twice.
        await user.should_not_see(content="graphics card")
        labels = user.find(ui.label).elements
        lost = [each for each in labels if each.text.startswith("lost.txt: caption")]
        assert len(lost) == 1
        # What was repaired is not said any more.
        await user.should_see(content="its caption is empty")
        (folder / "clips" / "ball.txt").write_text("a ball", encoding="utf-8")
        user.find("Examine all frames again").click()
        await until(lambda: not shown(user, "its caption is empty"))

    with_user(folder / "runs", act)


def test_the_page_shows_no_file_outside_of_its_folders(folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    shutil.copytree(folder / "clips", outside)
    (folder / "clips" / "linked.mp4").symlink_to(outside / "fox.mp4")
    (folder / "clips" / "linked.txt").symlink_to(outside / "fox.txt")

    async def act(user: User) -> None:
        await user.open(f"/data?folder={outside}")
        await user.should_see(content="is outside the folders that this page may use", retries=20)
        await opened(user, folder)
        assert "linked.mp4" not in names(user)
        await user.should_see(content="is outside the page's folders")
        codes = {
            name: [
                (await user.http_client.get(f"/clips/{key(folder)}/{number}/{view}")).status_code
                for view in ("poster", "trained")
            ]
            for number, name in enumerate(("ball", "cube", "fox", "linked"))
        }
        assert codes == {name: [200, 200] for name in ("ball", "cube", "fox")} | {
            "linked": [404, 404]
        }
        for wrong in ("0/mask", "4/poster", "-1/poster", "0/secret", "sheet/0", "x/poster"):
            answer = await user.http_client.get(f"/clips/{key(folder)}/{wrong}")
            assert answer.status_code in (404, 422), wrong
        assert (await user.http_client.get(f"/clips/{'0' * 16}/0/poster")).status_code == 404

    with_user(folder / "runs", act, [folder / "clips", folder / "run.yaml", folder / "cache"])


def test_what_can_not_be_read_is_told(folder: Path) -> None:
    async def act(user: User) -> None:
        (folder / "run.yaml").write_text("model: {variant: t2v-a15b}\nvideo: 1", encoding="utf-8")
        await user.open(address(folder))
        await user.should_see(content="did you mean", retries=20)
        await user.open("/data?run=none")
        await user.should_see(content="there is no such run", retries=20)
        for wrong in ("frames=0", "fps=nan", "variant=x", "strategy=x", f"file={'x' * 5000}"):
            assert (await user.http_client.get(f"/data?folder=x&{wrong}")).status_code == 422
        await user.open(f"/data?folder={folder / 'clips'}&frames=5&size=32x32&fps=8&masks=true")
        await until(lambda: shown(user, "5 frames at 32x32"))

    with_user(folder / "runs", act)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such names")
def test_names_that_are_not_utf_8_or_look_like_tags(folder: Path) -> None:
    odd = folder / "clips" / os.fsdecode(b"<img src=x>caf\xe9\n.mp4")
    try:
        shutil.copy(folder / "clips" / "fox.mp4", odd)
    except OSError:
        pytest.skip("the file system of this machine takes no such names")

    async def act(user: User) -> None:
        await opened(user, folder)
        shown = "<img src=x>caf\\udce9\\n.mp4"
        assert shown in names(user)
        write(user, shown, "a coffee")
        await until(odd.with_suffix(".txt").exists)

    with_user(folder / "runs", act)
