"""Operators that cannot compute on zero rows, written as others that can, at no cost.

Where nobody is left, the later stages of a flat file run on zero rows. Nearly all kernels then
return at once. Two kinds that do not have another form:

* OpenVINO refuses to pool nothing. An average over windows is the convolution with equal weights;
* a reshape that leaves a size open (-1) beside the batch: of nothing, any size would do. The size
  is written out where it does not depend on the batch (a group norm is exported so).

For those that have none, see :mod:`offramp.run.onnx_guards`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx.shape_inference
from onnx import helper, numpy_helper

__all__ = ["allow_empty"]

LARGEST_SHAPE = 64  # a constant of more entries is a weight, not a shape


def allow_empty(model: onnx.ModelProto, never_empty: Sequence[str] = ()) -> None:
    """Rewrite a model in place so that more of its operators may be given zero rows.

    Args:
        model: what torch exported.
        never_empty: inputs that always have rows; what is computed from them is left as it is.
    """
    _settle_reshapes(model)
    _convolve_averages(model, _computed_from(model.graph, never_empty))


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
