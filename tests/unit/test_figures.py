"""Figures of benchmarks: their files, charts and tables, the page of all of them, and the tables of
docs/performance.md."""

from __future__ import annotations

import html
import re
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import report
from figures import (
    Chart,
    Figure,
    Value,
    command_line,
    measured_here,
    read_figure,
    read_figures,
    write_figure,
)
from plots import draw
from tables import tables_of

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture
def figure() -> Figure:
    """An own and a bare loop, a limit that is missed, and a case without a number."""
    small, large = {"size": "17x256x256"}, {"size": "81x480x832"}
    values = [
        Value(
            case=small | {"loop": "onewan"},
            measure="duration",
            unit="s",
            repeats=(2.0, 1.0, 4.0),
            expected=1.5,
            baseline="bare loop",
            ratio=1.25,
            limit=1.0,
        ),
        Value(case=small | {"loop": "bare <loop>"}, measure="duration", unit="s", repeats=(1.6,)),
        Value(case=large | {"loop": "onewan"}, measure="duration", unit="s", reason="did not fit"),
        Value(case=small | {"loop": "onewan"}, measure="waits", repeats=(0.0,), expected=0.0),
    ]
    return measured_here(
        name="steps",
        title="Duration of steps",
        measured="Steps & pauses.",
        values=values,
        charts=[Chart(measure="duration", series="loop")],
        arithmetic="operations",
    )


def test_a_file_gives_the_figure_back(figure: Figure, tmp_path: Path) -> None:
    write_figure(figure, tmp_path / "sub" / "steps.json")
    assert read_figure(tmp_path / "sub" / "steps.json") == figure
    text = (tmp_path / "sub" / "steps.json").read_text(encoding="utf-8")
    for part in (
        '"min": 1.0',
        '"median": 2.0',
        '"max": 4.0',
        '"expected": 0.0',
        figure.machine.cpu,
    ):
        assert part in text


