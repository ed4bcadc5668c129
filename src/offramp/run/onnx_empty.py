"""Operators that cannot compute on zero rows, made able to.

Where nobody is left, the later stages of a flat file run on zero rows. Nearly all kernels then
return at once; the recurrent ones of ONNX Runtime abort the process. They get one row of zeros
where there is none, and it is cut off again behind them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

__all__ = ["allow_empty"]

# All in the layout that torch exports: X is (time, batch, size), the initial and last states are
# (directions, batch, size), and Y is (time, directions, batch, size).
RECURRENT = {"LSTM", "GRU", "RNN"}
INPUTS = (0, 5, 6)  # X, initial_h, initial_c: the batch is dimension 1
OUTPUT_AXES = (2, 1, 1)  # Y, Y_h, Y_c


def allow_empty(model: onnx.ModelProto) -> None:
    """Rewrite a model in place so that recurrent operators may be given zero rows."""
    graph = model.graph
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.op_type in RECURRENT and node.domain in ("", "ai.onnx"):
            nodes.extend(_guarded(node, len(nodes)))
        else:
            nodes.append(node)
    if len(nodes) == len(graph.node):
        return
    del graph.node[:]
    graph.node.extend(nodes)
    for value in (0, 1, 2):
        graph.initializer.append(numpy_helper.from_array(np.array([value], np.int64), _name(value)))


def _name(value: int) -> str:
    return f"empty/{value}"


def _guarded(node: onnx.NodeProto, number: int) -> list[onnx.NodeProto]:
    """The node with padding of the batch before it, and its removal behind it."""
    tag = f"empty/{number}"
    made: list[onnx.NodeProto] = []

    def add(kind: str, inputs: list[str], name: str, **attributes: Any) -> str:  # noqa: ANN401
        made.append(helper.make_node(kind, inputs, [f"{tag}/{name}"], **attributes))
        return f"{tag}/{name}"

    zero, one = _name(0), _name(1)
    rows = add("Shape", [node.input[0]], "rows", start=1, end=2)
    missing = add("Sub", [one, add("Min", [rows, one], "some")], "missing")
    pads = add("Concat", [zero, zero, zero, zero, missing, zero], "pads", axis=0)
    inner = onnx.NodeProto()
    inner.CopyFrom(node)
    for i in INPUTS:
        if i < len(node.input) and node.input[i]:
            inner.input[i] = add("Pad", [node.input[i], pads], f"input_{i}")
    made.append(inner)
    for i, (name, axis) in enumerate(zip(node.output, OUTPUT_AXES, strict=False)):
        if name:
            inner.output[i] = f"{tag}/output_{i}"
            given = [inner.output[i], zero, rows, _name(axis)]
            made.append(helper.make_node("Slice", given, [name]))
    return made
