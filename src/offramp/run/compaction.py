"""Taking the samples that go on out of what is live."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from offramp.run.chain import Link
from offramp.run.engines import Array, Engine, tensor_of
from offramp.run.rows import RowAxis
from offramp.run.selection import Selector

__all__ = ["Compaction"]


class Compaction:
    """How rows are taken out, for one engine and one way of batching.

    Args:
        engine: moves the arrays.
        inputs: names of the model's inputs, in the order of its call.
        selector: takes samples out of inputs where dimension 0 is not the batch.
    """

    def __init__(self, engine: Engine, inputs: Sequence[str], selector: Selector | None) -> None:
        self.engine = engine
        self.inputs = tuple(inputs)
        self.selector = selector

    def __call__(
        self, link: Link, values: Mapping[str, Array], rows: np.ndarray
    ) -> dict[str, Array]:
        """What is live after a step, for the samples ``rows`` (R,) alone."""
        if self.selector is None:
            index = self.engine.index(rows)
            return {name: self._take(values[name], link.rows[name], index) for name in link.live}
        inputs = [self._tensor(values[name]) for name in self.inputs]
        which = torch.from_numpy(rows)
        chosen = map(self.engine.array, self.selector.take(inputs, which))
        taken = dict(zip(self.inputs, chosen, strict=True))
        index = self.selector.indices(inputs, which)
        for name in link.live:
            if name not in taken:
                axis = link.rows[name]
                own = index[axis.of].numpy() if axis is not None and axis.of else rows
                taken[name] = self._take(values[name], axis, self.engine.index(own))
        return taken

    def _take(self, value: Array, axis: RowAxis | None, index: Array) -> Array:
        return value if axis is None else self.engine.take(value, axis, index)

    def _tensor(self, value: Array) -> Tensor:
        """As the user's function takes it: in the memory of the processor."""
        return tensor_of(self.engine.host(value))
