"""Operators that the ONNX exporter of torch takes in one form only, brought into it."""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

__all__ = ["bring_into_form"]

_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default


def bring_into_form(program: ExportedProgram) -> None:
    """Rewrite a program in place.

    Attention over ``(N, L, D)`` becomes attention over ``(N, 1, L, D)``: one head.
    """
    graph = program.graph
    for node in list(graph.nodes):
        if node.target is _ATTENTION and node.args[0].meta["val"].ndim == 3:
            _as_one_head(graph, node)
    program.graph_module.recompile()


def _as_one_head(graph: fx.Graph, node: fx.Node) -> None:
    with graph.inserting_before(node):
        wide = {
            source: _insert(graph, torch.ops.aten.unsqueeze.default, source)
            for source in node.all_input_nodes
            if _tensor(source).ndim == 3
        }
    with graph.inserting_after(node):
        narrow = _insert(graph, torch.ops.aten.squeeze.dim, node, _tensor(node).unsqueeze(1))
    node.replace_all_uses_with(narrow, delete_user_cb=lambda user: user is not narrow)
    for source, copy in wide.items():
        node.replace_input_with(source, copy)
    node.meta["val"] = _tensor(node).unsqueeze(1)


def _insert(
    graph: fx.Graph, operator: torch._ops.OpOverload, source: fx.Node, given: Tensor | None = None
) -> fx.Node:
    """``operator(source, 1)``, described for the exporter; ``given``: the source as it will be."""
    made = graph.call_function(operator, (source, 1))
    made.meta = {"val": operator(_tensor(source) if given is None else given, 1)}
    return made


def _tensor(node: fx.Node) -> Tensor:
    value: Tensor = node.meta["val"]
    return value
