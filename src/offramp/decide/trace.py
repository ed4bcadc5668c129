"""What every exit said on a data set, kept once: the one thing that deciding looks at."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from offramp.decide.samples import Samples
from offramp.errors import TraceError
from offramp.files import replaced

__all__ = ["Trace"]

SCHEMA = 1


@dataclass(frozen=True, eq=False)
class Trace:
    """The logits of every exit on one data set, its labels if there are any, and what exits cost.

    With it, calibrating, comparing and plotting are tensor arithmetic: the network runs once.

    Args:
        logits: (E, N, C) float32, the last exit being the backbone's own output.
        labels: (N,) int64 class indices, or ``None``.
        stage_costs: (E,) float64, the backbone's cost per sample between consecutive exits.
        head_costs: (E,) float64, the cost of each exit's head; the last is 0.
        cost_unit: the unit of both, ``"macs"`` as a rule.
        places: (E,) the exits' places, the last ``"backbone"``; numbered when not given.
        source: where the samples come from: ``"training"``, ``"unknown"``, or a name of yours.
        groups: (N,) int64 group of each sample, or ``None``; promises can be asked for each.
        cascade: whether each head reads the one before it, which then runs also where its own exit
            is off.
        inputs: (N,) int64 hash of each sample's input, or ``None``, by which samples that were used
            before are known; :func:`record` keeps them.
        network: (E,) digests of each head and of the backbone, or ``None``, by which thresholds
            for another network are noticed; :func:`record` keeps them.

    Raises:
        TraceError: shapes that do not fit, NaN or infinite logits, labels out of range, costs that
            are negative or that sum to nothing.
    """

    logits: Tensor
    labels: Tensor | None
    stage_costs: Tensor
    head_costs: Tensor
    cost_unit: str = "macs"
    places: tuple[str, ...] = ()
    source: str = "unknown"
    groups: Tensor | None = None
    cascade: bool = False
    inputs: Tensor | None = None
    network: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        put = object.__setattr__  # frozen for its users; normalised here, once
        put(self, "logits", _logits(self.logits))
        exits, samples, classes = self.logits.shape
        put(self, "labels", _labels(self.labels, samples, classes))
        put(self, "stage_costs", _costs("stage_costs", self.stage_costs, exits))
        put(self, "head_costs", _costs("head_costs", self.head_costs, exits))
        put(self, "groups", _integers("groups", self.groups, samples))
        put(self, "inputs", _integers("inputs", self.inputs, samples))
        if float(self.stage_costs.sum()) <= 0:
            raise TraceError(
                "stage_costs of the trace sum to 0, so no exit could save anything. "
                "Give the cost of the backbone between consecutive exits."
            )
        if float(self.head_costs[-1]) != 0:
            raise TraceError(
                f"head_costs[-1] must be 0: the last exit is the backbone's own output, whose cost "
                f"is in stage_costs; got {float(self.head_costs[-1])}."
            )
        places = tuple(self.places) or (*(f"exit {k}" for k in range(exits - 1)), "backbone")
        if len(places) != exits:
            raise TraceError(
                f"The trace has {exits} exits, but {len(places)} places were given: {places}. "
                f"Give one for each exit, the last being 'backbone'."
            )
        put(self, "places", places)

    @property
    def num_exits(self) -> int:
        """E, the backbone's own output included."""
        return self.logits.shape[0]

    @property
    def num_samples(self) -> int:
        """N."""
        return self.logits.shape[1]

    @property
    def num_classes(self) -> int:
        """C."""
        return self.logits.shape[2]

    @property
    def full_cost(self) -> float:
        """The cost of the backbone alone, without any head."""
        return float(self.stage_costs.sum())

    @cached_property
    def fingerprint(self) -> str:
        """The sha256 of the logits and the labels, as hexadecimal text."""
        digest = hashlib.sha256(repr(tuple(self.logits.shape)).encode())
        digest.update(self.logits.numpy().data.cast("B"))
        if self.labels is not None:
            digest.update(self.labels.numpy().data.cast("B"))
        return digest.hexdigest()

    @cached_property
    def samples(self) -> Samples:
        """Which samples these are."""
        return Samples.of(self)

    def exit_costs(self, active: Sequence[bool] | None = None) -> Tensor:
        """The cost per sample of leaving at each exit.

        Args:
            active: for each of the E - 1 auxiliary exits, whether its head runs; all by default.

        Returns:
            (E,) float64: the stages up to the exit, and the heads that ran on the way.

        Raises:
            TraceError: ``active`` has another length.
        """
        heads = self.head_costs
        if active is not None:
            if len(active) != self.num_exits - 1:
                raise TraceError(
                    f"active must name the {self.num_exits - 1} auxiliary exits of the trace, "
                    f"got {len(active)} values."
                )
            runs = torch.tensor([*active, True])
            if self.cascade:
                runs[: max((k for k, on in enumerate(active) if on), default=0)] = True
            heads = heads * runs
        return self.stage_costs.cumsum(0) + heads.cumsum(0)

    def subset(self, index: Tensor) -> Trace:
        """The trace of some of the samples.

        Args:
            index: (M,) int64 rows, or (N,) bool.
        """
        return replace(
            self,
            logits=self.logits[:, index],
            labels=None if self.labels is None else self.labels[index],
            groups=None if self.groups is None else self.groups[index],
            inputs=None if self.inputs is None else self.inputs[index],
        )

    def split(self, fraction: float, seed: int = 0) -> tuple[Trace, Trace]:
        """Two traces of different samples, drawn at random.

        Args:
            fraction: the share of the samples that goes to the first, strictly between 0 and 1.
            seed: of the draw.

        Raises:
            TraceError: a part would be empty.
        """
        first = round(fraction * self.num_samples)
        if not 0 < first < self.num_samples:
            raise TraceError(
                f"A split of {self.num_samples} samples at {fraction} leaves one part empty. "
                f"Give a fraction strictly between 0 and 1, or more samples."
            )
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(self.num_samples, generator=generator)
        return self.subset(order[:first]), self.subset(order[first:])

    def keep_exits(self, exits: Sequence[int]) -> Trace:
        """The trace of a network with some of the auxiliary exits only.

        In a cascade the heads between them still run, and count to the next one that is kept.

        Args:
            exits: indices of auxiliary exits to keep, each in 0..E-2; the last one always stays.

        Raises:
            TraceError: an index that is not an auxiliary exit.
        """
        last = self.num_exits - 1
        bad = [k for k in exits if not 0 <= k < last]
        if bad:
            raise TraceError(f"Auxiliary exits of this trace are 0..{last - 1}; got {bad}.")
        kept = [*sorted(set(exits)), last]
        reached = self.stage_costs.cumsum(0)[kept]
        heads = self.head_costs[kept]
        if self.cascade:
            heads = torch.diff(self.head_costs.cumsum(0)[kept], prepend=reached.new_zeros(1))
            heads[-1] = 0.0
        return replace(
            self,
            logits=self.logits[kept],
            stage_costs=torch.diff(reached, prepend=reached.new_zeros(1)),
            head_costs=heads,
            places=tuple(self.places[k] for k in kept),
            network=None if self.network is None else tuple(self.network[k] for k in kept),
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the trace as safetensors, its description as JSON in the header."""
        target = Path(path)
        tensors = {"logits": self.logits, "stage_costs": self.stage_costs}
        tensors["head_costs"] = self.head_costs
        if self.labels is not None:
            tensors["labels"] = self.labels
        for name, value in (("groups", self.groups), ("inputs", self.inputs)):
            if value is not None:
                tensors[name] = value
        about = {
            "schema": SCHEMA,
            "kind": "trace",
            "cost_unit": self.cost_unit,
            "places": list(self.places),
            "source": self.source,
            "fingerprint": self.fingerprint,
            "cascade": self.cascade,
            "network": self.network,
            "rest": _rest(tensors),
        }
        with replaced(target) as part:
            save_file(
                {name: value.contiguous() for name, value in tensors.items()},
                part,
                metadata={"offramp": json.dumps(about)},
            )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Trace:
        """Read a trace that :meth:`save` wrote.

        Raises:
            TraceError: the file is missing, foreign, cut off, of a later schema, or its contents
                are not those that were written.
        """
        source = Path(path)
        about, tensors = _read(source)
        trace = cls(
            logits=tensors["logits"],
            labels=tensors.get("labels"),
            stage_costs=tensors["stage_costs"],
            head_costs=tensors["head_costs"],
            cost_unit=str(about["cost_unit"]),
            places=tuple(about["places"]),
            source=str(about["source"]),
            groups=tensors.get("groups"),
            cascade=bool(about.get("cascade", False)),
            inputs=tensors.get("inputs"),
            network=tuple(known) if (known := about.get("network")) else None,
        )
        if trace.fingerprint != about["fingerprint"]:
            raise TraceError(
                f"{source} is damaged: its logits and labels are not those that were written "
                f"(sha256 {trace.fingerprint[:12]}, expected {str(about['fingerprint'])[:12]}). "
                f"Record the trace again."
            )
        return trace


def _read(path: Path) -> tuple[Mapping[str, Any], dict[str, Tensor]]:
    if not path.is_file():
        raise TraceError(f"There is no trace at {path}.")
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get("offramp", "{}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        about = json.loads(header)
    except (SafetensorError, ValueError, OSError) as error:
        raise TraceError(
            f"{path} is not a trace, or is cut off ({error}). "
            f"Traces are written by offramp.record(..., path=) or Trace.save()."
        ) from error
    if not isinstance(about, dict) or about.get("kind") != "trace":
        raise TraceError(
            f"{path} is a safetensors file, but not a trace of offramp. "
            f"Traces are written by offramp.record(..., path=) or Trace.save()."
        )
    if not isinstance(about.get("schema"), int) or about["schema"] > SCHEMA:
        raise TraceError(
            f"{path} has trace schema {about.get('schema')}; this offramp reads up to {SCHEMA}. "
            f"Update offramp, or record the trace again."
        )
    missing = {*_ABOUT} - about.keys() | {*_TENSORS} - tensors.keys()
    if missing:
        raise TraceError(f"{path} is damaged: it lacks {sorted(missing)}. Record the trace again.")
    if about.get("rest", found := _rest(tensors)) != found:
        raise TraceError(
            f"{path} is damaged: its costs, groups or inputs are not those that were written. "
            f"Record the trace again."
        )
    return about, tensors


_ABOUT = ("cost_unit", "places", "source", "fingerprint")
_TENSORS = ("logits", "stage_costs", "head_costs")


def _rest(tensors: Mapping[str, Tensor]) -> str:
    """The sha256 of what the fingerprint leaves out."""
    digest = hashlib.sha256()
    for name in ("stage_costs", "head_costs", "groups", "inputs"):
        if name in tensors:
            digest.update(name.encode())
            digest.update(tensors[name].contiguous().numpy().data.cast("B"))
    return digest.hexdigest()


def _logits(value: Any) -> Tensor:  # noqa: ANN401
    logits: Tensor = torch.as_tensor(value).detach().to("cpu", torch.float32).contiguous()
    if logits.ndim != 3 or 0 in logits.shape:
        raise TraceError(
            f"logits of a trace must be (exits, samples, classes) with none of them 0, "
            f"got shape {tuple(logits.shape)}."
        )
    for exit, block in enumerate(logits):
        # A sum is finite unless an entry is not (or the sum overflows): one pass, no mask kept.
        if not bool(torch.isfinite(block.sum(dtype=torch.float64))):
            bad = ~torch.isfinite(block).all(dim=1)
            rows = bad.nonzero().flatten()[:3].tolist()
            raise TraceError(
                f"logits of exit {exit} are NaN or infinite in {int(bad.sum())} of "
                f"{len(block)} samples (first rows: {rows}). A score of them would mean nothing: "
                f"look at the inputs of those rows, or at training that diverged."
            )
    return logits


def _integers(name: str, value: Any, samples: int) -> Tensor | None:  # noqa: ANN401
    if value is None:
        return None
    given = torch.as_tensor(value).detach().to("cpu")
    if given.shape != (samples,):
        raise TraceError(
            f"{name} of a trace must be one integer for each of the {samples} samples, "
            f"got shape {tuple(given.shape)}."
        )
    if given.is_floating_point() and not torch.equal(given, given.round()):
        raise TraceError(f"{name} of a trace must be integers, got {given.dtype} with fractions.")
    return given.to(torch.int64).contiguous()


def _labels(value: Any, samples: int, classes: int) -> Tensor | None:  # noqa: ANN401
    labels = _integers("labels", value, samples)
    if labels is not None and not bool(((labels >= 0) & (labels < classes)).all()):
        raise TraceError(
            f"labels of a trace must lie in 0..{classes - 1} (the logits have {classes} classes), "
            f"got values from {int(labels.min())} to {int(labels.max())}."
        )
    return labels


def _costs(name: str, value: Any, exits: int) -> Tensor:  # noqa: ANN401
    costs: Tensor = torch.as_tensor(value, dtype=torch.float64).detach().to("cpu").contiguous()
    if costs.shape != (exits,):
        raise TraceError(
            f"{name} of a trace must be one number for each of the {exits} exits, "
            f"got shape {tuple(costs.shape)}."
        )
    if not bool(torch.isfinite(costs).all()) or bool((costs < 0).any()):
        raise TraceError(
            f"{name} of a trace must be finite and not negative (each is the cost of one part, "
            f"not cumulative), got {costs.tolist()}."
        )
    return costs
