"""What papers propose, each as a combination of what the library has."""

from __future__ import annotations

from offramp.zoo.recipes.papers import PAPERS, PaperRecipe

__all__ = ["PAPERS", "PaperRecipe"]
