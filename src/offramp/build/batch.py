"""What a data loader yields, understood once for training and for recording."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from offramp.errors import DataError

__all__ = ["Batch", "as_call", "batch_size", "fingerprints", "take_rows", "unpack"]


@dataclass(frozen=True)
class Batch:
    """One batch as a call of the backbone, and its labels.

    Attributes:
        args: positional inputs of the backbone; dimension 0 of every tensor is the batch.
        kwargs: keyword inputs of the backbone.
        labels: ``(B,)`` integer labels, or ``None`` where the loader yields inputs alone.
        select: for inputs whose dimension 0 is not the batch: the function that takes rows.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    labels: Tensor | None = None
    select: Callable[..., Any] | None = None

    @property
    def size(self) -> int:
        """Number of samples: dimension 0 of the first tensor among the inputs, or of the labels.

        Raises:
            DataError: samples are taken by ``select``, and there are no labels to count.
        """
        if self.select is None:
            return batch_size(self.args, self.kwargs)
        if self.labels is None:
            raise DataError(
                "This model takes its samples by a select function, and the batch has no labels "
                "by which they could be counted. Yield (inputs, labels)."
            )
        return len(self.labels)

    def rows(self, rows: Tensor) -> Batch:
        """The batch of the samples ``rows`` (R,) alone, in that order."""
        labels = None if self.labels is None else self.labels[rows]
        if self.select is None:
            return Batch(*take_rows(self.args, self.kwargs, rows), labels)
        return Batch(*as_call(self.select(rows, *self.args, **self.kwargs)), labels, self.select)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with every tensor on ``device``."""
        args, kwargs, labels = pytree.tree_map_only(
            Tensor, lambda t: t.to(device), (self.args, self.kwargs, self.labels)
        )
        return Batch(args, kwargs, labels, self.select)


def unpack(
    item: Any,  # noqa: ANN401
    label_names: Sequence[str] = ("labels", "label"),
    select: Callable[..., Any] | None = None,
) -> Batch:
    """Read what a loader yields.

    * ``(x, y)``: ``x`` goes to the backbone (by keyword if it is a mapping), ``y`` is the labels;
    * ``(x1, x2, ..., y)``: all but the last go to the backbone, in order;
    * a mapping: its entries go by keyword, the first of ``label_names`` it holds is the labels;
    * a tensor alone: the input; there are no labels.

    Args:
        item: one batch of a loader.
        label_names: keys under which a mapping may hold its labels.
        select: for inputs whose dimension 0 is not the batch: the function that takes rows.

    Raises:
        DataError: ``item`` is none of these, or holds no tensor.
    """
    if isinstance(item, Batch):
        return item
    labels: Any = None
    if isinstance(item, Mapping):
        named = {str(key): value for key, value in item.items()}
        key = next((name for name in label_names if name in named), None)
        labels = named.pop(key) if key is not None else None
        batch = Batch((), named, _as_labels(labels))
    elif isinstance(item, Tensor):
        batch = Batch((item,))
    elif isinstance(item, (tuple, list)) and len(item) >= 2:
        args, kwargs = as_call(item[0] if len(item) == 2 else tuple(item[:-1]))
        batch = Batch(args, kwargs, _as_labels(item[-1]))
    elif isinstance(item, (tuple, list)) and len(item) == 1:
        batch = Batch(*as_call(item[0]))
    else:
        raise DataError(
            f"A batch of type {type(item).__name__!r} is not understood. Expected a tensor, "
            "a tuple (input, labels), or a mapping of keyword inputs. Let the loader's "
            "collate_fn yield one of these."
        )
    batch_size(batch.args, batch.kwargs)
    return replace(batch, select=select)


def as_call(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:  # noqa: ANN401
    """Positional and keyword arguments of an example, as examples are given everywhere.

    A mapping is passed by keyword, a tuple or list by position, anything else as the only argument.
    """
    if isinstance(example, Mapping):
        return (), {str(key): value for key, value in example.items()}
    if isinstance(example, (tuple, list)):
        return tuple(example), {}
    return (example,), {}


def batch_size(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """Dimension 0 of the first tensor leaf of a call.

    Raises:
        DataError: there is no tensor with a dimension.
    """
    for leaf in pytree.tree_leaves((tuple(args), dict(kwargs))):
        if isinstance(leaf, Tensor) and leaf.dim() > 0:
            return int(leaf.shape[0])
    raise DataError(
        "The inputs hold no tensor with a batch dimension. Expected at least one tensor whose "
        "dimension 0 is the batch."
    )


def take_rows(
    args: tuple[Any, ...], kwargs: dict[str, Any], rows: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call for some of the samples: every tensor whose dimension 0 is the batch is indexed.

    Args:
        args: positional inputs.
        kwargs: keyword inputs.
        rows: ``(R,)`` int64, the samples to take, in the order wanted.

    Raises:
        DataError: an input is of a layout that torch takes no rows from, such as CSR.
    """
    size = batch_size(args, kwargs)

    def take(leaf: Tensor) -> Tensor:
        if leaf.dim() == 0 or leaf.shape[0] != size:
            return leaf
        try:
            return leaf.index_select(0, rows.to(leaf.device))
        except NotImplementedError as error:
            raise DataError(
                f"An input of shape {tuple(leaf.shape)} has the layout {leaf.layout}, from which "
                "torch takes no rows, so samples cannot be taken out of the batch. Give it as "
                "input.to_sparse_coo() or input.to_dense(), or pass select=, a function that "
                "takes rows."
            ) from error

    taken: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map_only(
        Tensor, take, (args, kwargs)
    )
    return taken


