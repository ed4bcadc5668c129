"""What the ONNX exporter of torch, or an engine, wants in another form, brought into it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from offramp.run.onnx_tokens import flatten_tokens

__all__ = ["bring_into_form"]

_ATEN = torch.ops.aten
_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
_Masks = dict[tuple[fx.Node, torch.dtype], tuple[fx.Node, fx.Node]]
_LOW = torch.finfo(torch.float32).min / 2  # a number also with a score added; bfloat16 has it
RANK = 4  # (N, heads, L, D): the one that attention is exported in


def bring_into_form(program: ExportedProgram) -> None:
    """Rewrite a program in place.

    Attention over ``(N, L, D)`` becomes attention of one head, and attention over more dimensions
    that are a batch to it, such as ``(B, windows, heads, L, D)``, has the first ones folded. What
    cannot be folded, since its mask is shared along one of them, stays for the exporter to refuse.
    Attention is then written out as two products and a softmax: the exporter's own form works out
    the shape of the keys in kernels of its own, layer by layer.

    The largest softmax probability, spelt as eager torch is quickest with, becomes a softmax and
    its maximum: two kernels of an engine instead of five. A layer norm whose weight and bias are
    applied by themselves, as heads for tokens do, becomes one that has them. Linear layers over
    tokens become products of matrices (:mod:`offramp.run.onnx_tokens`).
    """
    graph = program.graph
    masks: _Masks = {}
    for node in list(graph.nodes):
        if node.target is _ATTENTION:
            if _rank(node.args[0]) != RANK:
                _fold(graph, node)
            if _rank(node.args[0]) == RANK:
                _write_out(graph, node, masks)
        elif node.target is _ATEN.reciprocal.default:
            _largest_probability(graph, node)
        elif node.target is _ATEN.layer_norm.default:
            _with_its_weight(graph, node)
    flatten_tokens(graph)
    graph.eliminate_dead_code()
    program.graph_module.recompile()


def _largest_probability(graph: fx.Graph, node: fx.Node) -> None:
    """``1 / sum exp(z - max z)``."""
    chain = [node]
    for target in (_ATEN.sum.dim_IntList, _ATEN.exp.default, _ATEN.sub.Tensor, _ATEN.amax.default):
        source = chain[-1].args[-1 if target is _ATEN.amax.default else 0]
        if not isinstance(source, fx.Node) or source.target is not target or source.kwargs:
            return
        chain.append(source)
    _, total, _, difference, largest = chain
    logits = difference.args[0]
    over_classes = ([-1], -1)
    if not isinstance(logits, fx.Node) or largest.args[0] is not logits or len(total.args) > 2:
        return
    if total.args[1] not in over_classes or largest.args[1] not in over_classes:
        return
    with graph.inserting_before(node):
        shares = graph.call_function(_ATEN.softmax.int, (logits, -1))
        shares.meta = {"val": _tensor(logits)}
        score = graph.call_function(_ATEN.amax.default, (shares, [-1]))
        score.meta = {"val": _tensor(node)}
    node.replace_all_uses_with(score)


def _with_its_weight(graph: fx.Graph, node: fx.Node) -> None:
    """``layer_norm(x) · weight + bias``, of one parameter each, the size of what is normalised."""
    values, shape, *rest = node.args
    if node.kwargs or any(value is not None for value in rest[:2]):
        return
    found: list[fx.Node] = []
    end = node
    for target in (_ATEN.mul.Tensor, _ATEN.add.Tensor):
        user = next(iter(end.users), None)
        if user is None or len(end.users) > 1:
            return
        if user.target is not target or user.args[0] is not end:
            return
        parameter = user.args[1] if len(user.args) == 2 and not user.kwargs else None
        if not isinstance(parameter, fx.Node) or parameter.op not in ("placeholder", "get_attr"):
            return
        alike = _tensor(parameter).dtype == _tensor(node).dtype
        if list(_tensor(parameter).shape) != shape or not alike:
            return
        found.append(parameter)
        end = user
    with graph.inserting_before(end):
        made = _call(graph, _ATEN.layer_norm.default, values, shape, *found, *rest[2:])
    end.replace_all_uses_with(made)


def _write_out(graph: fx.Graph, node: fx.Node, masks: _Masks) -> None:
    """``softmax(q kᵀ · scale + mask) v``; a query that may look at no key gets zeros."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    if given.get("dropout_p") or given.get("is_causal") or given.get("enable_gqa"):
        return
    query, keys, values = (given[name] for name in names[:3])
    mask, scale = given.get("attn_mask"), given.get("scale")
    if scale is None:
        scale = 1 / math.sqrt(_tensor(query).shape[-1])
    with graph.inserting_before(node):
        turned = _call(graph, _ATEN.transpose.int, keys, -2, -1)
        # First: products of half precision may be too large.
        query = _call(graph, _ATEN.mul.Tensor, query, scale)
        scores = _call(graph, _ATEN.matmul.default, query, turned)
        if mask is not None:
            dtype = _tensor(values).dtype
            if (mask, dtype) not in masks:
                masks[mask, dtype] = _added(graph, mask, dtype)
            added, seen = masks[mask, dtype]
            scores = _call(graph, _ATEN.add.Tensor, scores, added)
        shares = _call(graph, _ATEN.softmax.int, scores, -1)
        result = _call(graph, _ATEN.matmul.default, shares, values)
        if mask is not None:
            result = _call(graph, _ATEN.mul.Tensor, result, seen)
    node.replace_all_uses_with(result)
    graph.erase_node(node)


