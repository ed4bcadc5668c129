"""The auxiliary classifiers of Inception V1 as exits at their places; published weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from offramp.build.model import MultiExitModel, attach
from offramp.errors import DataError
from offramp.zoo.inception.network import Convolution, GoogLeNet

__all__ = ["AUXILIARY_WEIGHT", "AuxiliaryClassifier", "inception_v1", "load_torchvision"]

# Of each auxiliary loss against the loss of the network itself: section 5.
AUXILIARY_WEIGHT = 0.3

# torchvision's name of each classifier, and the module behind which it stands.
_PLACES = {"aux1": "inception4a", "aux2": "inception4d"}


class AuxiliaryClassifier(nn.Module):
    """Pooling to 4×4, a 1×1 convolution, two linear layers: section 5 of the paper.

    Args:
        in_channels: of the feature.
        num_classes: C.
        dropout: 0.7 in the paper.
    """

    def __init__(self, in_channels: int, num_classes: int, dropout: float = 0.7) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(4)
        self.conv = Convolution(in_channels, 128, 1)
        self.fc1 = nn.Linear(128 * 4 * 4, 1024)
        self.dropout = nn.Dropout(dropout)
        self.fc2 = nn.Linear(1024, num_classes)

    def forward(self, feature: Tensor) -> Tensor:
        """(B, D, H, W) -> (B, C) logits."""
        hidden = torch.relu(self.fc1(self.conv(self.pool(feature)).flatten(1)))
        logits: Tensor = self.fc2(self.dropout(hidden))
        return logits


def inception_v1(
    num_classes: int = 1000, *, size: int = 224, kernel: int = 5, width: float = 1.0
) -> MultiExitModel:
    """GoogLeNet with its auxiliary classifiers as exits, behind modules 4a and 4d.

    The classifiers are heads of the model, not parts of the backbone: trained with weight 0.3 they
    help as in the paper, ``Policy.final()`` leaves no trace of them in what is run or exported, and
    any other policy uses them as exits.

    Args:
        num_classes: C.
        size: side of the square images, at least 33; 224 in the paper.
        kernel: see :class:`GoogLeNet`.
        width: see :class:`GoogLeNet`.

    Raises:
        DataError: a size, kernel or width that the network does not take.
    """
    if size < 33:
        raise DataError(
            f"Inception V1 halves its images five times and needs a size of 33 or more, got {size}."
        )
    backbone = GoogLeNet(num_classes, kernel, width)
    heads = {
        place: AuxiliaryClassifier(backbone.get_submodule(place).out_channels, num_classes)  # type: ignore[arg-type]
        for place in _PLACES.values()
    }
    return attach(backbone, torch.zeros(2, 3, size, size), exits=heads)


def load_torchvision(model: MultiExitModel, state: Mapping[str, Tensor]) -> None:
    """Put a state dict of torchvision's ``googlenet`` into the model, by name.

    Weights without the auxiliary classifiers (``aux1.*``, ``aux2.*``) leave the heads as they are,
    and in those that torchvision publishes these classifiers were never trained: train the heads,
    ``fit(model, batches, scheme="heads")``, before they answer as exits. The published weights
    expect images with mean 0.5 and deviation 0.5 in every channel.

    Args:
        model: from :func:`inception_v1`, with ``kernel=3`` and as many classes as the weights.
        state: names and tensors; torchvision itself is not needed.

    Raises:
        DataError: a tensor is missing, is too many, or has another shape.
    """
    heads = {f"{name}.": f"heads.{k}." for k, name in enumerate(_PLACES)}
    renamed = {}
    for name, tensor in state.items():
        prefix = f"{name.partition('.')[0]}."
        put = heads.get(prefix)
        renamed[f"backbone.{name}" if put is None else put + name.removeprefix(prefix)] = tensor
    own = model.state_dict()
    if not any(name.startswith("heads.") for name in renamed):
        renamed |= {name: tensor for name, tensor in own.items() if name.startswith("heads.")}
    different = sorted(set(own) ^ set(renamed))
    different += [n for n in own if n in renamed and own[n].shape != renamed[n].shape]
    if different:
        name = different[0]
        came = tuple(renamed[name].shape) if name in renamed else "nothing"
        expected = tuple(own[name].shape) if name in own else "nothing"
        raise DataError(
            f"These are not weights of this network: {len(different)} tensors differ, first "
            f"{name!r}, expected {expected}, got {came}. torchvision's googlenet fits "
            "inception_v1(num_classes, kernel=3)."
        )
    model.load_state_dict(renamed)
