"""One stage of an exported graph as a graph module of its own."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any, cast

import sympy
import torch
from torch import Tensor, fx, nn
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from offramp.errors import StageError

if TYPE_CHECKING:
    from offramp.run.graph import Cutter

__all__ = ["StageBuilder", "is_tensor", "module_of"]


class StageBuilder:
    """One stage as a graph module of its own, sharing the parameters of the model."""

    def __init__(
        self,
        cutter: Cutter,
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
        self.sizes: dict[sympy.Symbol, fx.Proxy] = {}
        self.targets: dict[str, str] = {}  # the attribute of each parameter and buffer

    def build(self) -> fx.GraphModule:
        """The module: from the values that are read to the logits and the values made."""
        for node in self.reads:
            self.copies[node] = self._placeholder(node)
        self._find_sizes()
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

    def _find_sizes(self) -> None:
        """The number of rows now, read off the live values that have them."""
        for node in self.reads:
            for symbol, dim, multiple in self.cutter.sizes_of(node):
                if symbol in self.sizes:
                    continue
                size = self.graph.call_function(
                    torch.ops.aten.sym_size.int, (self.copies[node], dim)
                )
                if multiple != 1:
                    size = self.graph.call_function(operator.floordiv, (size, multiple))
                self.sizes[symbol] = fx.Proxy(size)

    def _copy(self, node: fx.Node) -> Any:  # noqa: ANN401
        """The node's counterpart in this stage, made on first use."""
        pending = [node]
        while pending:  # depth first, without recursion: graphs are thousands of nodes deep
            top = pending[-1]
            if top in self.copies:
                pending.pop()
                continue
            if not is_tensor(top) and top.op != "get_attr":
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
        if copy.target is torch.ops.aten.view.default:
            # Strides are not those of the example after compaction, and by who calls.
            copy.target = torch.ops.aten.reshape.default
        copy.meta = {k: node.meta[k] for k in ("val", "nn_module_stack") if k in node.meta}
        return copy

    def _state(self, node: fx.Node) -> fx.Node:
        name = self.cutter.state_names[node.name]
        program = self.cutter.program
        tensor = program.state_dict[name] if name in program.state_dict else program.constants[name]
        target = self.targets.get(name)
        if target is None:
            target = name.replace(".", "_")
            while hasattr(self.root, target):  # f.1 beside f_1
                target += "_"
            self.targets[name] = target
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
            if expression.free_symbols <= self.sizes.keys():
                made = sympy_interp(PythonReferenceAnalysis, self.sizes, expression)
                return made.node if isinstance(made, fx.Proxy) else made
        raise StageError(
            f"The size {node.name!r} of {module_of(node)} depends on the values of a tensor "
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


def is_tensor(node: fx.Node) -> bool:
    """Whether a node stands for a tensor, or a tuple of them, rather than a size."""
    value = node.meta.get("val")
    return node.op == "get_attr" or isinstance(value, Tensor | tuple | list)


def module_of(node: fx.Node) -> str:
    """The module that a node comes from, for an error's text."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed(list(stack.values())), ("", ""))[0] if stack else ""
    return f"module {path.removeprefix('model.backbone.')!r}" if path else "the model"
