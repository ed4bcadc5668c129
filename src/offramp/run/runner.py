"""Run a batch: score, release, compact, go on.

After each stage the criterion scores the rows that are left. Rows whose score reaches the threshold
leave with their answer; what is live is compacted to the others, and only they go on. So a batch
costs what its survivors cost.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from offramp.build.cost import ExitCosts
from offramp.build.model import ExitOutputs, MultiExitModel
from offramp.decide.policy import Policy
from offramp.errors import DataError, PolicyError
from offramp.run.chain import Link, chain
from offramp.run.engines import Array, Engine, StepCall, engine_of
from offramp.run.proof import prove
from offramp.run.stages import Call, RowAxis, cut

__all__ = ["Result", "Runner", "Stats"]


@dataclass(frozen=True)
class Result:
    """The answers to a batch, in the order of its rows, as arrays of the kind that was given.

    Attributes:
        prediction: (B,) int64 class indices.
        logits: (B, C) of the exit that was taken (as the criterion gives them: an ensemble's, say).
        exit: (B,) int64 number of that exit.
        score: (B,) its score.
    """

    prediction: Array
    logits: Array
    exit: Array
    score: Array


@dataclass(frozen=True)
class Stats:
    """What a runner has done since it was made, or since ``reset``.

    Attributes:
        samples: how many samples came.
        exits: how many left at each exit of the model.
        survivors: how many entered each stage.
        mean_cost: cost per sample in the unit of the model's costs, heads that ran included.
    """

    samples: int
    exits: tuple[int, ...]
    survivors: tuple[int, ...]
    mean_cost: float


class Runner:
    """Executes a model under a policy; every sample stops at its own exit, at any batch size.

    Safe to call from several threads at once.

    Args:
        model: the multi-exit model.
        policy: the criterion and its thresholds.
        example: an input batch of at least two samples, as the model is called with it: a tensor, a
            tuple of positional arguments, or a mapping of keyword arguments.
        engine: ``"torch"``, ``"onnxruntime"``, or an instance of an engine.
        exits: ``"active"``: exits that the policy switched off are left out, head and all;
            ``"all"``: every exit is kept, so that the runner can be recorded.

    Raises:
        StageError: the model cannot be cut.
        EqualityError: the stages do not reproduce the model; names the first module that differs.
        PolicyError: the policy is for another number of exits.
    """

    def __init__(
        self,
        model: MultiExitModel,
        policy: Policy,
        example: object,
        *,
        engine: str | Engine = "torch",
        exits: Literal["active", "all"] = "active",
    ) -> None:
        active = policy.active(model.num_exits)
        kept = [k for k, runs in enumerate(active) if runs or exits == "all"]
        staged = cut(model, example, kept)
        loaded = engine_of(engine)
        steps = chain(staged, policy, model.num_exits)
        links, calls = [step.link for step in steps], loaded.load(steps)
        self._set_up(loaded, links, calls, policy, model.costs, model.places, staged.call)
        prove(self, model, staged)

    def _set_up(
        self,
        engine: Engine,
        links: Sequence[Link],
        calls: Sequence[StepCall],
        policy: Policy,
        costs: ExitCosts,
        places: tuple[str, ...],
        call: Call,
    ) -> None:
        self.engine = engine
        self.policy = policy
        self.costs = costs
        self.places = places
        self.call = call
        self._links = tuple(links)
        self._calls = tuple(calls)
        self._inputs = self._links[0].inputs
        self._lock = threading.Lock()
        self.reset()

    @property
    def num_exits(self) -> int:
        """Exits of the model, its final output included, whether or not they are kept here."""
        return len(self.costs.stages)

    # -- calling -----------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Result:  # noqa: ANN401
        """Answer a batch.

        Args:
            args, kwargs: as the model is called, with torch tensors or numpy arrays; or the one
                thing that ``example`` was.

        Returns:
            The answers in the order of the rows.

        Raises:
            DataError: another structure, dtype or shape than the example; an empty batch; inputs
                that are not finite.
        """
        given = self._tensors(args, kwargs)
        answer = self._execute([self.engine.array(value) for value in given], self._leaving)
        logits = self.engine.host(answer.logits)
        if not np.isfinite(logits).all():
            _explain_not_finite(logits, given)
        self._count(answer)
        return answer.result(logits, given[0])

    def all_exits(self, *args: Any, **kwargs: Any) -> ExitOutputs:  # noqa: ANN401
        """Logits of every exit for a batch, nobody leaving: what :func:`offramp.record` records.

        Raises:
            PolicyError: this runner left out exits that its policy switched off.
        """
        if len(self._links) != self.num_exits:
            raise PolicyError(
                f"This runner keeps {len(self._links)} of {self.num_exits} exits, since its policy "
                "switched the others off; to record all, make it with exits='all'."
            )
        own = "raw" if self.policy.criterion.combines else "logits"
        given = self._tensors(args, kwargs)
        logits: list[Tensor] = []

        def keep(position: int, values: dict[str, Array]) -> np.ndarray:
            logits.append(torch.as_tensor(values[own]))
            return np.zeros(len(values["score"]), bool)

        self._execute([self.engine.array(value) for value in given], keep)
        return ExitOutputs(logits, logits[-1])

    def _leaving(self, position: int, values: dict[str, Array]) -> np.ndarray:
        score = self.engine.host(values["score"])
        return score >= score.dtype.type(self._links[position].threshold)

    def _execute(
        self,
        inputs: Sequence[Array],
        leaving: Callable[[int, dict[str, Array]], np.ndarray],
    ) -> _Answer:
        """Run the chain on ``inputs``, letting rows go where ``leaving`` says so."""
        samples = len(inputs[0])
        answer = _Answer(self.engine, samples)
        values = dict(zip(self._inputs, inputs, strict=True))
        rows = np.arange(samples)  # the sample that each live row belongs to
        for position, (link, call) in enumerate(zip(self._links, self._calls, strict=True)):
            outputs = call([values[name] for name in link.inputs])
            values.update(zip(link.outputs, outputs, strict=True))
            answer.entered.append(len(rows))
            gone = leaving(position, values)
            if gone.all() or position == len(self._links) - 1:
                answer.add(link.exit, rows, values["logits"], values["score"])
                break
            stay = None
            if gone.any():
                here, stay = np.flatnonzero(gone), np.flatnonzero(~gone)
                answer.add(link.exit, rows[here], *(self._take(values, n, here) for n in _ANSWER))
                rows = rows[stay]
            # Only what later steps read is kept: the rest is freed here.
            values = {
                name: values[name]
                if stay is None or (axis := link.rows[name]) is None
                else self.engine.take(values[name], axis, stay)
                for name in link.live
            }
        return answer

    def _take(self, values: dict[str, Array], name: str, rows: np.ndarray) -> Array:
        return self.engine.take(values[name], RowAxis(), rows)

    def _tensors(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """The tensors of a call, checked against the example."""
        example = args[0] if len(args) == 1 and not kwargs else {**kwargs} if not args else args
        call = Call.of(example) if not (args and kwargs) else Call.of_call(args, kwargs)
        if call.spec != self.call.spec:
            raise DataError(
                f"The input has the structure {call.describe()}, but the example had "
                f"{self.call.describe()}. Pass the same arguments as the example has."
            )
        given, known = call.tensors, self.call.tensors
        for name, value, like in zip(self.call.names(), given, known, strict=True):
            _check_tensor(name, value, like)
        sizes = {len(value) for value in given}
        if len(sizes) != 1:
            raise DataError(
                f"The inputs have different numbers of rows: {call.describe()}. Dimension 0 is the "
                "batch, and must be the same in all."
            )
        return given

    # -- what has been done ------------------------------------------------------------------------

    def _count(self, answer: _Answer) -> None:
        with self._lock:
            self._taken += np.bincount(answer.exit, minlength=self.num_exits)
            self._entered[: len(answer.entered)] += answer.entered

    @property
    def stats(self) -> Stats:
        """What has run since the runner was made, or since :meth:`reset`."""
        with self._lock:
            taken, entered = self._taken.copy(), self._entered.copy()
        kept = {link.exit for link in self._links}
        heads = [cost if k in kept else 0.0 for k, cost in enumerate(self.costs.heads)]
        cost = np.cumsum(np.add(self.costs.stages, heads))
        samples = int(taken.sum())
        mean = float(taken @ cost) / samples if samples else math.nan
        return Stats(samples, tuple(map(int, taken)), tuple(map(int, entered)), mean)

    def reset(self) -> None:
        """Start the statistics anew."""
        with self._lock:
            self._taken = np.zeros(self.num_exits, np.int64)
            self._entered = np.zeros(len(self._links), np.int64)


_ANSWER = ("logits", "score")


class _Answer:
    """The answers as they come in."""

    def __init__(self, engine: Engine, samples: int) -> None:
        self.engine = engine
        self.samples = samples
        self.exit = np.zeros(samples, np.int64)
        self.logits: Array = None
        self.score: Array = None
        self.entered: list[int] = []

    def add(self, exit: int, rows: np.ndarray, logits: Array, score: Array) -> None:
        self.exit[rows] = exit
        if len(rows) == self.samples:  # all at once: nothing to put together
            self.logits, self.score = logits, score
            return
        self.logits = self.engine.scatter(self.logits, logits, rows, self.samples)
        self.score = self.engine.scatter(self.score, score, rows, self.samples)

    def result(self, logits: np.ndarray, like: Tensor | np.ndarray) -> Result:
        """As arrays of the kind of ``like``; ``logits`` are the answer's, on the host."""
        if isinstance(like, np.ndarray):
            score = self.engine.host(self.score)
            return Result(logits.argmax(-1), logits, self.exit, score)
        tensor = torch.as_tensor(self.logits).to(like.device)
        score = torch.as_tensor(self.score).to(like.device)
        taken = torch.from_numpy(self.exit).to(like.device)
        return Result(tensor.argmax(-1), tensor, taken, score)


def _check_tensor(name: str, value: Tensor | np.ndarray, like: Tensor) -> None:
    dtype = str(value.dtype).removeprefix("torch.")
    expected = str(like.dtype).removeprefix("torch.")
    shape = ("batch", *like.shape[1:])
    if dtype != expected or value.ndim != like.ndim or value.shape[1:] != like.shape[1:]:
        raise DataError(
            f"Input {name!r}: expected {expected} of shape {_show(shape)}, got {dtype} of shape "
            f"{_show(value.shape)}. Convert it, or make the runner with an example of this kind."
        )
    if len(value) == 0:
        raise DataError(f"Input {name!r} is an empty batch; pass at least one row.")


def _show(shape: Sequence[object]) -> str:
    return "(" + ", ".join(map(str, shape)) + ")"


def _explain_not_finite(logits: np.ndarray, given: Sequence[Any]) -> None:
    bad = np.flatnonzero(~np.isfinite(logits).all(-1))
    at_fault = [
        i for i in bad if any(not torch.isfinite(torch.as_tensor(v[int(i)])).all() for v in given)
    ]
    what = "the input has NaN or infinite values" if at_fault else "the model overflows on them"
    raise DataError(
        f"The logits of row {int(bad[0])} ({len(bad)} of {len(logits)} rows) are not finite: {what}. "
        "Leave these rows out, or mend them."
    )
