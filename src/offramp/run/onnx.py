"""Stages as ONNX graphs, and all of them with the rule in one.

All steps are converted in one go, as parts of one graph that do not touch each other: each has its
own inputs and its own batch size. Split, they are the models of the stages. Connected, they are the
file to deploy::

    score >= threshold -> Compress what is live -> next step -> ScatterND over the answer

There is no ``If``: where nobody is left, kernels return at once on zero rows, and the weights of
all stages keep the layout that the runtime prefers.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.export import Dim

from offramp.errors import StageError
from offramp.run.onnx_empty import allow_empty
from offramp.run.onnx_forms import bring_into_form
from offramp.run.rows import RowAxis

if TYPE_CHECKING:
    from offramp.run.chain import Link, Step

__all__ = ["connect", "convert", "split"]

OPSET = 18
IR_VERSION = 10


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
        StageError: an operator has no counterpart in ONNX; it is named.
    """
    shapes = []
    for position, step in enumerate(steps):
        batch = Dim(f"batch_{position}", min=1)
        shapes.append(tuple(_dynamic(step.rows.get(name), batch) for name in step.inputs))
    try:
        with torch.no_grad(), _quiet():
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
    allow_empty(model, [f"0/{name}" for name in steps[0].inputs])
    return model


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
    """One model for each step, its inputs and outputs in the step's order.

    Args:
        model: what :func:`convert` or :func:`connect` made.
        steps: the steps, or their links.
    """
    graph = model.graph
    parts = _parts(graph, steps)
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
        models.append(_model(part, model))
    return models


def _parts(graph: onnx.GraphProto, steps: Sequence[Link]) -> list[list[onnx.NodeProto]]:
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


def _model(graph: onnx.GraphProto, like: onnx.ModelProto) -> onnx.ModelProto:
    model = helper.make_model(
        graph, opset_imports=like.opset_import, functions=list(like.functions)
    )
    model.ir_version = min(like.ir_version, IR_VERSION)
    model.producer_name = "offramp"
    return model


def connect(model: onnx.ModelProto, steps: Sequence[Step], names: Sequence[str]) -> onnx.ModelProto:
    """The whole rule in one graph.

    Args:
        model: what :func:`convert` made.
        steps: the steps.
        names: the names that the file's inputs get, in the order of the first step's values that
            are inputs of the model.

    Returns:
        A model with the inputs ``names`` and ``thresholds`` (optional: it has a default), and the
        outputs ``logits`` (B, C), ``prediction`` (B,), ``exit`` (B,), ``score`` (B,).

    Raises:
        StageError: samples are taken out by a ``select`` function.
    """
    taken = {"thresholds", *_OUTPUTS}.intersection(names)
    if taken or len(set(names)) < len(names):
        raise StageError(
            f"The file's own values are thresholds, {', '.join(_OUTPUTS)}, and the "
            f"model's inputs are {', '.join(names)}: one name cannot stand for two. Rename the "
            "argument of the forward."
        )
    if any(axis.of for step in steps for axis in step.rows.values() if axis is not None):
        raise StageError(
            "This model takes its samples out of a batch by a select function of Python, which "
            "one ONNX file cannot call. Run it with Runner(model, policy, example, engine=...): "
            "every engine executes the stages, and select stays in Python."
        )
    return _Connector(model, steps, names).model()


class _Stays(NamedTuple):
    """Names of values at the end of a step of R rows."""

    accepts: str  # (R,) bool: leaves here
    mask: str  # (R,) bool: goes on
    found: str  # (1, R') int64: the rows that go on


