"""The model cut at its exits, through ``torch.export``.

A multi-exit model is exported once, as a whole, with a dynamic batch. Its graph has one output per
exit, and stage ``k`` is what exit ``k`` needs and no earlier exit needed: the ancestors of
``logits[k]`` less those of the exits before. Nothing is computed before it is wanted.

What crosses a cut is the set of *live values*: tensors made in an earlier stage, or inputs, that a
later stage reads (skip connections, masks, several branches). A live value whose shape has the
batch in it, also as a multiple (windows, heads), loses the rows that have left; one without the
batch passes as it is. Three kinds of nodes never cross a cut, since each stage makes its own:
parameters, what is computed from parameters alone, and symbolic sizes, which are computed anew for
the rows that are left.

All knowledge of the insides of ``torch.export`` stays in this file.
"""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import numpy as np
import sympy
import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from offramp.build.batch import as_call
from offramp.build.model import MultiExitModel
from offramp.errors import DataError, StageError

__all__ = ["RowAxis", "Stage", "StagedModel", "cut"]


@dataclass(frozen=True)
class RowAxis:
    """Where the samples of a batch lie in a tensor.

    Attributes:
        dim: the dimension that holds them.
        multiple: entries along ``dim`` per sample: 1 for a plain batch, the number of windows or
            heads where these were folded into the batch.
        inner: with ``multiple`` > 1, whether the sample is the fast index of the folded dimension
            (``window * batch + sample``) rather than the slow one (``sample * multiple + window``).
    """

    dim: int = 0
    multiple: int = 1
    inner: bool = False

    def take(self, value: Tensor, rows: Tensor) -> Tensor:
        """The part of ``value`` that belongs to the samples ``rows`` (R,), in that order."""
        return value.index_select(self.dim, self.expand(rows, value.shape[self.dim]))

    def expand(self, rows: Tensor, size: int) -> Tensor:
        """Indices along ``dim`` (R * multiple,) of the samples ``rows`` (R,)."""
        if self.multiple == 1:
            return rows
        part = torch.arange(self.multiple, device=rows.device)
        if self.inner:
            batch = size // self.multiple
            return (part[:, None] * batch + rows[None, :]).reshape(-1)
        return (rows[:, None] * self.multiple + part[None, :]).reshape(-1)


