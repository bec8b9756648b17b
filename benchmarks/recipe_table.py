"""The table of docs/recipes.md, from `onewan.cli.recipes`.

python benchmarks/recipe_table.py    # writes it between its markers
"""

from __future__ import annotations

from pathlib import Path

from markers import replace_between

from onewan.cli.recipes import RECIPES, Recipe

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "recipes.md"
TABLE = "recipes"


def table() -> str:
    """The table in Markdown, a row for each purpose."""
    lines = [
        "| `--purpose` | clips | size | frames at 16 fps | steps of each expert | rank | "
        "learning rate | sources |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    return "\n".join([*lines, *(row(name, recipe) for name, recipe in RECIPES.items())])


def row(name: str, recipe: Recipe) -> str:
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
        sources,
    )
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    replace_between(DOCUMENT, TABLE, table())
