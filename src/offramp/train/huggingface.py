"""A multi-exit model as Hugging Face's Trainer wants it. Imports no transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from offramp.build.model import MultiExitModel
from offramp.build.outputs import ExitOutputs
from offramp.errors import DataError
from offramp.train.objectives import (
    Boosting,
    CrossEntropy,
    Distill,
    ExitLoss,
    ExitsSoFar,
    Matched,
    judged_outputs,
)

__all__ = ["HuggingFaceModule", "exit_accuracies"]

ScalarLoss = Callable[[ExitOutputs, Tensor], Tensor]


class HuggingFaceModule(nn.Module):
    """A multi-exit model for ``transformers.Trainer``: ``module(**batch)`` is a dictionary.

    ::

        trainer = transformers.Trainer(
            HuggingFaceModule(model),
            transformers.TrainingArguments(remove_unused_columns=False),
            train_dataset=data,
            compute_metrics=exit_accuracies,
        )

    The ``Trainer`` takes the first element of what is no dictionary for the loss, and the outputs
    of a multi-exit model begin with the logits of exit 0; hence this module. It also says that the
    loss is a mean over the batch, without which accumulated gradients would be too large.
    ``remove_unused_columns=False`` is needed, as the inputs are the backbone's and cannot be read
    from this module's signature. The model is trained in place; nothing is frozen but what has
    ``requires_grad=False``. Leave ``label_smoothing_factor`` of the ``Trainer`` out: labels are
    smoothed by ``loss=ExitLoss(CrossEntropy(label_smoothing=0.1))``.

    Which samples were trained on is not remembered here, as the ``Trainer`` does not tell epochs
    apart: ``model.training_fingerprints`` stays empty, and :func:`offramp.record` cannot tell
    training data.

    Args:
        model: from :func:`offramp.attach`.
        loss: function from the outputs and ``(B,)`` labels to a scalar, such as
            :class:`offramp.train.ExitLoss`; the mean of the exits' cross entropies if not given.

    Raises:
        DataError: ``model`` is no multi-exit model, or ``loss`` is an objective, which gives a term
            for every exit and sample.

    Attributes:
        model: as it was given.
        accepts_loss_kwargs: for the ``Trainer``: the loss is not divided by a number of items.
    """

    accepts_loss_kwargs = False

    def __init__(self, model: MultiExitModel, loss: ScalarLoss | None = None) -> None:
        super().__init__()
        if not isinstance(model, MultiExitModel):
            raise DataError(
                f"HuggingFaceModule takes a MultiExitModel, but got a {type(model).__name__}. "
                "Give it exits first: model = offramp.attach(backbone, example)."
            )
        if isinstance(loss, CrossEntropy | Distill | Boosting | Matched | ExitsSoFar):
            raise DataError(
                f"HuggingFaceModule got the objective {type(loss).__name__}, which gives a term "
                "for every exit and sample. Expected a function to a scalar: "
                f"ExitLoss({type(loss).__name__}(...))."
            )
        self.model = model
        self.loss = loss
        self.register_state_dict_post_hook(_unshare)  # type: ignore[no-untyped-call]

    def forward(self, labels: Tensor | None = None, **inputs: Any) -> dict[str, Tensor]:  # noqa: ANN401
        """Loss and logits.

        Args:
            labels: ``(B,)`` class indices.
            **inputs: of the backbone, by keyword.

        Returns:
            ``logits`` ``(B, E, C)`` of all exits, the batch first as the ``Trainer`` joins batches;
            ``loss``, a scalar, before it where labels were given. In evaluation mode, where the
            loss is an :class:`ExitLoss` of :class:`Boosting`, the logits are the running sums, by
            which such a network answers.
        """
        if labels is None or self.loss is not None:
            outputs = self.model(**inputs)
        else:
            outputs = self.model(**inputs, labels=labels)
        answers: Sequence[Tensor] = list(outputs)
        if not self.training and isinstance(self.loss, ExitLoss):
            answers = judged_outputs(self.loss.objective, answers)
        made = {"logits": torch.stack(list(answers), 1)}
        if labels is None:
            return made
        loss = outputs.loss if self.loss is None else self.loss(outputs, labels)
        return {"loss": loss, **made}


def _unshare(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:  # noqa: ANN401
    """Tied weights are written whole under each name: safetensors refuses shared memory."""
    seen: set[tuple[torch.device, int]] = set()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            continue
        place = value.device, value.untyped_storage().data_ptr()
        if place in seen:
            state[name] = value.clone()
        seen.add(place)


def exit_accuracies(predictions: Iterable[NDArray[Any]]) -> dict[str, float]:
    """Accuracy of every exit, as ``compute_metrics`` of ``transformers.Trainer``.

    Args:
        predictions: ``(N, E, C)`` logits and ``(N,)`` labels; what follows them is not read.

    Returns:
        ``exit_<k>_accuracy`` in [0, 1]; the last exit is the backbone's own.
    """
    logits, labels, *_ = predictions  # losses and inputs follow where they were asked for
    hits: NDArray[np.float64] = (logits.argmax(-1) == labels[:, None]).mean(0)
    return {f"exit_{k}_accuracy": float(share) for k, share in enumerate(hits)}
