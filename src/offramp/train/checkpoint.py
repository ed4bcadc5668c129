"""Training that was interrupted goes on: one file, replaced whole, with no code in it.

A checkpoint is one safetensors file: tensors of the model, of the optimiser and of the random
generators, and everything else as JSON in its header. It is written beside the last one, flushed
to disk, and renamed over it, so whatever happens there is one whole checkpoint.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.optim import Optimizer

from offramp.errors import TrainingError
from offramp.files import replaced

__all__ = [
    "FILE_NAME",
    "Checkpoint",
    "Position",
    "load_model_state",
    "load_optimizer_state",
    "optimizer_state",
    "read_checkpoint",
    "refuse_broken",
    "refuse_unsavable",
    "write_checkpoint",
]

FILE_NAME = "training.safetensors"

_SCHEMA = 1
_KIND = "offramp training checkpoint"

_ABANDONED = 3600.0  # seconds after which a file that was begun is no one's

# Settings of an optimiser that a checkpoint does not put back.
_OF_THE_NEW = frozenset({"lr", "initial_lr", "fused", "foreach"})


@dataclass(frozen=True)
class Position:
    """Where training stands: what comes next.

    Attributes:
        phase: index of the phase; the number of phases when all is done.
        epoch: epoch in this phase, counted from 0.
        step: batches of this epoch that are done.
        epochs_done: epochs finished over all phases.
    """

    phase: int = 0
    epoch: int = 0
    step: int = 0
    epochs_done: int = 0


@dataclass
class Checkpoint:
    """All that is needed to go on.

    Attributes:
        run: what the training was asked for; must agree when it goes on.
        position: where it stands.
        rows: history so far.
        tensors: by name, ``model/...``, ``optimizer/...``, ``meter/...``, ``random/...``,
            ``fingerprints``.
        optimizer: settings and numbers of the optimiser that are no tensors.
    """

    run: dict[str, Any]
    position: Position
    rows: list[dict[str, Any]]
    tensors: dict[str, Tensor]
    optimizer: dict[str, Any] = field(default_factory=dict)

    def part(self, name: str) -> dict[str, Tensor]:
        """The tensors below ``name/``, under the rest of their names."""
        head = f"{name}/"
        return {k.removeprefix(head): v for k, v in self.tensors.items() if k.startswith(head)}


def write_checkpoint(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write the checkpoint of ``folder``, replacing the one before.

    Raises:
        TrainingError: the file cannot be written; the checkpoint before is kept.
    """
    header = {
        "schema": _SCHEMA,
        "kind": _KIND,
        "run": checkpoint.run,
        "position": asdict(checkpoint.position),
        "rows": checkpoint.rows,
        "optimizer": checkpoint.optimizer,
    }
    # Tied tensors share memory, which the format does not know: each is written whole.
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in checkpoint.tensors.items()}
    data = save(tensors, metadata={"offramp": json.dumps(header)})
    path = folder / FILE_NAME
    try:
        _sweep(folder)
        with replaced(path) as part, part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise TrainingError(
            f"The checkpoint {str(path)!r} ({len(data) / 1e6:.1f} MB) could not be written: "
            f"{error}. The one before is untouched. Make room or choose another folder, and call "
            "fit again to go on."
        ) from error
    return path


