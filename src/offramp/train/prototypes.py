"""Class means for prototype heads, in one pass over the training samples."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from offramp.build.batch import unpack
from offramp.build.cascade import core
from offramp.build.model import MultiExitModel
from offramp.build.prototypes import PrototypeHead
from offramp.errors import DataError, HeadError
from offramp.train.data import Census, check_labels, distinct

__all__ = ["fit_prototypes"]


def fit_prototypes(model: MultiExitModel, loader: Iterable[Any]) -> None:
    """Set the means of every :class:`PrototypeHead` to those of the classes.

    The model runs in evaluation mode without gradients and gets its modes back; the backbone stays
    as it is. Sums are kept in float64. The samples are remembered as
    ``model.training_fingerprints``, as by :func:`offramp.fit`.

    Args:
        model: with at least one prototype head.
        loader: yields ``(input, labels)`` or mappings with a key ``labels``: training samples.

    Raises:
        HeadError: the model has no prototype head.
        DataError: no labels, labels out of range, or a class without samples.
    """
    cores = {k: core(head) for k, head in enumerate(model.heads)}
    heads = {k: head for k, head in cores.items() if isinstance(head, PrototypeHead)}
    if not heads:
        raise HeadError(
            "fit_prototypes found no PrototypeHead in the model: attach with "
            "heads=[PrototypeHead(classes), ...], one for each exit."
        )
    sums = {k: torch.zeros(head.means.shape, dtype=torch.float64) for k, head in heads.items()}
    counts = torch.zeros(model.num_classes, dtype=torch.float64)
    census = Census()
    for labels, features in _features(model, loader, census):
        counts += torch.bincount(labels, minlength=model.num_classes)
        for k, head in heads.items():
            sums[k].index_add_(0, labels, head.pool(features[k]).double().cpu())
    empty = (counts == 0).nonzero().flatten().tolist()
    if empty:
        raise DataError(
            f"The loader has no sample of class {', '.join(map(str, empty[:5]))}, so its mean is "
            f"not known. Give samples of all {model.num_classes} classes."
        )
    for k, head in heads.items():
        head.means.copy_(sums[k] / counts[:, None])
    model.training_fingerprints = distinct(model.training_fingerprints, census.hashes)


def _features(
    model: MultiExitModel, loader: Iterable[Any], census: Census
) -> Iterable[tuple[Tensor, list[Tensor]]]:
    """Labels (B,) and features, batch by batch, in evaluation mode."""
    modes: list[tuple[nn.Module, bool]] = [(module, module.training) for module in model.modules()]
    place = next((p.device for p in model.parameters()), torch.device("cpu"))
    model.eval()
    try:
        with torch.no_grad():
            for item in loader:
                batch = unpack(item, select=model.select)
                labels = check_labels(batch.labels, model.num_classes, "The loader")
                census.add(batch)
                here = batch.to(place)
                yield labels.cpu(), model.features(*here.args, **here.kwargs)[0]
    finally:
        for module, training in modes:
            module.training = training
