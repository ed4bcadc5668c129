"""The stages reproduce the model: shown on the example before anything else is run.

Two claims are checked. With nobody leaving, every exit's logits are those of the whole model: the
same bits on an engine that computes with torch's own operators, within a tolerance on another. With
rows leaving at every exit, each row's logits are those that it gets alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from offramp.errors import EqualityError
from offramp.run.stages import Call

if TYPE_CHECKING:
    from offramp.build.model import MultiExitModel
    from offramp.run.runner import Runner
    from offramp.run.stages import StagedModel

__all__ = ["TOLERANCE", "distance", "prove"]

TOLERANCE = {True: 1e-5, False: 1e-4}  # torch's own operators; another engine's
ROWS_ALONE = 4  # how many rows of the example are also run one by one


def distance(got: Any, wanted: Any) -> float:  # noqa: ANN401
    """Largest difference of two arrays, relative to the largest value (at least 1) of ``wanted``."""
    got, wanted = (torch.as_tensor(x).detach().double().cpu() for x in (got, wanted))
    return float((got - wanted).abs().max() / wanted.abs().max().clamp(min=1.0))


def prove(runner: Runner, model: MultiExitModel, staged: StagedModel) -> None:
    """Compare a runner with the model it was made from, on the example.

    Raises:
        EqualityError: a difference, with its size and the first module in which it appears.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            _whole(runner, model, staged)
            _alone(runner, model, staged)
    finally:
        for module in training:
            module.training = True


def _whole(runner: Runner, model: MultiExitModel, staged: StagedModel) -> None:
    args, kwargs = staged.call.build(staged.call.tensors)
    wanted = model(*args, **kwargs)
    got = _logits(runner, staged.call.tensors)
    for exit, logits in zip(staged.exits, got, strict=True):
        same = runner.engine.exact and torch.equal(torch.as_tensor(logits), wanted[exit])
        far = distance(logits, wanted[exit])
        if same or (not runner.engine.exact and far <= TOLERANCE[False]):
            continue
        raise EqualityError(
            f"Exit {exit} of the staged model differs from the whole model by {far:.2g} (relative) "
            f"on the example{_first_difference(model, staged)}. An operation there gives "
            "another result each time, or depends on Python state that export froze."
        )


def _logits(runner: Runner, tensors: list[Tensor]) -> list[Any]:
    own = "raw" if runner.policy.criterion.combines else "logits"
    found: list[Any] = []

    def keep(position: int, values: dict[str, Any]) -> np.ndarray:
        found.append(values[own])
        return np.zeros(len(values["score"]), bool)

    runner._execute([runner.engine.array(value) for value in tensors], keep)
    return found


def _alone(runner: Runner, model: MultiExitModel, staged: StagedModel) -> None:
    """Let every other row go at each exit, and compare each with what it gets by itself."""
    tensors = staged.call.tensors
    samples = len(tensors[0])

    def every_other(position: int, values: dict[str, Any]) -> np.ndarray:
        return np.arange(len(values["score"])) % 2 == position % 2

    answer = runner._execute([runner.engine.array(value) for value in tensors], every_other)
    tolerance = TOLERANCE[runner.engine.exact]
    logits = runner.engine.host(answer.logits)
    for row in np.linspace(0, samples - 1, min(samples, ROWS_ALONE)).astype(int):
        single = [value[row : row + 1] for value in tensors]
        by_itself = runner._execute([runner.engine.array(value) for value in single], _at(answer.exit[row], runner))
        far = distance(logits[row], runner.engine.host(by_itself.logits)[0])
        if not far <= tolerance:  # NaN is a difference too
            raise EqualityError(
                f"Row {row} of the example leaves at exit {answer.exit[row]} with other logits in a "
                f"batch than alone: they differ by {far:.2g} (relative, {tolerance:g} allowed)"
                f"{_first_mixing(model, staged.call, int(row), tolerance)}. Something mixes the rows "
                "of a batch (statistics over the batch, a reshape that moves the batch), so "
                "per-sample exits would change its answers."
            )


def _at(exit: int, runner: Runner) -> Any:  # noqa: ANN401
    """Leave at ``exit`` and nowhere before."""

    def leaving(position: int, values: dict[str, Any]) -> np.ndarray:
        return np.full(len(values["score"]), runner._links[position].exit == exit)

    return leaving


# -- where a difference begins: only ever run to explain a failure ---------------------------------


def _first_difference(model: MultiExitModel, staged: StagedModel) -> str:
    """Run the model twice: the first module that disagrees with itself; else unknown."""
    once = _module_outputs(model, staged.call, staged.call.tensors)
    again = _module_outputs(model, staged.call, staged.call.tensors)
    for (path, first), (_, second) in zip(once, again, strict=False):
        if not torch.equal(first, second):
            return f"; the first module that differs is {path!r}"
    return ""


def _first_mixing(model: MultiExitModel, call: Call, row: int, tolerance: float) -> str:
    """The first module whose output for a row differs between a batch and the row alone."""
    together = _module_outputs(model, call, call.tensors)
    alone = _module_outputs(model, call, [value[row : row + 1] for value in call.tensors])
    for (path, batch), (_, single) in zip(together, alone, strict=False):
        if not len(single) or len(batch) != len(single) * len(call.tensors[0]):
            continue
        share = len(single)
        if not distance(batch[row * share : (row + 1) * share], single) <= tolerance:
            return f"; the first module that differs is {path!r}"
    return ""


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
