"""What was cut or exported reproduces the model: shown before anything else is run.

Two claims are checked of stages, on the example. With nobody leaving, every exit's logits are those
of the whole model: the same bits on an engine that computes with torch's own operators, within a
tolerance on another. With rows leaving at every exit, each row's logits are those that it gets
alone; that is shown without TF32, whose rounding would hide rows that are mixed. A file is compared
with the model on variations of the example, in batches of several sizes, with all, none and some
leaving.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from offramp.build.outputs import find_logits
from offramp.errors import EqualityError, OfframpError, StageError
from offramp.run.answers import Answer
from offramp.run.difference import distance, first_difference, first_mixing, only_rounding
from offramp.run.engines import OnnxRuntime
from offramp.run.evaluating import PRECISION, evaluating, full_precision
from offramp.run.graph import shared_by_rows

if TYPE_CHECKING:
    from offramp.build.model import MultiExitModel
    from offramp.decide.policy import Policy
    from offramp.run.runner import Runner
    from offramp.run.stages import StagedModel

__all__ = ["TOLERANCE", "between_engines", "compare_file", "prove", "variations"]

TOLERANCE = {True: 1e-5, False: 1e-4}  # torch's own operators on the CPU; another engine's
ROWS_ALONE = 4  # how many rows of the example are also run one by one


def prove(runner: Runner, model: MultiExitModel, staged: StagedModel) -> None:
    """Compare a runner with the model it was made from, on the example.

    Raises:
        EqualityError: a difference, with its size and the first module in which it appears.
        StageError: what answers the whole example answers no part of it.
    """
    allowed = between_engines(model)
    with evaluating(model), torch.no_grad():
        with PRECISION:  # no other thread may change it between what is compared bit by bit
            _whole(runner, model, staged, allowed)
        device = any(not value.is_cpu for value in staged.call.tensors)
        with full_precision(wanted=device), _fewer_rows():
            rounding = _Rounding(model, staged, allowed)
            _alone(runner, model, staged, rounding)
            _one_by_one(runner, model, staged, rounding)
    with _fewer_rows():
        _in_one_call(runner, staged, allowed)
    _as_it_is(model, staged, allowed)
    _warn_of_mixing(staged)


def _warn_of_mixing(staged: StagedModel) -> None:
    """Rows that are mixed on some inputs only, under a condition, are mixed on no example."""
    shared = shared_by_rows(staged)
    if shared:
        warnings.warn(
            f"{shared} makes one value of all rows of a batch, so that the answer to a row may "
            "depend on the others, though it does not on the example. Make it for each row, as "
            "x.mean(1) does in place of x.mean(); where it cancels out, as in x - x.max() before a "
            "softmax, ignore this.",
            UserWarning,
            stacklevel=4,
        )


def between_engines(model: nn.Module) -> float:
    """What a few roundings come to, in the type that most of the model's parameters have."""
    counts: Counter[torch.dtype] = Counter()
    for parameter in model.parameters():
        if parameter.is_floating_point():
            counts[parameter.dtype] += parameter.numel()
    rounding = max((torch.finfo(dtype).eps for dtype, _ in counts.most_common(1)), default=0.0)
    return max(TOLERANCE[False], 4 * rounding)


