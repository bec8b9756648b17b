"""Captions that are typed in fields: when they are written, and what happens where someone else has
written meanwhile."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from onewan.data.caption_edits import Replacement
from onewan.data.caption_places import Place, TextFile, Written
from onewan.serving.caption_editing import Answer, EditedCaption, EditSession, State
from onewan.serving.clips import ClipSets
from onewan.serving.roots import Roots


class Field(EditedCaption):
    """A field without a screen, which notes what it says and gives the answer of the test."""

    def __init__(self, session: EditSession, place: Place, answer: Answer = None) -> None:
        entry: Any = SimpleNamespace(name=place.path.name, clip=object())
        super().__init__(session, entry, place)
        self.answer: Answer = answer
        self.asked, self.notes = list[str](), list[tuple[str, State]]()
        self.gone = False

    @property
    def is_gone(self) -> bool:
        return self.gone

    def say(self, note: str, state: State) -> None:
        self.notes.append((note, state))

    async def ask(self, theirs: str) -> Answer:
        self.asked.append(theirs)
        await self.save()  # as the field does that loses the cursor to the question
        return self.answer


@pytest.fixture
def sets(tmp_path: Path) -> ClipSets:
    for name in ("ball", "fox"):
        (tmp_path / f"{name}.txt").write_text(f"a {name} jumps", encoding="utf-8")
    return ClipSets(Roots(tmp_path / "runs", [tmp_path]), cast(Any, None))


def session(sets: ClipSets, tab: str = "one") -> EditSession:
    """A tab with the two captions."""
    folder = sets.roots.data[0]
    captions: dict[Place, Written] = sets.read(TextFile(p) for p in sorted(folder.glob("*.txt")))
    opened: Any = SimpleNamespace(clips=SimpleNamespace(captions=captions))
    return EditSession(sets, opened, tab)


def place(sets: ClipSets, name: str) -> TextFile:
    return TextFile(sets.roots.data[0] / f"{name}.txt")


def test_a_caption_is_written_once_and_shown_in_all_its_fields(sets: ClipSets) -> None:
    tab, fox = session(sets), place(sets, "fox")
    field, other, typed, gone = (Field(tab, fox) for _ in range(4))
    gone.gone = True
    field.typed, typed.typed = "a fox sleeps", "a fox swims"

    async def twice() -> None:
        await asyncio.gather(field.save(), field.save())

    asyncio.run(twice())
    assert fox.path.read_text(encoding="utf-8") == "a fox sleeps"
    assert field.notes[-1] == ("Saved", "good")
    assert (other.typed, typed.typed, gone.typed) == ("a fox sleeps", "a fox swims", "a fox jumps")
    assert not field.asked
    assert tab.edits.can_undo == 1
    assert tab.is_typing
    typed.gone = True
    assert not tab.is_typing


@pytest.mark.parametrize(
    ("answer", "written", "typed"),
    [
        ("write", "a red fox", "a red fox"),
        ("take", "a blue fox", "a blue fox"),
        (None, "a blue fox", "a red fox"),
    ],
)
def test_who_writes_second_is_asked_once(
    sets: ClipSets, answer: Answer, written: str, typed: str
) -> None:
    fox = place(sets, "fox")
    first, second = (Field(session(sets, tab), fox, answer) for tab in ("one", "two"))
    first.typed, second.typed = "a blue fox", "a red fox"
    asyncio.run(first.save())
    asyncio.run(second.save())
    assert second.asked == ["a blue fox"]
    assert fox.path.read_text(encoding="utf-8") == written
    assert (second.typed, second.is_changed) == (typed, answer is None)


def test_a_removed_file_is_told_and_what_can_not_be_written_too(sets: ClipSets) -> None:
    field = Field(session(sets), place(sets, "fox"))
    field.place.path.unlink()
    field.typed = "a fox"
    asyncio.run(field.save())
    assert field.asked == ["There is no caption file"]
    field = Field(session(sets), place(sets, "ball"))
    field.typed = "a\0b"
    asyncio.run(field.save())
    assert field.notes[-1][1] == "failed" and field.is_changed


def test_several_captions_are_changed_back_and_again(sets: ClipSets) -> None:
    tab = session(sets)
    fields = [Field(tab, place(sets, name)) for name in ("ball", "fox")]

    async def act() -> list[str]:
        wanted = Replacement(find="jumps", replace="runs")
        changes = wanted.changes(await tab.read())
        summaries = [(await tab.change(lambda: tab.edits.apply(changes))).summary]
        assert [field.typed for field in fields] == ["a ball runs", "a fox runs"]
        fields[1].place.path.write_text("another", encoding="utf-8")
        summaries.append((await tab.change(tab.edits.undo)).summary)
        return summaries

    changed, undone = asyncio.run(act())
    assert changed == "2 captions changed"
    assert undone.startswith("1 caption changed; fox.txt: left as it is, since it was changed")
    assert fields[0].typed == "a ball jumps"


def test_a_long_caption_and_an_unsaved_one_are_told(sets: ClipSets) -> None:
    field = Field(session(sets), place(sets, "fox"))
    field.say_state()
    field.typed = "word " * 600
    field.say_state()
    assert field.notes[0] == ("", "good")
    note, state = field.notes[1]
    assert note.startswith("Not saved yet; about ") and state == "unsaved"
