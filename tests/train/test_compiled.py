"""A compiled backbone: features are captured wherever the compiler was asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import offramp
from offramp.build.model import MultiExitModel
from offramp.train.loop import fit
from offramp.train.schemes import Layerwise, Mixed
from tests.train.tiny import FEATURES, NormNet, data_of, digests, loader_of

pytestmark = [
    # While attach() watches a pass, torch 2.13's compiler makes weak references that it does not
    # fill in; what they say when they are thrown away has no consequence.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    # The compiler itself looks at the gradient of a feature, and is built on a deprecated part.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated"),
]

PLACES = ["blocks.0", "blocks.1"]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch.compiler.reset()


def attached(net: nn.Module, places: list[str] = PLACES) -> MultiExitModel:
    example = torch.randn(4, FEATURES, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    return offramp.attach(net, example, exits=places)


def network() -> NormNet:
    torch.manual_seed(0)
    return NormNet(dropout=0.0)


def wrapped_before(backend: str) -> MultiExitModel:
    net: Any = torch.compile(network(), backend=backend)
    return attached(net, [f"_orig_mod.{place}" for place in PLACES])


def wrapped_and_run_before(backend: str) -> MultiExitModel:
    """What was compiled without hooks must be compiled again."""
    net: Any = torch.compile(network(), backend=backend)
    net.eval()(data_of(8)[0])
    return attached(net, [f"_orig_mod.{place}" for place in PLACES])


def in_place_before(backend: str) -> MultiExitModel:
    net = network()
    net.compile(backend=backend)
    return attached(net)


def blocks_before(backend: str) -> MultiExitModel:
    net = network()
    for block in net.blocks:
        block.compile(backend=backend)
    return attached(net)


def model_after(backend: str) -> MultiExitModel:
    model = attached(network())
    model.compile(backend=backend)
    return model


def backbone_after(backend: str) -> MultiExitModel:
    model = attached(network())
    model.backbone.compile(backend=backend)
    return model


WAYS: list[Callable[[str], MultiExitModel]] = [
    wrapped_before,
    wrapped_and_run_before,
    in_place_before,
    blocks_before,
    model_after,
    backbone_after,
]


def values(model: nn.Module) -> list[str]:
    return list(digests(model).values())


@pytest.mark.parametrize(
    ("way", "scheme"),
    [*((way, Mixed()) for way in WAYS), (wrapped_before, Layerwise()), (model_after, Layerwise())],
)
def test_a_compiled_backbone_trains_as_it_does_without(
    way: Callable[[str], MultiExitModel], scheme: Any
) -> None:
    """To the bit, as this backend runs the captured graph by the same kernels."""
    plain, compiled = attached(network()), way("eager")
    torch._dynamo.utils.counters.clear()
    for model in (plain, compiled):
        fit(model, loader_of(), scheme=scheme, epochs=3, progress=False, accelerator="cpu")
    if way in (model_after, backbone_after):  # before, the compiler gives up while attach() watches
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    assert values(plain) == values(compiled)
    x, _ = data_of(12, seed=3)
    with torch.no_grad():
        for one, other in zip(plain(x), compiled(x), strict=True):
            torch.testing.assert_close(one, other)


def test_what_was_compiled_is_recorded_run_and_exported(tmp_path: Path) -> None:
    model = wrapped_before("eager")
    x, y = data_of(40, seed=3)
    trace = offramp.record(model, [(x, y)])
    policy = offramp.Policy("confidence", [0.4, 0.4])
    result = offramp.Runner(model, policy, x[:4])(x)
    last = torch.as_tensor(result.exit) == 2
    assert 0 < last.sum() < 40
    torch.testing.assert_close(result.logits[last], trace.logits[2][last], rtol=1e-5, atol=1e-5)
    offramp.export(model, policy, x[:4], tmp_path / "net.offramp")


@pytest.mark.slow
@pytest.mark.parametrize("way", [wrapped_before, model_after])
def test_inductor_is_near(way: Callable[[str], MultiExitModel]) -> None:
    plain, compiled = attached(network()), way("inductor")
    sgd = lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9)  # noqa: E731
    for model in (plain, compiled):
        fit(model, loader_of(), epochs=2, optimizer=sgd, progress=False, accelerator="cpu")
    pairs = zip(plain.state_dict().values(), compiled.state_dict().values(), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
