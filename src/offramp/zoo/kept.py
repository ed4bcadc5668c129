"""A trained model in a folder: ``model.json`` says how it was made, beside it are its tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from offramp.build.model import MultiExitModel
from offramp.errors import ArtifactError
from offramp.files import replaced

__all__ = ["ABOUT", "KIND", "SCHEMA", "SEEN", "TENSORS", "complete", "fill", "read", "write"]

SCHEMA = 1
KIND = "zoo"  # of what this package makes by the name of a system
ABOUT, TENSORS, SEEN = "model.json", "model.safetensors", "training_fingerprints"
EXAMPLE = "example"


def write(
    model: MultiExitModel,
    folder: Path,
    about: Mapping[str, object],
    example: Tensor | Mapping[str, Tensor] | None = None,
) -> None:
    """Write ``model.json`` and ``model.safetensors``.

    Args:
        model: what is kept.
        folder: where to.
        about: kind, and what it takes to make the model again; as JSON can hold it.
        example: a batch that goes along, where making it again gives none.
    """
    # The hashes of the training samples go along: recording those again is then found out.
    tensors = {**model.state_dict(), SEEN: model.training_fingerprints}
    if isinstance(example, Tensor):
        tensors[EXAMPLE] = example
    elif example is not None:
        tensors |= {f"{EXAMPLE}/{name}": value for name, value in example.items()}
    # Each with memory of its own: the file format knows no tensors that share it.
    apart = {n: v.clone(memory_format=torch.contiguous_format) for n, v in tensors.items()}
    with replaced(folder / TENSORS) as part:
        save_file(apart, part)
    with replaced(folder / ABOUT) as part:
        part.write_text(json.dumps({"schema": SCHEMA, **about}, indent=2) + "\n", "utf-8")


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], Any]:
    """What :func:`write` wrote: about the model, its tensors, and the example or ``None``.

    Raises:
        ArtifactError: the folder or a file is missing, foreign, damaged or of a later schema.
    """
    try:
        about = json.loads((folder / ABOUT).read_text("utf-8"))
        tensors = load_file(folder / TENSORS)
    except (OSError, ValueError, SafetensorError) as error:
        raise ArtifactError(
            f"{folder} does not hold a model ({error}). Make one with: offramp fit ... --out "
            "FOLDER. A folder of `offramp zoo run` that lacks a part gets it by the same command."
        ) from error
    if not isinstance(about, dict) or about.get("kind") not in ("model", KIND):
        raise ArtifactError(f"{folder / ABOUT} does not describe a model of offramp.")
    complete(folder / ABOUT, about, ("schema",))
    if about["schema"] > SCHEMA:
        raise ArtifactError(
            f"{folder / ABOUT} has schema {about['schema']}; this offramp reads up to {SCHEMA}. "
            "Update offramp."
        )
    complete(folder / TENSORS, tensors, (SEEN,))
    example: Any = tensors.pop(EXAMPLE, None)
    if example is None:
        start = f"{EXAMPLE}/"
        names = [name for name in tensors if name.startswith(start)]
        example = {name.removeprefix(start): tensors.pop(name) for name in names} or None
    return about, tensors, example


def fill(model: MultiExitModel, tensors: dict[str, Tensor], folder: Path, maker: str) -> None:
    """Put the tensors of a folder into the model that was made again; then it evaluates.

    Args:
        model: of the same structure.
        tensors: from :func:`read`.
        folder: where they come from.
        maker: the name of what made the model.

    Raises:
        ArtifactError: the model is no longer the one that was trained.
    """
    rest = dict(tensors)
    model.training_fingerprints = rest.pop(SEEN)
    try:
        model.load_state_dict(rest)
    except RuntimeError as error:
        raise ArtifactError(
            f"{maker!r} no longer makes the network that {folder} was trained from: {error}"
        ) from error
    model.eval()


def complete(path: Path, found: Mapping[str, Any], wanted: Sequence[str]) -> None:
    """Refuse what lacks a part, or has a schema that is no number.

    Raises:
        ArtifactError: it does.
    """
    missing = [name for name in wanted if name not in found]
    if missing:
        raise ArtifactError(f"{path} is damaged: it lacks {missing}. Write it again.")
    if not isinstance(found.get("schema", 1), int):
        raise ArtifactError(f"{path} is damaged: its schema is no number. Write it again.")
