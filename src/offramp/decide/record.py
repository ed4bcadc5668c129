"""Run a network once over a data set and keep what every exit said."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from offramp.build.batch import Batch, fingerprints, unpack
from offramp.build.digest import digests
from offramp.build.model import MultiExitModel
from offramp.decide.trace import Trace
from offramp.errors import DataError, OfframpError, TraceError
from offramp.files import replaced

__all__ = ["record"]

# Logits are held so long before they go to disk, when there is a disk to go to.
SHARD_BYTES = 64 << 20
SHARD_SECONDS = 60.0
TRAINING_SHARE = 0.01  # below it, a few equal samples are duplicates in the data, not reuse


def record(
    model: Any,  # noqa: ANN401  # duck-typed: decide sees tensors, never a network's class
    loader: Iterable[Any],
    *,
    source: str | None = None,
    path: str | os.PathLike[str] | None = None,
    device: str | torch.device | None = None,
    progress: bool = True,
    max_samples: int | None = None,
) -> Trace:
    """The logits of every exit on the samples of a loader.

    The model runs in evaluation mode without gradients, and gets its modes back. With ``path``,
    logits go to disk as they come and an interrupted call takes up where it stopped, provided that
    the loader yields the same samples in the same order.

    Args:
        model: a ``MultiExitModel``, or anything with ``costs``, ``places`` and ``num_exits`` whose
            ``all_exits(*args, **kwargs)`` (or call) returns the logits of every exit.
        loader: yields ``(input, labels)``, mappings with a key ``labels``, or inputs alone.
        source: a name for the data. ``"training"`` is found out: where the samples are those the
            model was fitted on, no name hides it.
        path: where to write the trace as safetensors.
        device: where to run; where the model's parameters are by default.
        progress: show a bar on a terminal.
        max_samples: stop after so many.

    Returns:
        The trace, on the CPU.

    Raises:
        DataError: the loader yields nothing, or labels for some samples only.
        TraceError: logits that are NaN or do not fit together; or ``path`` holds the shards of
            another model or another order of samples.
    """
    if path is not None and Path(path).is_dir():
        raise DataError(f"path={str(path)!r} is a folder. Give the name of a .safetensors file.")
    held = _Held(None if path is None else Path(path), _digest(model))
    with _prepared(model, device) as place, held.kept():
        select = getattr(model, "select", None)
        for batch in _batches(loader, max_samples, progress, select):
            marks = fingerprints(batch)
            if not held.skip(marks):
                logits = _run(model, batch.to(place) if place is not None else batch)
                held.add(logits, batch.labels, marks)
    if held.samples == 0:
        raise DataError("The loader yielded no samples, so there is nothing to record.")
    logits, labels, marks = held.finish()
    seen = getattr(model, "training_fingerprints", None)
    if seen is not None and len(seen):
        shared = float(torch.isin(marks, seen).double().mean())
        source = "training" if shared >= TRAINING_SHARE else source
    costs = model.costs
    places = tuple(model.places)
    trace = Trace(
        logits=logits,
        labels=labels,
        stage_costs=torch.tensor(costs.stages, dtype=torch.float64),
        head_costs=torch.tensor(costs.heads, dtype=torch.float64),
        cost_unit=str(costs.unit),
        places=places if len(places) == len(logits) else (*places, "backbone"),
        source=source or "unknown",
        cascade=costs.cascade,
        inputs=marks,
        network=digests(model) if isinstance(model, MultiExitModel) else None,
    )
    if path is not None:
        trace.save(path)
        held.clean()
    return trace


@dataclass
class _Held:
    """What is recorded so far: in memory, and beyond a size on disk."""

    path: Path | None
    model: str
    blocks: list[tuple[Tensor, Tensor | None, Tensor]] = field(default_factory=list)
    shards: list[Path] = field(default_factory=list)
    samples: int = 0
    known: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    passed: int = 0
    held: int = 0  # bytes of logits in memory
    written: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        if self.path is None:
            return
        self.folder = self.path.with_name(f".{self.path.name}.shards")
        self.folder.mkdir(parents=True, exist_ok=True)
        marks = []
        for shard in sorted(self.folder.glob("*.safetensors")):
            tensors = _open(shard, self.model)
            marks.append(tensors["marks"])
            self.shards.append(shard)
        if marks:
            self.known = torch.cat(marks)
            self.samples = len(self.known)

    def skip(self, marks: Tensor) -> bool:
        """Whether these samples are on disk already."""
        start, end = self.passed, self.passed + len(marks)
        self.passed = end
        if start >= len(self.known):
            return False
        if not torch.equal(self.known[start:end], marks):
            raise TraceError(
                f"{self.folder} holds the beginning of another recording: its samples "
                f"{start}..{end - 1} are not those that the loader yields now. Load without "
                f"shuffling, with the same batch size, or delete that folder to start anew."
            )
        return True

    def add(self, logits: Tensor, labels: Tensor | None, marks: Tensor) -> None:
        if self.blocks and (labels is None) != (self.blocks[0][1] is None):
            raise DataError("The loader yields labels for some batches and none for others.")
        if self.blocks and logits.shape[::2] != self.blocks[0][0].shape[::2]:
            raise TraceError(
                f"Logits of a batch are (exits, samples, classes) = {tuple(logits.shape)}, those "
                f"before were {tuple(self.blocks[0][0].shape)}."
            )
        self.blocks.append((logits, labels, marks))
        self.samples += len(marks)
        self.held += logits.nbytes
        late = time.monotonic() - self.written >= SHARD_SECONDS
        if self.path is not None and (late or self.held >= SHARD_BYTES):
            self.flush()

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """What is in memory is written where something breaks that is no fault of the data."""
        try:
            yield
        except OfframpError:
            raise
        except BaseException:
            if self.path is not None and self.blocks:
                self.flush()
            raise
        finally:
            if self.path is not None and not self.shards:
                with contextlib.suppress(OSError):
                    self.folder.rmdir()

    def flush(self) -> None:
        logits, labels, marks = _join(self.blocks)
        tensors = {"logits": logits, "marks": marks}
        if labels is not None:
            tensors["labels"] = labels
        shard = self.folder / f"{len(self.shards):06d}.safetensors"
        with replaced(shard) as part:
            save_file(tensors, part, metadata={"offramp": json.dumps({"model": self.model})})
        self.shards.append(shard)
        self.blocks.clear()
        self.held, self.written = 0, time.monotonic()

    def finish(self) -> tuple[Tensor, Tensor | None, Tensor]:
        """Everything, in the order in which it came."""
        blocks = []
        for shard in self.shards:
            tensors = _open(shard, self.model)
            blocks.append((tensors["logits"], tensors.get("labels"), tensors["marks"]))
        blocks += self.blocks
        self.blocks = []
        logits, labels, marks = _join(blocks)
        if self.passed < len(marks):  # more is on disk than was asked for now
            logits, marks = logits[:, : self.passed].contiguous(), marks[: self.passed]
            labels = None if labels is None else labels[: self.passed]
        return logits, labels, marks

    def clean(self) -> None:
        if self.path is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


def _join(
    blocks: list[tuple[Tensor, Tensor | None, Tensor]],
) -> tuple[Tensor, Tensor | None, Tensor]:
    """One block from many; each is let go once it is copied, so that two copies never coexist."""
    labels = [block[1] for block in blocks if block[1] is not None]
    marks = torch.cat([block[2] for block in blocks])
    exits, _, classes = blocks[0][0].shape
    joined = torch.empty(exits, len(marks), classes, dtype=torch.float32)
    start = 0
    while blocks:
        logits = blocks.pop(0)[0]
        joined[:, start : start + logits.shape[1]] = logits
        start += logits.shape[1]
    if labels and sum(map(len, labels)) != len(marks):
        raise DataError("The loader yields labels for some batches and none for others.")
    return joined, torch.cat(labels) if labels else None, marks


def _open(shard: Path, model: str) -> dict[str, Tensor]:
    try:
        with safe_open(shard, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("offramp", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError, OSError) as error:
        raise TraceError(f"{shard} is damaged ({error}): delete {shard.parent}.") from error
    if header.get("model") != model:
        raise TraceError(
            f"{shard.parent} holds the beginning of a recording of another model (its parameters "
            f"differ). Delete that folder to start anew, or give another path."
        )
    return tensors


def _run(model: Any, batch: Batch) -> Tensor:  # noqa: ANN401
    """(E, B, C) float32 on the CPU."""
    call = getattr(model, "all_exits", model)
    outputs = list(call(*batch.args, **batch.kwargs))
    if len(outputs) != model.num_exits:
        raise TraceError(f"The model says it has {model.num_exits} exits, but gave {len(outputs)}.")
    shapes = sorted({tuple(logits.shape) for logits in outputs})
    if len(shapes) != 1 or len(shapes[0]) != 2:
        raise TraceError(f"The exits' logits must all be (batch, classes), got shapes {shapes}.")
    return torch.stack([logits.detach().float().cpu() for logits in outputs])


def _batches(
    loader: Iterable[Any], most: int | None, progress: bool, select: Callable[..., Any] | None
) -> Iterator[Batch]:
    """Batches as calls, the last one cut to ``most`` samples in all."""
    done = 0
    for item in _shown(loader, progress):
        batch = unpack(item, select=select)
        if most is not None and done + batch.size > most:
            batch = batch.rows(torch.arange(most - done))
        if batch.labels is not None and batch.labels.ndim != 1:
            raise DataError(
                f"Labels must be one class index for each sample, got shape "
                f"{tuple(batch.labels.shape)}."
            )
        if batch.size:
            done += batch.size
            yield batch
        if most is not None and done >= most:
            return


def _shown(loader: Iterable[Any], progress: bool) -> Iterator[Any]:
    """The loader, with a bar where there is somebody to see it."""
    from rich.console import Console

    console = Console(stderr=True)
    if not (progress and console.is_terminal):
        yield from loader
        return
    from rich.progress import track

    total = len(loader) if isinstance(loader, Sized) else None
    yield from track(loader, "recording", total=total, console=console, transient=True)


@contextlib.contextmanager
def _prepared(model: Any, device: str | torch.device | None) -> Iterator[torch.device | None]:  # noqa: ANN401
    """Evaluation mode, no gradients, the device; everything as it was afterwards."""
    if not isinstance(model, torch.nn.Module):
        with torch.no_grad():
            yield None if device is None else torch.device(device)
        return
    modes = [(module, module.training) for module in model.modules()]
    parameter = next(model.parameters(), None)
    home = torch.device("cpu") if parameter is None else parameter.device
    place = home if device is None else torch.device(device)
    try:
        model.eval()
        if place != home:
            model.to(place)
        with torch.no_grad():
            yield place
    finally:
        if place != home:
            model.to(home)
        for module, training in modes:
            module.training = training


def _digest(model: Any) -> str:  # noqa: ANN401
    """What tells one model's shards from another's."""
    found = hashlib.sha256(repr((model.num_exits, model.places, model.costs)).encode())
    if isinstance(model, torch.nn.Module):
        for name, value in model.state_dict().items():
            found.update(name.encode())
            if isinstance(value, Tensor):
                plain = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                found.update(plain.numpy().data)
    return found.hexdigest()
