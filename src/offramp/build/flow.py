"""Which tensor comes from which: one forward pass, recorded operation by operation.

The recorder counts multiply-accumulates and notes what every operation reads and writes. From that
it follows where a network can be cut: after a module whose output is the *only* costly value that
the rest of the network still needs. A skip connection that is still open, or a branch that is yet
to be joined, is a second such value; a mask or a position table is not, as making it costs nothing.

A value is a version of a storage, so views are the value they look at, and writing in place makes
a new one.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

__all__ = ["Flow", "FlowRecorder", "count_macs"]

_aten = torch.ops.aten

# A value is costly when making it took at least this share of the whole network's work. Masks,
# position tables and rotary angles stay below it.
COSTLY = 0.01


def _attention_flops(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:  # noqa: ANN401
    *batch, queries, width = query.shape
    keys, out = key.shape[-2], value.shape[-1]
    return 2 * math.prod(batch) * queries * keys * (width + out)


def _lstm_flops(x: Tensor, w_in: Tensor, w_hidden: Tensor, *_: Any, **__: Any) -> int:  # noqa: ANN401
    return 2 * math.prod(x.shape[:-1]) * (w_in.numel() + w_hidden.numel())


def _rnn_flops(x: Tensor, weights: Sequence[Tensor], *_: Any, **__: Any) -> int:  # noqa: ANN401
    return 2 * math.prod(x.shape[:-1]) * sum(w.numel() for w in weights if w.ndim > 1)


def _bilinear_flops(first: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:  # noqa: ANN401
    """Of ``nn.Bilinear``: (N, I), (C, I, J) and (N, J) to (N, C), one product after the other."""
    classes, inner, outer = weight.shape
    return 2 * len(first) * classes * (inner * outer + outer)


def _mv_flops(matrix: Tensor, *_: Any, **__: Any) -> int:  # noqa: ANN401
    return 2 * matrix.numel()


def _mm_flops(left: Tensor, right: Tensor, *_: Any, **__: Any) -> int:  # noqa: ANN401
    return 2 * left.numel() * right.shape[-1]


def _addmm_flops(_: Tensor, left: Tensor, right: Tensor, **__: Any) -> int:  # noqa: ANN401
    return _mm_flops(left, right)


# Operations that torch's own table of formulas does not hold; sparse operands count as dense here.
_EXTRA: dict[Any, Callable[..., int]] = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    _aten._scaled_dot_product_fused_attention_overrideable: _attention_flops,
    _aten._cudnn_rnn: _rnn_flops,
    _aten._sparse_addmm: _addmm_flops,
    _aten._sparse_mm_reduce_impl: _mm_flops,
    _aten._trilinear: _bilinear_flops,
    _aten.miopen_rnn: _rnn_flops,
    _aten.mkldnn_rnn_layer: _lstm_flops,
    _aten.mv: _mv_flops,
}


_SPARSE = (
    torch.sparse_coo,
    torch.sparse_csr,
    torch.sparse_csc,
    torch.sparse_bsr,
    torch.sparse_bsc,
)
# What is first read when at most this share of the work is left was kept for the end.
AT_THE_END = 0.05
# A place that sees less of the work before it than this is one branch of several.
SEES = 2 / 3


class Operation(NamedTuple):
    """The values that an operation reads and writes, and its floating-point operations.

    ``given``: whether it reads what the network was given, as it came.
    """

    reads: tuple[int, ...]
    writes: tuple[int, ...]
    flops: float
    given: bool = False


class Flow:
    """What a recorded pass says, once the value that is the answer is known.

    Times are counts of operations: a module that ended at time ``t`` ended after the first ``t``.

    Args:
        operations: in order.
        overwritten: value -> time of the operation that wrote over it.
        answer: the value that the pass was for.
    """

    def __init__(
        self, operations: Sequence[Operation], overwritten: Mapping[int, int], answer: int
    ) -> None:
        count = 1 + max((v for op in operations for v in (*op.reads, *op.writes)), default=answer)
        made, last_use, work = [0] * count, [-1] * count, [0.0] * count
        needed, self._from_inputs = [False] * count, [False] * count
        last_use[answer], needed[answer] = len(operations), True
        uses: dict[int, list[int]] = {answer: [len(operations)]}
        left = [0.0] * (len(operations) + 1)
        for time in range(len(operations) - 1, -1, -1):
            op = operations[time]
            left[time] = left[time + 1] + op.flops
            if any(needed[v] for v in op.writes):
                for v in op.reads:
                    needed[v] = True
                    last_use[v] = max(last_use[v], time)
                    uses.setdefault(v, []).append(time)
        for time, op in enumerate(operations):
            deepest = max((work[v] for v in op.reads), default=0.0) + op.flops
            given = self._comes_from_inputs(op)
            for v in op.writes:
                made[v], work[v], self._from_inputs[v] = time, deepest, given
        self._operations, self._overwritten = operations, overwritten
        self._needed, self._uses, self._left = needed, uses, left
        self._made, self._last_use = torch.tensor(made), torch.tensor(last_use)
        self._costly = torch.tensor(work) >= COSTLY * max(left[0], 1.0)

    def needed(self, value: int | None) -> bool:
        """Whether the answer depends on this value."""
        return value is not None and value < len(self._needed) and self._needed[value]

    def overwritten(self, value: int | None, time: int) -> bool:
        """Whether an operation after ``time`` writes into the storage of this value."""
        return value is not None and self._overwritten.get(value, -1) >= time

    def is_cut(self, time: int, values: Collection[int]) -> bool:
        """Whether, at ``time``, the rest needs no other costly value than these.

        Values that are kept for the very end do not count: a network that joins the outputs of all
        its layers there is still one stream. But the last of parallel branches, whose others wait
        for the end, is none: it does not see what they have found out.
        """
        live = (self._made < time) & (self._last_use >= time) & self._costly
        others = set(live.nonzero().flatten().tolist()).difference(values)
        if not all(self._kept_for_the_end(value, time) for value in others):
            return False
        return not others or self.seen(time, values) >= SEES

    def seen(self, time: int, values: Collection[int]) -> float:
        """The share of the work until ``time``, as far as the answer needs it, behind these values.

        It is small within a branch: what others have found out is not seen there.
        """
        done = sum(op.flops for op in self._operations[:time] if self._is_needed(op))
        behind, work = set(values), 0.0
        for op in reversed(self._operations[:time]):
            if not behind.isdisjoint(op.writes):
                behind.update(op.reads)
                work += op.flops
        return work / done if done else 1.0

    def pending(self, time: int, values: Collection[int]) -> float:
        """The share of all work that still comes from the inputs past these values.

        It is large within the first of several branches that begin with the inputs.
        """
        fed, past = set(values), 0.0
        for op in self._operations[time:]:
            if not fed.isdisjoint(op.reads):
                fed.update(op.writes)
            elif op.flops and self._is_needed(op) and self._comes_from_inputs(op):
                past += op.flops
        return past / self._left[0] if self._left[0] else 0.0

    def _comes_from_inputs(self, op: Operation) -> bool:
        return op.given or any(self._from_inputs[value] for value in op.reads)

    def _is_needed(self, op: Operation) -> bool:
        return any(self._needed[value] for value in op.writes)

    def _kept_for_the_end(self, value: int, time: int) -> bool:
        next_use = min(use for use in self._uses[value] if use >= time)
        return self._left[next_use] <= AT_THE_END * self._left[0]

    def all_later_work_needs(self, time: int, values: Iterable[int]) -> bool:
        """Whether every later costly operation that the answer needs depends on these values."""
        fed = set(values)
        for op in self._operations[time:]:
            if not fed.isdisjoint(op.reads):
                fed.update(op.writes)
            elif op.flops > 0 and self._is_needed(op):
                return False
        return True


class FlowRecorder(TorchDispatchMode):
    """Records operations while active. ``flops`` is the running total, ``time`` the running count.

    Args:
        parameters: named tensors whose first use is noted in ``first_use``.
        inputs: what the network is given.
    """

    supports_higher_order_operators = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Nothing is compiled while recording, and asking the compiler to keep out would import it:
        # seconds, for a pass of milliseconds.
        return False

    def __init__(
        self, parameters: Iterable[tuple[str, Tensor]] = (), inputs: Iterable[Tensor] = ()
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[Operation] = []
        self.overwritten: dict[int, int] = {}
        self.flops = 0.0
        self.first_use: dict[str, int] = {}
        self._values: dict[int, tuple[StorageWeakRef, int]] = {}
        self._count = 0
        self._parameters: dict[int, list[tuple[str, int, int]]] = {}
        for name, tensor in parameters:
            self._parameters.setdefault(_storage_key(tensor), []).append((name, *_span(tensor)))
        self._inputs = {_storage_key(tensor) for tensor in inputs}

    @property
    def time(self) -> int:
        """Operations recorded so far."""
        return len(self.operations)

    def value_of(self, tensor: Tensor) -> int | None:
        """The value a tensor shows now; ``None`` for inputs, parameters and constants."""
        found = self._values.get(_storage_key(tensor))
        # A storage that died may have left its address to another one.
        if found is None or found[0].expired():
            return None
        return found[1]

    def flow(self, answer: Tensor) -> Flow | None:
        """The recorded pass, seen from ``answer``; ``None`` if no operation made it."""
        value = self.value_of(answer)
        return None if value is None else Flow(self.operations, self.overwritten, value)

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401
        types: Any,  # noqa: ANN401
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        kwargs = kwargs or {}
        overload = isinstance(func, torch._ops.OpOverload)
        packet = func._overloadpacket if overload else None
        formula = _EXTRA.get(packet) or flop_registry.get(packet)
        if overload and formula is None:
            with self:  # under inference mode composite operations arrive whole
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        inputs = [t for t in pytree.arg_tree_leaves(*args, **kwargs) if isinstance(t, Tensor)]
        reads = self._read(inputs)
        given = any(_storage_key(t) in self._inputs and self.value_of(t) is None for t in inputs)
        written = _written(func, args, kwargs) if overload and func._schema.is_mutable else []
        for tensor in written:
            if (old := self.value_of(tensor)) is not None:
                self.overwritten[old] = self.time
        result = func(*args, **kwargs)
        outputs = [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]
        known = {_storage_key(t) for t in inputs}
        fresh = [t for t in outputs if _storage_key(t) not in known]
        cost = 0.0
        if packet in _EXTRA:
            cost = float(_EXTRA[packet](*args, **kwargs))
        elif formula is not None:
            cost = float(formula(*args, **kwargs, out_val=result))
        if cost:
            cost *= math.prod(map(_density, inputs))
        self.flops += cost
        writes = tuple({self._write(t) for t in (*written, *fresh)})
        self.operations.append(Operation(reads, writes, cost, given))
        return result

    def _read(self, inputs: list[Tensor]) -> tuple[int, ...]:
        reads = set()
        for tensor in inputs:
            held = self._parameters.get(_storage_key(tensor), ())
            first, end = _span(tensor) if len(held) > 1 else (0, 0)
            for name, begins, ends in held:
                # Several parameters may be parts of one storage, as vectors of parameters are.
                if len(held) == 1 or (first < ends and begins < end):
                    self.first_use.setdefault(name, self.time)
            value = self.value_of(tensor)
            if value is not None:
                reads.add(value)
        return tuple(reads)

    def _write(self, tensor: Tensor) -> int:
        value = self._count
        self._count += 1
        with contextlib.suppress(NotImplementedError, RuntimeError):  # sparse: no storage
            storage = StorageWeakRef(tensor.untyped_storage())
            self._values[_storage_key(tensor)] = (storage, value)
        return value


def count_macs(function: Callable[[], Any]) -> float:
    """Multiply-accumulates of one call, whole batch."""
    with torch.no_grad(), FlowRecorder() as recorder:
        function()
    macs: float = recorder.flops / 2
    return macs


def _storage_key(tensor: Tensor) -> int:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # sparse tensors have no storage
        return -id(tensor)


def _density(tensor: Tensor) -> float:
    """The share of its entries that a tensor stores, and a product with it multiplies."""
    if tensor.layout not in _SPARSE or not tensor.numel():
        return 1.0
    values = tensor._values() if tensor.is_sparse else tensor.values()
    return float(values.numel() / tensor.numel())


def _span(tensor: Tensor) -> tuple[int, int]:
    """Where in its storage a tensor begins and ends."""
    try:
        begins = int(tensor.storage_offset())
    except (NotImplementedError, RuntimeError):
        return 0, 1
    reach = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return begins, begins + (int(reach) + 1 if tensor.numel() else 0)


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:  # noqa: ANN401
    written = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[position] if position < len(args) else kwargs.get(argument.name)
        written += [t for t in pytree.tree_leaves(value) if isinstance(t, Tensor)]
    return written