def _sweep(folder: Path) -> None:
    """Remove what writers left that were killed; one that is still at it has a young file."""
    for left in folder.glob(f".{FILE_NAME}.*.part"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > _ABANDONED:
                left.unlink()


def read_checkpoint(folder: Path) -> Checkpoint | None:
    """The checkpoint of ``folder``, or ``None`` when there is none.

    Raises:
        TrainingError: the file is damaged, foreign, or of a later schema.
    """
    path = folder / FILE_NAME
    if not path.exists():
        return None
    hint = "Remove it, choose another folder, or pass resume=False to start anew."
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("offramp", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise TrainingError(f"The checkpoint {str(path)!r} is damaged: {error}. {hint}") from error
    if not isinstance(header, dict) or header.get("kind") != _KIND:
        raise TrainingError(f"The file {str(path)!r} is not an {_KIND}. {hint}")
    if header["schema"] != _SCHEMA:
        raise TrainingError(
            f"The checkpoint {str(path)!r} has schema {header['schema']}; this version of offramp "
            f"reads schema {_SCHEMA}. {hint}"
        )
    return Checkpoint(
        header["run"], Position(**header["position"]), header["rows"], tensors, header["optimizer"]
    )


def refuse_unsavable(model: nn.Module) -> None:
    """Make sure, before any training, that a model can be written.

    Raises:
        TrainingError: a module keeps more than tensors, by ``get_extra_state``.
    """
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise TrainingError(
                f"The state of the model holds a {type(value).__name__} as {name!r}, which cannot "
                "be saved without pickle. Train without checkpoint=, or let get_extra_state return "
                "a tensor."
            )


def load_model_state(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put the tensors of a checkpoint into the model.

    Raises:
        TrainingError: names or shapes differ: the checkpoint is of another model.
    """
    own = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    saved = {name: tuple(value.shape) for name, value in tensors.items()}
    different = sorted(n for n in own.keys() | saved.keys() if own.get(n) != saved.get(n))
    if different:
        name = different[0]
        raise TrainingError(
            f"The checkpoint is of another model: {len(different)} tensors differ, the first is "
            f"{name!r}: {saved.get(name, 'absent')} in the checkpoint, {own.get(name, 'absent')} "
            "in the model. Choose another folder, or pass resume=False to start anew."
        )
    model.load_state_dict(dict(tensors))


def optimizer_state(
    optimizer: Optimizer, names: Mapping[int, str]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of an optimiser as tensors and JSON.

    Args:
        optimizer: any optimiser whose state is tensors and plain numbers.
        names: ``id(parameter)`` -> name.

    Returns:
        Tensors by ``"<parameter>/<key>"``, and ``{"groups": ..., "numbers": ...}``.

    Raises:
        TrainingError: the state holds anything else.
    """
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            name = f"{names[id(parameter)]}/{key}"
            if isinstance(value, Tensor):
                tensors[name] = value
            elif value is None or isinstance(value, (bool, int, float, str)):
                numbers[name] = value
            else:
                raise TrainingError(
                    f"The optimiser {type(optimizer).__name__} keeps a {type(value).__name__} as "
                    f"{key!r}, which cannot be saved without pickle. Train without checkpoint=, or "
                    "take an optimiser whose state is tensors and numbers."
                )
    groups = [
        {key: value for key, value in group.items() if key != "params" and _plain(value)}
        for group in optimizer.param_groups
    ]
    return tensors, {"groups": groups, "numbers": numbers}


def load_optimizer_state(
    optimizer: Optimizer,
    names: Mapping[int, str],
    tensors: Mapping[str, Tensor],
    plain: Mapping[str, Any],
) -> None:
    """Inverse of :func:`optimizer_state`, on an optimiser that was made in the same way.

    Its learning rate and its kernels stay its own: a training may go on with another rate.
    """
    order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    found: dict[int, dict[str, Any]] = {}
    for name, value in {**tensors, **plain["numbers"]}.items():
        owner, key = name.rsplit("/", 1)
        kept = value.clone() if isinstance(value, Tensor) else value
        found.setdefault(order.index(owner), {})[key] = kept
    now = optimizer.state_dict()
    for group, saved in zip(now["param_groups"], plain["groups"], strict=True):
        for key, value in saved.items():
            if key in _OF_THE_NEW:
                continue
            group[key] = tuple(value) if isinstance(group.get(key), tuple) else value
    # Its own way in brings every value to where the parameters are, and gives it their type.
    optimizer.load_state_dict({"state": found, "param_groups": now["param_groups"]})
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for key, value in optimizer.state.get(parameter, {}).items():
                saved = tensors.get(f"{names[id(parameter)]}/{key}")
                if saved is None:
                    continue
                if saved.dtype != value.dtype:
                    value = saved.clone().to(value.device)
                if value.dim() and value.shape == parameter.shape:
                    # Fused kernels go through memory: what belongs together has to lie alike.
                    value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
                optimizer.state[parameter][key] = value


def refuse_broken(model: nn.Module) -> None:
    """Make sure that a model is worth keeping.

    Buffers do not count: a mask may well hold infinities.

    Raises:
        TrainingError: a parameter is not finite.
    """
    for name, value in model.named_parameters():
        if not bool(torch.isfinite(value).all()):
            raise TrainingError(
                f"The parameter {name!r} is no longer finite, so no checkpoint was written; the "
                "one before is kept. Call fit again to go on from there, with a smaller lr= or "
                "with clip=1.0."
            )


def _plain(value: object) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))
