"""A bar for each long part of a search, where there is somebody to see it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

__all__ = ["shown"]

Item = TypeVar("Item")


def shown(
    items: Iterable[Item], what: str, total: int | None, progress: bool = True
) -> Iterator[Item]:
    """The items, with a bar on standard error if that is a terminal.

    Args:
        items: to walk.
        what: is being done, in a word.
        total: how many there are, if that is known.
        progress: show it at all.
    """
    from rich.console import Console

    console = Console(stderr=True)
    if not (progress and console.is_terminal):
        yield from items
        return
    from rich.progress import track

    yield from track(items, what, total=total, console=console, transient=True)
