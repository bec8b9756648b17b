"""Drafts of run files: kept on disk, found by ids that name nothing else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from onewan.errors import OnewanError
from onewan.presets import drafts
from onewan.presets.drafts import Drafts


def test_a_draft_is_kept_changed_and_deleted(tmp_path: Path) -> None:
    kept = Drafts(tmp_path / "drafts")
    assert kept.all() == []
    first, second = kept.add("a: 1  # ä\n"), kept.add("b: [")
    os.utime(tmp_path / "drafts" / f"{second}.yaml", (1, 1))
    assert [draft.id for draft in Drafts(tmp_path / "drafts").all()] == [first, second]
    kept.write(first, "a: 2\n")
    assert kept.read(first) == "a: 2\n" and kept.all()[0].changed < 60
    kept.delete(first)
    kept.delete(first)
    assert kept.read(first) is None and [draft.text for draft in kept.all()] == ["b: ["]


def test_what_another_tab_has_written_or_deleted_stays(tmp_path: Path) -> None:
    kept = Drafts(tmp_path)
    draft = kept.add("a")
    assert kept.replace(draft, "a", "b") and kept.read(draft) == "b"
    assert kept.replace(draft, "a", "b")  # it is there already
    assert not kept.replace(draft, "a", "c") and kept.read(draft) == "b"
    kept.delete(draft)
    assert not kept.replace(draft, "b", "c") and kept.read(draft) is None


def test_a_draft_has_the_name_of_its_run(tmp_path: Path) -> None:
    kept = Drafts(tmp_path)
    for text in ("output: {name: dog}", "output: {}", "output: ["):
        kept.add(text)
    assert {draft.name for draft in kept.all()} == {"dog", ""}


@pytest.mark.parametrize("name", ["", "..", "../secret", "secret", "0" * 15, "\0", "0" * 16])
def test_an_id_names_drafts_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret.yaml").write_text("x")
    kept = Drafts(tmp_path / "drafts")
    kept.add("a")
    assert kept.read(name) is None
    kept.delete(name)
    assert (tmp_path / "secret.yaml").exists()


def test_there_are_only_so_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafts, "_MOST", 2)
    kept = Drafts(tmp_path)
    kept.add("a")
    kept.add("b")
    with pytest.raises(OnewanError, match="has 2 drafts"):
        kept.add("c")
