"""BranchyNet (Teerapittayanon et al., ICPR 2016)."""

from __future__ import annotations

from offramp.zoo.branchynet.networks import alexnet, b_alexnet, b_lenet, b_resnet, lenet
from offramp.zoo.branchynet.screening import GRID, Screened, screen, screen_all

__all__ = [
    "GRID",
    "Screened",
    "alexnet",
    "b_alexnet",
    "b_lenet",
    "b_resnet",
    "lenet",
    "screen",
    "screen_all",
]