@dataclass(frozen=True)
class Call:
    """One call of a model, flattened: what a runtime can hand on, and how to build it again.

    Attributes:
        leaves: all leaves of ``(args, kwargs)``: tensors and constants.
        spec: their structure.
    """

    leaves: list[Any]
    spec: pytree.TreeSpec

    @classmethod
    def of(cls, example: object) -> Call:
        """The call that an example stands for: a tensor, a tuple, or a mapping of keywords."""
        return cls.of_call(*as_call(example))

    @classmethod
    def of_call(cls, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
        """The call ``model(*args, **kwargs)``."""
        return cls(*pytree.tree_flatten((tuple(args), dict(sorted(kwargs.items())))))

    @cached_property
    def tensors(self) -> list[Any]:
        """The leaves that are data."""
        return [leaf for leaf in self.leaves if isinstance(leaf, Tensor | np.ndarray)]

    def build(self, tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """``(args, kwargs)`` with ``tensors`` in the places of its own."""
        fresh = iter(tensors)
        leaves = [next(fresh) if isinstance(x, Tensor | np.ndarray) else x for x in self.leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return args, kwargs

    def describe(self) -> str:
        """The call with shapes in place of tensors."""
        leaves = [tuple(x.shape) if hasattr(x, "shape") else x for x in self.leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        named = [f"{name}={value}" for name, value in kwargs.items()]
        return "(" + ", ".join([*map(str, args), *named]) + ")"

    @cached_property
    def names(self) -> tuple[str, ...]:
        """A name for each tensor: its keyword, or its position."""
        paths = pytree.tree_flatten_with_path(pytree.tree_unflatten(self.leaves, self.spec))[0]
        return tuple(
            "_".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path[1:])
            for path, leaf in paths
            if isinstance(leaf, Tensor | np.ndarray)
        )


@dataclass(frozen=True)
class Stage:
    """One piece of the model: from the values that are live to the logits of one exit.

    Attributes:
        exit: the number of the exit that the stage ends in, counted over all exits of the model.
        module: ``module(*[values[n] for n in inputs])`` returns ``(logits, *values of outputs)``.
        inputs: names of the live values it reads.
        outputs: names of the values it makes for later stages.
    """

    exit: int
    module: nn.Module
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class StagedModel:
    """A multi-exit model as a chain of stages.

    Attributes:
        stages: in order; the last one ends in the backbone's own output.
        rows: for each value that crosses a cut, where its samples lie; ``None``: it has no batch.
        inputs: names of the model's input tensors, in the order of the flattened call.
        call: the example; its tensors are one for each of ``inputs``.
        row_bytes: bytes of activations that are alive at once, at most, for one sample.
    """

    stages: tuple[Stage, ...]
    rows: dict[str, RowAxis | None]
    inputs: tuple[str, ...]
    call: Call
    row_bytes: float = 0.0

    @property
    def exits(self) -> tuple[int, ...]:
        """The numbers of the exits at which the stages end."""
        return tuple(stage.exit for stage in self.stages)

    def live_after(self, position: int) -> tuple[str, ...]:
        """Names of the values that exist after stage ``position`` and are still read later."""
        made = {name for stage in self.stages[: position + 1] for name in stage.outputs}
        exist = made.union(self.inputs)
        reads = (name for stage in self.stages[position + 1 :] for name in stage.inputs)
        return tuple(dict.fromkeys(name for name in reads if name in exist))


class _Logits(nn.Module):
    """The model as a function of the tensors of a flattened call, one output for each kept exit."""

    def __init__(self, model: MultiExitModel, exits: Sequence[int], call: Call) -> None:
        super().__init__()
        self.model = model
        self.exits = tuple(exits)
        self.call = call

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        args, kwargs = self.call.build(tensors)
        outputs = self.model(*args, **kwargs)
        return tuple(outputs[k] for k in self.exits)


def cut(model: MultiExitModel, example: object, exits: Sequence[int] | None = None) -> StagedModel:
    """Cut a model into one stage per exit.

    Args:
        model: the multi-exit model; it is exported in eval mode and not changed.
        example: one input batch of at least two samples (a tensor; a tuple of positional or a
            mapping of keyword arguments).
        exits: the exits to keep, by number; the final one is always kept. Default: all. The head of
            an exit that is not kept is in no stage.

    Raises:
        StageError: ``torch.export`` refuses the model, or its graph cannot be cut.
        DataError: the example is not a batch of two or more.
    """
    last = model.num_exits - 1
    kept = sorted({*(range(last) if exits is None else exits), last})
    call = Call.of(example)
    program = export(_Logits(model, kept, call), call.tensors)
    return _Cutter(program, kept, call).staged()


def export(module: nn.Module, tensors: Sequence[Tensor]) -> ExportedProgram:
    """Export ``module(*tensors)`` in eval mode, functional, with dimension 0 of each dynamic.

    Raises:
        StageError: with the reason that ``torch.export`` gives and the module it happened in.
        DataError: the tensors are not a batch of two or more.
    """
    sizes = {tensor.shape[0] if tensor.ndim else 0 for tensor in tensors}
    if len(sizes) != 1 or sizes.pop() < 2:
        raise DataError(
            "The example must be a batch of at least two samples, with the batch as dimension 0 of "
            f"every tensor; it has the shapes {[tuple(t.shape) for t in tensors]}. A batch of one "
            "would be taken for a constant. Pass two or more samples."
        )
    batch = Dim("batch", min=1)
    was = {sub: sub.training for sub in module.modules()}
    module.eval()
    shapes = (tuple({0: batch} for _ in tensors),)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of itself
            try:
                program: ExportedProgram = torch.export.export(
                    module, tuple(tensors), dynamic_shapes=shapes, strict=False
                )
                # Functional; no operator is taken apart.
                functional: ExportedProgram = program.run_decompositions({})
                return functional
            except Exception as error:
                where = _failing_module(module, tuple(tensors), shapes)
                raise StageError(_refusal(error, where)) from error
    finally:
        for sub, training in was.items():
            sub.training = training


def _failing_module(module: nn.Module, tensors: tuple[Tensor, ...], shapes: Any) -> str:  # noqa: ANN401
    """The path of the innermost module that an export does not come out of; "" if it is none.

    Only run to explain a failure: hooks follow a second export into the module and out of it.
    """
    inside: list[str] = []
    handles = []
    for path, part in module.named_modules():
        name = path.removeprefix("model.").removeprefix("backbone.")
        handles.append(part.register_forward_pre_hook(lambda *_, name=name: inside.append(name)))
        handles.append(part.register_forward_hook(lambda *_: inside.pop() and None))
    try:
        torch.export.export(module, tensors, dynamic_shapes=shapes, strict=False)
    except Exception:  # the same as the first time, which is the one to be reported
        return inside[-1] if inside else ""
    finally:
        for handle in handles:
            handle.remove()
    return ""


def _refusal(error: Exception, where: str) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = " ".join(lines[:2]) or type(error).__name__  # the second says which constraint
    place = f" in the module {where!r}" if where not in ("", "model", "backbone") else ""
    return (
        f"torch.export refuses this model{place}: {type(error).__name__}: {reason[:400]} "
        "Make the forward free of branches on tensor values, and of what fixes the batch "
        "(len(x) in place of x.shape[0] does); or cut by hand: build the backbone as an "
        "nn.Sequential of traceable parts, and run it with engine='torch'."
    )


class _Cutter:
    """The graph of one exported program, sorted into stages."""

    def __init__(
        self,
        program: ExportedProgram,
        exits: Sequence[int],
        call: Call,
    ) -> None:
        self.program = program
        self.exits = exits
        self.call = call
        signature = program.graph_signature
        self.state_names = {
            **signature.inputs_to_parameters,
            **signature.inputs_to_buffers,
            **signature.inputs_to_lifted_tensor_constants,
        }
        user = set(signature.user_inputs)
        self.inputs = [n for n in program.graph.nodes if n.op == "placeholder" and n.name in user]
        self.batch = self._batch_symbol()
        self.varying = self._varying()
        by_name = {n.name: n for n in program.graph.nodes}
        self.logits = [by_name[name] for name in signature.user_outputs]
        self.stage_of = self._assign()

    # -- which node runs where ---------------------------------------------------------------------

    def _batch_symbol(self) -> sympy.Symbol:
        for node in self.inputs:
            size: Any = node.meta["val"].shape[0]
            if isinstance(size, torch.SymInt) and isinstance(size.node.expr, sympy.Symbol):
                return size.node.expr
        raise StageError(
            "torch.export fixed the batch size of this model to that of the example: some "
            "operation works for that size only. Look for a reshape with a constant in place of "
            "the batch."
        )

    def _varying(self) -> set[fx.Node]:
        """Nodes that depend on an input or on the batch size; all others are made of parameters."""
        varying = set(self.inputs)
        for node in self.program.graph.nodes:
            if any(source in varying for source in node.all_input_nodes):
                varying.add(node)
        return varying

    def _assign(self) -> dict[fx.Node, int]:
        """For each node that some exit needs: the first stage that needs it."""
        stage_of: dict[fx.Node, int] = {}
        for position, logits in enumerate(self.logits):
            pending = [logits]
            while pending:
                node = pending.pop()
                if node in stage_of or node.op == "placeholder" or self._remade(node):
                    continue
                stage_of[node] = position
                pending.extend(node.all_input_nodes)
        for node in self.program.graph.nodes:  # a part of a tuple is made where the tuple is
            if node in stage_of and node.target is operator.getitem:
                stage_of[node] = stage_of.get(node.args[0], stage_of[node])
        return stage_of

    def _remade(self, node: fx.Node) -> bool:
        """Whether every stage makes this node for itself rather than receive it."""
        return node not in self.varying or not _is_tensor(node)

    # -- stages ------------------------------------------------------------------------------------

    def staged(self) -> StagedModel:
        reads = [self._reads(position) for position in range(len(self.exits))]
        stages = []
        for position, number in enumerate(self.exits):
            later = {node for read in reads[position + 1 :] for node in read}
            made = [n for n in self.program.graph.nodes if self.stage_of.get(n) == position]
            outputs = [n for n in made if n in later]
            module = _StageBuilder(self, position, reads[position], made, outputs).build()
            stages.append(
                Stage(
                    number,
                    module,
                    tuple(n.name for n in reads[position]),
                    tuple(n.name for n in outputs),
                )
            )
        crossing = {node for read in reads for node in read}
        rows = {node.name: self._row_axis(node) for node in crossing}
        names = tuple(node.name for node in self.inputs)
        staged = StagedModel(tuple(stages), rows, names, self.call, self._row_bytes())
        return _oriented(staged)

    def _row_bytes(self) -> float:
        """The most memory that activations take at any point of the graph, for one sample."""
        last_use: dict[fx.Node, int] = {}
        nodes = list(self.program.graph.nodes)
        for i, node in enumerate(nodes):
            last_use.update(dict.fromkeys(node.all_input_nodes, i))
        ends: dict[int, float] = {}
        alive = peak = 0.0
        for i, node in enumerate(nodes):
            value = node.meta.get("val")
            if isinstance(value, Tensor) and node in self.varying and self._batch_dims(node):
                size = value.element_size() * _numel_per_row(value)
                alive += size
                ends[last_use.get(node, i)] = ends.get(last_use.get(node, i), 0.0) + size
            peak = max(peak, alive)
            alive -= ends.get(i, 0.0)
        return peak

    def _reads(self, position: int) -> list[fx.Node]:
        """The tensors that a stage takes from inputs and earlier stages, in graph order."""
        wanted: set[fx.Node] = set()
        seen: set[fx.Node] = set()
        made = [n for n, k in self.stage_of.items() if k == position]
        pending = [source for node in made for source in node.all_input_nodes]
        if self.stage_of.get(self.logits[position]) != position:
            pending.append(self.logits[position])  # an exit that repeats an earlier value
        while pending:
            node = pending.pop()
            if node in seen or self.stage_of.get(node) == position:
                continue
            seen.add(node)
            if not _is_tensor(node):
                continue  # a symbolic size: computed anew
            if node not in self.varying:
                pending.extend(node.all_input_nodes)
            elif self.stage_of.get(node, -1) < position:
                wanted.add(node)
        order = [n for n in self.program.graph.nodes if n in wanted]
        if not any(self._batch_dims(n) for n in order):
            order.append(self.inputs[0])  # the number of rows must come from somewhere
        return order

    def _batch_dims(self, node: fx.Node) -> list[int]:
        shape = node.meta["val"].shape
        return [d for d, size in enumerate(shape) if self.batch in _symbols(size)]

    def _row_axis(self, node: fx.Node) -> RowAxis | None:
        dims = self._batch_dims(node)
        if not dims:
            return None
        shape = node.meta["val"].shape
        if len(dims) == 1:
            ratio = sympy.simplify(shape[dims[0]].node.expr / self.batch)
            if ratio.is_Integer:
                return RowAxis(dims[0], int(ratio))
        raise StageError(
            f"The value {node.name!r} of {_module_of(node)} crosses an exit with the shape "
            f"{tuple(str(s) for s in shape)}, in which the batch ({self.batch}) is not one "
            "dimension or a multiple of it, so rows cannot leave there. Place the exit elsewhere."
        )


class _StageBuilder:
    """One stage as a graph module of its own, sharing the parameters of the model."""

    def __init__(
        self,
        cutter: _Cutter,
        position: int,
        reads: list[fx.Node],
        made: list[fx.Node],
        outputs: list[fx.Node],
    ) -> None:
        self.cutter = cutter
        self.position = position
        self.reads = reads
        self.made = made
        self.outputs = outputs
        self.root = nn.Module()
        self.graph = fx.Graph()
        self.copies: dict[fx.Node, Any] = {}
        self.batch_size: fx.Proxy | None = None

    def build(self) -> fx.GraphModule:
        for node in self.reads:
            self.copies[node] = self._placeholder(node)
        self._find_batch_size()
        for node in self.made:
            self._copy(node)
        logits = self._copy(self.cutter.logits[self.position])
        self.graph.output((logits, *(self.copies[node] for node in self.outputs)))
        self.graph.eliminate_dead_code()
        self.graph.lint()
        module = fx.GraphModule(self.root, self.graph, f"Stage{self.position}")
        return module.eval()

    def _placeholder(self, node: fx.Node) -> fx.Node:
        copy = self.graph.placeholder(node.name)
        copy.meta = {"val": node.meta["val"]}
        return copy

    def _find_batch_size(self) -> None:
        """The number of rows now, read off the first live value that has the batch."""
        for node in self.reads:
            for dim in self.cutter._batch_dims(node):
                size = self.graph.call_function(
                    torch.ops.aten.sym_size.int, (self.copies[node], dim)
                )
                multiple = sympy.simplify(node.meta["val"].shape[dim].node.expr / self.cutter.batch)
                if multiple != 1:
                    size = self.graph.call_function(operator.floordiv, (size, int(multiple)))
                self.batch_size = fx.Proxy(size)
                return

    def _copy(self, node: fx.Node) -> Any:  # noqa: ANN401
        """The node's counterpart in this stage, made on first use."""
        pending = [node]
        while pending:  # depth first, without recursion: graphs are thousands of nodes deep
            top = pending[-1]
            if top in self.copies:
                pending.pop()
                continue
            if not _is_tensor(top) and top.op != "get_attr":
                self.copies[top] = self._scalar(top)
                continue
            missing = [n for n in top.all_input_nodes if n not in self.copies]
            if missing:
                pending.extend(missing)
                continue
            self.copies[top] = self._tensor(top)
        return self.copies[node]

    def _tensor(self, node: fx.Node) -> fx.Node:
        if node.op == "placeholder":
            return self._state(node)
        if node.op == "get_attr":
            target = str(node.target)
            self.root.add_module(target, self.cutter.program.graph_module.get_submodule(target))
            return self.graph.get_attr(target)
        copy = self.graph.node_copy(node, lambda source: self.copies[source])
        _settle_sizes(copy, node)
        copy.meta = {k: node.meta[k] for k in ("val", "nn_module_stack") if k in node.meta}
        return copy

    def _state(self, node: fx.Node) -> fx.Node:
        name = self.cutter.state_names[node.name]
        program = self.cutter.program
        tensor = program.state_dict[name] if name in program.state_dict else program.constants[name]
        target = name.replace(".", "_")
        if not hasattr(self.root, target):
            if isinstance(tensor, nn.Parameter):
                self.root.register_parameter(target, tensor)
            else:
                self.root.register_buffer(target, tensor)
        return self.graph.get_attr(target)

    def _scalar(self, node: fx.Node) -> Any:  # noqa: ANN401
        value = node.meta.get("val")
        if isinstance(value, int | float | bool):
            return value
        if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
            expression = value.node.expr
            if expression.is_Number:
                return int(expression) if expression.is_Integer else float(expression)
            if expression.free_symbols == {self.cutter.batch} and self.batch_size is not None:
                known = {self.cutter.batch: self.batch_size}
                made = sympy_interp(PythonReferenceAnalysis, known, expression)
                return made.node if isinstance(made, fx.Proxy) else made
        raise StageError(
            f"The size {node.name!r} of {_module_of(node)} depends on the values of a tensor "
            f"({value}), not on the batch size alone, so the stages after an exit cannot compute "
            "it anew. Remove the data-dependent shape, or place the exits after it."
        )


def _settle_sizes(copy: fx.Node, node: fx.Node) -> None:
    """Write a size that a reshape leaves open (-1) as the number it is: zero rows leave it open."""
    if node.target not in (torch.ops.aten.view.default, torch.ops.aten.reshape.default):
        return
    shape = node.meta["val"].shape
    open_sizes = cast("list[Any]", copy.args[1])
    sizes = [
        known if wanted == -1 and isinstance(known, int) else wanted
        for wanted, known in zip(open_sizes, shape, strict=True)
    ]
    copy.args = (copy.args[0], sizes)


def _oriented(staged: StagedModel) -> StagedModel:
    """Find out, by trying, in which order samples lie where they are folded with something else.

    The example is run as it is and with its first two samples exchanged; the order is the one in
    which exchanging the samples of the first gives the second.
    """
    if all(axis is None or axis.multiple == 1 for axis in staged.rows.values()):
        return staged
    tensors = staged.call.tensors
    swap = torch.arange(len(tensors[0]), device=tensors[0].device)
    swap[:2] = swap[:2].flip(0)
    plain = _values(staged, tensors)
    swapped = _values(staged, [tensor[swap] for tensor in tensors])
    rows = dict(staged.rows)
    for name, axis in staged.rows.items():
        if axis is None or axis.multiple == 1:
            continue
        orders = (axis, replace(axis, inner=True))
        far = [
            float((order.take(plain[name], swap) - swapped[name]).abs().sum()) for order in orders
        ]
        rows[name] = orders[far[1] < far[0]]
    return replace(staged, rows=rows)


def _values(staged: StagedModel, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    """Every value that crosses a cut, for one batch."""
    values = dict(zip(staged.inputs, tensors, strict=True))
    with torch.no_grad():
        for stage in staged.stages:
            _, *made = stage.module(*(values[name] for name in stage.inputs))
            values.update(zip(stage.outputs, made, strict=True))
    return values


def _numel_per_row(value: Tensor) -> float:
    sizes = [_hint(size) for size in value.shape]
    batch = next((_hint(size) / _ratio(size) for size in value.shape if _symbols(size)), 1.0)
    return math.prod(sizes) / max(batch, 1.0)


def _hint(size: Any) -> float:  # noqa: ANN401
    """A size for the example; 1 where the example does not tell."""
    if isinstance(size, int):
        return float(size)
    return float(size.node.hint or 1) if size.node.has_hint() else 1.0


def _ratio(size: Any) -> float:  # noqa: ANN401
    """How many times the batch a size is, where it is a plain multiple."""
    factor = size.node.expr.as_coeff_Mul()[0]
    return float(factor) if factor.is_Number and factor > 0 else 1.0


def _is_tensor(node: fx.Node) -> bool:
    """Whether a node stands for a tensor, or a tuple of them, rather than a size."""
    value = node.meta.get("val")
    return node.op == "get_attr" or isinstance(value, Tensor | tuple | list)


def _symbols(size: object) -> set[sympy.Symbol]:
    return size.node.expr.free_symbols if isinstance(size, torch.SymInt) else set()


def _module_of(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed(list(stack.values())), ("", ""))[0] if stack else ""
    return f"module {path.removeprefix('model.backbone.')!r}" if path else "the model"
