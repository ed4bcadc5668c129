"""What may be given to a runner: checked against the example, so that errors name the input."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offramp.errors import DataError
from offramp.run.calls import Call
from offramp.run.selection import Selector

__all__ = ["check_call", "explain_not_finite"]


def check_call(
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    known: Call,
    selector: Selector | None = None,
) -> list[Any]:
    """The tensors or arrays of a call that is like ``known``, in its order.

    Raises:
        DataError: another structure, dtype, rank or size, or an empty batch.
    """
    if args and kwargs:
        call = Call.of_call(args, kwargs)
    else:
        call = Call.of(args[0] if len(args) == 1 else args or kwargs)
    if call.spec != known.spec:
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
        return given
    for name, value, like in zip(known.names, given, known.tensors, strict=True):
        _check_tensor(name, value, like)
    if len({len(value) for value in given}) != 1:
        raise DataError(
            f"The inputs have different numbers of rows: {call.describe()}. Dimension 0 is the "
            "batch, and must be the same in all."
        )
    return given


def _check_tensor(
    name: str, value: Tensor | np.ndarray, like: Tensor, free: Collection[int] = (0,)
) -> None:
    dtype = str(value.dtype).removeprefix("torch.")
    expected = str(like.dtype).removeprefix("torch.")
    shape = ["batch" if d in free else size for d, size in enumerate(like.shape)]
    fits = value.ndim == like.ndim and all(
        d in free or a == b for d, (a, b) in enumerate(zip(value.shape, like.shape, strict=True))
    )
    if dtype != expected or not fits:
        raise DataError(
            f"Input {name!r}: expected {expected} of shape {_show(shape)}, got {dtype} of shape "
            f"{_show(value.shape)}. Convert it, or make the runner with an example of this kind."
        )
    if any(value.shape[d] == 0 for d in free):
        raise DataError(f"Input {name!r} is an empty batch; pass at least one row.")


def _show(shape: Sequence[object]) -> str:
    return "(" + ", ".join(map(str, shape)) + ")"


def explain_not_finite(logits: np.ndarray, given: Sequence[Any]) -> None:
    """Raise a DataError that says which rows have no finite logits, and why."""
    bad = np.flatnonzero(~np.isfinite(logits).all(-1))
    at_fault = [
        i for i in bad if any(not torch.isfinite(torch.as_tensor(v[int(i)])).all() for v in given)
    ]
    what = "the input has NaN or infinite values" if at_fault else "the model overflows on them"
    raise DataError(
        f"The logits of row {int(bad[0])} ({len(bad)} of {len(logits)} rows) are not finite: "
        f"{what}. Leave these rows out, or mend them."
    )
