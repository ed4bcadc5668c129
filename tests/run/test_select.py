"""A batch of graphs as one large graph: samples are taken out by the user's function."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import offramp
from offramp.build.model import MultiExitModel, attach
from offramp.decide.policy import Policy
from offramp.errors import DataError, StageError
from offramp.run.runner import Runner

SIZES = (4, 7, 3, 6, 5, 8)


class Convolution(nn.Module):
    """Sums over the neighbours, then a small network, as in a GIN."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inside, outside)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        return torch.tanh(self.linear(x + torch.zeros_like(x).index_add(0, edges[1], x[edges[0]])))


class Pool(nn.Module):
    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, classes)

    def forward(self, x: Tensor, batch: Tensor, graphs: Tensor) -> Tensor:
        total = x.new_zeros(graphs.shape[0], x.shape[1]).index_add(0, batch, x)
        return self.linear(total)


class Graphs(nn.Module):
    def __init__(self, width: int = 12, classes: int = 4) -> None:
        super().__init__()
        widths = [5, width, width, width]
        pairs = zip(widths[:-1], widths[1:], strict=True)
        self.convolutions = nn.ModuleList(Convolution(a, b) for a, b in pairs)
        self.pool = Pool(width, classes)

    def forward(self, x: Tensor, edges: Tensor, batch: Tensor, graphs: Tensor) -> Tensor:
        for convolution in self.convolutions:
            x = convolution(x, edges)
        return self.pool(x, batch, graphs)


def select(
    rows: Tensor, x: Tensor, edges: Tensor, batch: Tensor, graphs: Tensor
) -> dict[str, Tensor]:
    order = torch.full((len(graphs),), -1)
    order[rows] = torch.arange(len(rows))
    kept = order[batch] >= 0
    number = torch.cumsum(kept, 0) - 1
    return {
        "x": x[kept],
        "edges": number[edges[:, kept[edges[0]]]],
        "batch": order[batch[kept]],
        "graphs": graphs[rows],
    }


def graphs(seed: int = 0, sizes: tuple[int, ...] = SIZES) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    batch = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    same = batch[:, None] == batch[None, :]
    edges = (same & (torch.rand(same.shape, generator=generator) < 0.5)).nonzero().T
    x = torch.randn(len(batch), 5, generator=generator)
    return {"x": x, "edges": edges, "batch": batch, "graphs": torch.arange(len(sizes))}


def made(select: Any = select) -> MultiExitModel:  # noqa: ANN401
    torch.manual_seed(0)
    return attach(
        Graphs(),
        graphs(),
        exits=["convolutions.0", "convolutions.1"],
        heads=[Pool(12, 4), Pool(12, 4)],
        select=select,
    ).eval()


@pytest.mark.parametrize("engine", ["torch", "onnxruntime"])
def test_each_graph_gets_what_it_gets_alone(engine: str) -> None:
    model, x = made(), graphs(1, (5, 3, 6, 4, 7))
    with torch.no_grad():
        alone = [model(**select(torch.tensor([i]), **x)) for i in range(5)]
    scores = torch.tensor([[own.softmax(-1).max() for own in outputs] for outputs in alone])
    thresholds = [float(scores[:, 0].median()) - 1e-4, float(scores[:, 1].median()) - 1e-4]
    runner = Runner(model, Policy("confidence", thresholds), graphs(), engine=engine)
    runner.times = type(runner.times).none()  # compact at every exit
    result = runner(**x)
    taken = []
    for i, outputs in enumerate(alone):
        exit = next((k for k in (0, 1) if scores[i, k] >= thresholds[k]), 2)
        taken.append(exit)
        assert torch.allclose(result.logits[i], outputs[exit][0], atol=1e-5)
    assert result.exit.tolist() == taken
    assert len(set(taken)) > 1


def test_no_exit_taken_is_the_whole_network_bit_by_bit() -> None:
    model, x = made(), graphs(2, (3, 9, 4))
    outputs = Runner(model, Policy("confidence", [0.9, 0.9]), graphs()).all_exits(**x)
    with torch.no_grad():
        assert torch.equal(outputs.final, model.backbone(**x))


def test_more_graphs_than_fit_are_run_in_pieces() -> None:
    runner = Runner(made(), Policy("confidence", [0.5, 0.6]), graphs())
    x = graphs(3)
    at_once = runner(**x)
    runner.max_batch = 2
    pieces = runner(**x)
    assert torch.equal(at_once.exit, pieces.exit)
    assert torch.allclose(at_once.logits, pieces.logits, atol=1e-5)


def test_graphs_are_learnt_and_recorded() -> None:
    model = made()
    batches = [(graphs(seed), torch.randint(0, 4, (len(SIZES),))) for seed in range(4)]
    offramp.fit(model, batches[:3], epochs=1)
    trace = offramp.record(model, batches[3:])
    assert trace.logits.shape == (3, len(SIZES), 4)
    with torch.no_grad():
        wanted = model.eval()(**batches[3][0])
    assert torch.allclose(torch.as_tensor(trace.logits), torch.stack(list(wanted)), atol=1e-6)
    runner = Runner(model, Policy("confidence", [0.5, 0.6]), graphs(), exits="all")
    again = offramp.record(runner, batches[3:])
    assert torch.allclose(torch.as_tensor(again.logits), torch.as_tensor(trace.logits), atol=1e-6)


def test_a_select_that_fails_is_named() -> None:
    with pytest.raises(DataError, match="select function fails on rows"):
        Runner(made(lambda rows, x: x), Policy("confidence", [0.5, 0.6]), graphs())


def test_a_select_of_another_structure_is_named() -> None:
    with pytest.raises(DataError, match="expected the structure"):
        Runner(made(lambda rows, **x: x["x"]), Policy("confidence", [0.5, 0.6]), graphs())


def test_one_file_cannot_select(tmp_path: Any) -> None:  # noqa: ANN401
    with pytest.raises(StageError, match="select function of Python"):
        offramp.export(made(), Policy("confidence", [0.5, 0.6]), graphs(), tmp_path / "graphs")
    assert not list(tmp_path.iterdir())


def test_features_of_another_width_are_refused() -> None:
    runner = Runner(made(), Policy("confidence", [0.5, 0.6]), graphs())
    x = graphs()
    with pytest.raises(DataError, match="'x'"):
        runner(**{**x, "x": torch.randn(len(x["x"]), 6)})
