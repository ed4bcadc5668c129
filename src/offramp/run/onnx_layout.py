"""Shortcuts of residual blocks, written so that ONNX Runtime adds them within the convolution.

Its convolutions work on blocks of channels, and an addition behind one is done in passing where the
other summand is in blocks, too. If it is not, neither is the sum, and from there on every block of
the network reorders its map twice, adds and clips in kernels of their own. Two summands are:

* a shortcut that leaves out pixels and adds channels of zeros (option A of He et al., 2016). It is
  the convolution with ones where a channel is copied;
* the map that a stage begins with. It goes through a convolution that copies every channel.

Both copy exactly: x times one, and zeros added. Without kernels of their own, the later stages also
take less time where nobody is left.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

__all__ = ["keep_in_blocks"]

BLOCK = 8  # channels, or a multiple of it: others are not put into blocks


def keep_in_blocks(model: onnx.ModelProto, begins: Sequence[str]) -> None:
    """Rewrite a model in place.

    Slices that nobody reads any more stay: a stage is what its outputs need.

    Args:
        model: what torch exported.
        begins: the inputs that are features of an earlier stage.
    """
    graph = _Graph(model.graph)
    copies = [graph.padded_shortcut(node) for node in model.graph.node if node.op_type == "Pad"]
    copies += [graph.beginning(name) for name in begins]
    for copy in copies:
        if copy is not None:
            graph.put(copy)


@dataclass(frozen=True)
class _Copy:
    """A convolution that copies channels."""

    source: str
    result: str
    weights: np.ndarray
    strides: tuple[int, int]
    group: int
    instead_of: onnx.NodeProto | None  # of the whole source, where ``None``


class _Graph:
    def __init__(self, graph: onnx.GraphProto) -> None:
        self.graph = graph
        self.made_by = {name: node for node in graph.node for name in node.output}
        self.readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in graph.node:
            for name in node.input:
                self.readers[name].append(node)
        self.constants = {value.name: value for value in graph.initializer}
        self.known = {v.name: v.type.tensor_type for v in (*graph.input, *graph.value_info)}

    # -- what can be written otherwise -------------------------------------------------------------

    def padded_shortcut(self, node: onnx.NodeProto) -> _Copy | None:
        """Strided slices of height and width, and channels of zeros added to what is left."""
        added = self._added_channels(node)
        if added is None or not self._joins(node.output[0]):
            return None
        source, strides = node.input[0], [1, 1]
        while (before := self.made_by.get(source)) is not None and before.op_type == "Slice":
            step = self._every(before)
            if step is None:
                return None
            strides[step[0] - 2] *= step[1]
            source = before.input[0]
        channels = self._channels(source)
        if channels is None:
            return None
        first, width = added[0], channels + sum(added)
        weights = np.eye(width, dtype=np.float32)[:, first : first + channels, None, None]
        return _Copy(source, node.output[0], weights, (strides[0], strides[1]), 1, node)

    def beginning(self, name: str) -> _Copy | None:
        """The map that a stage begins with, where a residual block adds it."""
        channels = self._channels(name)
        if channels is None or channels % BLOCK or not self._joins(name):
            return None
        weights = np.ones((channels, 1, 1, 1), np.float32)
        return _Copy(name, f"{name}/in_blocks", weights, (1, 1), channels, None)

    def _joins(self, name: str) -> bool:
        """Whether the value is added to what a convolution computes."""
        for node in self.readers[name]:
            if node.op_type == "Add":
                (other,) = [value for value in node.input if value != name] or [""]
                before = self.made_by.get(other)
                if before is not None and before.op_type == "BatchNormalization":
                    before = self.made_by.get(before.input[0])
                if before is not None and before.op_type == "Conv":
                    return True
        return False

    def _channels(self, name: str) -> int | None:
        """Of a map ``(B, C, H, W)`` in single precision."""
        kind = self.known.get(name)
        if kind is None or kind.elem_type != TensorProto.FLOAT or len(kind.shape.dim) != 4:
            return None
        return kind.shape.dim[1].dim_value or None

    def _added_channels(self, node: onnx.NodeProto) -> tuple[int, int] | None:
        """Channels of zeros before and behind those of a map; nothing else is padded."""
        mode = next((a.s for a in node.attribute if a.name == "mode"), b"constant")
        pads = self._numbers(node, 1)
        if mode != b"constant" or pads is None or (len(node.input) > 3 and node.input[3]):
            return None
        value = self._numbers(node, 2)
        zero = len(node.input) < 3 or not node.input[2] or value == [0]
        if len(pads) != 8 or not zero or any(pads[:1] + pads[2:5] + pads[6:]) or min(pads) < 0:
            return None
        return pads[1], pads[5]

    def _every(self, node: onnx.NodeProto) -> tuple[int, int] | None:
        """The axis of which a slice takes every so many-th, from the first to the last."""
        starts, ends, axes, steps = (self._numbers(node, k) for k in (1, 2, 3, 4))
        if not (starts and ends and axes and steps) or len(starts) != 1:
            return None
        if starts != [0] or ends[0] < 2**31 - 1 or axes[0] not in (2, 3) or steps[0] < 1:
            return None
        return axes[0], steps[0]

    def _numbers(self, node: onnx.NodeProto, index: int) -> list[int] | None:
        if index >= len(node.input) or node.input[index] not in self.constants:
            return None
        found: Any = numpy_helper.to_array(self.constants[node.input[index]])
        return list(found.flatten().tolist())

    # -- writing it --------------------------------------------------------------------------------

    def put(self, copy: _Copy) -> None:
        weights = f"{copy.result}/copy"
        self.graph.initializer.append(numpy_helper.from_array(copy.weights, weights))
        made = helper.make_node(
            "Conv",
            [copy.source, weights],
            [copy.result],
            kernel_shape=[1, 1],
            strides=copy.strides,
            group=copy.group,
        )
        if copy.instead_of is not None:
            copy.instead_of.CopyFrom(made)
            return
        for node in self.readers[copy.source]:
            for i, name in enumerate(node.input):
                if name == copy.source:
                    node.input[i] = copy.result
        self.graph.node.insert(0, made)