def fingerprints(batch: Batch) -> Tensor:
    """A 64-bit hash of every sample, over the bytes of its rows of all inputs; labels do not count.

    Equal samples have equal hashes whatever else is in the batch, so samples can be recognised
    across loaders. Tensors without the batch in dimension 0 do not count, unless samples are taken
    out by ``select``: then all do.

    Returns:
        ``(B,)`` int64.
    """
    size = batch.size
    if batch.select is not None:
        alone = (batch.rows(torch.tensor([i])) for i in range(size))
        return torch.tensor([_fingerprint(single) for single in alone], dtype=torch.int64)
    hashes = [hashlib.blake2b(digest_size=8) for _ in range(size)]
    for leaf in pytree.tree_leaves((batch.args, batch.kwargs)):
        if not isinstance(leaf, Tensor) or leaf.dim() == 0 or leaf.shape[0] != size:
            continue
        header = f"{leaf.dtype}{tuple(leaf.shape[1:])}".encode()
        for digest, row in zip(hashes, _rows(leaf.detach().cpu(), size), strict=True):
            digest.update(header)
            digest.update(row)
    values = [int.from_bytes(digest.digest(), "little", signed=True) for digest in hashes]
    return torch.tensor(values, dtype=torch.int64)


def _fingerprint(single: Batch) -> int:
    """The hash of all tensors of a batch of one."""
    digest = hashlib.blake2b(digest_size=8)
    for leaf in pytree.tree_leaves((single.args, single.kwargs)):
        if isinstance(leaf, Tensor):
            digest.update(f"{leaf.dtype}{tuple(leaf.shape)}".encode())
            digest.update(_bytes(leaf.detach().cpu()))
    return int.from_bytes(digest.digest(), "little", signed=True)


def _rows(tensor: Tensor, size: int) -> Iterable[bytes]:
    """The bytes of each of ``size`` rows."""
    if tensor.layout is not torch.strided:
        tensor = tensor.to_sparse_coo()
        return (_bytes(tensor.index_select(0, torch.tensor([row]))) for row in range(size))
    if not tensor.numel():
        return [b""] * size
    rows = tensor.contiguous().reshape(size, -1).view(torch.uint8).numpy()
    return (row.tobytes() for row in rows)


def _bytes(tensor: Tensor) -> bytes:
    """Those of its entries; of a sparse tensor, in any layout, those of its indices and values."""
    if tensor.layout is torch.strided:
        content: bytes = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return content
    entries = tensor.to_sparse_coo().coalesce()
    return _bytes(entries.indices()) + _bytes(entries.values())


def _as_labels(labels: Any) -> Tensor | None:  # noqa: ANN401
    if labels is None or isinstance(labels, Tensor):
        return labels
    try:
        return torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"Labels of type {type(labels).__name__!r} cannot be read as a tensor: {error}. "
            "Expected (B,) integers."
        ) from error
