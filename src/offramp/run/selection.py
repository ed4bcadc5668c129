"""Taking samples out of a batch whose dimension 0 is not the batch, by the user's function.

A batch of graphs, say: node features (nodes, F), edges (2, edges), the graph of each node. Which
nodes and edges belong to some of the graphs is for the user's ``select`` to say::

    select(rows, **inputs) -> inputs of these samples alone

It is called with the model's inputs as they were given, by position or by name, after ``rows``, a
tensor of sample numbers. What it returns are inputs of the same structure. It may number things
anew in integer inputs (edges); entries of real-valued inputs it only leaves out or moves, so that
sending row numbers through it tells which nodes are left.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from offramp.errors import DataError, StageError
from offramp.run.calls import Call

__all__ = ["Selector", "samples_of", "take_samples"]


@dataclass(frozen=True)
class Selector:
    """A ``select`` function with what the example tells of it.

    Attributes:
        select: the user's function.
        call: the example.
        free: for each tensor of the call, the dimensions whose size depends on the samples.
        batch: position and dimension of the input that has one entry for each sample.
        counted: for each axis key, ``x.0``, the input and dimension to send row numbers through.
    """

    select: Callable[..., Any]
    call: Call
    free: tuple[frozenset[int], ...]
    batch: tuple[int, int] = (0, 0)
    counted: tuple[tuple[str, int, int], ...] = ()

    @classmethod
    def of(cls, select: Callable[..., Any], call: Call, samples: int) -> Selector:
        """Find the free dimensions by taking fewer of the example's samples.

        Raises:
            DataError: ``select`` fails, or gives another structure.
        """
        bare = cls(select, call, ())
        half = max(1, samples // 2)
        # Both halves: one may have none of something (edges, say) and differ in nothing there.
        parts = [bare.take(call.tensors, rows) for rows in torch.arange(samples).split(half)]
        free = [
            frozenset(d for d in range(a.ndim) if any(a.shape[d] != b.shape[d] for b in others))
            for a, *others in zip(call.tensors, *parts, strict=True)
        ]
        return cls(select, call, tuple(free))

    def take(self, tensors: list[Tensor], rows: Tensor) -> list[Tensor]:
        """The tensors of the call for the samples ``rows`` (R,) alone.

        Raises:
            DataError: ``select`` fails, or gives another structure.
        """
        args, kwargs = self.call.build(tensors)
        try:
            made = Call.of(self.select(rows, *args, **kwargs))
        except (TypeError, ValueError, IndexError, KeyError, RuntimeError) as error:
            raise DataError(
                f"The select function fails on rows {rows.tolist()[:8]}: {error}. It is called as "
                "select(rows, ...) with the model's inputs, and returns inputs for these samples."
            ) from error
        if made.spec != self.call.spec:
            raise DataError(
                f"The select function returned {made.describe()}; expected the structure "
                f"{self.call.describe()}. Return inputs as the model takes them."
            )
        return made.tensors

    def indices(self, tensors: list[Tensor], rows: Tensor) -> Mapping[str, Tensor]:
        """For each axis key the entries (K,) that belong to the samples ``rows`` (R,)."""
        found: dict[str, Tensor] = {}
        for key, position, dim in self.counted:
            value = tensors[position]
            shape = [1] * value.ndim
            shape[dim] = value.shape[dim]
            # float64 holds row numbers exactly; the values themselves are not needed.
            numbers = torch.arange(value.shape[dim], dtype=torch.float64).view(shape)
            sent = list(tensors)
            sent[position] = numbers.expand(value.shape).contiguous()
            came = self.take(sent, rows)[position]
            found[key] = (
                came.movedim(dim, 0).flatten(1)[:, 0].long() if came.ndim > 1 else came.long()
            )
        return found


def samples_of(tensors: Sequence[Any], selector: Selector | None) -> int:
    """The number of samples in the tensors of a call."""
    position, dim = selector.batch if selector is not None else (0, 0)
    return int(tensors[position].shape[dim])


def take_samples(
    tensors: Sequence[Tensor], rows: Tensor, selector: Selector | None
) -> list[Tensor]:
    """The tensors of a call for the samples ``rows`` (R,) alone, in that order."""
    if selector is not None:
        return selector.take(list(tensors), rows)
    return [value[rows.to(value.device)] for value in tensors]


def countable(key: str) -> StageError:
    """The error for an axis that no real-valued input shares."""
    return StageError(
        f"A value that crosses an exit has one entry for each of {key!r}, and no real-valued input "
        "has: which of them belong to a sample cannot be told. Give such an input (a weight of 1 "
        "for each edge, say), or place the exit elsewhere."
    )
