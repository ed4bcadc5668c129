"""What a search needs, and what it says where that is missing. All raise ``DataError``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from offramp.build.batch import as_call
from offramp.build.cost import check_backbone
from offramp.errors import DataError
from offramp.places.features import HeldOut

__all__ = ["check_devices", "check_rows", "check_settings", "check_trained"]

LEAST = 200  # rows, below which differences between exits are chance
SURE = 3.0  # standard errors by which a trained backbone is better than the commonest class


def check_settings(
    exits: int | None, drops: Sequence[float], worth: float, samples: int, epochs: int
) -> None:
    """Refuse settings out of range, or of another type."""
    counts = {"samples": samples, "epochs": epochs} | ({} if exits is None else {"exits": exits})
    for name, value in counts.items():
        if not isinstance(value, Integral) or value < 1:
            raise DataError(f"{name}={value!r}: expected 1 or more, a whole number.")
    if not isinstance(drops, Sequence) or not drops or not all(map(_is_share, drops)):
        raise DataError(
            f"drops={drops!r}: expected one or more shares of accuracy from 0 to 1, such as "
            "(0.0, 0.01)."
        )
    if not _is_share(worth):
        raise DataError(f"worth={worth!r}: expected a share of the cost from 0 to 1, such as 0.01.")


def _is_share(value: object) -> bool:
    return isinstance(value, Real) and 0.0 <= float(value) < 1.0


def check_devices(backbone: nn.Module, example: Any) -> None:  # noqa: ANN401
    """Refuse a backbone and an example that do not lie together."""
    check_backbone(backbone)
    homes = {p.device for p in backbone.parameters()}
    leaves = pytree.tree_leaves(as_call(example))
    there = {leaf.device for leaf in leaves if isinstance(leaf, Tensor)}
    if len(homes) == 1 and there and there != homes:
        (home,) = homes
        raise DataError(
            f"The backbone lies on {home} and the example on {', '.join(sorted(map(str, there)))}. "
            "Move one of them: example.to(device), or backbone.to(device). Batches of the loader "
            "are moved to the backbone."
        )
    if any(home.type == "meta" for home in homes):
        raise DataError("The backbone lies on 'meta' and has no values. Load its weights first.")


def check_rows(labels: Tensor, rows: int) -> None:
    """Refuse too few rows, and rows of one class."""
    if rows < LEAST:
        raise DataError(
            f"{rows} samples were looked at (the loader's, or as many as samples= and memory let), "
            f"too few for a search: expected {LEAST} or more, since below that the differences "
            "between exits are chance. Place exits by cost instead: method='percentiles'."
        )
    if len(labels.unique()) < 2:
        raise DataError(
            f"All labels that were seen are {int(labels[0])}: with one class there is nothing to "
            "tell apart. Is the data set sorted, or a subset of one class? Shuffle it."
        )


def check_trained(held: HeldOut) -> None:
    """Refuse too few held-out rows, and a backbone that is no better than guessing."""
    rows = len(held.labels)
    if rows < LEAST // 5:
        raise DataError(
            f"{rows} held-out samples are left, too few to choose exits on: expected {LEAST // 5} "
            "or more that the heads were not trained on."
        )
    accuracy = float((held.logits[-1].argmax(1) == held.labels).double().mean())
    commonest = float(held.labels.bincount().max()) / rows
    error = math.sqrt(commonest * (1 - commonest) / rows)
    if accuracy < commonest + SURE * error:
        raise DataError(
            f"The backbone answers {accuracy:.1%} of the held-out samples right, which is no "
            f"better than always answering the commonest class ({commonest:.1%}): it looks "
            "untrained, or the labels are not its. Train it first; a search weighs exits against "
            "what it can do."
        )
