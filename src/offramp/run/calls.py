"""One call of a model, flattened into its tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from offramp.build.batch import as_call

__all__ = ["Call"]


@dataclass(frozen=True)
class Call:
    """One call of a model, flattened: what a runtime can hand on, and how to build it again.

    Attributes:
        leaves: all leaves of ``(args, kwargs)``: tensors and constants.
        spec: their structure.
        entries: for tensors that an embedding reads, by position, how many entries that has.
    """

    leaves: list[Any]
    spec: pytree.TreeSpec
    entries: Mapping[int, int] = field(default_factory=dict)

    @classmethod
    def of(cls, example: object) -> Call:
        """The call that an example stands for: a tensor, a tuple, or a mapping of keywords.

        Arrays become tensors, with memory of their own.
        """
        args, kwargs = pytree.tree_map_only(
            np.ndarray, lambda array: torch.from_numpy(np.array(array, order="C")), as_call(example)
        )
        return cls.of_call(args, kwargs)

    @classmethod
    def of_call(cls, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
        """The call ``model(*args, **kwargs)``; ``labels`` are no input of the backbone's."""
        inputs = {name: kwargs[name] for name in sorted(kwargs) if name != "labels"}
        return cls(*pytree.tree_flatten((tuple(args), inputs)))

    @cached_property
    def tensors(self) -> list[Any]:
        """The leaves that are data."""
        return [leaf for leaf in self.leaves if isinstance(leaf, Tensor | np.ndarray)]

    @cached_property
    def finite(self) -> tuple[bool, ...]:
        """For each tensor whether it has real values, and none of them is NaN or infinite."""
        values = [torch.as_tensor(value) for value in self.tensors]
        return tuple(v.is_floating_point() and bool(v.isfinite().all()) for v in values)

    @cached_property
    def flat(self) -> tuple[int, tuple[str, ...]] | None:
        """How many positional and which keyword arguments, where each is one tensor."""
        args, kwargs = pytree.tree_unflatten(self.leaves, self.spec)
        every = (*args, *kwargs.values())
        if not all(isinstance(value, Tensor | np.ndarray) for value in every):
            return None
        return len(args), tuple(kwargs)

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
