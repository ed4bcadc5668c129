"""The model cut at its exits.

A multi-exit model is exported once, as a whole, with a dynamic batch. Its graph has one output per
exit, and stage ``k`` is what exit ``k`` needs and no earlier exit needed: the ancestors of
``logits[k]`` less those of the exits before. Nothing is computed before it is wanted.

What crosses a cut is the set of *live values*: tensors made in an earlier stage, or inputs, that a
later stage reads (skip connections, masks, several branches). A live value whose shape has the
batch in it, also as a multiple (windows, heads), loses the rows that have left; one without the
batch passes as it is. Three kinds of nodes never cross a cut, since each stage makes its own:
parameters, what is computed from parameters alone, and symbolic sizes, which are computed anew for
the rows that are left. Where a ``select`` function takes the samples out, integers made of inputs
(graph indices) do not cross either: they are made of the inputs that it returns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from offramp.errors import StageError
from offramp.run.calls import Call
from offramp.run.rows import RowAxis
from offramp.run.selection import Selector, samples_of, take_samples

__all__ = ["Stage", "StagedModel", "oriented"]

Shake = Callable[[Tensor], Tensor]
# Masks are made of inputs in many ways: whether they are zero, one, positive, or more than others.
_SHAKES: tuple[Shake, ...] = (
    torch.zeros_like,
    torch.ones_like,
    lambda tensor: -tensor - 1 if tensor.is_floating_point() else torch.zeros_like(tensor),
    lambda tensor: tensor + 0.5 if tensor.is_floating_point() else torch.ones_like(tensor),
)
ROUNDED = 0.01  # of the entries of a value may differ by more than rounding usually does


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
        selector: takes samples out of the inputs where dimension 0 is not the batch.
    """

    stages: tuple[Stage, ...]
    rows: dict[str, RowAxis | None]
    inputs: tuple[str, ...]
    call: Call
    row_bytes: float = 0.0
    selector: Selector | None = None

    @property
    def samples(self) -> int:
        """How many samples the example has."""
        return samples_of(self.call.tensors, self.selector)

    def take(self, tensors: Sequence[Tensor], rows: Tensor) -> list[Tensor]:
        """Inputs for the samples ``rows`` (R,) alone."""
        return take_samples(tensors, rows, self.selector)

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


def oriented(staged: StagedModel) -> StagedModel:
    """Find out, by trying, in which order samples lie where they are folded with something else.

    The example is run as it is and with its samples moved; the order is the one in which moving
    the samples of the first gives the second. What that does not tell, as of a mask that is the
    same in all samples, is told by examples whose samples differ in all inputs.

    Raises:
        StageError: samples lie in neither order, or no example tells in which.
    """
    folded = {name: axis for name, axis in staged.rows.items() if axis and axis.multiple > 1}
    if not folded:
        return staged
    told = _orders(staged, staged.call.tensors, folded)
    reason = ""
    for shake in _SHAKES if staged.selector is None else ():
        left = {name: axis for name, axis in folded.items() if name not in told}
        if not left:
            break
        try:
            told |= _orders(staged, _shaken(staged.call.tensors, shake), left)
        except (RuntimeError, IndexError) as error:
            reason = f" ({error})"
    left = {name: axis for name, axis in folded.items() if name not in told}
    if left and staged.selector is None:
        raise StageError(
            f"The example does not tell in which order samples lie in {sorted(left)}, nor do "
            f"other inputs that were made to tell{reason}. Give an example whose rows differ in "
            "every input (a mask with padding, say)."
        )
    return replace(staged, rows={**staged.rows, **told})


def _orders(
    staged: StagedModel, example: Sequence[Tensor], folded: Mapping[str, RowAxis]
) -> dict[str, RowAxis]:
    """The order of samples in those folded values where an example tells it."""
    # Every sample moves, so that each that differs from its neighbour tells.
    moved = torch.arange(staged.samples, device=example[0].device).roll(1)
    plain = _values(staged, example)
    after = _values(staged, staged.take(example, moved))
    told = {}
    for name, axis in folded.items():
        orders = (axis, replace(axis, inner=True))
        far = [_unlike(order.take(plain[name], moved), after[name]) for order in orders]
        if min(far) > ROUNDED * after[name].numel():
            raise StageError(
                f"The samples of {name!r}, of shape {tuple(after[name].shape)}, are folded with "
                "something else in an order that is not known: they lie neither together nor in "
                "turn. Fold the batch first or last, x.reshape(batch * n, ...) or "
                "x.repeat(n, ...), or place the exits where it is not folded."
            )
        if far[0] != far[1]:
            told[name] = orders[far[1] < far[0]]
    return told


def _unlike(one: Tensor, other: Tensor) -> int:
    """How many entries of two values differ by more than rounding; NaN is as NaN."""
    if one.is_floating_point():
        return int((~torch.isclose(one, other, rtol=1e-4, atol=1e-6, equal_nan=True)).sum())
    return int((one != other).sum())


def _shaken(tensors: Sequence[Tensor], shake: Shake) -> list[Tensor]:
    """An example whose samples differ: here and there another truth value or number."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for tensor in tensors:
        drawn = torch.rand(tensor.shape, generator=generator).to(tensor.device)
        other = tensor.logical_not() if tensor.dtype == torch.bool else shake(tensor)
        made.append(torch.where(drawn < 0.3, other, tensor))
    return made


def _values(staged: StagedModel, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    """Every value that crosses a cut, for one batch."""
    values = dict(zip(staged.inputs, tensors, strict=True))
    with torch.no_grad():
        for stage in staged.stages:
            _, *made = stage.module(*(values[name] for name in stage.inputs))
            values.update(zip(stage.outputs, made, strict=True))
    return values
