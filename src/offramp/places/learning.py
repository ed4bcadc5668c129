"""The heads of all candidates learn at once, on features that were computed once."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR

from offramp.errors import TrainingError
from offramp.places.dense import Dense
from offramp.places.features import Features
from offramp.places.progress import shown
from offramp.train.optimizers import adamw, cosine

__all__ = ["learn"]

BATCH = 128
LR = 0.01


def learn(dense: Dense, features: Features, epochs: int, seed: int, progress: bool) -> None:
    """Train every head by cross entropy; each stands for itself.

    Args:
        dense: whose heads are trained, in place.
        features: of N rows.
        epochs: passes over these rows.
        seed: of their order.
        progress: show a bar on a terminal.

    Raises:
        TrainingError: a loss is no number any more.
    """
    heads = nn.ModuleList(candidate.head for candidate in dense.candidates).train()
    optimizer = adamw(heads.parameters(), LR)
    rows = len(features.labels)
    size = min(BATCH, max(8, rows // 8))
    steps = max(1, rows // size)  # rows that are left over are among others in the next epoch
    last = steps * epochs
    course = LambdaLR(optimizer, lambda step: cosine(min(step, last - 1) / last))
    generator = torch.Generator().manual_seed(seed)
    for epoch in shown(range(epochs), "heads", epochs, progress):
        order = torch.randperm(rows, generator=generator).to(features.labels.device)
        for step in range(steps):
            chosen = order[step * size : (step + 1) * size]
            labels = features.labels[chosen].to(features.condensed[0].device)
            parts = [part[chosen.to(part.device)] for part in features.condensed]
            losses = torch.stack(
                [
                    functional.cross_entropy(candidate.head.classify(parts[k]), labels)
                    for k, candidate in zip(features.index, dense.candidates, strict=True)
                ]
            )
            optimizer.zero_grad()
            losses.sum().backward()
            optimizer.step()
            course.step()
        _refuse_broken(dense, losses.detach(), epoch)
    heads.eval()


def _refuse_broken(dense: Dense, losses: torch.Tensor, epoch: int) -> None:
    broken = (~torch.isfinite(losses)).nonzero().flatten().tolist()
    if broken:
        place = dense.model.places[dense.candidates[broken[0]].place]
        raise TrainingError(
            f"The loss of the head {dense.candidates[broken[0]].name!r} at {place!r} is not a "
            f"number any more in epoch {epoch + 1} of the search. Are all inputs finite, and the "
            "features of the backbone with them?"
        )
