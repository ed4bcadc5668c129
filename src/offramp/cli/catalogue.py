"""What `offramp zoo` shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from offramp.zoo.recipe import Recipe

__all__ = ["Catalogue"]


@dataclass(frozen=True)
class Catalogue:
    """Recipes, one a line."""

    recipes: Sequence[Recipe]

    def to_dict(self) -> dict[str, Any]:
        """Name, paper, summary, data and epochs of each."""
        return {
            recipe.name: {
                "paper": recipe.paper,
                "summary": recipe.summary,
                "data": recipe.data,
                "epochs": recipe.epochs,
            }
            for recipe in self.recipes
        }

    def render(self) -> Table:
        """The same as a table."""
        table = Table("system", "what it is", "paper", "data", "epochs", box=None)
        for recipe in self.recipes:
            table.add_row(
                recipe.name, recipe.summary, recipe.paper, recipe.data, str(recipe.epochs)
            )
        return table
