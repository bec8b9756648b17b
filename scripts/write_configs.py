"""Writes the run files in configs/, their table, and what `onewan init --list` says of them.

Usage: python scripts/write_configs.py [--check]

With --check nothing is written, and the exit status is 1 if a file is not up to date. Each run file
is the one that `onewan init` writes for its variant, method and card (`onewan.presets.run_files`).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from onewan.errors import MemoryPlanError
from onewan.presets.fitting import fitted
from onewan.presets.run_files import CARDS_GB, LISTED, RunFile, as_listed, cells
from onewan.presets.starter import METHODS, MethodKind, StarterRequest, starter
from onewan.variants import VARIANTS, VariantName

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "configs"
HOSTS_GB = (64, 128)
"""Host memory; a run file is for the least with which it fits."""
README = """\
# Run files to start from

One for each variant, method and card, as `onewan init` writes it: copy one beside a folder `clips`,
read its comments, and train. `python scripts/write_configs.py` writes them; a test loads, plans and
tries each.

```bash
onewan init --list
onewan init dog.yaml --variant t2v-a14b --method lora --vram 24GB
```

The first command prints this table without a copy of the repository, the second writes such a file
for your card.

*Clips* are the largest training clips that fit. *Step* is the time of a training step by
arithmetic, for a card of about that memory (`onewan plan`). *Host* is the highest peak in host
memory, and the host memory that the values were chosen for. With more of it,
`onewan init --vram 24GB --ram 128GB` may keep the weights as they are stored.

| file | clips | weights | step | host |
| --- | --- | --- | --- | --- |
"""


def made(variant: VariantName, method: MethodKind, card_gb: int) -> tuple[RunFile, str] | None:
    """The run file for a card, and its text; None if none of `HOSTS_GB` is enough for it."""
    name = f"{method}_{card_gb}gb.yaml"
    request = StarterRequest(variant=variant, method=method, file=name)
    for host_gb in HOSTS_GB:
        try:
            values, plan = fitted(request, card_gb * 10**9, host_gb * 10**9)
        except MemoryPlanError:
            continue
        side = round((values.area or 0) ** 0.5)
        found = RunFile(
            variant=variant,
            method=method,
            card_gb=card_gb,
            host_gb=host_gb,
            frames=values.frames,
            size=f"{side}x{side}" if side else "480p",
            weights=values.weights,
            step_seconds=float(f"{plan.run_time.step:.3g}"),
            device_bytes=plan.peak.device_bytes,
            host_bytes=plan.host_peak.host_bytes,
        )
        return found, starter(replace(request, fitted=values))
    return None


def all_combinations() -> Iterator[tuple[VariantName, MethodKind, int]]:
    """Each variant, method and card, in the order of the table."""
    for variant in VARIANTS:
        for method in METHODS:
            for card_gb in CARDS_GB:
                yield variant, method, card_gb


def readme(rows: Sequence[RunFile]) -> str:
    """The page with the table of `rows`."""
    lines = [f"| [{row.file}]({row.file}) | {' | '.join(cells(row)[3:])} |" for row in rows]
    return README + "\n".join(lines) + "\n"


def texts() -> dict[Path, str]:
    """The text of each file."""
    found = [made(*combination) for combination in all_combinations()]
    rows = [row for row, _ in filter(None, found)]
    return {
        **{FOLDER / row.file: text for row, text in filter(None, found)},
        FOLDER / "README.md": readme(rows),
        ROOT / "src" / "onewan" / "resources" / LISTED: as_listed(rows),
    }


def main() -> int:
    expected = texts()
    present = {p for p in FOLDER.rglob("*") if p.is_file()}
    wrong = [p for p, text in expected.items() if not p.is_file() or p.read_text("utf-8") != text]
    left = sorted(present - expected.keys())
    if "--check" in sys.argv[1:]:
        for path in (*wrong, *left):
            print(f"{path}: is not up to date; run python scripts/write_configs.py")
        return 1 if wrong or left else 0
    for path in left:
        path.unlink()
    for path in wrong:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(expected[path], encoding="utf-8", newline="\n")
    print(
        f"{FOLDER}: {len(expected) - 2} run files, {len(wrong)} files written, {len(left)} removed"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
