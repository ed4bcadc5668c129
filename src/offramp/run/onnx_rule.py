"""All stages with the rule between them in one ONNX graph.

    score >= threshold -> Compress what is live -> next step

There is no ``If``: where nobody is left, kernels return at once on zero rows, and the weights of
all stages keep the layout that the runtime prefers. The graph to deploy puts the answers together
(``ScatterND``); the one that a runner executes hands out what every step says.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from offramp.errors import StageError
from offramp.run.onnx import model_like, parts_of
from offramp.run.onnx_guards import POOLS, RECURRENT, guard, unguard
from offramp.run.rows import RowAxis

if TYPE_CHECKING:
    from offramp.run.chain import Link

__all__ = ["cannot_select", "connect", "join"]

_OUTPUTS = ("logits", "prediction", "exit", "score")


def connect(model: onnx.ModelProto, steps: Sequence[Link], names: Sequence[str]) -> onnx.ModelProto:
    """The file to deploy.

    Args:
        model: what :func:`offramp.run.onnx.convert` made; it is changed.
        steps: the steps.
        names: the names that the file's inputs get, in the order of the first step's values that
            are inputs of the model.

    Returns:
        A model with the inputs ``names`` and ``thresholds`` (optional: it has a default), and the
        outputs ``logits`` (B, C), ``prediction`` (B,), ``exit`` (B,), ``score`` (B,).

    Raises:
        StageError: samples are taken out by a ``select`` function, or a name stands for two values.
    """
    taken = {"thresholds", *_OUTPUTS}.intersection(names)
    if taken or len(set(names)) < len(names):
        raise StageError(
            f"The file's own values are thresholds, {', '.join(_OUTPUTS)}, and the "
            f"model's inputs are {', '.join(names)}: one name cannot stand for two. Rename the "
            "argument of the forward."
        )
    guard(model, RECURRENT | POOLS, _of_the_first(model, steps))
    return _Rule(model, steps, names, file=True).made()


def join(model: onnx.ModelProto, steps: Sequence[Link], summed: Sequence[bool]) -> onnx.ModelProto:
    """All steps in one call of a runner.

    Args:
        model: what :func:`offramp.run.onnx.convert` or :func:`connect` made; it is changed.
        steps: the steps.
        summed: for each input, whether it has to be finite.

    Returns:
        A model with the step's inputs in order and a threshold () for every step but the last
        behind them, the step's own by default. Outputs: the logits (R_k, C) and score (R_k,) of
        each step for the rows that came there; and, where some inputs in ``summed`` are in single
        precision, ``check`` (), their sum: finite where they are (and maybe infinite where they
        are large).

    Raises:
        StageError: samples are taken out by a ``select`` function.
    """
    unguard(model)
    guard(model, RECURRENT, _of_the_first(model, steps))
    names = [f"given/{k}" for k in range(len(steps[0].inputs))]
    return _Rule(model, steps, names, file=False).made(summed)


def cannot_select() -> StageError:
    """The error for a model with a ``select`` function, which no single graph can call."""
    return StageError(
        "This model takes its samples out of a batch by a select function of Python, which one "
        "ONNX file cannot call. Run it with Runner(model, policy, example, engine=...): every "
        "engine executes the stages, and select stays in Python."
    )


def _of_the_first(model: onnx.ModelProto, steps: Sequence[Link]) -> set[str]:
    """What the first step computes: it always has rows. In a file, later steps hang on it."""
    return {name for node in parts_of(model.graph, steps)[0] for name in node.output}


class _Rule:
    """The steps one after the other, rows leaving between them."""

    def __init__(
        self, model: onnx.ModelProto, steps: Sequence[Link], names: Sequence[str], *, file: bool
    ) -> None:
        if any(axis.of for step in steps for axis in step.rows.values() if axis is not None):
            raise cannot_select()
        self.source = model
        self.steps = steps
        self.names = names
        self.file = file
        own = [np.array(step.threshold, np.float32) for step in steps[:-1]]
        # A file has all thresholds in one input, for whoever calls it. A runner gives them seldom,
        # and taking them apart would be a kernel in every call.
        self.limits = {f"rule/threshold_{k}": limit for k, limit in enumerate(own)}
        if file:
            self.limits = {"thresholds": np.array(own, np.float32)} if own else {}
        graph = model.graph
        self.known = {v.name: v for v in (*graph.input, *graph.output, *graph.value_info)}
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, np.ndarray] = {}
        self.accepts: list[str] = []  # (R,) bool of each step: leaves here
        self.goes: list[str] = []  # (R,) bool: goes on
        self.sizes: list[onnx.ValueInfoProto] = []  # of what is taken
        self._found: dict[int, str] = {}
        self._put_together()

    def _put_together(self) -> None:
        parts = parts_of(self.source.graph, self.steps)
        self._free_names(parts)
        live = dict(zip(self.steps[0].inputs, self.names, strict=True))
        placed: set[str] = set()  # a constant may serve several parts
        limits = [f"rule/threshold_{k}" for k in range(len(self.steps) - 1)]
        if self.file and limits:
            self.nodes.append(
                helper.make_node("Split", ["thresholds"], limits, axis=0, num_outputs=len(limits))
            )
        for position, (step, part) in enumerate(zip(self.steps, parts, strict=True)):
            for name in step.inputs:
                made = [f"{position}/{name}"]
                self.nodes.append(helper.make_node("Identity", [live[name]], made))
                if live[name].startswith("rule/"):
                    self._sized_like(live[name], self.known[made[0]])
            self.nodes.extend(node for node in part if node.output[0] not in placed)
            placed.update(node.output[0] for node in part)
            live.update({name: f"{position}/{name}" for name in step.outputs})
            if position < len(limits):
                score = f"{position}/score"
                self.accepts.append(self._add("GreaterOrEqual", [score, limits[position]]))
                self.goes.append(self._add("Not", [self.accepts[-1]]))
                live = {n: self._take(live[n], step.rows[n], position) for n in step.live}

    def _free_names(self, parts: Sequence[Sequence[onnx.NodeProto]]) -> None:
        """Rename inner values that are called as the graph's own inputs and outputs are."""
        nodes = [node for part in parts for node in part]
        public = {*self.names, *self.limits, *_OUTPUTS, "check"}
        clash = public.intersection(name for node in nodes for name in node.output)
        for node in nodes:
            for values in (node.input, node.output):
                for i, name in enumerate(values):
                    if name in clash:
                        values[i] = f"inner/{name}"

    def _sized_like(self, name: str, value: onnx.ValueInfoProto) -> None:
        """Name the number of rows that were taken, which is found out only when they are.

        Of two sizes without a name a runtime cannot know that they are the same, and so cannot
        write a result over what it was made of.
        """
        said = onnx.ValueInfoProto()
        said.CopyFrom(value)
        said.name = name
        self.sizes.append(said)

    def _found_rows(self, position: int) -> str:
        """(1, R') int64: the rows that go on behind a step."""
        if position not in self._found:
            self._found[position] = self._add("NonZero", [self.goes[position]])
        return self._found[position]

    def _take(self, value: str, axis: RowAxis | None, position: int) -> str:
        """The part of a live value that belongs to the rows that go on."""
        if axis is None:
            return value
        if axis.multiple == 1:
            return self._add("Compress", [value, self.goes[position]], axis=axis.dim)
        part = np.arange(axis.multiple)
        rows = self._add("Squeeze", [self._found_rows(position), self._constant([0])])
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

    # -- what comes out ----------------------------------------------------------------------------

    def made(self, summed: Sequence[bool] = ()) -> onnx.ModelProto:
        """The model."""
        return self._file() if self.file else self._joined(summed)

    def _file(self) -> onnx.ModelProto:
        answer = self._answers()
        made = {name: node for node in self.nodes for name in node.output}
        for name, value in answer.items():
            if value.startswith("rule/"):  # what nobody else reads gets its name where it is made
                made[value].output[0] = name
            else:
                self.nodes.append(helper.make_node("Identity", [value], [name]))
        self.nodes.append(
            helper.make_node("ArgMax", ["logits"], ["prediction"], axis=-1, keepdims=0)
        )
        logits = self.known["0/logits"].type.tensor_type
        outputs = [
            helper.make_tensor_value_info(
                "logits", logits.elem_type, ["batch", logits.shape.dim[1].dim_value]
            ),
            helper.make_tensor_value_info("prediction", TensorProto.INT64, ["batch"]),
            helper.make_tensor_value_info("exit", TensorProto.INT64, ["batch"]),
            helper.make_tensor_value_info("score", self._type("0/score"), ["batch"]),
        ]
        graph = self.source.graph
        return self._model(outputs, [*graph.input, *graph.output])  # where it can be split

    def _answers(self) -> dict[str, str]:
        """What the first step says, with the answers of later ones written over where rows went on.

        A row that leaves has its own exit's number, one that stays the next one's: only where it
        went further still is something written over that.
        """
        answer = {"logits": "0/logits", "score": "0/score"}
        came = ""  # (R_k, 1): the rows of the batch that came to a step
        for position in range(len(self.steps) - 1):
            numbers = [self._constant(self.steps[k].exit) for k in (position, position + 1)]
            exit = self._add("Where", [self.accepts[position], *numbers])
            if position:
                answer["exit"] = self._add("ScatterND", [answer["exit"], came, exit])
                came = self._add("Compress", [came, self.goes[position]], axis=0)
            else:
                answer["exit"] = exit
                came = self._add("Transpose", [self._found_rows(0)])
            for name in ("logits", "score"):
                later = f"{position + 1}/{name}"
                answer[name] = self._add("ScatterND", [answer[name], came, later])
        if "exit" not in answer:  # a single step
            size = self._add("Shape", [answer["score"]])
            answer["exit"] = self._add("Expand", [self._constant(self.steps[0].exit), size])
        return answer

    def _joined(self, summed: Sequence[bool]) -> onnx.ModelProto:
        inputs = [
            name
            for name, inner, wanted in zip(self.names, self.steps[0].inputs, summed, strict=True)
            if wanted and self._type(f"0/{inner}") == TensorProto.FLOAT
        ]
        said = [f"{k}/{name}" for k in range(len(self.steps)) for name in ("logits", "score")]
        outputs = [self.known[name] for name in said]
        if inputs:
            sums = [self._add("ReduceSum", [name], keepdims=0) for name in inputs]
            if len(sums) > 1:
                self.nodes.append(helper.make_node("Sum", sums, ["check"]))
            else:
                self.nodes[-1].output[0] = "check"
            outputs.append(helper.make_tensor_value_info("check", TensorProto.FLOAT, []))
        return self._model(outputs)

    def _type(self, name: str) -> int:
        kind: int = self.known[name].type.tensor_type.elem_type
        return kind

    def _model(
        self, outputs: Sequence[onnx.ValueInfoProto], info: Sequence[onnx.ValueInfoProto] = ()
    ) -> onnx.ModelProto:
        inputs = []
        for name, inner in zip(self.names, self.steps[0].inputs, strict=True):
            value = onnx.ValueInfoProto()
            value.CopyFrom(self.known[f"0/{inner}"])
            value.name = name
            inputs.append(value)
        made = [numpy_helper.from_array(v, name) for name, v in self.constants.items()]
        for name, limit in self.limits.items():
            inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, limit.shape))
            made.append(numpy_helper.from_array(limit, name))
        known = {value.name for value in made}
        kept = [value for value in self.source.graph.initializer if value.name not in known]
        graph = helper.make_graph(
            self.nodes, "offramp", inputs, outputs, [*kept, *made], value_info=[*info, *self.sizes]
        )
        return model_like(graph, self.source)

    def _constant(self, value: object) -> str:
        array = np.asarray(value, np.int64)
        name = f"rule/constant_{'x'.join(map(str, array.shape))}_{'_'.join(map(str, array.flat))}"
        self.constants[name] = array
        return name

    def _add(self, kind: str, inputs: list[str], **attributes: Any) -> str:  # noqa: ANN401
        out = f"rule/{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [out], **attributes))
        return out
