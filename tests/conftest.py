"""What all tests share."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, settings

from benchmarks.vision_packages import prepare

prepare()

# On a busy machine drawing an example may take long, which says nothing about what is tested.
settings.register_profile("offramp", suppress_health_check=[HealthCheck.too_slow], deadline=None)
settings.load_profile("offramp")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Tests do not depend on the order in which they run."""
    torch.manual_seed(0)