def test_a_file_that_is_no_figure_is_named(tmp_path: Path) -> None:
    file = tmp_path / "other.json"
    file.write_text('{"name": "other"}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"other\.json: is no figure .*title: Field required"):
        read_figure(file)


def test_a_newer_format_is_refused(figure: Figure, tmp_path: Path) -> None:
    write_figure(replace(figure, format=99), tmp_path / "steps.json")
    with pytest.raises(ValueError, match="has format 99, and this version reads 1"):
        read_figure(tmp_path / "steps.json")


def test_a_value_has_a_number_or_a_reason() -> None:
    for wrong in ({}, {"repeats": (1.0,), "reason": "did not fit"}):
        with pytest.raises(ValueError, match="either repeats or a reason"):
            Value(case={"size": "a"}, measure="duration", **wrong)


def test_the_command_repeats_the_benchmark_without_folders_of_this_machine(tmp_path: Path) -> None:
    script = str(ROOT / "benchmarks" / "memory.py")
    arguments = [script, "--rows", "3", "--json", "a.json", "--plot=b.svg", str(tmp_path / "clips")]
    assert command_line(arguments) == "python benchmarks/memory.py --rows 3 clips"


def test_limits_are_compared_with_the_median(figure: Figure) -> None:
    (missed,) = figure.missed()
    assert missed.median == 2.0
    assert replace(missed, limit=2.0).keeps_limit
    assert replace(missed, at_least=True).keeps_limit
    assert not replace(missed, at_least=True, limit=2.1).keeps_limit


def texts_of(svg: str) -> list[str]:
    return [
        "".join(element.itertext()).strip()
        for element in ElementTree.fromstring(svg).iter()
        if element.tag.endswith("}text")
    ]


def test_a_chart_names_its_unit_its_machine_and_what_arithmetic_says(figure: Figure) -> None:
    (svg,) = draw(figure)
    texts = texts_of(svg)
    for part in ("Duration of steps", "duration, s", "onewan", "bare <loop>", "operations"):
        assert part in texts
    assert "2.00 (1.25x)" in texts
    below = next(text for text in texts if figure.date[:10] in text)
    assert figure.machine.title in below and "relative to bare loop" in below
    assert_no_outside_reference(svg)


def test_bars_and_lines_begin_at_zero(figure: Figure) -> None:
    """The same lengths from the left for values that are multiples of each other."""
    two = [
        Value(case={"batch size": n}, measure="rate", unit="1/s", repeats=(10.0 * n,), expected=5.0)
        for n in (1, 2)
    ]
    bars, lines = (
        draw(replace(figure, values=tuple(two), charts=(Chart(measure="rate", **chart),)))[0]
        for chart in ({"kind": "bars"}, {"kind": "lines", "x": "batch size"})
    )
    widths = [
        bar_width(path) for path in re.findall(r'<path d="([^"]*)" clip-path[^>]*#0072b2', bars)
    ]
    assert widths[1] == pytest.approx(2 * widths[0], rel=0.01)
    for svg in (bars, lines):
        assert 0.0 in [float(text) for text in texts_of(svg) if re.fullmatch(r"[\d.]+", text)]
    assert "batch size" in texts_of(lines)


def bar_width(path: str) -> float:
    xs = [float(x) for x in re.findall(r"[ML] ([\d.]+) ", path)]
    return max(xs) - min(xs)


def test_a_table_has_a_row_for_each_case_and_a_column_for_each_measure(figure: Figure) -> None:
    (table,) = tables_of(figure)
    lines = table.markdown().splitlines()
    assert lines[0] == (
        "| size | loop | duration, s | operations | relative to bare loop | limit | waits | "
        "operations |"
    )
    assert lines[2] == (
        "| 17x256x256 | onewan | 2.00 (1.00 to 4.00) | 1.50 | 1.25 | at most 1, missed | 0 | 0 |"
    )
    assert lines[3] == "| 17x256x256 | bare <loop> | 1.60 | - | - | - | - | - |"
    assert lines[4] == "| 81x480x832 | onewan | did not fit | - | - | - | - | - |"


def test_a_table_across_a_key_has_a_column_for_each_of_its_values(figure: Figure) -> None:
    values = tuple(value for value in figure.values if value.measure == "duration")
    (table,) = tables_of(replace(figure, values=values, across="loop"))
    lines = table.markdown().splitlines()
    assert lines[0] == "| size | onewan | bare <loop> |"
    assert lines[1] == "| --- | ---: | ---: |"
    assert lines[2:] == [
        "| 17x256x256 | 2.00 (1.00 to 4.00) | 1.60 |",
        "| 81x480x832 | did not fit | - |",
    ]


def test_cases_that_have_other_keys_have_a_table_of_their_own(figure: Figure) -> None:
    other = Value(case={"machine": "A card"}, measure="rate", repeats=(3.0,))
    tables = tables_of(replace(figure, values=(*figure.values, other)))
    assert [table.titles[0] for table in tables] == ["size", "machine"]
    assert tables[1].markdown().splitlines()[0] == "| machine | rate |"


# ---------------------------------------------------------------------------------------- the page


def assert_no_outside_reference(document: str) -> None:
    """Nothing that a browser would ask another host for: only data and places in the page."""
    for target in re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)""", document):
        assert target.startswith(("#", "data:")), target
    for target in re.findall(r"url\(([^)]*)\)", document):
        assert target.strip("\"'").startswith(("#", "data:")), target
    assert "@import" not in document


def test_the_page_has_all_figures_and_says_what_was_not_measured(
    figure: Figure, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_figure(replace(figure, name="memory"), tmp_path / "memory.json")
    write_figure(figure, tmp_path / "steps.json")
    assert report.main(["--from", str(tmp_path)]) == 0
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "2 figures" in capsys.readouterr().out
    for title in (*report.SECTIONS, report.OTHERS):
        assert f">{title}</h2>" in page
    assert page.count("Duration of steps</h3>") == 2
    assert page.count("<h3>streaming</h3><p>Not measured.") == 1
    assert "<h3>memory</h3>" not in page
    assert "bare &lt;loop&gt;" in page and "bare <loop>" not in page
    assert "2 values miss their limits" in page
    assert figure.machine.cpu in page and html.escape(figure.command) in page
    assert_no_outside_reference(page)


def test_a_benchmark_that_fails_is_reported_and_the_others_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("raise SystemExit('no such card')", encoding="utf-8")
    works = tmp_path / "works.py"
    works.write_text("import sys; print('measured', sys.argv[1])", encoding="utf-8")
    chosen = [report.Benchmark(figure=path.stem, script=str(path)) for path in (broken, works)]
    monkeypatch.setattr(sys, "argv", ["report.py"])
    assert report.measure(chosen, tmp_path / "out") == [f"{broken}: status 1: no such card"]
    assert "measured --json" in capsys.readouterr().out


def test_every_benchmark_of_the_page_exists() -> None:
    for benchmark in report.benchmarks():
        assert (ROOT / "benchmarks" / benchmark.script).is_file(), benchmark.script


def test_the_documentation_has_the_figures_of_the_results(tmp_path: Path) -> None:
    # `python benchmarks/report.py --from benchmarks/results --write` writes them.
    document = tmp_path / "docs" / "performance.md"
    document.parent.mkdir()
    original = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    document.write_text(original, encoding="utf-8")
    pictures = tmp_path / "docs" / "images" / "performance"
    figures = read_figures(RESULTS)
    written = report.write_document(figures, document, pictures)
    assert set(written) >= {"gpu", *figures}
    assert document.read_text(encoding="utf-8") == original
    committed = ROOT / "docs" / "images" / "performance"
    assert {f.name for f in pictures.iterdir()} == {f.name for f in committed.iterdir()}
