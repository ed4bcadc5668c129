"""What a backbone returns, and what a multi-exit model returns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from offramp.errors import DataError

__all__ = ["ExitOutputs", "LogitsFunction", "find_logits", "tensors_in"]

LogitsFunction = Callable[[Any], Tensor]


@dataclass
class ExitOutputs:
    """The logits of every exit; a sequence of E tensors.

    Attributes:
        logits: E tensors ``(B, C)`` in the order of execution, the last being the backbone's own.
        output: what the backbone returned, as it returned it.
        loss: a scalar where labels were given, else ``None``.
    """

    logits: list[Tensor]
    output: Any = None
    loss: Tensor | None = None

    @property
    def final(self) -> Tensor:
        """``(B, C)`` logits of the backbone itself."""
        return self.logits[-1]

    def stack(self) -> Tensor:
        """``(E, B, C)`` logits of all exits in one tensor."""
        return torch.stack(list(self.logits))

    def __len__(self) -> int:
        return len(self.logits)

    def __getitem__(self, exit: int) -> Tensor:
        return self.logits[exit]

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.logits)


def _flatten(outputs: ExitOutputs) -> tuple[list[Any], None]:
    return [outputs.logits, outputs.output, outputs.loss], None


def _unflatten(children: Any, _: None) -> ExitOutputs:  # noqa: ANN401
    logits, output, loss = children
    return ExitOutputs(logits, output, loss)


# torch.export, DistributedDataParallel and torch.func see through registered nodes only.
pytree.register_pytree_node(
    ExitOutputs,
    _flatten,
    _unflatten,
    serialized_type_name="offramp.ExitOutputs",
    to_dumpable_context=lambda context: context,
    from_dumpable_context=lambda context: context,
    flatten_with_keys_fn=lambda outputs: (
        [
            (pytree.GetAttrKey("logits"), outputs.logits),
            (pytree.GetAttrKey("output"), outputs.output),
            (pytree.GetAttrKey("loss"), outputs.loss),
        ],
        None,
    ),
)


def tensors_in(output: Any) -> list[Tensor]:  # noqa: ANN401
    """All tensors that a module hands on, in order.

    Layers of sequence models return tuples with the hidden state first, recurrent layers the
    sequence first and their state after it.
    """
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        output = list(output.values())
    elif is_dataclass(output):
        output = [getattr(output, part.name) for part in fields(output)]
    elif not isinstance(output, (tuple, list)):
        return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
    return [tensor for part in output for tensor in tensors_in(part)]


def find_logits(output: Any, function: LogitsFunction | None = None) -> Tensor:  # noqa: ANN401
    """The backbone's ``(B, C)`` logits in what it returned.

    They are what ``function`` says; without it the output itself, its attribute or key ``logits``,
    or the first element of a tuple.

    Raises:
        DataError: there is no ``(B, C)`` tensor there, or it has fewer than two classes.
    """
    found = function(output) if function is not None else _search(output)
    if not isinstance(found, Tensor):
        raise DataError(
            f"No logits were found in the backbone's output of type {type(output).__name__!r}. "
            "Expected a tensor, a tuple that begins with one, or an object or mapping with "
            "'logits'. Pass logits=, a function from the output to its (B, C) logits."
        )
    if found.dim() != 2:
        raise DataError(
            f"The backbone's logits have shape {tuple(found.shape)}; expected (B, C). Pass "
            "logits=, a function from the output to its (B, C) logits."
        )
    if found.shape[1] < 2:
        raise DataError(
            f"The backbone's logits have shape {tuple(found.shape)}; expected (B, C) with two "
            "classes or more, since a single one is always the answer and always sure. If it is "
            "the logit of 'yes', pass "
            "logits=lambda out: torch.cat([torch.zeros_like(out), out], 1)."
        )
    return found


def _search(output: Any) -> Any:  # noqa: ANN401
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping) and "logits" in output:
        return output["logits"]
    if isinstance(getattr(output, "logits", None), Tensor):
        return output.logits
    if isinstance(output, (tuple, list)) and len(output) > 0:
        return _search(output[0])
    return None