class _Connector:
    def __init__(self, model: onnx.ModelProto, steps: Sequence[Step], names: Sequence[str]) -> None:
        self.source = model
        self.steps = steps
        self.names = names
        self.graph = model.graph
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, np.ndarray] = {}

    def model(self) -> onnx.ModelProto:
        self._check_names()
        live = dict(zip(self.steps[0].inputs, self.names, strict=True))
        placed: set[str] = set()  # a constant may serve several parts
        stays: list[_Stays] = []
        parts = _parts(self.graph, self.steps)
        limits = [f"rule/threshold_{k}" for k in range(len(self.steps) - 1)]
        if limits:
            self.nodes.append(
                helper.make_node("Split", ["thresholds"], limits, axis=0, num_outputs=len(limits))
            )
        for position, (step, part) in enumerate(zip(self.steps, parts, strict=True)):
            self._bind(position, step, live)
            self.nodes.extend(node for node in part if node.output[0] not in placed)
            placed.update(node.output[0] for node in part)
            live.update({name: f"{position}/{name}" for name in step.outputs})
            if position < len(limits):
                stays.append(self._stays(position, limits[position]))
                live = self._survivors(position, live, stays[-1])
        return self._finish(self._answers(stays))

    def _check_names(self) -> None:
        taken = {name for node in self.graph.node for name in node.output}
        clash = taken.intersection({*self.names, "thresholds", *_OUTPUTS})
        for node in self.graph.node:  # free the public names
            for values in (node.input, node.output):
                for i, name in enumerate(values):
                    if name in clash:
                        values[i] = f"inner/{name}"

    def _bind(self, position: int, step: Step, live: dict[str, str]) -> None:
        for name in step.inputs:
            self.nodes.append(helper.make_node("Identity", [live[name]], [f"{position}/{name}"]))

    def _stays(self, position: int, threshold: str) -> _Stays:
        """Which of the rows that entered a step go on."""
        accepts = self._add("GreaterOrEqual", [f"{position}/score", threshold])
        mask = self._add("Not", [accepts])
        return _Stays(accepts, mask, self._add("NonZero", [mask]))

    def _survivors(self, position: int, live: dict[str, str], stays: _Stays) -> dict[str, str]:
        """The part of what is live that belongs to the rows that go on."""
        step = self.steps[position]
        return {n: self._take(live[n], step.rows[n], stays, position) for n in step.live}

    def _take(self, value: str, axis: RowAxis | None, stays: _Stays, position: int) -> str:
        if axis is None:
            return value
        if axis.multiple == 1:
            return self._add("Compress", [value, stays.mask], axis=axis.dim)
        part = np.arange(axis.multiple)
        rows = self._add("Squeeze", [stays.found, self._constant([0])])
        if axis.inner:
            batch = self._add("Shape", [f"{position}/score"])
            outer = self._add("Mul", [self._constant(part[:, None]), batch])
            grid = self._add("Add", [outer, self._add("Unsqueeze", [rows, self._constant([0])])])
        else:
            scaled = self._add("Mul", [rows, self._constant(axis.multiple)])
            outer = self._add("Unsqueeze", [scaled, self._constant([1])])
            grid = self._add("Add", [outer, self._constant(part[None, :])])
        index = self._add("Reshape", [grid, self._constant([-1])])
        return self._add("Gather", [value, index], axis=axis.dim)

    def _answers(self, stays: list[_Stays]) -> dict[str, str]:
        """From the last step back: what a step says, with the later answers of those who went on.

        A row that leaves has its own exit's number, one that stays the next one's: only where it
        went further still is something written over that.
        """
        last = len(self.steps) - 1
        answer = {"logits": f"{last}/logits", "score": f"{last}/score"}
        for position in reversed(range(last)):
            where = self._add("Transpose", [stays[position].found])
            numbers = [self._constant(self.steps[k].exit) for k in (position, position + 1)]
            own = {
                "logits": f"{position}/logits",
                "score": f"{position}/score",
                "exit": self._add("Where", [stays[position].accepts, *numbers]),
            }
            own.update(
                {n: self._add("ScatterND", [own[n], where, answer[n]]) for n in own if n in answer}
            )
            answer = own
        if "exit" not in answer:  # a single step
            size = self._add("Shape", [answer["score"]])
            answer["exit"] = self._add("Expand", [self._constant(self.steps[last].exit), size])
        return answer

    def _finish(self, answer: dict[str, str]) -> onnx.ModelProto:
        for name in ("logits", "exit", "score"):
            self.nodes.append(helper.make_node("Identity", [answer[name]], [name]))
        self.nodes.append(
            helper.make_node("ArgMax", [answer["logits"]], ["prediction"], axis=-1, keepdims=0)
        )
        defaults = np.array([s.threshold for s in self.steps[:-1]], np.float32)
        given = {v.name: v for v in self.graph.input}
        inputs = []
        for name, inner in zip(self.names, self.steps[0].inputs, strict=True):
            value = onnx.ValueInfoProto()
            value.CopyFrom(given[f"0/{inner}"])
            value.name = name
            inputs.append(value)
        made = [numpy_helper.from_array(v, name) for name, v in self.constants.items()]
        if len(defaults):
            kind = helper.make_tensor_value_info("thresholds", TensorProto.FLOAT, defaults.shape)
            inputs.append(kind)
            made.append(numpy_helper.from_array(defaults, "thresholds"))
        kinds = {v.name: v for v in self.graph.output}
        logits = kinds["0/logits"].type.tensor_type
        classes = logits.shape.dim[1].dim_value
        outputs = [
            helper.make_tensor_value_info("logits", logits.elem_type, ["batch", classes]),
            helper.make_tensor_value_info("prediction", TensorProto.INT64, ["batch"]),
            helper.make_tensor_value_info("exit", TensorProto.INT64, ["batch"]),
            helper.make_tensor_value_info(
                "score", kinds["0/score"].type.tensor_type.elem_type, ["batch"]
            ),
        ]
        graph = helper.make_graph(
            self.nodes,
            "offramp",
            inputs,
            outputs,
            [*self.graph.initializer, *made],
            value_info=[*self.graph.input, *self.graph.output],  # where the file can be split
        )
        return _model(graph, self.source)

    def _constant(self, value: object) -> str:
        array = np.asarray(value, np.int64)
        name = f"rule/constant_{'x'.join(map(str, array.shape))}_{'_'.join(map(str, array.flat))}"
        self.constants[name] = array
        return name

    def _add(self, kind: str, inputs: list[str], **attributes: Any) -> str:  # noqa: ANN401
        out = f"rule/{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [out], **attributes))
        return out


_OUTPUTS = ("logits", "prediction", "exit", "score")
