"""An artifact on the command line: what it holds, and what it takes here."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich import box
from rich.console import Group
from rich.table import Table
from torch import Tensor

from offramp.analyse.table import cost_text
from offramp.build.batch import unpack
from offramp.decide.policy import Policy
from offramp.errors import DataError, OfframpError, unknown_name
from offramp.run.artifact import load
from offramp.run.engines import OnnxRuntime, OpenVINO
from offramp.run.runner import Runner
from offramp.run.timing import compare

__all__ = ["Bench", "Holdings", "bench", "class_names", "engine_with", "json_object"]

BATCHES = (1, 8, 32, 64)
CALIBRATED, NOBODY, EVERYBODY = "as calibrated", "nobody leaves", "all at the first exit"


def class_names(text: str | None) -> list[str] | None:
    """Names of classes: separated by commas, or one on each line of a file of that name.

    Raises:
        DataError: the file cannot be read as text, or there is none where the name is one.
    """
    if text is None:
        return None
    try:
        if Path(text).is_file():
            lines = Path(text).read_text("utf-8-sig").rstrip().splitlines()
            return [line.strip() for line in lines]
    except ValueError as error:
        raise DataError(f"--classes {text!r} cannot be read as text: {error}.") from error
    except OSError:  # too long for the name of a file
        pass
    if Path(text).suffix == ".txt":
        raise DataError(f"There is no file {text!r} for --classes. Give one, or names with commas.")
    return [name.strip() for name in text.split(",")]


def json_object(text: str | None) -> dict[str, Any] | None:
    """A JSON object: the text itself, or what a file of that name holds.

    Raises:
        DataError: it is none.
    """
    if text is None:
        return None
    try:
        content = Path(text).read_text("utf-8") if text.endswith(".json") else text
        found = json.loads(content)
    except (OSError, ValueError) as error:
        raise DataError(f"--preprocessing {text!r} cannot be read as JSON: {error}.") from error
    if not isinstance(found, dict):
        raise DataError(
            f"--preprocessing is a JSON {type(found).__name__}; expected an object, such as "
            '\'{"mean": [0.5], "std": [0.25]}\', or the name of a .json file that holds one.'
        )
    return found


def engine_with(name: str, threads: int | None) -> OnnxRuntime | OpenVINO:
    """The engine of that name on so many threads.

    Raises:
        OfframpError: it is none that executes an artifact; the nearest is named.
    """
    known: dict[str, type[OnnxRuntime | OpenVINO]] = {e.name: e for e in (OnnxRuntime, OpenVINO)}
    if name not in known:
        raise OfframpError(unknown_name("engine for an artifact", name, list(known)))
    if threads is not None and threads < 1:
        raise OfframpError(f"--threads {threads}: expected 1 or more.")
    return known[name](threads)


@dataclass(frozen=True)
class Holdings:
    """What an artifact holds, as its manifest tells."""

    path: Path
    manifest: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """All of it, as JSON can hold it."""
        return {"artifact": str(self.path), **self.manifest}

    def render(self) -> Group:
        """The parts with their checksums, and what a client has to know."""
        about, proof = self.manifest, self.manifest["proof"]
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("part")
        table.add_column("bytes", justify="right")
        table.add_column("sha256")
        for name, digest in about["sha256"].items():
            table.add_row(name, f"{(self.path / name).stat().st_size:,}", digest)
        inputs = [f"{i['name']}: {i['dtype']} {_shape(i['shape'])}" for i in about["inputs"]]
        exits = ", ".join(str(step["exit"]) for step in about["steps"])
        mixes = ", ".join(proof["mixes"])
        return Group(
            table,
            f"inputs: {'; '.join(inputs)}",
            f"outputs: {', '.join(about['outputs'])}; {about['num_classes']} classes",
            f"exits: {exits} of {len(about['costs']['stages'])}; the whole network costs "
            f"{cost_text(sum(about['costs']['stages']))} {about['costs']['unit']}",
            f"proof: {proof['rows']} rows in batches of {', '.join(map(str, proof['batches']))} "
            f"({mixes}); logits within {proof['largest_relative_difference']:.1e} of the model's",
        )


def _shape(sizes: Sequence[int | None]) -> str:
    return "(" + ", ".join("batch" if size is None else str(size) for size in sizes) + ")"


@dataclass(frozen=True)
class Bench:
    """Median times of an artifact here.

    Attributes:
        path: the artifact.
        engine: name of the engine.
        threads: of each stage.
        inputs: what was run on.
        rows: for each mix and batch size: ``mix``, ``batch``, ``ms``, ``exits`` (how many of the
            batch left at each exit of the model).
    """

    path: Path
    engine: str
    threads: int
    inputs: str
    rows: tuple[dict[str, Any], ...]

    def to_dict(self) -> dict[str, Any]:
        """All of it, as JSON can hold it, with the versions of what ran."""
        packages = ("offramp", "torch", self.engine)
        return {
            "artifact": str(self.path),
            "engine": self.engine,
            "threads": self.threads,
            "inputs": self.inputs,
            "rows": list(self.rows),
            "versions": {
                "machine": platform.machine(),
                **{name: version(name) for name in packages},
            },
        }

    def render(self) -> Group:
        """One line a mix, one column a batch size."""
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("milliseconds")
        for size in BATCHES:
            table.add_column(f"batch {size}", justify="right")
        full = {row["batch"]: row["ms"] for row in self.rows if row["mix"] == NOBODY}
        for mix in dict.fromkeys(row["mix"] for row in self.rows):
            own = [row for row in self.rows if row["mix"] == mix]
            cells = [f"{r['ms']:.3f} ({r['ms'] / full[r['batch']]:.2f})" for r in own]
            table.add_row(mix, *cells)
        largest = self.rows[len(BATCHES) - 1]  # of the first mix: the artifact's own thresholds
        return Group(
            table,
            f"Medians of batches in turn, on {self.engine} with {self.threads} threads; in "
            f"brackets the share of what it takes where {NOBODY}.",
            f"On {self.inputs}; {largest['mix']}, of {largest['batch']} there left at each exit: "
            f"{', '.join(map(str, largest['exits']))}.",
        )


def bench(
    path: Path,
    engine: str = "onnxruntime",
    threads: int | None = None,
    loader: Iterable[Any] | None = None,
    seconds: float = 10.0,
) -> Bench:
    """Time an artifact: batches of several sizes, as calibrated, nobody and everybody leaving.

    All of them take turns, so that whatever else the machine does falls on all.

    Args:
        path: the artifact.
        engine: ``"onnxruntime"`` or ``"openvino"``.
        threads: of each stage; one for each core by default.
        loader: its first batch is run; random numbers by default, of which others may leave.
        seconds: about how long to measure.

    Raises:
        ArtifactError: it does not load.
        DataError: the loader yields nothing, or what the artifact does not take; or there is no
            time to measure in.
    """
    if not seconds > 0:
        raise DataError(f"--seconds {seconds}: expected a time above 0 to measure in.")
    executes = engine_with(engine, threads)
    runner = load(path, executes)
    mixes = _mixes(runner)
    calls = {size: _inputs(runner, loader, size) for size in BATCHES}
    pairs = [(mix, size) for mix in mixes for size in BATCHES]
    candidates = {
        f"{mix}/{size}": partial(mixes[mix], *calls[size][0], **calls[size][1])
        for mix, size in pairs
    }
    medians = compare(candidates, repeats=200, seconds=seconds)
    rows = []
    for mix, size in pairs:
        left = np.bincount(candidates[f"{mix}/{size}"]().exit, minlength=runner.num_exits)
        ms = medians[f"{mix}/{size}"]
        rows.append({"mix": mix, "batch": size, "ms": ms, "exits": left.tolist()})
    inputs = "random numbers" if loader is None else "the loader's first batch"
    return Bench(path, executes.name, executes.threads, inputs, tuple(rows))


def _mixes(runner: Runner) -> dict[str, Runner]:
    """The runner under its own thresholds, and under those that hold and release everybody."""
    criterion, exits = runner.policy.criterion, runner.num_exits
    nobody = [math.inf] * (exits - 1)
    active = runner.policy.active(exits)
    if not any(active):
        return {NOBODY: runner}
    everybody = list(nobody)
    everybody[active.index(True)] = -math.inf
    return {
        CALIBRATED: runner,
        NOBODY: runner.under(Policy(criterion, nobody)),
        EVERYBODY: runner.under(Policy(criterion, everybody)),
    }


def _inputs(
    runner: Runner, loader: Iterable[Any] | None, size: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call of ``size`` rows: the first batch of the loader again and again, or drawn."""
    if loader is not None:
        item = next(iter(loader), None)
        if item is None:
            raise DataError("The loader yields nothing; it has to yield one batch at least.")
        batch = unpack(item)
        chosen = batch.rows(torch.arange(size) % batch.size)
        return chosen.args, chosen.kwargs
    generator = torch.Generator().manual_seed(size)
    return runner.call.build([_drawn(like, size, generator) for like in runner.call.tensors])


def _drawn(like: Tensor, rows: int, generator: torch.Generator) -> Tensor:
    """Random numbers like those of an input; ones for integers, a class or a mask that any has."""
    shape = (rows, *like.shape[1:])
    if like.is_floating_point():
        return torch.randn(shape, generator=generator).to(like.dtype)
    return torch.ones(shape, dtype=like.dtype)
