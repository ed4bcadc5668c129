"""A trained multi-exit model in a folder: how it was made, and its tensors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from offramp.build.model import MultiExitModel, attach
from offramp.cli.factories import backbone_of
from offramp.errors import ArtifactError
from offramp.places.result import SCHEMA as PLAN_SCHEMA
from offramp.zoo.kept import ABOUT, KIND, complete, fill, read, write

__all__ = ["load_model", "read_plan", "save_model"]


def save_model(
    model: MultiExitModel,
    folder: Path,
    network: str,
    shape: str | None,
    heads: Sequence[str] | None = None,
) -> None:
    """Write ``model.json`` and ``model.safetensors``.

    Args:
        model: made by ``attach`` with heads by name.
        folder: where to.
        network: the ``module:factory`` that made its backbone.
        shape: of one sample, where that gives no example.
        heads: the names of the heads, where they are not automatic.
    """
    about = {
        "kind": "model",
        "network": network,
        "shape": shape,
        "places": list(model.places),
        "heads": "auto" if heads is None else list(heads),
        "cascade": model.cascade,
    }
    write(model, folder, about)


def load_model(folder: Path) -> tuple[MultiExitModel, Any]:
    """The model that :func:`save_model` or a run of the zoo wrote, evaluating, and an example.

    Raises:
        ArtifactError: the folder or a file is missing, foreign, damaged or of a later schema; or
            the network is no longer the one that was trained.
    """
    about, tensors, _ = read(folder)
    if about["kind"] == KIND:
        from offramp.zoo.restoring import restore  # with the systems, and what trains them

        return restore(folder)
    path = folder / ABOUT
    complete(path, about, ("network", "shape", "places"))
    if not isinstance(about["network"], str) or not isinstance(about["shape"], str | None):
        raise ArtifactError(
            f"{path} is damaged: network and shape are texts, got {about['network']!r} "
            f"and {about['shape']!r}. Write it again."
        )
    backbone, example = backbone_of(about["network"], about["shape"])
    model = attach(
        backbone,
        example,
        exits=about["places"],
        heads=about.get("heads", "auto"),
        cascade=about.get("cascade", False),
    )
    fill(model, tensors, folder, about["network"])
    return model, example


def read_plan(path: Path) -> tuple[list[str], list[str]]:
    """The places and the names of the heads in a plan that ``offramp plan --out`` wrote.

    Raises:
        ArtifactError: the file is missing, foreign, or of a later schema; or no exit pays.
    """
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"{path} does not hold a plan ({error}). Make one with: offramp plan ... --out FILE"
        ) from error
    if not isinstance(found, dict) or found.get("kind") != "places":
        raise ArtifactError(f"{path} is not a plan. Make one with: offramp plan ... --out FILE")
    complete(path, found, ("schema",))
    if found["schema"] > PLAN_SCHEMA:
        raise ArtifactError(
            f"{path} has schema {found['schema']}; this offramp reads up to {PLAN_SCHEMA}. "
            "Update offramp."
        )
    complete(path, found, ("exits",))
    if not found["exits"]:
        raise ArtifactError(
            f"The plan in {path} has no exits, since none pays there. Place some by --exits, or "
            "leave the network as it is."
        )
    complete(path, found, ("heads",))
    return found["exits"], found["heads"]
