"""What may be given to a runner: checked against the example, so that errors name the input."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offramp.build.batch import as_call
from offramp.errors import DataError
from offramp.run.calls import Call
from offramp.run.selection import Selector, samples_of

__all__ = ["check_call", "check_entries", "check_finite", "explain_not_finite", "flat_call"]


def check_call(
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    known: Call,
    selector: Selector | None = None,
) -> list[Any]:
    """The tensors or arrays of a call that is like ``known``, in its order.

    Raises:
        DataError: another structure, dtype, rank or size; or an empty batch.
    """
    given = flat_call(args, kwargs, known)
    if given is None:
        call = Call.of_call(args, kwargs)
        if len(args) == 1 and not kwargs and not _alike(call, known):
            call = Call.of_call(*as_call(args[0]))  # the one thing that the example was
        if not _alike(call, known):
            raise DataError(
                f"The input has the structure {call.describe()}, but the example had "
                f"{known.describe()}. Pass the same arguments as the example has."
            )
        given = call.tensors
    if selector is not None:
        for name, value, like, free in zip(
            known.names, given, known.tensors, selector.free, strict=True
        ):
            _check_tensor(name, value, like, free)
        # Of other inputs there may be nothing: a graph without edges.
        if samples_of(given, selector) == 0:
            raise _empty(known.names[selector.batch[0]])
        return given
    for name, value, like in zip(known.names, given, known.tensors, strict=True):
        _check_tensor(name, value, like)
        if len(value) == 0:
            raise _empty(name)
    if len(given) > 1 and len({len(value) for value in given}) != 1:
        shapes = ", ".join(f"{n}={_show(v.shape)}" for n, v in zip(known.names, given, strict=True))
        raise DataError(
            f"The inputs have different numbers of rows: {shapes}. Dimension 0 is the batch, and "
            "must be the same in all."
        )
    return given


def flat_call(args: tuple[Any, ...], kwargs: dict[str, Any], known: Call) -> list[Any] | None:
    """The tensors of a call whose arguments are tensors, as most are: without a walk of a tree."""
    if known.flat is None:
        return None
    count, names = known.flat
    places, named = list(args), kwargs
    if len(places) == 1 and not named and isinstance(places[0], dict):
        named = places.pop()
    if len(places) != count or len(named) != len(names):
        return None
    given = [*places, *map(named.get, names)]
    return given if all(isinstance(value, Tensor | np.ndarray) for value in given) else None


def _alike(call: Call, known: Call) -> bool:
    """Whether tensors stand where the example had some, and its own constants elsewhere."""
    if call.spec != known.spec:
        return False
    kinds = (Tensor, np.ndarray)
    return all(
        isinstance(leaf, kinds) == isinstance(like, kinds)
        and (isinstance(like, kinds) or leaf is like or leaf == like)
        for leaf, like in zip(call.leaves, known.leaves, strict=True)
    )


def check_finite(given: Sequence[Any], known: Call) -> None:
    """Refuse NaN and infinite values in inputs that had none in the example.

    Not every kernel hands them on to the logits, where they would be seen: some take the larger of
    NaN and 0 to be 0. What lies on a device is not looked at, since that would wait for it.
    """
    for name, value, checked in zip(known.names, given, known.finite, strict=True):
        if not checked or _finite(value):
            continue
        finite: Any = np if isinstance(value, np.ndarray) else torch
        rows = np.asarray(finite.isfinite(value)).reshape(len(value), -1).all(1)
        bad = np.flatnonzero(~rows).tolist()
        raise DataError(
            f"The values of row {bad[0]} ({len(bad)} of {len(value)} rows) are not finite: the "
            f"input has NaN or infinite values in {name!r}. Leave these rows out, or mend them."
        )


def check_entries(given: Sequence[Any], known: Call) -> None:
    """Refuse numbers of entries that an embedding does not have.

    ONNX Runtime takes a negative one as counted from the end, and OpenVINO answers for any. What
    lies on a device is not looked at, since that would wait for it.
    """
    for position, entries in known.entries.items():
        value = given[position]
        if 0 in value.shape or (isinstance(value, Tensor) and value.device.type != "cpu"):
            continue
        held = np.asarray(value)  # torch finds no extremes of some unsigned types
        low, high = int(held.min()), int(held.max())
        if low < 0 or high >= entries:
            raise DataError(
                f"Input {known.names[position]!r} has values from {low} to {high}, and the "
                f"embedding that reads it has the entries 0..{entries - 1}. Check the tokenizer, "
                "and mask padding rather than mark it by a number of its own."
            )


def _finite(value: Tensor | np.ndarray) -> bool:
    if isinstance(value, np.ndarray):
        return bool(np.isfinite(value).all())
    if not value.is_floating_point() or value.device.type != "cpu":
        return True
    # The sum is one pass; where large values overflow it, all of them are looked at.
    return math.isfinite(value.sum().item()) or bool(torch.isfinite(value).all())


@cache
def _dtype(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def _check_tensor(
    name: str, value: Tensor | np.ndarray, like: Tensor, free: Collection[int] = (0,)
) -> None:
    dtype, expected = _dtype(value.dtype), _dtype(like.dtype)
    fits = value.ndim == like.ndim and all(
        a == b or d in free for d, (a, b) in enumerate(zip(value.shape, like.shape, strict=True))
    )
    if dtype != expected or not fits:
        shape = ["batch" if d in free else size for d, size in enumerate(like.shape)]
        raise DataError(
            f"Input {name!r}: expected {expected} of shape {_show(shape)}, got {dtype} of shape "
            f"{_show(value.shape)}. Convert it, or make the runner with an example of this kind."
        )


def _empty(name: str) -> DataError:
    return DataError(f"Input {name!r} is an empty batch; pass at least one row.")


def _show(shape: Sequence[object]) -> str:
    return "(" + ", ".join(map(str, shape)) + ")"


def explain_not_finite(logits: np.ndarray, given: Sequence[Any], first: int = 0) -> None:
    """Raise a DataError that says which rows have no finite logits, and why.

    Args:
        logits: (R, C).
        given: the inputs of these rows.
        first: the number of the first of them in the batch that was given.
    """
    bad = np.flatnonzero(~np.isfinite(logits).all(-1))
    by_row = [value[bad] for value in given if len(value) == len(logits)]
    at_fault = any(
        not (np if isinstance(value, np.ndarray) else torch).isfinite(value).all()
        for value in by_row
    )
    what = "the input has NaN or infinite values" if at_fault else "the model overflows on them"
    row = first + int(bad[0])
    raise DataError(
        f"The logits of row {row} ({len(bad)} of {len(logits)} rows) are not finite: "
        f"{what}. Leave these rows out, or mend them."
    )
