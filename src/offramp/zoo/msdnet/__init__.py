"""Multi-Scale Dense Networks (Huang et al., ICLR 2018)."""

from __future__ import annotations

from offramp.zoo.msdnet.classifiers import ANYTIME, BUDGETED, msdnet
from offramp.zoo.msdnet.network import Classifier, MSDNet

__all__ = ["ANYTIME", "BUDGETED", "Classifier", "MSDNet", "msdnet"]
