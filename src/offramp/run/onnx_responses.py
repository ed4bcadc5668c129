"""Local response normalisation (Krizhevsky et al., 2012) in operators that an engine is quick with.

torch exports it as a mean over three dimensions of which two are one wide, and as a power of 3/4.
For both, ONNX Runtime has one loop over single numbers only: in AlexNet for small images they took
half of the time. The sum over neighbouring channels is a convolution with ones where a channel is
in the window, which also multiplies by alpha and adds k; and ``y ** 0.75`` is the square root of y
times the square root of that. (Where the square of a feature overflows, torch divides by infinity;
the convolution gives NaN, and a runner refuses the row.)
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

__all__ = ["write_out_responses"]

QUARTERS = (0.25, 0.5, 0.75)  # powers that square roots make


def write_out_responses(model: onnx.ModelProto) -> None:
    """Rewrite a model in place.

    What nobody reads any more stays: a stage is what its outputs need.

    Args:
        model: what torch exported.
    """
    graph = _Graph(model.graph)
    for node in list(model.graph.node):
        if node.op_type == "AveragePool":
            graph.window(node)


class _Graph:
    def __init__(self, graph: onnx.GraphProto) -> None:
        self.graph = graph
        self.made_by = {name: node for node in graph.node for name in node.output}
        self.constants = {value.name: value for value in graph.initializer}
        values = (*graph.input, *graph.value_info, *graph.output)
        self.known = {v.name: v.type.tensor_type for v in values}

    def window(self, pool: onnx.NodeProto) -> None:
        """A mean over neighbouring channels, and what it is multiplied by and added to."""
        given = {a.name: helper.get_attribute_value(a) for a in pool.attribute}
        width, *others = given["kernel_shape"]
        moves = [*given.get("strides", ()), *given.get("dilations", ())]
        pads = [*given.get("pads", ()), given.get("auto_pad", b"NOTSET") != b"NOTSET"]
        if width < 2 or {*others, *moves, 1} != {1} or any(pads):
            return
        padded, last = self.made_by.get(pool.input[0]), self._only_reader(pool.output[0])
        if padded is None or last is None or last.op_type != "Squeeze":
            return
        dimensions = len(others)
        before = self._channels_padded(padded, width - 1)
        spread = self._source(padded, dimensions)
        if before is None or spread is None or self._numbers(last, 1) != [1]:
            return
        source, channels = spread
        factor, added = 1.0 / width, 0.0
        # A change of shape that leaves the shape as it is has been taken out by the exporter.
        following = self._only_reader(last.output[0])
        if following is not None and following.op_type == "Mul":
            value = self._scalar(following, last.output[0])
            if value is not None:
                factor, last = factor * value, following
                following = self._only_reader(last.output[0])
                if following is not None and following.op_type == "Add":
                    value = self._scalar(following, last.output[0])
                    if value is not None:
                        added, last = value, following
        behind = width - 1 - before
        ones = np.tril(np.triu(np.ones((channels, channels)), -before), behind)
        weights = np.float32(factor * ones).reshape(channels, channels, *[1] * dimensions)
        result = last.output[0]
        inputs = [source, f"{result}/window"]
        self.graph.initializer.append(numpy_helper.from_array(weights, inputs[1]))
        if added:
            inputs.append(f"{result}/added")
            bias = np.full(channels, added, np.float32)
            self.graph.initializer.append(numpy_helper.from_array(bias, inputs[2]))
        made = helper.make_node("Conv", inputs, [result], kernel_shape=[1] * dimensions)
        last.CopyFrom(made)
        if added > 0 and factor > 0:
            self._root(result)

    def _root(self, source: str) -> None:
        """A power of quarters, below one, of what is positive: no zero has a sign there."""
        power = self._only_reader(source)
        if power is None or power.op_type != "Pow" or power.input[0] != source:
            return
        exponent = self._scalar(power, source)
        if exponent not in QUARTERS:
            return
        result = power.output[0]
        once, twice = f"{result}/root", f"{result}/root_of_root"
        nodes = [
            helper.make_node("Sqrt", [source], [once]),
            helper.make_node("Sqrt", [once], [twice]),
            helper.make_node("Mul", [once, twice], [result]),
        ]
        if exponent < QUARTERS[-1]:
            nodes = nodes[: round(-math.log2(exponent))]  # a root for each half
            nodes[-1].output[0] = result
        at = list(self.graph.node).index(power)
        self.graph.node.remove(power)
        for place, node in enumerate(nodes, at):
            self.graph.node.insert(place, node)

    # -- what is matched ---------------------------------------------------------------------------

    def _channels_padded(self, node: onnx.NodeProto, wanted: int) -> int | None:
        """Zeros before the channels (dimension 2 here), of so many before and behind them.

        None if there are more or fewer of them, or if anything else is padded.
        """
        if node.op_type != "Pad" or {a.s for a in node.attribute if a.name == "mode"} - {
            b"constant"
        }:
            return None
        pads, value = self._numbers(node, 1), self._numbers(node, 2)
        if pads is None or (len(node.input) > 2 and node.input[2] and value != [0]):
            return None
        if len(node.input) > 3:  # only some axes
            return None
        before, behind = 2, 2 + len(pads) // 2
        if len(pads) < 8 or any(pads[:2] + pads[3:behind] + pads[behind + 1 :]):
            return None
        fits = min(pads) >= 0 and pads[before] + pads[behind] == wanted
        return int(pads[before]) if fits else None

    def _source(self, padded: onnx.NodeProto, dimensions: int) -> tuple[str, int] | None:
        """What was spread out to (B, 1, C, ...), with so many dimensions behind C; and C."""
        spread = self.made_by.get(padded.input[0])
        known = None if spread is None else self.known.get(spread.input[0])
        if spread is None or known is None or known.elem_type != TensorProto.FLOAT:
            return None
        sizes = [d.dim_value for d in known.shape.dim]
        if len(sizes) != 2 + dimensions or not sizes[1]:
            return None
        to = self._numbers(spread, 1)
        if spread.op_type == "Reshape":
            fits = to is not None and to[1:] == [1, *sizes[1:]]
        else:
            fits = spread.op_type == "Unsqueeze" and to == [1]
        return (spread.input[0], sizes[1]) if fits else None

    def _only_reader(self, name: str) -> onnx.NodeProto | None:
        found = [node for node in self.graph.node if name in node.input]
        public = any(name == value.name for value in self.graph.output)
        return found[0] if len(found) == 1 and not public else None

    def _scalar(self, node: onnx.NodeProto, other: str) -> float | None:
        """The constant beside ``other``, where it is one number."""
        names = [name for name in node.input if name != other]
        constant = self.constants.get(names[0]) if len(names) == 1 else None
        if constant is None:
            return None
        value = numpy_helper.to_array(constant)
        return float(value.reshape(())) if value.size == 1 and value.ndim < 2 else None

    def _numbers(self, node: onnx.NodeProto, index: int) -> list[int] | None:
        if index >= len(node.input) or node.input[index] not in self.constants:
            return None
        found: Any = numpy_helper.to_array(self.constants[node.input[index]])
        return list(found.flatten().tolist())
