"""The tables of docs/recipes.md and docs/start.md, from `onewan.presets.recipes`.

python benchmarks/recipe_table.py    # writes them between their markers
"""

from __future__ import annotations

from pathlib import Path

from markers import replace_between

from onewan.presets.recipes import RECIPES, Recipe

DOCS = Path(__file__).resolve().parents[1] / "docs"
DOCUMENTS = ((DOCS / "recipes.md", True), (DOCS / "start.md", False))
"""Documents with the table, and whether it has the sources of each row there."""
TABLE = "recipes"


def table(*, with_sources: bool) -> str:
    """The table in Markdown, a row for each purpose."""
    titles = [
        "`--purpose`",
        "clips",
        "size",
        "frames at 16 fps",
        "steps of each expert",
        "rank",
        "learning rate",
        *(["sources"] if with_sources else []),
    ]
    lines = [f"| {' | '.join(titles)} |", "|" + " --- |" * len(titles)]
    rows = (row(name, recipe, with_sources=with_sources) for name, recipe in RECIPES.items())
    return "\n".join([*lines, *rows])


def row(name: str, recipe: Recipe, *, with_sources: bool) -> str:
    rate = recipe.lr
    if recipe.high_lr is not None:
        rate += f"; high expert {recipe.high_lr}"
    sources = ", ".join(f"[{source.name}]({source.url})" for source in recipe.sources)
    cells = (
        f"`{name}`",
        recipe.material,
        f"{recipe.side}x{recipe.side}",
        str(recipe.frames(16)),
        str(recipe.steps),
        str(recipe.rank),
        rate,
        *([sources] if with_sources else []),
    )
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    for document, with_sources in DOCUMENTS:
        replace_between(document, TABLE, table(with_sources=with_sources))
