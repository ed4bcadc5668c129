"""What may be given to a runner: checked against the example, so that errors name the input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offramp.errors import DataError
from offramp.run.stages import Call

__all__ = ["check_call", "explain_not_finite"]


def check_call(args: tuple[Any, ...], kwargs: dict[str, Any], known: Call) -> list[Any]:
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
    for name, value, like in zip(known.names, given, known.tensors, strict=True):
        _check_tensor(name, value, like)
    if len({len(value) for value in given}) != 1:
        raise DataError(
            f"The inputs have different numbers of rows: {call.describe()}. Dimension 0 is the "
            "batch, and must be the same in all."
        )
    return given


def _check_tensor(name: str, value: Tensor | np.ndarray, like: Tensor) -> None:
    dtype = str(value.dtype).removeprefix("torch.")
    expected = str(like.dtype).removeprefix("torch.")
    shape = ("batch", *like.shape[1:])
    if dtype != expected or value.ndim != like.ndim or value.shape[1:] != like.shape[1:]:
        raise DataError(
            f"Input {name!r}: expected {expected} of shape {_show(shape)}, got {dtype} of shape "
            f"{_show(value.shape)}. Convert it, or make the runner with an example of this kind."
        )
    if len(value) == 0:
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
