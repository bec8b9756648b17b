"""One page with the figures of all benchmarks, and the tables of docs/performance.md.

Each benchmark writes what it measured as JSON (`figures.Figure`). This runs the quick ones, some
minutes in all, and makes one HTML page of everything that a folder has: charts, tables, machine,
versions, and the command that repeats each figure. The page needs nothing from outside.

    python benchmarks/report.py                      # measures, then writes build/figures
    python benchmarks/report.py --from benchmarks/results --page figures.html  # measures nothing
    python benchmarks/report.py --only batching memory   # measures these
    make figures                                     # as the repository's own figures are made

What no file is there for is named on the page as not measured, with its command.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from figures import ROOT, Figure, read_figures
from gpu_table import is_real, table
from markers import replace_between
from plots import draw
from tables import MISSED, Table, tables_of

from onewan.pages import document
from onewan.pages.document import text

RESULTS = ROOT / "benchmarks" / "results"
DOCUMENT = ROOT / "docs" / "performance.md"
PICTURES = ROOT / "docs" / "images" / "performance"
OUT = ROOT / "build" / "figures"
GPU_TABLE = "<!-- gpu: begin -->"


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """A script, and what it writes."""

    figure: str
    """The name of its figure and of its file."""
    script: str
    quick: tuple[str, ...] | None = ()
    """Its arguments in the quick set, which a CPU measures in a minute; None if it takes longer."""
    needs: str = ""
    """What it takes besides a CPU."""

    def wrote(self, figure: Figure) -> bool:
        """Whether `figure` is this one, or this one of one of several devices."""
        return figure.name == self.figure or figure.name.startswith(f"{self.figure}_on_")


SECTIONS: dict[str, tuple[Benchmark, ...]] = {
    "Peak memory consumption during training": (
        Benchmark(figure="memory", script="memory.py", quick=None),
        Benchmark(figure="device_memory", script="device_memory.py"),
        Benchmark(figure="vae_memory", script="vae_memory.py", quick=None, needs="a GPU"),
    ),
    "Memory efficiency of video batching": (Benchmark(figure="batching", script="batching.py"),),
    "Model offloading effectiveness": (
        Benchmark(figure="offloading", script="offloading.py"),
        Benchmark(figure="streaming", script="streaming.py"),
    ),
    "Steps per second": (
        Benchmark(figure="steps_per_second", script="train_step.py", quick=("--steps", "7")),
        Benchmark(figure="gpu", script="gpu.py", quick=None, needs="a GPU"),
        Benchmark(figure="gpu_settings", script="gpu_settings.py", quick=None, needs="a GPU"),
    ),
    "Batch size scaling": (Benchmark(figure="batch_scaling", script="batch_scaling.py"),),
    "Several GPUs, simulated": (
        Benchmark(figure="scaling", script="scaling.py", quick=None, needs="Linux"),
    ),
    "Comparison with existing trainers": (
        Benchmark(
            figure="peers", script="peers_data.py", quick=None, needs="checkouts of the trainers"
        ),
    ),
    "Reports of runs": (
        Benchmark(
            figure="report_page", script="report_page.py", quick=None, needs="the browser chromium"
        ),
    ),
    "The page of a run": (
        Benchmark(
            figure="web_page",
            script="web_page.py",
            quick=None,
            needs="the browser chromium and two cores",
        ),
    ),
    "Start-up": (Benchmark(figure="startup", script="startup.py", quick=("--repeats", "3")),),
    "Data, sampling and files": (
        Benchmark(figure="data", script="data.py", quick=None),
        Benchmark(figure="decode", script="decode.py", quick=None),
        Benchmark(figure="sampling", script="sampling.py", quick=None),
        Benchmark(figure="convert", script="convert.py", quick=None),
        Benchmark(figure="loading", script="loading.py", quick=None),
    ),
}
"""All benchmarks. The first five titles are those of the project's design."""
OTHERS = "Further figures"


def benchmarks() -> Iterator[Benchmark]:
    for section in SECTIONS.values():
        yield from section


# --------------------------------------------------------------------------------------- measuring


