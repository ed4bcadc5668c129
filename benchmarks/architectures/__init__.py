"""The architectures that the coverage benchmark takes through the whole path.

Each is as small as its family allows, has random weights, and is built when it is asked for.
"""

from __future__ import annotations

from benchmarks.architectures.entry import Architecture
from benchmarks.architectures.others import OTHERS
from benchmarks.architectures.timm_list import TIMM
from benchmarks.architectures.torchvision_list import TORCHVISION
from benchmarks.architectures.transformers_list import TRANSFORMERS

__all__ = ["ARCHITECTURES", "Architecture"]

ARCHITECTURES: dict[str, Architecture] = {
    one.name: one for one in (*TIMM, *TORCHVISION, *TRANSFORMERS, *OTHERS)
}
