"""On an accelerator: device kept, few waits, few batch sizes. Skipped where there is none."""

from __future__ import annotations

import copy
import dataclasses
import math
import shutil
import warnings
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import offramp
from offramp.build.model import MultiExitModel
from offramp.decide.policy import Policy
from offramp.errors import DataError
from offramp.run.engines import Torch
from offramp.run.evaluating import full_precision
from offramp.run.proof import TOLERANCE
from offramp.run.runner import Runner
from offramp.run.times import StageTimes
from tests.networks import example_of
from tests.run.conftest import KINDS, case, rows_of
from tests.run.test_engines import far, medians

device = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
kinds = pytest.mark.parametrize("kind", KINDS)


def on_device(kind: str, rows: int, seed: int = 1) -> Tensor | dict[str, Tensor]:
    x = example_of(kind, rows, seed)
    return {k: v.cuda() for k, v in x.items()} if isinstance(x, dict) else x.cuda()


@cache
def model_on_device(kind: str) -> MultiExitModel:
    return copy.deepcopy(case(kind).model).cuda()


@cache
def runner_on_device(kind: str, engine: str = "torch") -> Runner:
    policy = Policy("confidence", medians(kind))
    runner = Runner(model_on_device(kind), policy, on_device(kind, 5), engine=engine)
    runner.times = StageTimes.none()  # it always compacts
    return runner


def said(kind: str, x: Tensor | dict[str, Tensor]) -> list[Tensor]:
    with torch.no_grad():
        model = model_on_device(kind)
        return list((model(**x) if isinstance(x, dict) else model(x)).logits)


@device
@kinds
def test_no_exit_taken_gives_the_bits_of_the_model(kind: str) -> None:
    runner = runner_on_device(kind).under(Policy("confidence", [math.inf, math.inf]))
    for size in (1, 5, 64):
        x = on_device(kind, size, seed=size)
        result = runner(x)
        assert torch.equal(result.logits, said(kind, x)[-1])
        assert all(v.is_cuda for v in dataclasses.asdict(result).values())


@device
@kinds
def test_rows_get_what_they_get_alone(kind: str) -> None:
    runner = runner_on_device(kind)
    x = on_device(kind, 40, seed=2)
    with full_precision():
        result, logits = runner(x), torch.stack(said(kind, x))
        assert result.exit.unique().tolist() == [0, 1, 2]
        wanted = logits[result.exit, torch.arange(40, device="cuda")]
        assert far(result.logits, wanted) <= TOLERANCE[False]
        for row in range(0, 40, 7):
            alone = runner(rows_of(x, slice(row, row + 1)))
            assert alone.exit[0] == result.exit[row]
            assert far(alone.logits[0], result.logits[row]) <= TOLERANCE[False]


@device
@kinds
def test_what_is_given_on_the_processor_is_answered_there(kind: str) -> None:
    runner, x = runner_on_device(kind), example_of(kind, 9)
    arrays = {k: v.numpy() for k, v in x.items()} if isinstance(x, dict) else x.numpy()
    ours, numpy = runner(x), runner(arrays)
    assert all(v.is_cpu for v in dataclasses.asdict(ours).values())
    assert all(isinstance(v, np.ndarray) for v in dataclasses.asdict(numpy).values())
    assert far(ours.logits, torch.from_numpy(numpy.logits)) <= TOLERANCE[False]


@device
def test_a_runner_on_the_processor_answers_what_lies_on_a_device() -> None:
    one = case("cnn")
    runner = Runner(one.model, Policy("confidence", medians("cnn")), one.example)
    for seed in range(20):  # a copy that is not waited for would be read too early
        x = example_of("cnn", 256, seed=seed)
        ours, theirs = runner(x), runner(x.cuda())
        assert all(v.is_cuda for v in dataclasses.asdict(theirs).values())
        assert torch.equal(ours.logits, theirs.logits.cpu())


