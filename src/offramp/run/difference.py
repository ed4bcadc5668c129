"""How far results are apart, why, and in which module they part: run only where they differ."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from offramp.run.calls import Call

if TYPE_CHECKING:
    from offramp.build.model import MultiExitModel
    from offramp.run.stages import StagedModel

__all__ = ["distance", "first_difference", "first_mixing", "only_rounding"]

EXACTLY = 1e-9  # what float64 leaves of rounding, with room for networks that amplify it


def distance(got: Any, wanted: Any) -> float:  # noqa: ANN401
    """Largest difference, relative to the largest absolute value of ``wanted`` (at least 1)."""
    got, wanted = (torch.as_tensor(x).detach().double().cpu() for x in (got, wanted))
    return float((got - wanted).abs().max() / wanted.abs().max().clamp(min=1.0))


def first_difference(model: MultiExitModel, staged: StagedModel) -> str:
    """Run the model twice: the first module that disagrees with itself; else unknown."""
    once = _module_outputs(model, staged.call, staged.call.tensors)
    again = _module_outputs(model, staged.call, staged.call.tensors)
    for (path, first), (_, second) in zip(once, again, strict=False):
        if not torch.equal(first, second):
            return f"; the first module that differs is {path!r}"
    return ""


def first_mixing(model: MultiExitModel, staged: StagedModel, row: int, tolerance: float) -> str:
    """The first module whose output for a row differs between a batch and the row alone."""
    call = staged.call
    together = _module_outputs(model, call, call.tensors)
    alone = _module_outputs(model, call, staged.take(call.tensors, torch.tensor([row])))
    for (path, batch), (_, single) in zip(together, alone, strict=False):
        if 0 in (batch.ndim, single.ndim):  # one number for all rows is of none of them
            continue
        if not len(single) or len(batch) != len(single) * staged.samples:
            continue
        share = len(single)
        if not distance(batch[row * share : (row + 1) * share], single) <= tolerance:
            return f"; the first module that differs is {path!r}"
    return ""


def only_rounding(model: MultiExitModel, staged: StagedModel, row: int) -> bool:
    """Whether a row gets in a batch what it gets alone, once the model computes in float64.

    Then it was rounding that made them differ: a hundred layers amplify it, and kernels for other
    batch sizes round otherwise. Rows that are mixed differ in any precision (unless a network mixes
    them by an amount that it takes from the precision). Where the model does not compute in
    float64, nothing is shown.
    """
    call = staged.call
    tensors = [v.double() if v.is_floating_point() else v for v in call.tensors]
    try:
        twin = copy.deepcopy(model).double()
        found = []
        for given in (tensors, staged.take(tensors, torch.tensor([row]))):
            args, kwargs = call.build([value.clone() for value in given])
            found.append(twin(*args, **kwargs).logits)
    except Exception:
        return False
    return all(
        one.dtype == torch.float64 and distance(one[row : row + 1], other) <= EXACTLY
        for one, other in zip(*found, strict=True)
    )


def _module_outputs(
    model: MultiExitModel, call: Call, tensors: list[Tensor]
) -> list[tuple[str, Tensor]]:
    found: list[tuple[str, Tensor]] = []
    handles = []
    for path, module in model.backbone.named_modules():
        if next(module.children(), None) is None:
            handles.append(
                module.register_forward_hook(
                    lambda _m, _i, out, path=path: (
                        found.append((path, out.detach().clone()))
                        if isinstance(out, Tensor)
                        else None
                    )
                )
            )
    try:
        args, kwargs = call.build(tensors)
        model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return found
