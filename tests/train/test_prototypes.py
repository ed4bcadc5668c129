"""Prototype heads: class means by hand, the whole path to a file, and what is refused."""

from __future__ import annotations

import onnxruntime
import pytest
import torch
from torch import nn

import offramp
from offramp.build.prototypes import PrototypeHead
from offramp.decide import calibrate, record, replay
from offramp.errors import DataError, HeadError
from offramp.train import fit_prototypes


def blobs(rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Three classes of maps around patterns of their own."""
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.randn(3, 4, 6, 6, generator=torch.Generator().manual_seed(9))
    labels = torch.randint(0, 3, (rows,), generator=generator)
    return patterns[labels] + 0.5 * torch.randn(rows, 4, 6, 6, generator=generator), labels


def network(**settings: bool) -> offramp.MultiExitModel:
    torch.manual_seed(0)
    backbone = nn.Sequential(
        nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU()),
        nn.Flatten(),
        nn.Linear(16 * 36, 3),
    )
    heads = [PrototypeHead(3), PrototypeHead(3)]
    return offramp.attach(backbone, blobs(4, 0)[0], exits=["0", "1"], heads=heads, **settings)


def loader(rows: int, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    x, y = blobs(rows, seed)
    return list(zip(x.split(50), y.split(50), strict=True))


def test_means_and_distances_are_those_by_hand():
    model = network()
    before = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    fit_prototypes(model, loader(230, 1))
    x, y = blobs(230, 1)
    with torch.no_grad():
        features, _ = model.features(x)
        logits = model(x).logits
    for k in range(2):
        points = features[k].mean((2, 3))
        means = torch.stack([points[y == c].mean(0) for c in range(3)])
        torch.testing.assert_close(model.heads[k].means, means)
        torch.testing.assert_close(logits[k], -torch.cdist(points, means), atol=1e-4, rtol=1e-4)
    assert all(torch.equal(before[n], v) for n, v in model.backbone.state_dict().items())
    assert model.training


def test_every_head_of_a_cascade_gets_its_means():
    alone, linked = network(), network(cascade=True)
    fit_prototypes(alone, loader(230, 1))
    fit_prototypes(linked, loader(230, 1))
    assert float(alone.heads[1].means.abs().max()) > 0
    assert torch.equal(linked.heads[0].means, alone.heads[0].means)
    assert torch.equal(linked.heads[1].head.means, alone.heads[1].means)


def test_from_features_to_a_file(tmp_path):
    model = network()
    fit_prototypes(model, loader(300, 1))
    trace = record(model, loader(300, 2), progress=False)
    assert float((trace.logits[1].argmax(1) == trace.labels).double().mean()) > 0.9
    assert record(model, loader(300, 1), progress=False).source == "training"
    policy = calibrate(trace, "class_mean", max_cost=0.7)
    x, _ = blobs(40, 3)
    offramp.export(model, policy, x[:4], tmp_path / "p.offramp")
    session = onnxruntime.InferenceSession(str(tmp_path / "p.offramp" / "model.onnx"))
    found = dict(
        zip(
            [node.name for node in session.get_outputs()],
            session.run(None, {session.get_inputs()[0].name: x.numpy()}),
            strict=True,
        )
    )
    wanted = replay(record(model, [(x, torch.zeros(40, dtype=torch.long))], progress=False), policy)
    assert found["exit"].tolist() == wanted.exit.tolist()
    assert found["prediction"].tolist() == wanted.prediction.tolist()
    assert len(set(found["exit"].tolist())) > 1


@pytest.mark.parametrize("shape", [(4, 7), (4, 9, 7), (4, 7, 5, 5), (4, 7, 3, 5, 5)])
def test_any_common_shape_of_feature(shape):
    head = PrototypeHead(3)
    assert head(torch.randn(shape)).shape == (4, 3)
    assert head.means.shape == (3, 7)


def test_refusals():
    x, _ = blobs(20, 0)
    with pytest.raises(DataError, match="no sample of class 1, 2, so its mean"):
        fit_prototypes(network(), [(x, torch.zeros(20, dtype=torch.long))])
    with pytest.raises(DataError, match="The loader has no labels"):
        fit_prototypes(network(), [x])
    bare = offramp.attach(
        nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)), torch.randn(4, 4), exits=1
    )
    with pytest.raises(HeadError, match="found no PrototypeHead in the model"):
        fit_prototypes(bare, [(torch.randn(4, 4), torch.zeros(4, dtype=torch.long))])


def test_prototype_heads_are_not_for_gradients():
    with pytest.raises(
        DataError, match=r"'heads' has nothing to train: .* no parameters.*fit_proto"
    ):
        offramp.fit(network(), loader(50, 1), scheme="heads", epochs=1, progress=False)
    offramp.fit(network(), loader(50, 1), scheme="joint", epochs=1, progress=False)
