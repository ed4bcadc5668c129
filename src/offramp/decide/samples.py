"""Which samples a trace holds, so that what was fitted on some is not tested on them.

A sample is known by the bits of its logits at all exits. Where many samples have the same ones, as
where a network says only yes or no, or a data set holds the same image twice, that two traces have
some in common proves nothing: only more than there would be by chance does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from offramp.decide.trace import Trace

__all__ = ["Samples"]

CLEARLY = 3.0  # standard deviations


@dataclass(frozen=True, eq=False)
class Samples:
    """The samples of a trace.

    Attributes:
        fingerprint: of the whole trace.
        marks: (N,) int64, one of each sample.
    """

    fingerprint: str
    marks: Tensor

    @classmethod
    def of(cls, trace: Trace) -> Samples:
        """Those of a trace."""
        generator = torch.Generator().manual_seed(0)
        marks = torch.zeros(trace.num_samples, dtype=torch.int64)
        for logits in trace.logits:  # one exit at a time: the bits take twice the room as int64
            factors = torch.randint(2**62, (trace.num_classes,), generator=generator)
            bits = logits.contiguous().view(torch.int32).long()
            marks = marks * 0x5851F42D4C957F2D + bits @ (2 * factors + 1)  # modulo 2**64
        return cls(trace.fingerprint, marks)

    def overlap(self, trace: Trace) -> int:
        """How many samples of a trace are among these; 0 where that may well be chance.

        The samples that are equal within the two traces tell how many would be equal between them.
        """
        if trace.fingerprint == self.fingerprint:
            return trace.num_samples
        marks = Samples.of(trace).marks
        shared = int(torch.isin(marks, self.marks).sum())
        alike = sum(len(each) - len(each.unique()) for each in (marks, self.marks))
        chance = 2 * alike
        return shared if shared > chance + CLEARLY * (chance + 1) ** 0.5 else 0
