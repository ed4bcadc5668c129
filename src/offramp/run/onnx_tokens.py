"""Linear layers over tokens as products of two matrices, bias included."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, fx

__all__ = ["flatten_tokens"]

_ATEN = torch.ops.aten
_OF_EACH_NUMBER = {
    _ATEN.dropout.default,
    _ATEN.gelu.default,
    _ATEN.relu.default,
    _ATEN.sigmoid.default,
    _ATEN.silu.default,
    _ATEN.tanh.default,
}


def flatten_tokens(graph: fx.Graph) -> None:
    """Rewrite a graph in place: what lies between linear layers over ``(B, T, D)`` is ``(B·T, D)``.

    Of more than two dimensions an engine computes a product and then adds the bias, in two kernels;
    of two it does so in one. Sums, layer norms and functions of each number are the same in either
    form, so that tokens stay flat from one layer to the next. Nothing in the graph may be written
    in place.
    """
    flat: dict[fx.Node, fx.Node] = {}
    for node in list(graph.nodes):
        sources = _to_flatten(node, flat) if _is_of_tokens(node) else []
        if not sources:
            continue
        with graph.inserting_before(node):
            for source in sources:
                if source not in flat:
                    value = _tensor(source).flatten(0, -2)
                    flat[source] = _reshaped(graph, source, [-1, value.shape[-1]], value)
            args = tuple(flat[arg] if arg in sources else arg for arg in node.args)
            made = graph.call_function(node.target, args, node.kwargs)
            made.meta = {"val": _tensor(node).flatten(0, -2)}
            back = _reshaped(graph, made, [-1, *_tensor(node).shape[1:]], _tensor(node))
        flat[back] = made
        node.replace_all_uses_with(back)
        graph.erase_node(node)


def _to_flatten(node: fx.Node, flat: dict[fx.Node, fx.Node]) -> list[fx.Node]:
    """The arguments that are flat where the node is computed flat; none where it is not."""
    first: Any = next(iter(node.args), None)
    if node.target is _ATEN.add.Tensor:
        both = [arg for arg in node.args if isinstance(arg, fx.Node)]
        worth = len(both) == 2 and not flat.keys().isdisjoint(both)
        return both if worth and all(_sizes(arg) == _sizes(node) for arg in both) else []
    if node.target is _ATEN.linear.default:
        matrix = _tensor(cast(fx.Node, node.args[1])).ndim == 2
        worth = matrix and (first in flat or len(node.args) > 2)  # has a bias
    elif node.target is _ATEN.layer_norm.default:
        shape: Any = node.args[1]
        worth = first in flat and len(shape) == 1
    elif node.target is _ATEN.clone.default:  # what a dropout may be exported as
        worth = first in flat and not node.kwargs
    else:
        worth = node.target in _OF_EACH_NUMBER and first in flat
    return [first] if worth else []


def _is_of_tokens(node: fx.Node) -> bool:
    """Whether it is of floats in three or more dimensions, all of them known but the first."""
    value = node.meta.get("val") if node.op == "call_function" else None
    return (
        isinstance(value, Tensor)
        and value.is_floating_point()
        and value.ndim > 2
        and all(isinstance(size, int) and size for size in value.shape[1:])
    )


def _reshaped(graph: fx.Graph, source: fx.Node, sizes: list[int], value: Tensor) -> fx.Node:
    made = graph.call_function(_ATEN.reshape.default, (source, sizes))
    made.meta = {"val": value}
    return made


def _sizes(node: fx.Node) -> list[str]:
    """By what they are called: to compare an open size with a number would settle it.

    A size itself, which may be added to a tensor, has none.
    """
    return [str(size) for size in getattr(node.meta["val"], "shape", ())]


def _tensor(node: fx.Node) -> Tensor:
    value: Tensor = node.meta["val"]
    return value