@contextmanager
def _fewer_rows() -> Iterator[None]:
    """Say what it means that rows cannot be computed where all of them together could."""
    try:
        yield
    except (OfframpError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # every engine has its own
        raise StageError(
            "Some rows of a batch cannot be computed without the others: "
            f"{type(error).__name__}: {str(error)[:300]}. A part of the network behind an exit "
            "addresses rows by numbers that were made before it (an order of the rows, say), and "
            "has fewer rows when some have left. Make these numbers anew behind the exit, or place "
            "the exits elsewhere."
        ) from error


def _of(model: nn.Module, staged: StagedModel, tensors: Sequence[Tensor]) -> Any:  # noqa: ANN401
    """What a module returns; on copies, since a network may write into its inputs."""
    args, kwargs = staged.call.build([value.clone() for value in tensors])
    return model(*args, **kwargs)


def _tolerance(runner: Runner, tensors: Sequence[Tensor]) -> float:
    """Between batch sizes; a device takes other kernels for other sizes."""
    return TOLERANCE[runner.engine.exact and all(value.is_cpu for value in tensors)]


class _Rounding:
    """Whether differences between a row in a batch and alone are of rounding only."""

    def __init__(self, model: MultiExitModel, staged: StagedModel, allowed: float) -> None:
        self.allowed = allowed  # between engines
        self._model, self._staged = model, staged
        self._shown: dict[int, bool] = {}

    def explains(self, far: float, row: int) -> bool:
        """For a difference that is more than is usual, but no more than between engines."""
        if not far <= self.allowed:
            return False
        if row not in self._shown:
            self._shown[row] = only_rounding(self._model, self._staged, row)
        return self._shown[row]


def _whole(runner: Runner, model: MultiExitModel, staged: StagedModel, allowed: float) -> None:
    wanted = _of(model, staged, staged.call.tensors)
    got = _logits(runner, staged.call.tensors)
    for exit, logits in zip(staged.exits, got, strict=True):
        same = runner.engine.exact and torch.equal(torch.as_tensor(logits), wanted[exit].float())
        far = distance(logits, wanted[exit])
        if same or (not runner.engine.exact and far <= allowed):
            continue
        raise EqualityError(
            f"Exit {exit} of the staged model differs from the whole model by {far:.2g} (relative) "
            f"on the example{first_difference(model, staged)}. An operation there gives "
            "another result each time, or depends on Python state that export froze."
        )


def _logits(runner: Runner, tensors: list[Tensor]) -> list[Any]:
    own = "raw" if runner.policy.criterion.combines else "logits"
    found: list[Any] = []

    def keep(position: int, values: dict[str, Any]) -> np.ndarray:
        found.append(values[own])
        return np.zeros(len(values["score"]), bool)

    runner._execute([runner.engine.array(value) for value in tensors], keep)
    return found


def _alone(runner: Runner, model: MultiExitModel, staged: StagedModel, rounding: _Rounding) -> None:
    """Let every other row go at each exit, and compare each with what it gets by itself."""
    tensors = staged.call.tensors
    samples = staged.samples

    def every_other(position: int, values: dict[str, Any]) -> np.ndarray:
        mask: np.ndarray = np.arange(len(values["score"])) % 2 == position % 2
        return mask

    answer = runner._execute([runner.engine.array(value) for value in tensors], every_other)
    tolerance = _tolerance(runner, tensors)
    logits = runner.engine.host(answer.logits)
    for row in np.linspace(0, samples - 1, min(samples, ROWS_ALONE)).astype(int):
        single = staged.take(tensors, torch.tensor([row]))
        by_itself = runner._execute(
            [runner.engine.array(value) for value in single], _at(answer.exit[row], runner)
        )
        far = distance(logits[row], runner.engine.host(by_itself.logits)[0])
        if not (far <= tolerance or rounding.explains(far, int(row))):  # NaN is a difference too
            raise EqualityError(
                f"Row {row} of the example leaves at exit {answer.exit[row]} with other logits in "
                f"a batch than alone: they differ by {far:.2g} (relative, {tolerance:g} allowed)"
                f"{first_mixing(model, staged, int(row), tolerance)}. Something mixes the "
                "rows of a batch (statistics over the batch, a reshape that moves the batch), so "
                "per-sample exits would change its answers."
            )


def _one_by_one(
    runner: Runner, model: MultiExitModel, staged: StagedModel, rounding: _Rounding
) -> None:
    """With nobody leaving, rows of the example in a batch, by themselves, and in the model."""
    tensors = staged.call.tensors
    tolerance = _tolerance(runner, tensors)
    whole = [runner.engine.host(value) for value in _logits(runner, tensors)]
    samples = staged.samples
    for row in np.linspace(0, samples - 1, min(samples, ROWS_ALONE)).astype(int):
        single = staged.take(tensors, torch.tensor([row]))
        own = _of(model, staged, single)
        alone = _logits(runner, single)
        for exit, batch, by_itself in zip(staged.exits, whole, alone, strict=True):
            # The model is of another engine, where this one does not compute the same bits.
            own_limit = tolerance if runner.engine.exact else rounding.allowed
            for other, limit in ((by_itself, tolerance), (own[exit], own_limit)):
                here = batch[row : row + 1]
                far = distance(here, other) if other.shape == here.shape else math.inf
                if not (far <= limit or rounding.explains(far, int(row))):
                    raise EqualityError(
                        f"Row {row} of the example has other logits at exit {exit} in a batch than "
                        f"alone: they differ by {far:.2g} (relative, {limit:g} allowed)"
                        f"{first_mixing(model, staged, int(row), tolerance)}. Something mixes the "
                        "rows of a batch, or a branch in a forward depends on how many there are, "
                        "so per-sample exits would change its answers."
                    )


def _in_one_call(runner: Runner, staged: StagedModel, allowed: float) -> None:
    """All stages in one call, where the engine has that, beside one after the other."""
    if runner._whole is None:
        return
    inputs = [runner.engine.array(value) for value in staged.call.tensors]
    scores: list[Tensor] = []

    def keep(position: int, values: dict[str, Any]) -> np.ndarray:
        scores.append(torch.as_tensor(runner.engine.host(values["score"])))
        return np.zeros(staged.samples, bool)

    runner._execute(inputs, keep)
    count = len(runner._links) - 1
    own = [link.threshold for link in runner._links[:-1]]
    for limits in (own, [math.inf] * count, [-math.inf] * count, [*map(_between, scores[:-1])]):
        thresholds = [*limits, -math.inf]
        links = [replace(k, threshold=t) for k, t in zip(runner._links, thresholds, strict=True)]
        other, whole = runner._with(links), runner._whole.under(links)
        near = [(s - t).abs() <= allowed for s, t in zip(scores, limits, strict=False)]
        clear = ~torch.stack(near).any(0).numpy() if near else np.ones(staged.samples, bool)
        wanted = other._execute(inputs, other._leaving)
        _alike(runner, whole(inputs), wanted, clear, allowed)
        if clear[0]:
            first = [value[:1] for value in inputs]
            exit, found = whole.single(first)
            wanted = other._execute(first, other._leaving)
            if found is not None:
                got = Answer(runner.engine, np.array([exit]), found.logits, found.score)
                _alike(runner, got, wanted, clear[:1], allowed)


def _alike(runner: Runner, got: Answer, wanted: Answer, clear: np.ndarray, allowed: float) -> None:
    """Refuse a call that gives clear rows (B,) bool other answers than stage by stage."""
    far = distance(got.logits[clear], wanted.logits[clear]) if clear.any() else 0.0
    if not far <= allowed or (got.exit != wanted.exit)[clear].any():
        raise EqualityError(
            f"All stages in one call of {runner.engine.name} answer otherwise than one after "
            f"the other: logits differ by {far:.2g} (relative) on the example. An operator "
            "computes something else on fewer rows. Use engine='torch'."
        )


def _as_it_is(model: MultiExitModel, staged: StagedModel, allowed: float) -> None:
    """The backbone with the fused kernels that are off meanwhile, which a user calls."""
    fused = (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention)
    if not any(isinstance(module, fused) for module in model.backbone.modules()):
        return
    with evaluating(model), torch.no_grad():
        plain = find_logits(_of(model.backbone, staged, staged.call.tensors), model._logits)
    with evaluating(model, fused=True), torch.no_grad():
        own = find_logits(_of(model.backbone, staged, staged.call.tensors), model._logits)
    far = distance(plain, own)
    if not far <= allowed:
        raise EqualityError(
            f"The backbone's logits differ by {far:.2g} (relative) between PyTorch's fused "
            "transformer kernels and the plain operators, which stages consist of. With a padding "
            "mask, nn.TransformerEncoder leaves zeros where tokens are padded; make it with "
            "enable_nested_tensor=False."
        )


def _at(exit: int, runner: Runner) -> Any:  # noqa: ANN401
    """Leave at ``exit`` and nowhere before."""

    def leaving(position: int, values: dict[str, Any]) -> np.ndarray:
        return np.full(len(values["score"]), runner._links[position].exit == exit)

    return leaving


# -- a file ----------------------------------------------------------------------------------------

BATCHES = (1, 7, 32)
DISTINCT = 336  # rows; each is compared in each of four mixes


def compare_file(
    file: bytes,
    model: MultiExitModel,
    policy: Policy,
    staged: StagedModel,
) -> dict[str, Any]:
    """Compare an ONNX file with the eager model on over 1,000 rows.

    Returns:
        What was compared: rows, batches, mixes, the largest relative difference of the logits, and
        what was allowed.

    Raises:
        EqualityError: a class, an exit or logits differ.
        StageError: the file answers a whole batch, but not what is left of one.
    """
    session = OnnxRuntime().session(file)
    rows, trace = _compared(model, staged)
    allowed = between_engines(model)
    count = len(staged.exits) - 1
    scored = _scored(policy, staged.exits, trace)
    own = [policy.thresholds_for(model.num_exits)[k] for k in staged.exits[:-1]]
    mixes = {
        "none leave": [math.inf] * count,
        "all leave": [-math.inf] * count,
        "mixed": [_between(score) for _, score in scored[:-1]],
        "as calibrated": own,
    }
    worst, compared = 0.0, 0
    for mix, thresholds in mixes.items():
        wanted = _decide(scored, staged.exits, thresholds, allowed)
        given = np.array(thresholds, np.float32)
        start = 0
        for turn in itertools.count():
            size = min(BATCHES[turn % len(BATCHES)], DISTINCT - start)
            if size <= 0:
                break
            here = slice(start, start + size)
            feed = [value[here].cpu().numpy() for value in rows]
            with _fewer_rows():
                got = session([*feed, given] if count else feed)
            worst = max(worst, _same(got, [w[here] for w in wanted], mix, size, allowed))
            start, compared = start + size, compared + size
    _warn_of_mixing(staged)
    return {
        "rows": compared,
        "batches": list(BATCHES),
        "mixes": list(mixes),
        "largest_relative_difference": worst,
        "tolerance": allowed,
    }


def _compared(model: MultiExitModel, staged: StagedModel) -> tuple[list[Tensor], list[Tensor]]:
    """Rows to compare, and the model's logits for them at each kept exit.

    Where the model has no finite answer to a new row (one without anything that a mask leaves, say)
    one of the example takes its place.
    """
    tensors = staged.call.tensors
    rows = variations(tensors, DISTINCT)
    trace = _eager(model, staged, rows)
    finite = torch.stack([logits.isfinite().all(-1) for logits in trace]).all(0)
    if finite.all():
        return rows, trace
    bad = (~finite).nonzero()[:, 0]
    for value, tensor in zip(rows, tensors, strict=True):
        value[bad] = tensor[bad % len(tensor)]
    return rows, _eager(model, staged, rows)


def variations(tensors: Sequence[Tensor], rows: int, seed: int = 0) -> list[Tensor]:
    """New rows like those of an example: real-valued ones with noise, integers mixed by column.

    Noise stays within what a column of the example holds, and leaves whole numbers whole: a model
    may take their logarithm, or look them up.

    Args:
        tensors: each (B, ...).
        rows: how many to make.
        seed: of the random numbers.

    Returns:
        For each tensor one of shape (rows, ...).
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(tensors[0]), (rows,), generator=generator)
    made = []
    for tensor in tensors:
        source = tensor.detach().cpu()
        fresh = source[drawn].clone()
        if source.is_floating_point():
            noise = torch.randn(fresh.shape, generator=generator).to(fresh.dtype)
            fresh = fresh + 0.5 * source.std().nan_to_num() * noise
            whole = (source == source.round()).all(0)
            fresh = torch.where(whole, fresh.round(), fresh)
            low = source.nan_to_num(torch.inf, torch.inf, -torch.inf).amin(0)
            high = source.nan_to_num(-torch.inf, torch.inf, -torch.inf).amax(0)
            fresh = torch.where(low <= high, fresh.clamp(low, high), fresh)
        elif source.ndim > 1:
            other = source[torch.randint(len(source), (rows,), generator=generator)]
            swap = torch.rand(fresh.shape, generator=generator) < 0.3
            fresh = torch.where(swap, other, fresh)
        made.append(fresh.to(tensor.device))
    return made


def _eager(model: MultiExitModel, staged: StagedModel, rows: list[Tensor]) -> list[Tensor]:
    """Logits of each kept exit for all rows, by the model itself."""
    found: list[list[Tensor]] = [[] for _ in staged.exits]
    with evaluating(model), torch.no_grad():
        for start in range(0, len(rows[0]), BATCHES[-1]):
            part_of = [v[start : start + BATCHES[-1]].clone() for v in rows]  # it may write there
            args, kwargs = staged.call.build(part_of)
            outputs = model(*args, **kwargs)
            for part, exit in zip(found, staged.exits, strict=True):
                part.append(outputs[exit].float().cpu())
    return [torch.cat(part) for part in found]


def _scored(
    policy: Policy, exits: Sequence[int], trace: Sequence[Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """(logits, score) of each exit as the criterion gives them."""
    state: tuple[Tensor, ...] = ()
    found = []
    with torch.no_grad():
        for exit, raw in zip(exits, trace, strict=True):
            logits, score, state = policy.criterion(raw, state, exit)
            found.append((logits, score))
    return found


def _between(score: Tensor) -> float:
    """A threshold that about half of the scores reach, and none is close to."""
    values = score.float().sort().values
    middle = values[len(values) // 4 : 3 * len(values) // 4]
    if middle[0] == middle[-1]:  # scores that count have few values
        middle = values
    gap = int((middle[1:] - middle[:-1]).argmax())
    return float((middle[gap] + middle[gap + 1]) / 2)


def _decide(
    scored: list[tuple[Tensor, Tensor]],
    exits: Sequence[int],
    thresholds: Sequence[float],
    allowed: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Logits, exit and score of each row; and whether some score lies too close to call."""
    logits, score = (value.clone() for value in scored[-1])
    exit = torch.full((len(score),), exits[-1])
    close = torch.zeros(len(score), dtype=torch.bool)
    earlier = list(zip(scored, exits, thresholds, strict=False))
    for (own, value), number, threshold in reversed(earlier):
        leaves = value >= threshold
        logits[leaves], score[leaves], exit[leaves] = own[leaves], value[leaves], number
        if math.isfinite(threshold):
            near = (value - threshold).abs() <= allowed * max(1.0, abs(threshold))
            close |= near & (value != value.round())  # counts are exact on every engine
    return logits.numpy(), exit.numpy(), score.numpy(), close.numpy()


def _same(
    got: Sequence[np.ndarray], wanted: Sequence[np.ndarray], mix: str, size: int, allowed: float
) -> float:
    """The largest relative difference of the logits; raises where answers differ."""
    logits, prediction, exit, _ = got
    own, taken, _, close = wanted
    clear = ~close
    what = None
    if (exit != taken)[clear].any():
        what = "takes other exits than"
    elif (prediction != logits.argmax(-1)).any():
        what = "predicts other classes than the logits of"
    far = distance(logits[clear], own[clear]) if clear.any() else 0.0
    if what is None and not far <= allowed:
        what = f"gives logits that are {far:.2g} (relative) from those of"
    if what is not None:
        raise EqualityError(
            f"The exported file {what} the model, in a batch of {size} with {mix!r}. Nothing was "
            "written. Run the model with engine='torch', and look for an operator that ONNX "
            "computes differently (random numbers, reductions over an empty batch)."
        )
    return far
