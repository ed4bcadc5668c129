"""Heads in a cascade: an exit also sees what the exit before it said.

"Zero Time Waste" (Wołczyk et al., NeurIPS 2021, section 3.1) hands the output of an exit to the
last layer of the next one, so that what is known already need not be found again. No gradient flows
back through it: an exit answers for itself.
"""

from __future__ import annotations

from torch import Tensor, nn

from offramp.build.heads import asked_inputs

__all__ = ["PREVIOUS", "CascadeHead", "asked_of", "cascaded", "core"]

# Under this name a head is given the logits of the exit before.
PREVIOUS = "previous_logits"


class CascadeHead(nn.Module):
    """Any head, and a linear layer on the logits of the exit before.

    ``head(feature) + W previous``. Where the head ends in a linear layer, as all of the library's
    do, this is that layer on its input joined with the previous logits. ``W`` starts at 0: an
    untrained cascade answers as its heads do.

    Args:
        head: from a feature to ``(B, C)`` logits.
        logits: ``(B, C)`` of the head, for their width, type and device.
    """

    def __init__(self, head: nn.Module, logits: Tensor) -> None:
        super().__init__()
        self.head = head
        classes, kind = logits.shape[-1], {"device": logits.device, "dtype": logits.dtype}
        # No random number is drawn: the heads are those that the seed gives without a cascade.
        self.link = nn.utils.skip_init(nn.Linear, classes, classes, bias=False, **kind)
        nn.init.zeros_(self.link.weight)

    def forward(self, feature: Tensor, previous_logits: Tensor, **inputs: Tensor) -> Tensor:
        """The feature, ``(B, C)`` of the exit before, what the head asks for: to ``(B, C)``."""
        logits: Tensor = self.head(feature, **inputs) + self.link(previous_logits)
        return logits


def cascaded(head: nn.Module, logits: Tensor) -> nn.Module:
    """The head in a cascade. One that asks for ``previous_logits`` itself stays as it is.

    Args:
        head: not yet in a cascade.
        logits: ``(B, C)`` that it gave.
    """
    return head if PREVIOUS in asked_inputs(head) else CascadeHead(head, logits)


def core(head: nn.Module) -> nn.Module:
    """The head that classifies the feature, without the cascade around it."""
    return head.head if isinstance(head, CascadeHead) else head


def asked_of(head: nn.Module) -> tuple[str, ...]:
    """Names of what a head wants beside its feature, also of one inside a cascade."""
    own = asked_inputs(core(head))
    return own if core(head) is head else (*own, PREVIOUS)