@device
@kinds
def test_an_exit_waits_for_the_device_once(kind: str) -> None:
    runner = runner_on_device(kind)
    x = on_device(kind, 40, seed=2)
    assert runner(x).exit.unique().tolist() == [0, 1, 2]
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as waits:
        warnings.simplefilter("always")
        try:
            torch.cuda.set_sync_debug_mode("warn")
            runner(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [w for w in waits if "synchronizing CUDA operation" in str(w.message)]
    assert 1 <= len(waits) <= 3, [str(w.message) for w in waits]


@device
def test_steps_see_few_batch_sizes() -> None:
    runner = runner_on_device("cnn")
    other = runner.under(runner.policy)
    seen: set[int] = set()

    def noting(call: object) -> object:
        def noted(values: list[Tensor]) -> list[Tensor]:
            found = call(values)
            seen.add(len(found[0]))
            return found

        return noted

    other._calls = [noting(call) for call in runner._calls]
    for size in range(33, 64):
        other(on_device("cnn", size, seed=size))
    few = {size for size in seen if size < 33}
    assert few
    assert few <= {1, 2, 4, 8, 16, 32}


@device
def test_precision_of_the_process_is_left_as_it_was() -> None:
    before = torch.backends.cudnn.conv.fp32_precision
    Runner(model_on_device("cnn"), Policy.final(), on_device("cnn", 5))
    assert torch.backends.cudnn.conv.fp32_precision == before


def test_a_wider_choice_of_precision_still_holds_afterwards() -> None:
    backends: Any = torch.backends
    kinds = (backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul)
    before, own = backends.fp32_precision, [kind.fp32_precision for kind in kinds]
    try:
        for kind in kinds:
            kind.fp32_precision = "none"
        backends.fp32_precision = "tf32"
        with full_precision(), full_precision():  # a runner may be made within
            assert {kind.fp32_precision for kind in kinds} == {"ieee"}
        assert {kind.fp32_precision for kind in kinds} == {"tf32"}
        backends.fp32_precision = "ieee"
        assert {kind.fp32_precision for kind in kinds} == {"ieee"}
    finally:
        backends.fp32_precision = before
        for kind, value in zip(kinds, own, strict=True):
            kind.fp32_precision = value


def test_on_the_processor_no_precision_is_touched() -> None:
    seen: set[str] = set()
    cudnn: Any = torch.backends.cudnn

    class Switching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(12, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            seen.add(
                f"{cudnn.conv.fp32_precision}, {cudnn.allow_tf32}"
            )  # the older one can be read
            return self.last(self.first(x))

    before = f"{cudnn.conv.fp32_precision}, {cudnn.allow_tf32}"
    model = offramp.attach(Switching().eval(), torch.randn(4, 12), exits=["first"])
    seen.clear()
    Runner(model, Policy("confidence", [0.5]), torch.randn(4, 12))
    assert seen == {before}


@device
def test_logits_that_are_not_finite_are_refused() -> None:
    x = on_device("cnn", 5).clone()
    x[3] = math.nan
    with pytest.raises(DataError, match="row"):
        runner_on_device("cnn")(x)


@device
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, where inductor is imported
def test_inductor_answers_as_eager_torch_does() -> None:
    if shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler, and there is no g++")
    x = on_device("mlp", 40, seed=2)
    compiled, eager = runner_on_device("mlp", "inductor"), runner_on_device("mlp")
    with full_precision():
        result, wanted = compiled(x), eager(x)
    assert torch.equal(result.exit, wanted.exit)
    assert far(result.logits, wanted.logits) <= TOLERANCE[False]


@device
def test_training_and_recording_use_the_device_and_leave_the_model_where_it_was() -> None:
    model = copy.deepcopy(case("cnn").model)
    x = example_of("cnn", 64)
    batches = [(x[i : i + 16], torch.arange(i, i + 16) % 5) for i in range(0, 64, 16)]
    places: set[str] = set()
    hook = model.heads[0].register_forward_hook(lambda _, __, out: places.add(out.device.type))
    offramp.fit(model, batches, epochs=1, progress=False)
    assert places == {"cuda"}
    assert all(p.is_cpu for p in model.parameters())
    hook.remove()
    fresh = [example_of("cnn", 16, seed=9)]
    here = offramp.record(model, fresh, progress=False)
    there = offramp.record(model, fresh, progress=False, device="cuda")
    assert far(there.logits, here.logits) <= 1e-2  # convolutions by TF32


class Counting(Torch):
    """Eager torch that counts how often it waits."""

    def __init__(self) -> None:
        self.waits = 0

    def host(self, value: Tensor) -> np.ndarray:
        self.waits += 1
        return super().host(value)


@kinds
@pytest.mark.parametrize("rows", [1, 12])
def test_values_come_from_the_engine_once_an_exit(kind: str, rows: int) -> None:
    one, engine = case(kind), Counting()
    runner = Runner(one.model, Policy("confidence", [0.5, 0.5]), one.example, engine=engine)
    for thresholds, most in (([math.inf] * 2, 3), ([-math.inf] * 2, 2), (medians(kind), 3)):
        other = runner.under(Policy("confidence", thresholds))
        engine.waits = 0
        other(example_of(kind, rows, seed=2))
        assert 1 <= engine.waits <= most
