"""Operators that cannot compute on zero rows, made able to.

Where nobody is left, the later stages of a flat file run on zero rows. Nearly all kernels then
return at once. Two kinds do not:

* the recurrent ones of ONNX Runtime abort the process. They get one row of zeros where there is
  none, and it is cut off again behind them;
* a reshape that leaves a size open (-1) beside the batch: of nothing, any size would do. The size
  is written out where it does not depend on the batch (a group norm is exported so).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx.shape_inference
from onnx import helper, numpy_helper

__all__ = ["allow_empty"]

# All in the layout that torch exports: X is (time, batch, size), the initial and last states are
# (directions, batch, size), and Y is (time, directions, batch, size).
RECURRENT = {"LSTM", "GRU", "RNN"}
INPUTS = (0, 5, 6)  # X, initial_h, initial_c: the batch is dimension 1
OUTPUT_AXES = (2, 1, 1)  # Y, Y_h, Y_c

LARGEST_SHAPE = 64  # a constant of more entries is a weight, not a shape


def allow_empty(model: onnx.ModelProto) -> None:
    """Rewrite a model in place so that all of its operators may be given zero rows."""
    _settle_reshapes(model)
    _pad_recurrent(model)


def _settle_reshapes(model: onnx.ModelProto) -> None:
    graph = model.graph
    constants = {value.name: value for value in graph.initializer}
    wanted: dict[str, tuple[onnx.NodeProto, list[int]]] = {}
    for node in graph.node:
        if node.op_type == "Reshape" and node.input[1] in constants:
            sizes = numpy_helper.to_array(constants[node.input[1]]).tolist()
            if -1 in sizes and 0 in sizes:
                wanted[node.output[0]] = (node, sizes)
    if not wanted:
        return
    for value in _inferred(model):
        if value.name not in wanted:
            continue
        node, sizes = wanted[value.name]
        open_at = sizes.index(-1)
        known = value.type.tensor_type.shape.dim
        if len(known) == len(sizes) and known[open_at].HasField("dim_value"):
            sizes[open_at] = known[open_at].dim_value
            node.input[1] = f"{node.output[0]}/sizes"
            array = np.array(sizes, np.int64)
            graph.initializer.append(numpy_helper.from_array(array, node.input[1]))


def _inferred(model: onnx.ModelProto) -> Sequence[onnx.ValueInfoProto]:
    """The shapes of all values, found on a copy without the weights."""
    source = model.graph
    graph = onnx.GraphProto()
    graph.name = source.name
    graph.node.extend(source.node)
    graph.input.extend(source.input)
    graph.output.extend(source.output)
    for value in source.initializer:
        if np.prod(value.dims) <= LARGEST_SHAPE:
            graph.initializer.append(value)
        else:
            kind = helper.make_tensor_value_info(value.name, value.data_type, value.dims)
            graph.input.append(kind)
    skeleton = helper.make_model(
        graph, opset_imports=model.opset_import, functions=list(model.functions)
    )
    inferred = onnx.shape_inference.infer_shapes(skeleton, data_prop=True)
    return [*inferred.graph.value_info, *inferred.graph.output]


def _pad_recurrent(model: onnx.ModelProto) -> None:
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
