"""The systems of the zoo by name."""

from __future__ import annotations

from collections.abc import Iterable

from offramp.errors import DataError, unknown_name
from offramp.zoo.branchynet import recipes as branchynet
from offramp.zoo.inception import recipes as inception
from offramp.zoo.msdnet import recipes as msdnet
from offramp.zoo.recipe import Recipe
from offramp.zoo.shallow_deep import recipes as shallow_deep

__all__ = ["SYSTEMS", "system"]

SYSTEMS: dict[str, Recipe] = {
    recipe.name: recipe
    for recipes in (branchynet, inception, shallow_deep, msdnet)
    for recipe in recipes.RECIPES
}


def system(name: str, also: Iterable[str] = ()) -> Recipe:
    """The recipe of that name.

    Args:
        name: of a system.
        also: names of what the caller knows besides, for the error.

    Raises:
        DataError: there is none.
    """
    if name not in SYSTEMS:
        raise DataError(unknown_name("system", name, sorted([*SYSTEMS, *also])))
    return SYSTEMS[name]
