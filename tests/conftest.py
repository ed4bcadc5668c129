"""What all tests share."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch.onnx._internal.exporter import _registration

from benchmarks.vision_packages import prepare
from offramp.decide.criteria import base

prepare()

# On a busy machine drawing an example may take long, which says nothing about what is tested.
settings.register_profile("offramp", suppress_health_check=[HealthCheck.too_slow], deadline=None)
settings.load_profile("offramp")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Tests do not depend on the order in which they run."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _own_criteria(monkeypatch: pytest.MonkeyPatch) -> None:
    """A criterion defined in a test or a document's code is known there alone."""
    monkeypatch.setattr(base, "_REGISTER", dict(base._REGISTER))


@pytest.fixture(autouse=True, scope="session")
def _operators_known() -> Iterator[None]:
    """torch makes its table of operators anew for every export, which takes a second or two."""
    made, patch = _registration.ONNXRegistry.from_torchlib, pytest.MonkeyPatch()
    patch.setattr(_registration.ONNXRegistry, "from_torchlib", staticmethod(cache(made)))
    yield
    patch.undo()
