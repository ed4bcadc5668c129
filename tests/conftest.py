"""What all tests share."""

from __future__ import annotations

import pytest
import torch

from benchmarks.vision_packages import prepare

prepare()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Tests do not depend on the order in which they run."""
    torch.manual_seed(0)
