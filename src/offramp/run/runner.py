"""Run a batch: score, release, compact, go on.

After each stage the criterion scores the rows that are left. Rows whose score reaches the threshold
leave with their answer; what is live is compacted to the others, and only they go on. So a batch
costs what its survivors cost.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from offramp.build.cost import ExitCosts
from offramp.build.model import ExitOutputs, MultiExitModel
from offramp.decide.policy import Policy
from offramp.errors import PolicyError, StageError
from offramp.run.answers import Answer, Result
from offramp.run.calls import Call
from offramp.run.chain import Link, chain
from offramp.run.compaction import Compaction
from offramp.run.engines import Array, Engine, StepCall, Torch, engine_of
from offramp.run.evaluating import evaluating
from offramp.run.graph import cut
from offramp.run.inputs import check_call, explain_not_finite
from offramp.run.proof import prove
from offramp.run.rows import RowAxis
from offramp.run.selection import Selector, samples_of, take_samples
from offramp.run.sequential import cut_by_hand
from offramp.run.stages import StagedModel
from offramp.run.times import StageTimes, fastest, rows_in_memory

__all__ = ["Result", "Runner", "Stats"]


@dataclass(frozen=True)
class Stats:
    """What a runner has done since it was made, or since ``reset``.

    Attributes:
        samples: how many samples came.
        exits: how many left at each exit of the model.
        survivors: how many entered each stage.
        mean_cost: cost per sample in the unit of the model's costs, heads that ran included.
        missed: how many samples were answered after the deadline they were given.
    """

    samples: int
    exits: tuple[int, ...]
    survivors: tuple[int, ...]
    mean_cost: float
    missed: int = 0


class Runner:
    """Executes a model under a policy; every sample stops at its own exit, at any batch size.

    Safe to call from several threads at once.

    Args:
        model: the multi-exit model.
        policy: the criterion and its thresholds.
        example: an input batch of at least two samples, as the model is called with it: a tensor, a
            tuple of positional arguments, or a mapping of keyword arguments.
        engine: ``"torch"``, ``"inductor"``, ``"onnxruntime"``, ``"openvino"``, an instance of an
            engine, or ``"auto"``: the fastest here of those that load at once (all but inductor),
            measured on the example; ``runner.engine.name`` says which.
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
        staged = _staged(model, example, kept, engine)
        steps = chain(staged, policy, model.num_exits)
        links = [step.link for step in steps]
        if engine == "auto":
            loaded, calls = fastest(steps, staged)
        else:
            loaded = engine_of(engine)
            calls = loaded.load(steps)
        self._set_up(
            loaded,
            links,
            calls,
            policy,
            model.costs,
            model.places,
            staged.call,
            staged.row_bytes,
            staged.selector,
        )
        prove(self, model, staged)
        self.measure()

    @classmethod
    def of_links(
        cls,
        engine: Engine,
        links: Sequence[Link],
        calls: Sequence[StepCall],
        policy: Policy,
        costs: ExitCosts,
        places: tuple[str, ...],
        call: Call,
        row_bytes: float,
        selector: Selector | None = None,
    ) -> Runner:
        """A runner from steps that are executable already, as an artifact has them."""
        runner = cls.__new__(cls)
        runner._set_up(engine, links, calls, policy, costs, places, call, row_bytes, selector)
        runner.measure()
        return runner

    def _set_up(
        self,
        engine: Engine,
        links: Sequence[Link],
        calls: Sequence[StepCall],
        policy: Policy,
        costs: ExitCosts,
        places: tuple[str, ...],
        call: Call,
        row_bytes: float,
        selector: Selector | None,
    ) -> None:
        self.engine = engine
        self.policy = policy
        self.costs = costs
        self.places = places
        self.call = call
        self._links = tuple(links)
        self._calls = tuple(calls)
        self._inputs = self._links[0].inputs
        self._selector = selector
        self._compact = Compaction(engine, self._inputs, selector)
        self.max_batch = rows_in_memory(row_bytes)
        self.times = StageTimes.none()
        self._lock = threading.Lock()
        self.reset()

    def measure(self, batch: int = 16) -> None:
        """Time every stage here and now: what compaction and deadlines go by.

        Args:
            batch: the larger of the two batch sizes that are timed; the other is 1.
        """
        self.times = StageTimes.measure(
            self.engine, self._links, self._calls, self.call, self._compact, batch
        )

    @property
    def num_exits(self) -> int:
        """Exits of the model, its final output included, whether or not they are kept here."""
        return len(self.costs.stages)

    @property
    def select(self) -> Callable[..., Any] | None:
        """The function that takes samples out, where dimension 0 of the inputs is not the batch."""
        return None if self._selector is None else self._selector.select

    # -- calling -----------------------------------------------------------------------------------

    def __call__(
        self,
        *args: Any,  # noqa: ANN401
        deadline_ms: float | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> Result:
        """Answer a batch.

        Args:
            *args: as the model is called, with torch tensors or numpy arrays; or the one thing
                that ``example`` was.
            **kwargs: arguments by name, likewise.
            deadline_ms: answer within this time: where the next stage would end too late, by the
                times measured here, every row that is left takes the answer it has. The first
                stage always runs; what came too late is counted in ``stats.missed``.

        Returns:
            The answers in the order of the rows.

        Raises:
            DataError: another structure, dtype or shape than the example; an empty batch; inputs
                that are not finite.
        """
        begin = time.perf_counter()
        given = self._given(args, kwargs)
        if samples_of(given, self._selector) > self.max_batch:
            return self._in_pieces(given, deadline_ms, begin)
        return self._answer(given, deadline_ms, begin)

    def _answer(self, given: Sequence[Any], deadline_ms: float | None, begin: float) -> Result:
        leaving = self._leaving
        if deadline_ms is not None:
            end = begin + deadline_ms / 1e3
            leaving = partial(self._leaving_by, end)
        answer = self._execute([self.engine.array(value) for value in given], leaving)
        logits = self.engine.host(answer.logits)
        if not np.isfinite(logits).all():
            explain_not_finite(logits, given)
        late = deadline_ms is not None and time.perf_counter() > end
        self._count(answer, missed=answer.samples if late else 0)
        return answer.result(logits, given[0])

    def _in_pieces(self, given: Sequence[Any], deadline_ms: float | None, begin: float) -> Result:
        """A batch that would not fit into memory, as several."""
        tensors = [torch.as_tensor(value) for value in given]
        arrays = isinstance(given[0], np.ndarray)
        pieces = []
        for rows in torch.arange(samples_of(given, self._selector)).split(self.max_batch):
            part: list[Any] = take_samples(tensors, rows, self._selector)
            part = [value.numpy() for value in part] if arrays else part
            pieces.append(self._answer(part, deadline_ms, begin))
        join = np.concatenate if arrays else torch.cat
        return Result(*(join([getattr(p, f.name) for p in pieces]) for f in fields(Result)))

    def anytime(self, *args: Any, **kwargs: Any) -> Iterator[Result]:  # noqa: ANN401
        """The answers of successive exits, each as soon as it is known; nobody leaves.

        Yields:
            For every exit that is kept, the answer of all rows there.

        Raises:
            DataError: as for a call.
        """
        given = self._given(args, kwargs)
        values = dict(zip(self._inputs, map(self.engine.array, given), strict=True))
        rows = np.arange(samples_of(given, self._selector))
        for link, call in zip(self._links, self._calls, strict=True):
            outputs = call([values[name] for name in link.inputs])
            values.update(zip(link.outputs, outputs, strict=True))
            answer = Answer(self.engine, len(rows))
            answer.add(link.exit, rows, values["logits"], values["score"])
            yield answer.result(self.engine.host(answer.logits), given[0])

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
        given = self._given(args, kwargs)
        logits: list[Tensor] = []

        def keep(position: int, values: dict[str, Array]) -> np.ndarray:
            logits.append(torch.as_tensor(values[own]))
            return np.zeros(len(values["score"]), bool)

        self._execute([self.engine.array(value) for value in given], keep)
        return ExitOutputs(logits, logits[-1])

    def _given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        return check_call(args, kwargs, self.call, self._selector)

    def _leaving(self, position: int, values: dict[str, Array]) -> np.ndarray:
        score = self.engine.host(values["score"])
        gone: np.ndarray = score >= score.dtype.type(self._links[position].threshold)
        return gone

    def _leaving_by(self, end: float, position: int, values: dict[str, Array]) -> np.ndarray:
        """As by the thresholds, but all where the next stage would end after ``end``."""
        gone = self._leaving(position, values)
        if position + 1 < len(self._links):
            expected = self.times.stage(position + 1, int((~gone).sum()))
            if time.perf_counter() + expected > end:
                gone[:] = True
        return gone

    def _execute(
        self,
        inputs: Sequence[Array],
        leaving: Callable[[int, dict[str, Array]], np.ndarray],
    ) -> Answer:
        """Run the chain on ``inputs``, letting rows go where ``leaving`` says so."""
        samples = samples_of(inputs, self._selector)
        answer = Answer(self.engine, samples)
        values = dict(zip(self._inputs, inputs, strict=True))
        rows = np.arange(samples)  # the sample that each live row belongs to
        waiting = np.ones(samples, bool)  # which live rows have no answer yet
        for position, (link, call) in enumerate(zip(self._links, self._calls, strict=True)):
            outputs = call([values[name] for name in link.inputs])
            values.update(zip(link.outputs, outputs, strict=True))
            answer.entered.append(int(waiting.sum()))
            last = position == len(self._links) - 1
            told = leaving(position, values)
            gone = waiting if last else waiting & told
            if gone.all():
                answer.add(link.exit, rows, values["logits"], values["score"])
                break
            stay = None
            if gone.any():
                here = np.flatnonzero(gone)
                answer.add(link.exit, rows[here], *(self._take(values, n, here) for n in _ANSWER))
                waiting = waiting & ~gone
                left = int(waiting.sum())
                if not left:
                    break
                if self.times.compaction_pays(position, len(rows), left):
                    stay = np.flatnonzero(waiting)
                    rows, waiting = rows[stay], np.ones(left, bool)
            # Only what later steps read is kept: the rest is freed here.
            if stay is None:
                values = {name: values[name] for name in link.live}
            else:
                values = self._compact(link, values, stay)
        return answer

    def _take(self, values: dict[str, Array], name: str, rows: np.ndarray) -> Array:
        return self.engine.take(values[name], RowAxis(), rows)

    # -- what has been done ------------------------------------------------------------------------

    def _count(self, answer: Answer, missed: int) -> None:
        with self._lock:
            self._missed += missed
            self._taken += np.bincount(answer.exit, minlength=self.num_exits)
            self._entered[: len(answer.entered)] += answer.entered

    @property
    def stats(self) -> Stats:
        """What has run since the runner was made, or since :meth:`reset`."""
        with self._lock:
            taken, entered, missed = self._taken.copy(), self._entered.copy(), self._missed
        kept = {link.exit for link in self._links}
        heads = [cost if k in kept else 0.0 for k, cost in enumerate(self.costs.heads)]
        cost = np.cumsum(np.add(self.costs.stages, heads))
        samples = int(taken.sum())
        mean = float(taken @ cost) / samples if samples else math.nan
        return Stats(samples, tuple(map(int, taken)), tuple(map(int, entered)), mean, missed)

    def reset(self) -> None:
        """Start the statistics anew."""
        with self._lock:
            self._taken = np.zeros(self.num_exits, np.int64)
            self._entered = np.zeros(len(self._links), np.int64)
            self._missed = 0


def _staged(
    model: MultiExitModel, example: object, exits: list[int], engine: str | Engine
) -> StagedModel:
    """The model's stages; those cut by hand where export refuses and eager torch executes."""
    try:
        return cut(model, example, exits)
    except StageError:
        by_hand = engine == "torch" or isinstance(engine, Torch)
        last = model.num_exits - 1
        kept = [k for k in exits if k != last]
        with evaluating(model):
            staged = cut_by_hand(model, example, kept) if by_hand else None
        if staged is None:
            raise
        return staged


_ANSWER = ("logits", "score")
