"""What leaving at each exit is worth: right or wrong, or smoothed so that noise is not fitted."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from offramp.decide.scored import Scored
from offramp.decide.trace import Trace

__all__ = ["agreement", "correctness", "smoothed"]

ELEMENTS = 20_000_000  # logits that the stacked posterior is fitted on, at most: bounds its memory
RIDGE = 1.0  # in samples: how much data it takes to move the stack from the plain mean


def correctness(trace: Trace, scored: Scored) -> Tensor:
    """(E, N) float32: 1 where the exit's answer is the label."""
    if trace.labels is None:
        return agreement(scored)
    return (scored.predictions == trace.labels).float()


def agreement(scored: Scored) -> Tensor:
    """(E, N) float32: 1 where the exit's answer is that of the last exit."""
    return (scored.predictions == scored.predictions[-1]).float()


def smoothed(trace: Trace, scored: Scored) -> Tensor:
    """The chance that each exit's answer is right, halfway between label and model.

    A label says right or wrong, which is the chance of being right plus noise, and thresholds
    chosen on few samples fit that noise. The chance is therefore also estimated from what all exits
    say together: a softmax of their weighted log-probabilities (a stack with one weight an exit and
    one offset a class, fitted by maximum likelihood). The mean of label and estimate has half the
    noise and half of the estimate's bias.

    Returns:
        (E, N) float32.
    """
    right = correctness(trace, scored)
    if trace.labels is None:
        return right
    weights, offsets = _stack(trace)
    chance = torch.empty_like(right)
    step = max(1, ELEMENTS // (trace.num_classes * trace.num_exits))
    for start in range(0, trace.num_samples, step):
        part = slice(start, start + step)
        posterior = _combine(trace.logits[:, part], weights, offsets).softmax(dim=1).float()
        chance[:, part] = posterior.gather(1, scored.predictions[:, part].T).T
    return (right + chance) / 2


def _combine(logits: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """(E, B, C) -> (B, C) float64."""
    logs = logits.double().log_softmax(dim=2)
    return torch.einsum("e,ebc->bc", weights, logs) + offsets


def _stack(trace: Trace) -> tuple[Tensor, Tensor]:
    """The stack's weights (E,) and offsets (C,), by penalised maximum likelihood, in float64."""
    exits, samples, classes = trace.logits.shape
    labels = trace.labels
    if labels is None:  # pragma: no cover - callers look first
        raise ValueError("labels")
    rows = max(1, min(samples, ELEMENTS // (exits * classes)))
    chosen = torch.linspace(0, samples - 1, rows).long()
    logs = trace.logits[:, chosen].double().log_softmax(dim=2)
    target = labels[chosen]
    even = torch.full((exits,), 1 / exits, dtype=torch.float64)
    with torch.enable_grad():
        weights = even.clone().requires_grad_()
        offsets = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
        solver = torch.optim.LBFGS([weights, offsets], max_iter=60, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            solver.zero_grad()
            joint = torch.einsum("e,ebc->bc", weights, logs) + offsets
            pull = ((weights - even) ** 2).sum() * exits + (offsets**2).sum()
            loss: Tensor = functional.cross_entropy(joint, target) + RIDGE / rows * pull
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        solver.step(closure)  # type: ignore[no-untyped-call, arg-type]
    return weights.detach(), offsets.detach()
