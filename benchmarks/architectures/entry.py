"""One architecture of the list."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

__all__ = ["CLASSES", "ROWS", "Architecture"]

CLASSES = 7
ROWS = 9  # samples that every architecture comes with


@dataclass(frozen=True)
class Architecture:
    """A network with random weights, and samples for it.

    Attributes:
        name: unique in the list.
        source: the package that it comes from.
        kind: what sort of network it is; the tests take one of each kind.
        build: makes the network and ``ROWS`` samples (a tensor, or a mapping of keyword
            arguments). The random state is seeded before.
        attach: further arguments of ``offramp.attach``.
    """

    name: str
    source: str
    kind: str
    build: Callable[[], tuple[nn.Module, Any]]
    attach: dict[str, Any] = field(default_factory=dict)
