"""Lets torchvision, and timm that needs it, be imported where their compiled operators do not fit.

Call :func:`prepare` before the import. The tests and the benchmarks share it.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch

__all__ = ["prepare"]

_OPERATORS = ("nms", "qnms")
_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_prepared = False
_library: torch.library.Library | None = None  # what it defines lives as long as it


def prepare() -> None:
    """Find torchvision and name its compiled operators where they cannot load.

    Its wheels are compiled for one build of torch; beside another one (a CPU build, say) the
    compiled operators stay out, and then it stops at import because two of them have no name. The
    networks that are used here need none of them.
    """
    global _library, _prepared
    if _prepared:
        return
    _prepared = True
    apart = Path(sys.prefix) / "vision"  # where the Makefile puts them: see requirements-vision.txt
    if apart.is_dir():
        sys.path.append(str(apart))
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None:
        return
    try:
        torch.ops.load_library(next(Path(found.origin).parent.glob("_C*.so")))
    except (OSError, StopIteration):
        _library = torch.library.Library("torchvision", "FRAGMENT")
        for name in _OPERATORS:
            _library.define(name + _SCHEMA)
