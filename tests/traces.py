"""Traces of networks that never were, for tests of what only sees tensors."""

from __future__ import annotations

import torch

from offramp.decide.trace import Trace

__all__ = ["make_trace"]


def make_trace(
    samples: int = 300,
    classes: int = 5,
    strengths: tuple[float, ...] = (1.5, 3.0, 4.5, 6.0),
    seed: int = 0,
    labels: bool = True,
    head: float = 0.05,
) -> Trace:
    """Exits that see the label through noise, the later the better; samples differ in difficulty.

    Every stage costs 1, every head ``head``.
    """
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randint(0, classes, (samples,), generator=generator)
    ease = 1.5 * torch.rand(samples, generator=generator)
    shared = torch.randn(samples, classes, generator=generator)
    logits = []
    for strength in strengths:
        noise = shared + torch.randn(samples, classes, generator=generator)
        noise[torch.arange(samples), truth] += strength * ease
        logits.append(2 * noise)
    exits = len(strengths)
    heads = torch.full((exits,), head)
    heads[-1] = 0
    return Trace(torch.stack(logits), truth if labels else None, torch.ones(exits), heads)
