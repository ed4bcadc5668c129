"""How much memory the activations of a graph take, for one sample."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import sympy
import torch
from torch import Tensor, fx

__all__ = ["row_bytes", "symbols_of"]


def row_bytes(graph: fx.Graph, varying: Collection[fx.Node]) -> float:
    """The most memory that activations take at any point of the graph, in bytes for one sample.

    Args:
        graph: an exported graph.
        varying: its nodes that depend on an input.
    """
    last_use: dict[fx.Node, int] = {}
    nodes = list(graph.nodes)
    for i, node in enumerate(nodes):
        last_use.update(dict.fromkeys(node.all_input_nodes, i))
    ends: dict[int, float] = {}
    alive = peak = 0.0
    for i, node in enumerate(nodes):
        value = node.meta.get("val")
        if isinstance(value, Tensor) and node in varying and any(map(symbols_of, value.shape)):
            size = value.element_size() * _numel_per_row(value)
            alive += size
            ends[last_use.get(node, i)] = ends.get(last_use.get(node, i), 0.0) + size
        peak = max(peak, alive)
        alive -= ends.get(i, 0.0)
    return peak


def _numel_per_row(value: Tensor) -> float:
    sizes = [_hint(size) for size in value.shape]
    batch = next((_hint(size) / _ratio(size) for size in value.shape if symbols_of(size)), 1.0)
    return math.prod(sizes) / max(batch, 1.0)


def _hint(size: Any) -> float:  # noqa: ANN401
    """A size for the example; 1 where the example does not tell."""
    if isinstance(size, int):
        return float(size)
    return float(size.node.hint or 1) if size.node.has_hint() else 1.0


def _ratio(size: Any) -> float:  # noqa: ANN401
    """How many times the batch a size is, where it is a plain multiple."""
    factor = size.node.expr.as_coeff_Mul()[0]
    return float(factor) if factor.is_Number and factor > 0 else 1.0


def symbols_of(size: object) -> set[sympy.Symbol]:
    """The symbols that a size depends on; none where it is a number."""
    return size.node.expr.free_symbols if isinstance(size, torch.SymInt) else set()
