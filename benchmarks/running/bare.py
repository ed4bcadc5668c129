"""The backbone alone, on the engine that executes the stages."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import onnx

from offramp.build.model import MultiExitModel
from offramp.decide.policy import Policy
from offramp.run.chain import Step, chain
from offramp.run.engines import Engine, OnnxEngine, StepCall
from offramp.run.graph import cut
from offramp.run.onnx import convert, split

__all__ = ["bare_call", "bare_file"]


def bare_call(model: MultiExitModel, example: Any, engine: Engine) -> StepCall:
    """From the model's inputs, in the order of its call, to its last logits; no head, no score."""
    if isinstance(engine, OnnxEngine):
        return engine.session(bare_file(model, example).SerializeToString())
    return engine.load([_only(model, example)])[0]


def bare_file(model: MultiExitModel, example: Any) -> onnx.ModelProto:
    """The same as an ONNX model, converted as stages are."""
    step = _only(model, example)
    return split(convert([step]), [step])[0]


def _only(model: MultiExitModel, example: Any) -> Step:
    staged = cut(model, example, [])
    (step,) = chain(staged, Policy.final(), model.num_exits)
    return replace(step, module=staged.stages[0].module, outputs=("logits",))
