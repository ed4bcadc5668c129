"""The model that a run of the zoo kept, made again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from offramp.build.model import MultiExitModel, attach
from offramp.errors import ArtifactError, unknown_name
from offramp.zoo.kept import ABOUT, KIND, complete, fill, read
from offramp.zoo.resnet import cifar_resnet
from offramp.zoo.systems import SYSTEMS
from offramp.zoo.text.running import bare_encoder
from offramp.zoo.text.systems import TEXT, attach_to_layers

__all__ = ["RESNET", "restore"]

RESNET = "cifar-resnet"  # what the demo trains


def restore(folder: Path) -> tuple[MultiExitModel, Any]:
    """The model that ``offramp zoo run`` or ``offramp demo`` kept, and an example batch.

    Args:
        folder: that they wrote.

    Returns:
        The model in evaluation mode, with the hashes of its training samples; and a few of the
        calibration samples, as the model takes them.

    Raises:
        ArtifactError: the folder or a file is missing, foreign, damaged or of a later schema; or
            the system is no longer the one that was trained.
        MissingExtra: it reads text, and the package transformers is not installed.
    """
    about, tensors, example = read(folder)
    path = folder / ABOUT
    if about["kind"] != KIND:
        raise ArtifactError(f"{path} describes a model that is none of the zoo. Load it as others.")
    complete(path, about, ("system", "classes"))
    classes = about["classes"]
    if not isinstance(classes, int) or classes < 1 or example is None:
        raise ArtifactError(
            f"{folder} is damaged: expected a number of classes and an example, got {classes!r} "
            f"and {'no' if example is None else 'an'} example. Run the same command again."
        )
    model = _made(path, about, classes, example)
    fill(model, tensors, folder, about["system"])
    return model, example


def _made(path: Path, about: dict[str, Any], classes: int, example: Any) -> MultiExitModel:  # noqa: ANN401
    """The model of that name, its weights drawn anew."""
    name = about["system"]
    if name in SYSTEMS:
        return SYSTEMS[name].build(classes)
    if name in TEXT:
        return attach_to_layers(bare_encoder(path.parent), example, TEXT[name].head)
    if name != RESNET:
        known = [*SYSTEMS, *TEXT, RESNET]
        raise ArtifactError(
            f"{path}: {unknown_name('system', name, known)} Make that of yours in Python, and load "
            "the tensors beside it into it."
        )
    complete(path, about, ("network", "places"))
    try:
        backbone = cifar_resnet(num_classes=classes, **about["network"])
    except TypeError as error:
        raise ArtifactError(f"{path} is damaged: {error}. Write it again.") from error
    return attach(backbone, example, exits=about["places"])
