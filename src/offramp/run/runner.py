"""Run a batch: score, release, compact, go on.

After each stage the criterion scores the rows that are left. Rows whose score reaches the threshold
leave with their answer; what is live is compacted to the others, and only they go on. So a batch
costs what its survivors cost.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any, Literal, NoReturn

import numpy as np
import torch
from torch import Tensor

from offramp.build.cost import ExitCosts
from offramp.build.model import ExitOutputs, MultiExitModel
from offramp.decide.criteria import criterion_to_json
from offramp.decide.policy import Policy
from offramp.errors import DataError, EqualityError, PolicyError, StageError
from offramp.run.answers import Answer, Result, as_tensors
from offramp.run.calls import Call
from offramp.run.chain import Link, chain, check_network, check_state
from offramp.run.compaction import Compaction
from offramp.run.engines import Array, Engine, StepCall, StepCalls, engine_of, tensor_of
from offramp.run.inputs import (
    check_call,
    check_entries,
    check_finite,
    explain_not_finite,
    flat_call,
)
from offramp.run.proof import prove
from offramp.run.rows import RowAxis, most_rows
from offramp.run.selection import Selector, samples_of, take_samples
from offramp.run.sequential import cut_for
from offramp.run.stats import Stats, Tally
from offramp.run.times import StageTimes, fastest, rows_in_memory
from offramp.run.timing import compare
from offramp.run.whole import Whole

__all__ = ["Result", "Runner", "Stats"]

SLOW = 0.1  # seconds
CLEARLY = 1.05


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

    Attributes:
        training_fingerprints: hashes of the samples that the model was trained on, by which
            ``record`` knows them; ``None`` where a file does not have them.

    Raises:
        StageError: the model cannot be cut.
        EqualityError: the stages do not reproduce the model; names the first module that differs.
        PolicyError: the policy is for another number of exits.
    """

    training_fingerprints: Tensor | None = None

    def __init__(
        self,
        model: MultiExitModel,
        policy: Policy,
        example: object,
        *,
        engine: str | Engine = "torch",
        exits: Literal["active", "all"] = "active",
    ) -> None:
        check_network(policy, model)
        if exits == "all":
            check_state(policy)
        active = policy.active(model.num_exits)
        kept = [k for k, runs in enumerate(active) if runs or exits == "all"]
        staged = cut_for(engine, model, example, kept)
        steps = chain(staged, policy, model.num_exits)
        links = [step.link for step in steps]
        names = ["torch", "onnxruntime", "openvino"]
        while True:
            if engine == "auto":
                loaded, calls = fastest(
                    names, lambda tried: tried.load(steps), links, staged.call, staged.selector
                )
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
            try:
                prove(self, model, staged)
            except EqualityError:
                # It may be the engine's doing, in half precision say.
                if engine != "auto" or loaded.exact:
                    raise
                names.remove(loaded.name)
            else:
                break
        self.training_fingerprints = model.training_fingerprints
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
        engine.check(call.names, call.tensors)
        self.engine = engine
        self.policy = policy
        self.costs = costs
        self.places = places
        self.call = call
        self._links = tuple(links)
        self._calls = calls
        self._inputs = self._links[0].inputs
        self._selector = selector
        self._whole: Whole | None = None
        if isinstance(calls, StepCalls) and calls.whole is not None and selector is None:
            self._whole = Whole(engine, calls.whole, self._links, calls.limits)
        # What is not in single precision is not looked at inside of the one call, nor are integers.
        pairs = zip(call.finite, call.tensors, strict=True)
        single = not any(finite and value.dtype != torch.float32 for finite, value in pairs)
        self._looks = bool(call.entries) or not single
        self._takes_one = call.flat == (1, ())
        self._checked: list[Any] | None = None
        self._seen: tuple[Any, Any] | None = None  # shape and dtype of a single row
        self._compact = Compaction(engine, self._inputs, selector)
        fit = rows_in_memory(row_bytes, engine.device)
        self.max_batch = min(fit, most_rows(engine.device) or fit)
        self.times = StageTimes.none()
        self.in_one_call = False
        self.reset()

    def measure(self, batch: int = 16) -> None:
        """Time every stage here and now: what compaction and deadlines go by.

        Where the engine has all stages in one call, too, that is timed beside them, and the faster
        of the two answers from now on.

        Args:
            batch: the larger of the two batch sizes that are timed; the other is 1.
        """
        self.times = StageTimes.measure(
            self.engine, self._links, self._calls, self.call, self._compact, batch
        )
        self.in_one_call = self._whole is not None and self._one_call_pays(batch)
        inputs = [self.engine.array(v) for v in self._some(1)]
        if self._whole is not None and self.in_one_call and isinstance(self._calls, StepCalls):
            self._calls.release()
            self._whole.trim(inputs)
        else:
            self._whole = None  # not both are held in memory
            if isinstance(self._calls, StepCalls):
                self._calls.whole = None
            self.engine.trim(self._calls[0], inputs)

    def _some(self, rows: int) -> list[Tensor]:
        """The example's tensors, repeated to that many samples where that can be done."""
        samples = samples_of(self.call.tensors, self._selector)
        return take_samples(self.call.tensors, torch.arange(rows) % samples, self._selector)

    def _one_call_pays(self, batch: int) -> bool:
        """Whether all stages in one call are as fast: nobody leaving, and all at the first exit.

        Stage by stage it has to be clearly faster, since then both are not held in memory.
        """
        slower = []
        for size, threshold in itertools.product((1, batch), (math.inf, -math.inf)):
            if sum(line.at(size) for line in self.times.stages) > SLOW:
                continue  # what happens between the stages does not count
            inputs = [self.engine.array(v) for v in self._some(size)]
            links = [replace(link, threshold=threshold) for link in self._links[:-1]]
            other = self._with((*links, self._links[-1]))
            whole = other._whole
            at_once = None if whole is None else whole.single if size == 1 else whole
            ways = {"whole": partial(at_once or other._stepwise, inputs)}
            ways["stepwise"] = partial(other._stepwise, inputs)
            times = compare(ways, repeats=11, warmup=2, seconds=0.5)
            slower.append(math.log(times["whole"] / times["stepwise"]))
        return sum(slower) <= len(slower) * math.log(CLEARLY)

    def __reduce__(self) -> NoReturn:
        """What an engine has loaded stays in its process."""
        raise StageError(
            "A Runner can be neither pickled nor copied: its stages are loaded in this process. "
            "Make one from the model in the other process, or load(path) there what export wrote. "
            "Threads may share one; runner.under(policy) makes another on the same stages."
        )

    def under(self, policy: Policy) -> Runner:
        """A runner of the same stages under other thresholds; nothing is cut or converted anew.

        Raises:
            PolicyError: another criterion, another number of exits, or an exit that this runner
                left out since its own policy switched it off.
        """
        if criterion_to_json(policy.criterion) != criterion_to_json(self.policy.criterion):
            raise PolicyError(
                f"This runner executes the criterion {self.policy.criterion.name!r}; the policy "
                f"has {policy.criterion.name!r} or other settings of it. Make a new Runner."
            )
        check_state(policy)
        thresholds = (*policy.thresholds_for(self.num_exits), -math.inf)
        kept = {link.exit for link in self._links}
        missing = [k for k, on in enumerate(policy.active(self.num_exits)) if on and k not in kept]
        if missing:
            raise PolicyError(
                f"The policy uses exit {missing[0]}, which this runner left out, since its own "
                "policy switched it off. Make the runner with exits='all'."
            )
        other = self._with([replace(k, threshold=thresholds[k.exit]) for k in self._links])
        other.policy = policy
        other.reset()
        return other

    def _with(self, links: Sequence[Link]) -> Runner:
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._links = tuple(links)
        other._whole = None if self._whole is None else self._whole.under(links)
        return other

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
                that are not finite, integers that the engine would cut, or that an embedding does
                not have; a deadline that is no number.
        """
        if self._seen is not None and len(args) == 1 and deadline_ms is None and not kwargs:
            answer = self._like_the_last(args[0])
            if answer is not None:
                return answer
        end = None if deadline_ms is None else time.perf_counter() + _seconds(deadline_ms)
        given = self._given(args, kwargs)
        fits = samples_of(given, self._selector) <= self.max_batch
        found = self._answer(given, end) if fits else self._in_pieces(given, end)
        if end is not None and time.perf_counter() > end:  # however many parts it was answered in
            self._tally.add([], missed=len(found.exit))
        return found

    def _like_the_last(self, value: Any) -> Result | None:  # noqa: ANN401
        """The answer to one row as it came before, where nothing but the engine's call is needed.

        A network that runs for a fraction of a millisecond would wait for every other line.
        """
        whole = self._whole
        alike = type(value) is np.ndarray and (value.shape, value.dtype) == self._seen
        if not alike or whole is None or not self.in_one_call:
            return None
        exit, found = whole.single((value,))
        if found is not None:
            self._tally.add([exit])
        return found

    def _answer(self, given: Sequence[Any], end: float | None, first: int = 0) -> Result:
        whole = self._whole if self.in_one_call and end is None else None
        if whole is None or self._looks:
            self._check(given)
        inputs = [self.engine.array(value) for value in given]
        if whole is not None and len(inputs[0]) == 1:
            exit, found = whole.single(inputs)
            if found is not None:
                self._tally.add([exit])
                if self._takes_one and not self._looks and type(given[0]) is np.ndarray:
                    self._seen = given[0].shape, given[0].dtype
                arrays = isinstance(given[0], np.ndarray)
                return found if arrays else as_tensors(found, given[0].device)
        if whole is not None:
            said = whole(inputs)
        elif end is None:
            said = self._stepwise(inputs)
        else:
            said = self._execute(inputs, partial(self._leaving_by, end))
        said.own(inputs)
        if not said.finite:
            if whole is not None:
                check_finite(given, self.call)
            _look(said, given, first)
        self._tally.add(said.exit.tolist())
        return said.result(given[0])

    def _stepwise(self, inputs: Sequence[Array]) -> Answer:
        """Stage by stage; a single row leaves or goes on, with no rows to keep apart."""
        if samples_of(inputs, self._selector) > 1:
            return self._execute(inputs, self._leaving)
        values = dict(zip(self._inputs, inputs, strict=True))
        for link, call in zip(self._links, self._calls, strict=True):
            outputs = call([values[name] for name in link.inputs])
            values.update(zip(link.outputs, outputs, strict=True))
            if link is self._links[-1]:
                break
            score = self.engine.host(values["score"])
            if score[0] >= score.dtype.type(link.threshold):
                break
        exit = np.array([link.exit])
        return Answer(self.engine, exit, values["logits"], values["score"])

    def _in_pieces(self, given: Sequence[Any], end: float | None) -> Result:
        """A batch that would not fit into memory, as several."""
        self._check(given)  # of the whole batch, before any of it is answered
        arrays = isinstance(given[0], np.ndarray)
        tensors = []
        if self._selector is not None:
            tensors = [tensor_of(v) if isinstance(v, np.ndarray) else v for v in given]
        pieces = []
        for rows in torch.arange(samples_of(given, self._selector)).split(self.max_batch):
            first = int(rows[0])
            if self._selector is None:
                part = [value[first : first + len(rows)] for value in given]
            else:
                part = take_samples(tensors, rows, self._selector)
                part = [value.detach().cpu().numpy() for value in part] if arrays else part
            pieces.append(self._answer(part, end, first))
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
        self._check(given)
        values = dict(zip(self._inputs, map(self.engine.array, given), strict=True))
        rows = np.arange(samples_of(given, self._selector))
        for link, call in zip(self._links, self._calls, strict=True):
            outputs = call([values[name] for name in link.inputs])
            values.update(zip(link.outputs, outputs, strict=True))
            answer = Answer(self.engine, np.zeros(len(rows), np.int64))
            answer.add(link.exit, rows, values["logits"], values["score"])
            answer.own()  # later exits may read what is handed out here
            _look(answer, given)
            yield answer.result(given[0])

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
        self._check(given)
        logits: list[Tensor] = []

        def keep(position: int, values: dict[str, Array]) -> np.ndarray:
            value = values[own]
            # As an answer: not in inference mode, and nobody else's.
            logits.append(value.detach().clone() if isinstance(value, Tensor) else tensor_of(value))
            return np.zeros(len(values["score"]), bool)

        self._execute([self.engine.array(value) for value in given], keep)
        return ExitOutputs(logits, logits[-1])

    def _given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        alone = self._takes_one and len(args) == 1 and not kwargs and type(args[0]) in _PLAIN
        given = list(args) if alone else flat_call(args, kwargs, self.call)
        # What has just the shapes and types of a call that was checked needs no second look.
        kind = None if given is None else [(type(v), v.dtype, v.shape) for v in given]
        if given is not None and kind == self._checked:
            return given
        checked = check_call(args, kwargs, self.call, self._selector)
        self._checked = kind
        return checked

    def _check(self, given: Sequence[Any]) -> None:
        """Refuse values that would not be answered as they should be."""
        check_finite(given, self.call)
        check_entries(given, self.call)
        self.engine.check(self.call.names, given)

    def _leaving(self, position: int, values: dict[str, Array]) -> np.ndarray:
        if position + 1 == len(self._links):  # all that are left; no need to wait for scores
            return np.ones(len(values["score"]), bool)
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
        answer = Answer(self.engine, np.zeros(samples, np.int64))
        values = dict(zip(self._inputs, inputs, strict=True))
        rows = np.arange(samples)  # the sample that each live row belongs to
        waiting = np.ones(samples, bool)  # which live rows have no answer yet
        for position, (link, call) in enumerate(zip(self._links, self._calls, strict=True)):
            outputs = call([values[name] for name in link.inputs])
            values.update(zip(link.outputs, outputs, strict=True))
            last = position == len(self._links) - 1
            told = leaving(position, values)
            gone = waiting if last else waiting & told
            if gone.all():
                answer.add(link.exit, rows, values["logits"], values["score"])
                break
            stay = None
            if gone.any():
                here = np.flatnonzero(gone)
                index, axis = self.engine.index(here), RowAxis()
                own = (self.engine.take(values[name], axis, index) for name in _ANSWER)
                answer.add(link.exit, rows[here], *own)
                waiting = waiting & ~gone
                left = int(waiting.sum())
                if not left:
                    break
                size = min(self.engine.bucket(left), len(rows))
                if size < len(rows) and self.times.compaction_pays(position, len(rows), size):
                    # Where the engine wants a rounder number, rows that are answered fill it up.
                    filling = np.flatnonzero(~waiting)[: size - left]
                    stay = np.sort(np.concatenate([np.flatnonzero(waiting), filling]))
                    rows, waiting = rows[stay], waiting[stay]
            # Only what later steps read is kept: the rest is freed here.
            if stay is None:
                values = {name: values[name] for name in link.live}
            else:
                values = self._compact(link, values, stay)
        return answer

    # -- what has been done ------------------------------------------------------------------------

    @property
    def stats(self) -> Stats:
        """What has run since the runner was made, or since :meth:`reset`."""
        return self._tally.stats()

    def reset(self) -> None:
        """Start the statistics anew."""
        self._tally = Tally(self.costs, [link.exit for link in self._links])


def _seconds(milliseconds: float) -> float:
    try:
        number = float(milliseconds)
    except (TypeError, ValueError):
        number = math.nan
    if math.isnan(number):
        raise DataError(
            f"deadline_ms is a number of milliseconds, as in 5.0; got {milliseconds!r}."
        )
    return number / 1e3


def _look(said: Answer, given: Sequence[Any], first: int = 0) -> None:
    """Refuse logits that are not finite; ``first``: where these rows begin in the batch."""
    logits = said.host_logits()
    if not np.isfinite(logits).all():
        explain_not_finite(logits, given, first)


_ANSWER = ("logits", "score")
_PLAIN = (Tensor, np.ndarray)
