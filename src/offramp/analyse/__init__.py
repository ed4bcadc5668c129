"""What a policy does: intervals, overthinking, calibration error, baselines, pictures, verdict."""

from __future__ import annotations

from offramp.analyse.calibration import expected_calibration_error
from offramp.analyse.intervals import bootstrap, paired_difference, wilson
from offramp.analyse.overthinking import Overthinking, overthinking
from offramp.analyse.report import Report, evaluate

__all__ = [
    "Overthinking",
    "Report",
    "bootstrap",
    "evaluate",
    "expected_calibration_error",
    "overthinking",
    "paired_difference",
    "wilson",
]
