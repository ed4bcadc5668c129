"""Stages as ONNX graphs.

All steps are converted in one go, as parts of one graph that do not touch each other: each has its
own inputs and its own batch size. Split, they are the models of the stages;
:mod:`offramp.run.onnx_rule` puts them together with the rule.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import onnx
import torch
from onnx import helper
from torch import Tensor, nn
from torch.export import Dim

from offramp.errors import StageError
from offramp.run.onnx_empty import allow_empty
from offramp.run.onnx_forms import bring_into_form
from offramp.run.onnx_guards import unguard
from offramp.run.onnx_layout import keep_in_blocks
from offramp.run.onnx_responses import write_out_responses
from offramp.run.rows import RowAxis

if TYPE_CHECKING:
    from offramp.run.chain import Link, Step

__all__ = ["convert", "model_like", "parts_of", "split"]

OPSET = 20
IR_VERSION = 10
MOST_BYTES = 2**31 - 1  # of what protobuf writes


class _Side(nn.Module):
    """Steps side by side, each on its own inputs."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.steps = nn.ModuleList(modules)

    def forward(self, *values: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
        return [step(*given) for step, given in zip(self.steps, values, strict=True)]


def convert(steps: Sequence[Step]) -> onnx.ModelProto:
    """All steps as one graph of parts that do not touch; values are named ``position/name``.

    Raises:
        StageError: an operator has no counterpart in ONNX; it is named. Or the weights are more
            than a file of ONNX can hold.
    """
    _check_size(steps)
    shapes = []
    for position, step in enumerate(steps):
        batch = Dim(f"batch_{position}", min=1)
        shapes.append(tuple(_dynamic(step.rows.get(name), batch) for name in step.inputs))
    try:
        # Stages have their own types by now; the caller's autocast would change them again.
        with torch.no_grad(), torch.autocast("cpu", enabled=False), _quiet():
            program = torch.export.export(
                _Side([step.module for step in steps]).eval(),
                # One tensor given twice would be traced as one input of both parts.
                tuple(tuple(value.clone() for value in step.example) for step in steps),
                dynamic_shapes=(tuple(shapes),),
                strict=False,
            )
            bring_into_form(program)
            converted = torch.onnx.export(
                program,
                dynamo=True,
                input_names=[f"{k}/{name}" for k, s in enumerate(steps) for name in s.inputs],
                output_names=[f"{k}/{name}" for k, s in enumerate(steps) for name in s.outputs],
                opset_version=OPSET,
                verbose=False,
            )
    except Exception as error:
        reason = next((text for text in str(error).splitlines() if text.strip()), "")
        raise StageError(
            f"These stages cannot be written as ONNX: {type(error).__name__}: {reason[:400]}. "
            "Use engine='torch', or replace the operator."
        ) from error
    if converted is None:
        raise StageError("torch.onnx gave no model for these stages. Use engine='torch'.")
    model = converted.model_proto
    write_out_responses(model)
    begins = [f"{k}/{name}" for k, s in enumerate(steps) if k for name in s.inputs]
    keep_in_blocks(model, begins)
    allow_empty(model, [f"0/{name}" for name in steps[0].inputs])
    return model


def _check_size(steps: Sequence[Step]) -> None:
    weights = [t for step in steps for t in step.module.state_dict().values()]
    held = sum({tensor.data_ptr(): tensor.nbytes for tensor in weights}.values())
    if held >= MOST_BYTES:
        raise StageError(
            f"The weights of these stages are {held / 1e9:.1f} GB, and a file of ONNX holds "
            f"{MOST_BYTES / 1e9:.1f} GB. Use engine='torch' or 'inductor'."
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch says of itself: its own deprecations, and packages it does not find."""
    chatter = logging.getLogger("torch.onnx._internal.exporter._registration")
    was, chatter.disabled = chatter.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        chatter.disabled = was


def _dynamic(axis: RowAxis | None, batch: Any) -> dict[int, Any] | None:  # noqa: ANN401
    if axis is None:
        return None
    if axis.of:  # not the samples: torch finds out which of these sizes are the same
        return {axis.dim: Dim.AUTO}
    return {axis.dim: batch if axis.multiple == 1 else axis.multiple * batch}


def split(model: onnx.ModelProto, steps: Sequence[Link]) -> list[onnx.ModelProto]:
    """One model for each step, its inputs and outputs in the step's order; guards are taken out.

    Args:
        model: what :func:`convert` or :func:`offramp.run.onnx_rule.connect` made.
        steps: the steps, or their links.
    """
    unguard(model)  # a stage on its own is not given nothing
    graph = model.graph
    parts = parts_of(graph, steps)
    infos = {value.name: value for value in (*graph.input, *graph.output, *graph.value_info)}
    models = []
    for position, (step, nodes) in enumerate(zip(steps, parts, strict=True)):
        used = {name for node in nodes for name in _reads(node)}
        part = helper.make_graph(
            nodes,
            f"stage_{position}",
            [infos[f"{position}/{name}"] for name in step.inputs],
            [infos[f"{position}/{name}"] for name in step.outputs],
            [value for value in graph.initializer if value.name in used],
        )
        models.append(model_like(part, model))
    return models


def parts_of(graph: onnx.GraphProto, steps: Sequence[Link]) -> list[list[onnx.NodeProto]]:
    """For each step the nodes from its inputs to its outputs, in order."""
    nodes = list(graph.node)
    made_by = {name: i for i, node in enumerate(nodes) for name in node.output if name}
    parts = []
    for position, step in enumerate(steps):
        seen = {f"{position}/{name}" for name in step.inputs}  # where the part begins
        wanted: set[int] = set()
        pending = [f"{position}/{name}" for name in step.outputs]
        while pending:
            name = pending.pop()
            index = made_by.get(name)
            if name in seen or index is None:
                continue
            seen.add(name)
            wanted.add(index)
            pending.extend(_reads(nodes[index]))
        parts.append([nodes[index] for index in sorted(wanted)])
    return parts


def _reads(node: onnx.NodeProto) -> list[str]:
    """Every outer value that a node reads, also inside its subgraphs."""
    names = [name for name in node.input if name]
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            for inner in graph.node:
                names.extend(_reads(inner))
    return names


def model_like(graph: onnx.GraphProto, like: onnx.ModelProto) -> onnx.ModelProto:
    """A graph as a model of the same operators as another."""
    model = helper.make_model(
        graph, opset_imports=like.opset_import, functions=list(like.functions)
    )
    model.ir_version = min(like.ir_version, IR_VERSION)
    model.producer_name = "offramp"
    return model
