"""Prototype heads: distances in every type of number."""

from __future__ import annotations

import pytest
import torch

from offramp.build.prototypes import PrototypeHead

LABELS = torch.arange(20).repeat(5)


@pytest.fixture
def case():
    generator = torch.Generator().manual_seed(0)
    means = 4 * torch.rand(20, 512, generator=generator)
    return means, means[LABELS] + 0.15 * torch.randn(100, 512, generator=generator)


def fitted(means, points):
    head = PrototypeHead(20)
    head(points)
    head.means.copy_(means)
    return head


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_nearest_class_is_found_in_any_type(case, kind):
    means, points = case
    logits = fitted(means, points.to(kind))(points.to(kind))
    assert logits.dtype == kind
    assert torch.equal(logits.argmax(1), LABELS)
    exact = -torch.cdist(points.double(), means.double())
    torch.testing.assert_close(logits.double(), exact, rtol=0.01, atol=0.05)


def test_autocast_takes_no_digits(case):
    means, points = case
    head = fitted(means, points)
    with torch.autocast("cpu", torch.bfloat16):
        logits = head(points)
    assert torch.equal(logits, head(points))


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_it_exports_without_a_switch_of_autocast(case, kind):
    means, points = case
    head = fitted(means, points.to(kind))
    batch = torch.export.Dim("batch", min=1, max=200)
    program = torch.export.export(head, (points[:3].to(kind),), dynamic_shapes=({0: batch},))
    assert not any("autocast" in str(node.target) for node in program.graph.nodes)
    assert torch.equal(program.module()(points.to(kind)), head(points.to(kind)))
