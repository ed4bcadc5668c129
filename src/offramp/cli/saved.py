"""A trained multi-exit model in a folder: how it was made, and its tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from offramp.build.model import MultiExitModel, attach
from offramp.cli.factories import backbone_of
from offramp.errors import ArtifactError
from offramp.files import replaced
from offramp.places.result import SCHEMA as PLAN_SCHEMA

__all__ = ["load_model", "read_plan", "save_model"]

SCHEMA = 1
ABOUT, TENSORS, SEEN = "model.json", "model.safetensors", "training_fingerprints"


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
        "schema": SCHEMA,
        "kind": "model",
        "network": network,
        "shape": shape,
        "places": list(model.places),
        "heads": "auto" if heads is None else list(heads),
        "cascade": model.cascade,
    }
    # The hashes of the training samples go along: recording those again is then found out.
    tensors = {**model.state_dict(), SEEN: model.training_fingerprints}
    # Each with memory of its own: the file format knows no tensors that share it.
    apart = {n: v.clone(memory_format=torch.contiguous_format) for n, v in tensors.items()}
    with replaced(folder / TENSORS) as part:
        save_file(apart, part)
    with replaced(folder / ABOUT) as part:
        part.write_text(json.dumps(about, indent=2) + "\n", "utf-8")


def load_model(folder: Path) -> tuple[MultiExitModel, Any]:
    """The model that :func:`save_model` wrote, in evaluation mode, and an example batch.

    Raises:
        ArtifactError: the folder or a file is missing, foreign, damaged or of a later schema; or
            the network is no longer the one that was trained.
    """
    try:
        about = json.loads((folder / ABOUT).read_text("utf-8"))
        tensors = load_file(folder / TENSORS)
    except (OSError, ValueError, SafetensorError) as error:
        raise ArtifactError(
            f"{folder} does not hold a model ({error}). Make one with: offramp fit ... --out FOLDER"
        ) from error
    if not isinstance(about, dict) or about.get("kind") != "model":
        raise ArtifactError(f"{folder / ABOUT} does not describe a model of offramp.")
    _complete(folder / ABOUT, about, ("schema",))
    if about["schema"] > SCHEMA:
        raise ArtifactError(
            f"{folder / ABOUT} has schema {about['schema']}; this offramp reads up to {SCHEMA}. "
            "Update offramp."
        )
    _complete(folder / ABOUT, about, ("network", "shape", "places"))
    if not isinstance(about["network"], str) or not isinstance(about["shape"], str | None):
        raise ArtifactError(
            f"{folder / ABOUT} is damaged: network and shape are texts, got {about['network']!r} "
            f"and {about['shape']!r}. Write it again."
        )
    _complete(folder / TENSORS, tensors, (SEEN,))
    backbone, example = backbone_of(about["network"], about["shape"])
    model = attach(
        backbone,
        example,
        exits=about["places"],
        heads=about.get("heads", "auto"),
        cascade=about.get("cascade", False),
    )
    model.training_fingerprints = tensors.pop(SEEN)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise ArtifactError(
            f"{about['network']!r} no longer makes the network that {folder} was trained from: "
            f"{error}"
        ) from error
    return model.eval(), example


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
    _complete(path, found, ("schema",))
    if found["schema"] > PLAN_SCHEMA:
        raise ArtifactError(
            f"{path} has schema {found['schema']}; this offramp reads up to {PLAN_SCHEMA}. "
            "Update offramp."
        )
    _complete(path, found, ("exits",))
    if not found["exits"]:
        raise ArtifactError(
            f"The plan in {path} has no exits, since none pays there. Place some by --exits, or "
            "leave the network as it is."
        )
    _complete(path, found, ("heads",))
    return found["exits"], found["heads"]


def _complete(path: Path, found: Mapping[str, Any], wanted: Sequence[str]) -> None:
    missing = [name for name in wanted if name not in found]
    if missing:
        raise ArtifactError(f"{path} is damaged: it lacks {missing}. Write it again.")
    if not isinstance(found.get("schema", 1), int):
        raise ArtifactError(f"{path} is damaged: its schema is no number. Write it again.")
