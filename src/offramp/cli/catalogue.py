"""What `offramp zoo` shows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from offramp.zoo.recipe import Recipe
from offramp.zoo.text import TextSystem
from offramp.zoo.text.running import EPOCHS

__all__ = ["Catalogue"]


@dataclass(frozen=True)
class Catalogue:
    """Systems, one a line.

    Attributes:
        recipes: for images.
        texts: for text encoders.
    """

    recipes: Sequence[Recipe]
    texts: Sequence[TextSystem]

    def to_dict(self) -> dict[str, Any]:
        """Name, paper, summary, data and epochs of each."""
        return {
            name: {"paper": paper, "summary": summary, "data": data, "epochs": epochs}
            for name, summary, paper, data, epochs in self._lines()
        }

    def _lines(self) -> Iterator[tuple[str, str, str, str, int]]:
        for recipe in self.recipes:
            yield recipe.name, recipe.summary, recipe.paper, recipe.data, recipe.epochs
        for text in self.texts:
            yield text.name, text.summary, text.paper, "sentences", EPOCHS

    def render(self) -> Table:
        """The same as a table."""
        table = Table("system", "what it is", "paper", "data", "epochs", box=None)
        for *words, epochs in self._lines():
            table.add_row(*words, str(epochs))
        return table
