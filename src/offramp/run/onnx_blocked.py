"""Rows are taken from maps as ONNX Runtime lays them out, without a way back and forth.

It computes convolutions on blocks of channels, (B, C / 16, H, W, 16), and goes on in that layout
from operators of its own only. To take rows between two stages it therefore brings each map into
the plain layout, takes the rows, and brings them into blocks again. Rows are dimension 0 in both,
so that they can be taken from the blocks as they are, to the bit.
"""

from __future__ import annotations

from collections import defaultdict

import onnx

__all__ = ["take_in_blocks"]

_TAKE, _PLAIN, _BLOCKS = "Compress", "ReorderOutput", "ReorderInput"
LARGEST_BLOCK = 16  # channels; a map that fills its blocks has one shape in both layouts


def take_in_blocks(model: onnx.ModelProto) -> bool:
    """Leave out the change of layout around every taking of rows, where nothing else needs it.

    Args:
        model: as ONNX Runtime writes what it has optimised for this processor; it is changed.

    Returns:
        Whether anything was.
    """
    graph = model.graph
    if any(a.HasField("g") or a.graphs for node in graph.node for a in node.attribute):
        return False  # what is read inside of an If or a Loop is not looked at
    made = {name: node for node in graph.node for name in node.output}
    readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in graph.node:
        for name in node.input:
            readers[name].append(node)
    public = {value.name for value in graph.output}
    dropped = []
    for node in graph.node:
        if node.op_type != _TAKE or node.output[0] in public or _attribute(node, "axis") != 0:
            continue
        before, after = made.get(node.input[0]), readers[node.output[0]]
        if before is None or not _fills_its_blocks(before):
            continue
        if not after or not all(map(_into_blocks, after)):
            continue
        node.input[0] = before.input[0]
        for reorder in after:
            for reader in readers[reorder.output[0]]:
                _replace(reader, reorder.output[0], node.output[0])
        dropped += after
    read = public.union(*(node.input for node in graph.node))
    dropped += [n for n in graph.node if n.op_type == _PLAIN and n.output[0] not in read]
    for node in dropped:
        graph.node.remove(node)
    return bool(dropped)


def _fills_its_blocks(node: onnx.NodeProto) -> bool:
    """Whether it brings a map into the plain layout that has the same shape in both."""
    plain = node.op_type == _PLAIN and not _attribute(node, "channels_last")
    return plain and (_attribute(node, "channels") or 1) % LARGEST_BLOCK == 0


def _into_blocks(node: onnx.NodeProto) -> bool:
    return node.op_type == _BLOCKS and not _attribute(node, "channels_last")


def _attribute(node: onnx.NodeProto, name: str) -> int | None:
    return next((a.i for a in node.attribute if a.name == name), None)


def _replace(node: onnx.NodeProto, old: str, new: str) -> None:
    for i, name in enumerate(node.input):
        if name == old:
            node.input[i] = new