def _added(graph: fx.Graph, mask: fx.Node, dtype: torch.dtype) -> tuple[fx.Node, fx.Node]:
    """What is added to scores, and 1 for queries that may look at some key, 0 for the others.

    Both depend on the mask alone, which all layers share.
    """
    if _tensor(mask).dtype == torch.bool and dtype != torch.float16:
        # As far below every score as infinity is, but of a query without keys the softmax is a
        # number still: three kernels instead of six, in every step.
        added = _call(graph, _ATEN.where.Scalar, mask, 0.0, _LOW)
        added = _call(graph, _ATEN.to.dtype, added, dtype)
        open_ = _call(graph, _ATEN.to.dtype, mask, dtype)
        return added, _call(graph, _ATEN.amax.default, open_, [-1], True)
    if _tensor(mask).dtype == torch.bool:
        seen = _call(graph, _ATEN.any.dim, mask, -1, True)
        mask = _call(graph, _ATEN.where.Scalar, mask, 0.0, -math.inf)
    else:
        open_ = _call(graph, _ATEN.ne.Scalar, mask, -math.inf)
        seen = _call(graph, _ATEN.any.dim, open_, -1, True)
    added = _call(graph, _ATEN.where.ScalarOther, seen, mask, 0.0)
    added = _call(graph, _ATEN.to.dtype, added, dtype)
    return added, _call(graph, _ATEN.to.dtype, seen, dtype)


def _call(graph: fx.Graph, target: Any, *args: Any) -> fx.Node:  # noqa: ANN401
    made = graph.call_function(target, args)
    known = (_tensor(arg) if isinstance(arg, fx.Node) else arg for arg in args)
    made.meta = {"val": target(*known)}
    return made


def _fold(graph: fx.Graph, node: fx.Node) -> None:
    rank = _rank(node.args[0])
    leading = _tensor(node).shape[: rank - RANK + 1]
    whole = [source for source in node.all_input_nodes if _rank(source) == rank]
    masks = [source for source in node.all_input_nodes if _rank(source) not in (rank, 2)]
    fixed = all(isinstance(size, int) for size in leading[1:])
    alike = all(_tensor(source).shape[: len(leading)] == leading for source in whole)
    if masks or (rank > RANK and not (fixed and alike)):
        return
    with graph.inserting_before(node):
        folded = {source: _folded(graph, source, rank) for source in whole}
    result = _tensor(node)
    node.meta["val"] = _flat(result, rank)
    with graph.inserting_after(node):
        if rank < RANK:
            back = graph.call_function(torch.ops.aten.squeeze.dim, (node, 1))
        else:
            sizes = [-1, *leading[1:]]
            back = graph.call_function(torch.ops.aten.unflatten.int, (node, 0, sizes))
        back.meta = {"val": result}
    node.replace_all_uses_with(back, delete_user_cb=lambda user: user is not back)
    for source, copy in folded.items():
        node.replace_input_with(source, copy)


def _folded(graph: fx.Graph, source: fx.Node, rank: int) -> fx.Node:
    if rank < RANK:
        made = graph.call_function(torch.ops.aten.unsqueeze.default, (source, 1))
    else:
        made = graph.call_function(torch.ops.aten.flatten.using_ints, (source, 0, rank - RANK))
    made.meta = {"val": _flat(_tensor(source), rank)}
    return made


def _flat(value: Tensor, rank: int) -> Tensor:
    return value.unsqueeze(1) if rank < RANK else value.flatten(0, rank - RANK)


def _rank(node: Any) -> int:  # noqa: ANN401
    return _tensor(node).ndim


def _tensor(node: fx.Node) -> Tensor:
    value: Tensor = node.meta["val"]
    return value
