"""The exported graph of a model, sorted into stages.

All knowledge of the insides of ``torch.export`` stays here and in ``builder.py``.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram, default_decompositions

from offramp.build.model import MultiExitModel
from offramp.build.unchanged import without_autocast
from offramp.errors import DataError, StageError
from offramp.run.builder import StageBuilder, is_tensor, module_of
from offramp.run.calls import Call
from offramp.run.evaluating import evaluating
from offramp.run.footprint import row_bytes, symbols_of
from offramp.run.rows import RowAxis, most_rows
from offramp.run.selection import Selector, countable
from offramp.run.stages import Stage, StagedModel, oriented

__all__ = ["cut", "shared_by_rows"]

_aten = torch.ops.aten
_CONVERTING, _WIDE = {_aten._to_copy, _aten.to}, {torch.int32, torch.int64}
# What takes no more than a shape, a type and a device from another tensor.
_NO_VALUES = {
    _aten.empty_like,
    _aten.full_like,
    _aten.new_empty,
    _aten.new_full,
    _aten.new_ones,
    _aten.new_zeros,
    _aten.ones_like,
    _aten.zeros_like,
}
_LIKE_ANOTHER = {_aten.to, _aten.type_as}  # of the second, only the type
_LOOKING_UP = {_aten.embedding, _aten.embedding_bag, _aten._embedding_bag}
# What moves values about and leaves none of them out.
_SAME_VALUES = {
    _aten.clone,
    _aten.expand,
    _aten.permute,
    _aten.reshape,
    _aten.squeeze,
    _aten.transpose,
    _aten.unsqueeze,
    _aten.view,
}


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
    selector = None
    if model.select is not None:
        args, kwargs = call.build(call.tensors)
        with evaluating(model), torch.no_grad():
            samples = len(model(*args, **kwargs).final)
        selector = Selector.of(model.select, call, samples)
    program = export(_Logits(model, kept, call), call.tensors, selector)
    return Cutter(program, kept, call, selector).staged()


def export(
    module: nn.Module, tensors: Sequence[Tensor], selector: Selector | None = None
) -> ExportedProgram:
    """Export ``module(*tensors)`` in eval mode, functional, with dimension 0 of each dynamic.

    With a selector, the dimensions that it finds to depend on the samples are dynamic instead.

    Raises:
        StageError: with the reason that ``torch.export`` gives and the module it happened in.
        DataError: the tensors are not a batch of two or more.
    """
    sizes = {tensor.shape[0] if tensor.ndim else 0 for tensor in tensors}
    if selector is None and (len(sizes) != 1 or sizes.pop() < 2):
        raise DataError(
            "The example must be a batch of at least two samples, with the batch as dimension 0 of "
            f"every tensor; it has the shapes {[tuple(t.shape) for t in tensors]}. A batch of one "
            "would be taken for a constant. Pass two or more samples."
        )
    if selector is None and all(bool((tensor == tensor[:1]).all()) for tensor in tensors):
        raise DataError(
            "The samples of the example are all alike, so that nothing could be proven on them: "
            "rows that are mixed up would look the same. Pass real samples, or torch.randn(...)."
        )
    # One tensor given twice would be traced as one input.
    tensors = [tensor.clone() for tensor in tensors]
    batch = Dim("batch", min=1, max=most_rows(tensors[0].device))
    was = {sub: sub.training for sub in module.modules()}
    module.eval()
    free = selector.free if selector is not None else [{0}] * len(tensors)
    # Sizes that a selector finds are not all the same; which are, torch finds out.
    size = batch if selector is None else Dim.AUTO
    shapes = (tuple(dict.fromkeys(dims, size) for dims in free),)
    try:
        with torch.no_grad(), without_autocast(module), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of itself
            try:
                program: ExportedProgram = torch.export.export(
                    module, tuple(tensors), dynamic_shapes=shapes, strict=False
                )
                return _functional(program)
            except Exception as error:
                where = _failing_module(module, tuple(tensors), shapes)
                raise StageError(_refusal(error, where)) from error
    finally:
        for sub, training in was.items():
            sub.training = training


def _functional(program: ExportedProgram) -> ExportedProgram:
    """Without writing in place; of all operators only einsum is taken apart.

    On zero rows ONNX Runtime's kernel for it divides by their number, which ends the process.
    """
    einsum = torch.ops.aten.einsum.default
    apart = {}
    if any(node.target is einsum for node in program.graph.nodes):
        apart[einsum] = default_decompositions()[einsum]
    functional: ExportedProgram = program.run_decompositions(apart)
    return functional


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
        "(len(x) in place of x.shape[0] does); or cut by hand: build the backbone as a plain "
        "nn.Sequential, the exits at children that return one tensor, and run it with "
        "engine='torch'."
    )


def shared_by_rows(staged: StagedModel) -> str:
    """The first operation that makes one value of all rows of a batch, and its module; else ""."""
    for stage in staged.stages:
        if not isinstance(stage.module, fx.GraphModule):
            continue
        read, valued = _read(stage.module.graph), set[fx.Node]()  # depends on more than sizes
        for node in stage.module.graph.nodes:
            given = node.op == "placeholder"
            if not given and (_valueless(node) or valued.isdisjoint(node.all_input_nodes)):
                continue
            valued.add(node)
            # Integers that index what a selector takes are of the whole batch, as they should.
            ours = node in read and not (staged.selector and _is_integer(node))
            if ours and _loses_rows(node):
                return f"{_maker(node).target} in {module_of(_maker(node))}"
    return ""


def _read(graph: fx.Graph) -> set[fx.Node]:
    """Nodes whose values, and not their shapes alone, come into what is returned."""
    found: set[fx.Node] = set()
    pending = [node for node in graph.nodes if node.op == "output"]
    while pending:
        node = pending.pop()
        if not _valueless(node):
            pending += set(node.all_input_nodes) - found
            found.update(node.all_input_nodes)
    return found


def _valueless(node: fx.Node) -> bool:
    """Whether a node takes no values from others."""
    kind = getattr(node.target, "overloadpacket", None)
    return kind in _NO_VALUES or node.target is _aten.sym_size.int


def _loses_rows(node: fx.Node) -> bool:
    """Whether a tensor without a batch is made of one that has it."""
    if _batch_dims(node) != []:
        return False
    maker = _maker(node)
    first_alone = getattr(maker.target, "overloadpacket", None) in _LIKE_ANOTHER
    sources = maker.all_input_nodes[:1] if first_alone else maker.all_input_nodes
    return any(_batch_dims(source) for source in sources)


def _maker(node: fx.Node) -> fx.Node:
    """What computes a node: for a part of a tuple, what makes the tuple."""
    return node.all_input_nodes[0] if node.target is operator.getitem else node


def _batch_dims(node: fx.Node) -> list[int] | None:
    """Dimensions whose size depends on the samples; ``None`` where a node is no single tensor."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return None
    return [d for d, size in enumerate(value.shape) if symbols_of(size)]


