"""What all tests share."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

# torchvision and what needs it lie apart from the other packages (see requirements-vision.txt).
_VISION = Path(sys.prefix) / "vision"
if _VISION.is_dir():
    sys.path.append(str(_VISION))

_OPERATORS = ("nms", "qnms")
_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_library: torch.library.Library | None = None


def _let_torchvision_load() -> None:
    """Name torchvision's compiled operators where they cannot load.

    Its wheels are compiled for one build of torch; beside another one (a CPU build, say) the
    compiled operators stay out, and then it stops at import because two of them have no name. The
    networks that are tested here use none of them.
    """
    global _library
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None:
        return
    try:
        torch.ops.load_library(next(Path(found.origin).parent.glob("_C*.so")))
    except (OSError, StopIteration):
        _library = torch.library.Library("torchvision", "FRAGMENT")
        for name in _OPERATORS:
            _library.define(name + _SCHEMA)


_let_torchvision_load()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Tests do not depend on the order in which they run."""
    torch.manual_seed(0)
