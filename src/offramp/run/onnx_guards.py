"""Operators that cannot compute on zero rows, and have no other form: guarded by a row of zeros.

Where there is no row they get one, and it is cut off again behind them. That copies what they
read, and takes kernels where nobody is left, so it is only done where it has to be:

* the recurrent operators of ONNX Runtime abort the process;
* OpenVINO refuses to pool nothing. ONNX Runtime does not, but a file to deploy is for both.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import helper, numpy_helper

__all__ = ["POOLS", "RECURRENT", "guard", "unguard"]

RECURRENT = frozenset({"LSTM", "GRU", "RNN"})
POOLS = frozenset({"AveragePool", "MaxPool", "LpPool"})

OWN = "empty/at_"  # the names of a guard's values begin so
PARTS = {"Shape", "Min", "Sub", "Concat", "Pad", "Slice"}  # of a guard, beside what is guarded


class _Padded(NamedTuple):
    """Where the batch lies around an operator."""

    rank: int  # of its inputs
    axis: int  # of them that is the batch
    inputs: tuple[int, ...]  # those that have a batch
    outputs: tuple[int, ...]  # for each output, the axis that is the batch


def guard(model: onnx.ModelProto, kinds: Collection[str], spared: Collection[str] = ()) -> None:
    """Rewrite a model in place so that operators of some kinds may be given zero rows.

    Args:
        model: with no guards but those that :func:`unguard` left.
        kinds: of :data:`POOLS` and :data:`RECURRENT`.
        spared: values that always have rows; what computes them is left as it is.
    """
    graph = model.graph
    always, taken = frozenset(spared), {_tag(node) for node in graph.node}
    free = (n for n in itertools.count() if f"{OWN}{n}/" not in taken)
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        padded = _padding_of(node) if node.op_type in kinds and not _tag(node) else None
        if padded is None or not always.isdisjoint(node.output):
            nodes.append(node)
        else:
            nodes.extend(_guarded(node, padded, next(free)))
    if len(nodes) == len(graph.node):
        return
    _replace(graph, nodes)
    known = {value.name for value in graph.initializer}
    for value in (0, 1, 2):
        if _name(value) not in known:
            array = np.array([value], np.int64)
            graph.initializer.append(numpy_helper.from_array(array, _name(value)))


def unguard(model: onnx.ModelProto) -> None:
    """Undo :func:`guard` in place; a guard between whose parts something was put since stays."""
    graph = model.graph
    guards: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in graph.node:
        guards[_tag(node)].append(node)
    guards.pop("", None)
    bare = {tag: _bare(tag, parts) for tag, parts in guards.items()}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        found = bare.get(_tag(node))
        if found is None:
            nodes.append(node)
        elif node.op_type == found.op_type:  # where it was
            nodes.append(found)
    if len(nodes) < len(graph.node):
        _replace(graph, nodes)


def _bare(tag: str, parts: Sequence[onnx.NodeProto]) -> onnx.NodeProto | None:
    """The operator without its guard; ``None`` where not all is as it was made."""
    before = {n.output[0]: n.input[0] for n in parts if n.op_type == "Pad"}
    behind = {n.input[0]: n.output[0] for n in parts if n.op_type == "Slice"}
    others = [n for n in parts if n.op_type not in PARTS]
    if len(others) != 1 or others[0].op_type not in RECURRENT | POOLS:
        return None
    inner = onnx.NodeProto()
    inner.CopyFrom(others[0])
    for values, names in ((inner.input, before), (inner.output, behind)):
        for i, name in enumerate(values):
            values[i] = names.get(name, name)
    return None if any(n.startswith(tag) for n in (*inner.input, *inner.output)) else inner


def _tag(node: onnx.NodeProto) -> str:
    """What the names of one guard's values begin with; empty for a node that is of none."""
    own = (name for name in (*node.output, *node.input) if name.startswith(OWN))
    return next((name.rpartition("/")[0] + "/" for name in own), "")


def _padding_of(node: onnx.NodeProto) -> _Padded | None:
    """How an operator that needs rows is given some; ``None``: it needs none."""
    if node.domain not in ("", "ai.onnx"):
        return None
    if node.op_type in RECURRENT:
        # In the layout that torch exports: X is (time, batch, size), the initial and last states
        # (directions, batch, size), and Y is (time, directions, batch, size).
        return _Padded(3, 1, (0, 5, 6), (2, 1, 1))
    if node.op_type in POOLS:
        return _Padded(2 + len(_kernel(node)), 0, (0,), (0, 0))
    return None


def _kernel(node: onnx.NodeProto) -> Sequence[int]:
    found: Sequence[int] = next(a.ints for a in node.attribute if a.name == "kernel_shape")
    return found


def _replace(graph: onnx.GraphProto, nodes: Sequence[onnx.NodeProto]) -> None:
    del graph.node[:]
    graph.node.extend(nodes)


def _name(value: int) -> str:
    return f"empty/{value}"


def _guarded(node: onnx.NodeProto, padded: _Padded, number: int) -> list[onnx.NodeProto]:
    """The node with padding of the batch before it, and its removal behind it."""
    tag = f"{OWN}{number}"
    made: list[onnx.NodeProto] = []

    def add(kind: str, inputs: list[str], name: str, **attributes: Any) -> str:  # noqa: ANN401
        made.append(helper.make_node(kind, inputs, [f"{tag}/{name}"], **attributes))
        return f"{tag}/{name}"

    zero, one = _name(0), _name(1)
    rows = add("Shape", [node.input[0]], "rows", start=padded.axis, end=padded.axis + 1)
    missing = add("Sub", [one, add("Min", [rows, one], "some")], "missing")
    ends = [missing if axis == padded.axis else zero for axis in range(padded.rank)]
    pads = add("Concat", [zero] * padded.rank + ends, "pads", axis=0)
    inner = onnx.NodeProto()
    inner.CopyFrom(node)
    for i in padded.inputs:
        if i < len(node.input) and node.input[i]:
            inner.input[i] = add("Pad", [node.input[i], pads], f"input_{i}")
    made.append(inner)
    for i, (name, axis) in enumerate(zip(node.output, padded.outputs, strict=False)):
        if name:
            inner.output[i] = f"{tag}/output_{i}"
            given = [inner.output[i], zero, rows, _name(axis)]
            made.append(helper.make_node("Slice", given, [name]))
    return made
