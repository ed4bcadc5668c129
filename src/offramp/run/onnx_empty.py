"""Operators that cannot compute on zero rows, made able to.

Where nobody is left, the later stages of a flat file run on zero rows. Nearly all kernels then
return at once. Three kinds do not:

* the recurrent ones of ONNX Runtime abort the process. They get one row of zeros where there is
  none, and it is cut off again behind them;
* OpenVINO refuses to pool nothing. An average over windows is the convolution with equal weights,
  and is written so, which costs nothing (padding would: it copies the map). Other poolings are
  padded as the recurrent ones are;
* a reshape that leaves a size open (-1) beside the batch: of nothing, any size would do. The size
  is written out where it does not depend on the batch (a group norm is exported so).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx.shape_inference
from onnx import helper, numpy_helper

__all__ = ["allow_empty"]

RECURRENT = {"LSTM", "GRU", "RNN"}
POOLS = {"AveragePool", "MaxPool", "LpPool"}

LARGEST_SHAPE = 64  # a constant of more entries is a weight, not a shape


class _Padded(NamedTuple):
    """Where the batch lies around an operator."""

    rank: int  # of its inputs
    axis: int  # of them that is the batch
    inputs: tuple[int, ...]  # those that have a batch
    outputs: tuple[int, ...]  # for each output, the axis that is the batch


def allow_empty(model: onnx.ModelProto, never_empty: Sequence[str] = ()) -> None:
    """Rewrite a model in place so that all of its operators may be given zero rows.

    Args:
        model: what torch exported.
        never_empty: inputs that always have rows; what is computed from them is left as it is.
    """
    _settle_reshapes(model)
    spared = _computed_from(model.graph, never_empty)
    _convolve_averages(model, spared)
    _pad(model, spared)


def _computed_from(graph: onnx.GraphProto, inputs: Sequence[str]) -> set[str]:
    """The names of all values that depend on some of the inputs."""
    found = set(inputs)
    for node in graph.node:  # they come in the order of computation
        if not found.isdisjoint(node.input):
            found.update(node.output)
    return found


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


def _convolve_averages(model: onnx.ModelProto, spared: set[str]) -> None:
    """Write averages over windows as convolutions, which every engine computes on zero rows."""
    nodes = [
        node
        for node in model.graph.node
        if node.op_type == "AveragePool" and node.output[0] not in spared and _is_linear(node)
    ]
    if not nodes:
        return
    known = {value.name: value.type.tensor_type for value in _inferred(model)}
    for node in nodes:
        kind = known.get(node.input[0])
        if kind is None or len(kind.shape.dim) < 3 or not kind.shape.dim[1].dim_value:
            continue
        channels = kind.shape.dim[1].dim_value
        kernel = _attributes(node)["kernel_shape"]
        dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type)
        weights = np.full((channels, 1, *kernel), 1 / np.prod(kernel), dtype)
        name = f"{node.output[0]}/equal_weights"
        model.graph.initializer.append(numpy_helper.from_array(weights, name))
        kept = [a for a in node.attribute if a.name in ("kernel_shape", "strides", "pads")]
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute("group", channels)])
        node.op_type = "Conv"
        node.input.append(name)


def _is_linear(node: onnx.NodeProto) -> bool:
    """Whether every window of an average has the same weights, at the borders too."""
    given = _attributes(node)
    plain = not given.get("ceil_mode") and given.get("auto_pad", b"NOTSET") == b"NOTSET"
    return plain and (not any(given.get("pads", ())) or bool(given.get("count_include_pad")))


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def _padding_of(node: onnx.NodeProto) -> _Padded | None:
    """How an operator that needs rows is given some; ``None``: it needs none."""
    if node.domain not in ("", "ai.onnx"):
        return None
    if node.op_type in RECURRENT:
        # In the layout that torch exports: X is (time, batch, size), the initial and last states
        # (directions, batch, size), and Y is (time, directions, batch, size).
        return _Padded(3, 1, (0, 5, 6), (2, 1, 1))
    if node.op_type in POOLS:
        return _Padded(2 + len(_attributes(node)["kernel_shape"]), 0, (0,), (0, 0))
    return None


def _pad(model: onnx.ModelProto, spared: set[str]) -> None:
    graph = model.graph
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        padded = _padding_of(node)
        if padded is None or not spared.isdisjoint(node.output):
            nodes.append(node)
        else:
            nodes.extend(_guarded(node, padded, len(nodes)))
    if len(nodes) == len(graph.node):
        return
    del graph.node[:]
    graph.node.extend(nodes)
    for value in (0, 1, 2):
        graph.initializer.append(numpy_helper.from_array(np.array([value], np.int64), _name(value)))


def _name(value: int) -> str:
    return f"empty/{value}"


def _guarded(node: onnx.NodeProto, padded: _Padded, number: int) -> list[onnx.NodeProto]:
    """The node with padding of the batch before it, and its removal behind it."""
    tag = f"empty/{number}"
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