def _is_integer(node: fx.Node) -> bool:
    return not node.meta["val"].is_floating_point()


class Cutter:
    """The graph of one exported program, sorted into stages."""

    def __init__(
        self,
        program: ExportedProgram,
        exits: Sequence[int],
        call: Call,
        selector: Selector | None,
    ) -> None:
        self.program = program
        self.exits = exits
        self.call = call
        self.selector = selector
        signature = program.graph_signature
        self.state_names = {
            **signature.inputs_to_parameters,
            **signature.inputs_to_buffers,
            **signature.inputs_to_lifted_tensor_constants,
        }
        user = set(signature.user_inputs)
        self.inputs = [n for n in program.graph.nodes if n.op == "placeholder" and n.name in user]
        by_name = {n.name: n for n in program.graph.nodes}
        self.logits = [by_name[name] for name in signature.user_outputs]
        self.batch = self._batch_symbol()
        self.counted = self._counted()
        self.varying = self._varying()
        self.valued = self._valued()
        self.indexing = self._indexing() if selector is not None else set()
        self.stage_of = self._assign()

    # -- which node runs where ---------------------------------------------------------------------

    def _batch_symbol(self) -> sympy.Symbol:
        size: Any = self.logits[-1].meta["val"].shape[0]
        if isinstance(size, torch.SymInt) and isinstance(size.node.expr, sympy.Symbol):
            return size.node.expr
        raise StageError(
            "torch.export fixed the batch size of this model to that of the example: some "
            "operation works for that size only. Look for a reshape with a constant in place of "
            "the batch, and for len(x), which is a plain number: write x.shape[0]."
        )

    def _counted(self) -> dict[sympy.Symbol, tuple[int, int]]:
        """For each size that is dynamic: an input, by position, and the dimension that has it.

        Real-valued inputs come first: row numbers can be sent through them.
        """
        found: dict[sympy.Symbol, tuple[int, int]] = {}
        places = list(enumerate(self.inputs))
        places.sort(key=lambda place: not place[1].meta["val"].is_floating_point())
        for position, node in places:
            for dim, size in enumerate(node.meta["val"].shape):
                if isinstance(size, torch.SymInt) and isinstance(size.node.expr, sympy.Symbol):
                    found.setdefault(size.node.expr, (position, dim))
        return found

    def _indexing(self) -> set[fx.Node]:
        """Integers made of integer inputs alone, such as the ends of edges."""
        integers = {n for n in self.inputs if not n.meta["val"].is_floating_point()}
        made: set[fx.Node] = set()
        for node in self.program.graph.nodes:
            values = node.meta.get("val")
            values = values if isinstance(values, tuple | list) else [values]
            real = any(not isinstance(v, Tensor) or v.is_floating_point() for v in values)
            sources = [n for n in node.all_input_nodes if is_tensor(n)]
            known = all(n in integers or n in made or n not in self.varying for n in sources)
            if node.op == "call_function" and sources and known and not real:
                made.add(node)
        return made

    def _varying(self) -> set[fx.Node]:
        """Nodes that depend on an input or on the batch size; all others are made of parameters."""
        varying = set(self.inputs)
        for node in self.program.graph.nodes:
            if any(source in varying for source in node.all_input_nodes):
                varying.add(node)
        return varying

    def _valued(self) -> set[fx.Node]:
        """Nodes that depend on what an input holds, or on chance, and not on sizes alone.

        Row numbers made of the batch size, say, are those of the rows that are left.
        """
        valued = set(self.inputs)
        for node in self.program.graph.nodes:
            random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
            size = node.target is torch.ops.aten.sym_size.int
            if random or not size and any(source in valued for source in node.all_input_nodes):
                valued.add(node)
        return valued

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
        return node not in self.valued or node in self.indexing or not is_tensor(node)

    # -- stages ------------------------------------------------------------------------------------

    def staged(self) -> StagedModel:
        reads = [self._reads(position) for position in range(len(self.exits))]
        stages = []
        for position, number in enumerate(self.exits):
            later = {node for read in reads[position + 1 :] for node in read}
            made = [n for n in self.program.graph.nodes if self.stage_of.get(n) == position]
            outputs = [n for n in made if n in later]
            module = StageBuilder(self, position, reads[position], made, outputs).build()
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
        size = row_bytes(self.program.graph, self.varying)
        call = replace(self.call, entries=self._entries())
        staged = StagedModel(tuple(stages), rows, names, call, size, self._selector(rows))
        return oriented(staged)

    def _entries(self) -> dict[int, int]:
        """For whole inputs that embeddings read, by position, how many entries the smallest has."""
        found: dict[int, int] = {}
        for position, given in enumerate(self.inputs):
            pending = [] if given.meta["val"].is_floating_point() else [given]
            for node in pending:  # which grows
                for user in node.users:
                    kind = getattr(user.target, "overloadpacket", None)
                    # A narrow type has room for some values only, and makes others of the rest.
                    wide = kind in _CONVERTING and user.meta["val"].dtype in _WIDE
                    if wide or kind in _SAME_VALUES:
                        pending.append(user)
                    elif kind in _LOOKING_UP and user.args[1] is node:
                        entries = int(user.all_input_nodes[0].meta["val"].shape[0])
                        found[position] = min(entries, found.get(position, entries))
        return found

    def _selector(self, rows: dict[str, RowAxis | None]) -> Selector | None:
        """The selector, knowing where to send row numbers through for the axes that cross."""
        if self.selector is None:
            return None
        if self.batch not in self.counted:
            raise StageError(
                "No input has one entry for each sample, so select has nothing to go by. Give the "
                "model one, such as the numbers of the graphs in the batch."
            )
        inputs = {node.name for node in self.inputs}
        crossing = {axis.of for name, axis in rows.items() if axis and name not in inputs}
        keys = {self._key(symbol): symbol for symbol in self.counted if symbol != self.batch}
        counted = []
        for key in sorted(crossing - {""}):
            position, dim = self.counted[keys[key]]
            if not self.inputs[position].meta["val"].is_floating_point():
                raise countable(key)
            counted.append((key, position, dim))
        return replace(self.selector, batch=self.counted[self.batch], counted=tuple(counted))

    def _key(self, symbol: sympy.Symbol) -> str:
        """The name of what a symbol counts: "" for the samples, else an input and dimension."""
        if symbol == self.batch:
            return ""
        position, dim = self.counted[symbol]
        return f"{self.call.names[position]}.{dim}"

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
            if not is_tensor(node):
                continue  # a symbolic size: computed anew
            if node not in self.valued:
                pending.extend(node.all_input_nodes)
            elif node not in self.indexing and self.stage_of.get(node, -1) < position:
                wanted.add(node)
        if position == 0 or self.selector is not None:
            # The first stage is handed every input, also one that is read later only; a selector
            # takes and returns them all.
            wanted.update(self.inputs)
        order = [n for n in self.program.graph.nodes if n in wanted]
        if not any(_batch_dims(n) for n in order):
            order.append(self.inputs[0])  # the number of rows must come from somewhere
        return order

    def sizes_of(self, node: fx.Node) -> list[tuple[sympy.Symbol, int, int]]:
        """What can be read off a node's shape: (symbol, dimension, multiple)."""
        found = []
        for dim, size in enumerate(node.meta["val"].shape):
            if len(symbols_of(size)) == 1:
                (symbol,) = symbols_of(size)
                ratio = sympy.simplify(size.node.expr / symbol)
                if ratio.is_Integer:
                    found.append((symbol, dim, int(ratio)))
        return found

    def _row_axis(self, node: fx.Node) -> RowAxis | None:
        dims = _batch_dims(node)
        if not dims:
            return None
        shape = node.meta["val"].shape
        sizes = self.sizes_of(node)
        if len(dims) == len(sizes) == 1 and sizes[0][0] in self.counted:
            symbol, dim, multiple = sizes[0]
            return RowAxis(dim, multiple, of=self._key(symbol))
        raise StageError(
            f"The value {node.name!r} of {module_of(node)} crosses an exit with the shape "
            f"{tuple(str(s) for s in shape)}, in which the batch ({self.batch}) is not one "
            "dimension or a multiple of it, so rows cannot leave there. Place the exit elsewhere."
        )