def measure(chosen: Sequence[Benchmark], folder: Path) -> list[str]:
    """Run the benchmarks one after another; returns what went wrong, a line each."""
    problems: list[str] = []
    folder.mkdir(parents=True, exist_ok=True)
    for number, benchmark in enumerate(chosen, 1):
        script = ROOT / "benchmarks" / benchmark.script
        file = folder / f"{benchmark.figure}.json"
        arguments = [*(benchmark.quick or ()), "--json", str(file)]
        print(f"[{number} of {len(chosen)}] {benchmark.script}", flush=True)
        begin = time.monotonic()
        environment = {"OMP_NUM_THREADS": "1"} | os.environ
        done = subprocess.run(
            [sys.executable, str(script), *arguments],
            env=environment,
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
        )
        for line in done.stdout.splitlines():
            print(f"    {line}")
        print(f"    {time.monotonic() - begin:.0f} s", flush=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            # A benchmark that measured everything ends with 1 where a limit is missed.
            problems.append(f"{benchmark.script}: status {done.returncode}: {last}")
    return problems


# ----------------------------------------------------------------------------------------- the page


STYLE = """
h2 { border-top: 1px solid var(--line); padding-top: 1rem; margin-top: 2.5rem; }
h3 { font-size: 1.1rem; margin-top: 1.5rem; }
nav a { display: inline-block; margin: 0 1rem .3rem 0; }
.charts { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start; margin: .8rem 0; }
.charts img { width: 35rem; max-width: 100%; background: #fff; border: 1px solid var(--line); }
table { font-size: .85rem; margin: .6rem 0; }
th, td { vertical-align: top; font-variant-numeric: tabular-nums; white-space: nowrap; }
.t { text-align: left; }
.long { white-space: normal; min-width: min(16rem, 36vw); }
.facts { color: var(--soft); font-size: .85rem; overflow-wrap: anywhere; max-width: none; }
"""


def page(figures: Mapping[str, Figure]) -> str:
    """The whole HTML document."""
    parts: list[str] = []
    for title, section in SECTIONS.items():
        parts.append(f'<h2 id="{_id(title)}">{text(title)}</h2>')
        for benchmark in section:
            found = [figure for figure in figures.values() if benchmark.wrote(figure)]
            parts += map(_figure, found) if found else [_missing(benchmark)]
    titles = list(SECTIONS)
    others = [
        figure
        for figure in figures.values()
        if not any(benchmark.wrote(figure) for benchmark in benchmarks())
    ]
    if others:
        titles.append(OTHERS)
        parts.append(f'<h2 id="{_id(OTHERS)}">{OTHERS}</h2>')
        parts += map(_figure, others)
    links = "".join(f'<a href="#{_id(title)}">{text(title)}</a>' for title in titles)
    missed = [value for figure in figures.values() for value in figure.missed()]
    kept = f'<p class="wrong">{len(missed)} values miss their limits.</p>' if missed else ""
    body = [f"<h1>{TITLE}</h1>", f"<p>{INTRODUCTION}</p>", kept, f"<nav>{links}</nav>", *parts]
    return document.page(TITLE, body, own_style=STYLE)


TITLE = "onewan: performance figures"
INTRODUCTION = (
    "What was measured, beside what arithmetic says. Each figure names its machine and the command "
    "that repeats it. Times of different machines and of different runs are not comparable with "
    "each other; ratios within one run are."
)


def _id(title: str) -> str:
    return title.lower().replace(" ", "-").replace(",", "")


def _missing(benchmark: Benchmark) -> str:
    needs = f", which takes {text(benchmark.needs)}," if benchmark.needs else ""
    return (
        f"<h3>{text(benchmark.figure)}</h3><p>Not measured. "
        f"<code>python benchmarks/{text(benchmark.script)}</code>{needs} measures it.</p>"
    )


def _figure(figure: Figure) -> str:
    pictures = "".join(
        f'<img alt="{text(chart.title or figure.title)}" '
        f'src="{document.data_uri("image/svg+xml", svg.encode())}">'
        for chart, svg in zip(figure.charts, draw(figure), strict=True)
    )
    tables = "".join(map(_table, tables_of(figure)))
    return (
        f"<h3>{text(figure.title)}</h3><p>{text(figure.measured)}</p>"
        f'<div class="charts">{pictures}</div>{tables}'
        f'<p class="facts">{text(_facts(figure))}<br>Repeat it: '
        f"<code>{text(figure.command)}</code></p>"
    )


def _facts(figure: Figure) -> str:
    """Machine, date, duration, load and versions."""
    machine = figure.machine
    parts: list[str] = []
    if machine.device_type != "cpu":
        memory = ""
        if machine.device_memory and machine.device_type != "sim":
            memory = f" with {machine.device_memory / 1e9:.0f} GB"
        parts.append(machine.device + memory)
    if machine.cores:  # results of before this was noted have none
        ram = f"{machine.ram / 1e9:.0f} GB of host memory"
        parts.append(f"{machine.cores} cores of {machine.cpu}, {ram}")
    parts += [machine.system, figure.date]
    if figure.seconds:
        parts.append(f"took {figure.seconds:.0f} s")
    if machine.load_before is not None and machine.load_after is not None:
        parts.append(f"load average {machine.load_before:g} before, {machine.load_after:g} after")
    versions = ", ".join(f"{name} {version}" for name, version in figure.versions.items())
    return "; ".join([*parts, versions])


_LONG = 24
"""Rows of a table that is folded away."""
_LONG_TEXT = 40
"""Letters of a cell that may be broken into lines."""


def _table(table: Table) -> str:
    def cell(tag: str, column: int, content: str) -> str:
        kinds = ["t"] if column < table.numbers else []
        kinds += ["long"] if len(content) > _LONG_TEXT else []
        kinds += ["wrong"] if content.endswith(MISSED) else []
        attribute = f' class="{" ".join(kinds)}"' if kinds else ""
        return f"<{tag}{attribute}>{text(content)}</{tag}>"

    head = "".join(cell("th", column, title) for column, title in enumerate(table.titles))
    rows = "".join(
        "<tr>" + "".join(cell("td", column, each) for column, each in enumerate(row)) + "</tr>"
        for row in table.rows
    )
    shown = f'<div class="wide"><table><tr>{head}</tr>{rows}</table></div>'
    if len(table.rows) <= _LONG:
        return shown
    return f"<details><summary>{len(table.rows)} rows</summary>{shown}</details>"


# ------------------------------------------------------------------------------------ the document


def write_document(figures: Mapping[str, Figure], target: Path, pictures: Path) -> list[str]:
    """Replace the parts of `target` that have markers with a figure's name: its charts, which are
    files in the folder `pictures`, and its table. Returns the names that the document has."""
    content = target.read_text(encoding="utf-8")
    written: list[str] = []
    on_devices = [figure for figure in figures.values() if is_real(figure)]
    if GPU_TABLE in content:
        replace_between(target, "gpu", table(on_devices))
        written.append("gpu")
    for name, figure in figures.items():
        if f"<!-- {name}: begin -->" in content:
            replace_between(target, name, part_of_document(figure, target.parent, pictures))
            written.append(name)
    return written


def part_of_document(figure: Figure, folder: Path, pictures: Path) -> str:
    """Charts, table and machine of `figure` in Markdown, for a document in `folder`."""
    pictures.mkdir(parents=True, exist_ok=True)
    parts: list[str] = []
    for number, (chart, svg) in enumerate(zip(figure.charts, draw(figure), strict=True), 1):
        file = pictures / f"{figure.name}{'' if number == 1 else f'_{number}'}.svg"
        file.write_text(svg, encoding="utf-8")
        link = file.relative_to(folder).as_posix()
        parts.append(f"![{chart.title or figure.title}]({link})")
    measured = f"Measured on {figure.machine.title}, {figure.date[:10]}: `{figure.command}`"
    tables = [table.markdown() for table in tables_of(figure)]
    return "\n\n".join([*parts, *tables, measured])


# ----------------------------------------------------------------------------------------- program


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = [benchmark.figure for benchmark in benchmarks()]
    parser.add_argument(
        "--results", type=Path, default=OUT, help="folder of the JSON files (build/figures)"
    )
    parser.add_argument(
        "--from", dest="source", type=Path, metavar="FOLDER", help="measure nothing; read these"
    )
    parser.add_argument("--only", nargs="+", choices=names, help="measure these, quick or not")
    parser.add_argument("--page", type=Path, help="the page (default: index.html in the folder)")
    parser.add_argument(
        "--write", action="store_true", help="write tables and charts of docs/performance.md too"
    )
    options = parser.parse_args(arguments)
    folder: Path = options.source or options.results
    problems: list[str] = []
    if options.source is None:
        chosen = [
            benchmark
            for benchmark in benchmarks()
            if (benchmark.figure in options.only if options.only else benchmark.quick is not None)
        ]
        problems = measure(chosen, folder)
    figures = read_figures(folder)
    target: Path = options.page or folder / "index.html"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page(figures), encoding="utf-8")
    print(f"{len(figures)} figures: {target}")
    if options.write:
        print(f"{DOCUMENT.name}: {', '.join(write_document(figures, DOCUMENT, PICTURES))}")
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
