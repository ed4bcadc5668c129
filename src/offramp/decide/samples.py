"""Which samples a trace holds, so that what was fitted on some is not tested on them.

A sample is known by the hash of its input, where both traces have kept that, as recorded ones do;
else by the bits of its logits at the last exit (which stays when others are left out, but may be
others at another batch size), where only one sample has them. That two traces have some in common
still proves nothing where samples are alike, as where a data set holds the same image twice: only
more than there would be by chance does.
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
CHUNK = 1 << 16  # samples at a time


@dataclass(frozen=True, eq=False)
class Samples:
    """The samples of a trace.

    Attributes:
        fingerprint: of the whole trace.
        marks: (N,) int64, one of each sample's logits.
        inputs: (N,) int64, one of each sample's input, or ``None``.
    """

    fingerprint: str
    marks: Tensor
    inputs: Tensor | None

    @classmethod
    def of(cls, trace: Trace) -> Samples:
        """Those of a trace."""
        generator = torch.Generator().manual_seed(0)
        factors = 2 * torch.randint(2**62, (trace.num_classes,), generator=generator) + 1
        parts = trace.logits[-1].split(CHUNK)
        marks = [part.view(torch.int32).long() @ factors for part in parts]  # modulo 2**64
        return cls(trace.fingerprint, torch.cat(marks), trace.inputs)

    def overlap(self, trace: Trace) -> int:
        """How many samples of a trace are among these; 0 where that may well be chance.

        Of samples that are drawn independently, a kind that comes once in each of two traces is no
        likelier than one that comes twice in one of them: those are counted to know what is chance.
        """
        if trace.fingerprint == self.fingerprint:
            return trace.num_samples
        known: tuple[Tensor, Tensor] = (self.marks, trace.samples.marks)
        if self.inputs is not None and trace.inputs is not None:
            known = (self.inputs, trace.inputs)
        found = [marks.unique(return_counts=True) for marks in known]
        own, other = (marks[counts == 1] for marks, counts in found)
        shared = int(torch.isin(other, own).sum())
        chance = 2 * sum(int((counts == 2).sum()) for _, counts in found)
        return shared if shared > chance + CLEARLY * (chance + 1) ** 0.5 else 0
