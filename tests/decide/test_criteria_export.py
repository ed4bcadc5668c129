"""Every criterion traces, with its state, and decides in ONNX Runtime as it does here."""

from __future__ import annotations

import io

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from offramp.decide.criteria import Criterion
from tests.decide.rules import CLASSES, EXITS, every_rule, random_logits

RULES = every_rule()
QUICK = ("confidence", "patience", "weighted geometric")  # one without state, with counts, growing


class Chain(nn.Module):
    """A criterion over all exits, as stages would call it one after the other."""

    def __init__(self, rule: Criterion) -> None:
        super().__init__()
        self.rule = rule

    def forward(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        state: tuple[Tensor, ...] = ()
        outs, scores = [], []
        for k in range(EXITS):
            out, score, state = self.rule(logits[:, k], state, k)
            outs.append(out)
            scores.append(score)
        return torch.stack(outs, 1), torch.stack(scores, 1)


def exported(name: str) -> tuple[Chain, torch.export.ExportedProgram]:
    chain = Chain(RULES[name]).eval()
    rows = torch.export.Dim("rows", min=2)
    example = torch.randn(3, EXITS, CLASSES)
    return chain, torch.export.export(chain, (example,), dynamic_shapes=({0: rows},))


@pytest.mark.parametrize("name", sorted(RULES))
def test_traces_with_a_dynamic_batch(name):
    chain, program = exported(name)
    for rows in (2, 5, 64):
        logits = random_logits(rows).transpose(0, 1)
        out, score = chain(logits)
        traced_out, traced_score = program.module()(logits)
        assert torch.equal(out, traced_out)
        assert torch.equal(score, traced_score)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in sorted(RULES)]
)
def test_onnx_decides_alike(name):
    chain, program = exported(name)
    file = io.BytesIO()
    torch.onnx.export(program, dynamo=True, verbose=False).save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    logits = random_logits(1000, seed=1).transpose(0, 1).contiguous()
    out, score = (value.detach() for value in chain(logits))
    (given,) = [node.name for node in session.get_inputs()]
    onnx_out, onnx_score = session.run(None, {given: logits.numpy()})
    np.testing.assert_allclose(onnx_out, out.numpy(), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(onnx_score, score.numpy(), rtol=1e-4, atol=1e-5)
    assert (onnx_out.argmax(2) == out.numpy().argmax(2)).all()
    for k in range(EXITS):
        # The same decisions at a threshold midway between scores, as calibrate would choose it.
        values = score[:, k].unique()
        if len(values) > 1:
            gaps = values.diff()
            inner = slice(len(gaps) // 4, len(gaps) // 4 * 3 + 1)
            widest = int(gaps[inner].argmax()) + len(gaps) // 4
            threshold = float(values[widest] + gaps[widest] / 2)
            assert ((onnx_score[:, k] >= threshold) == (score[:, k] >= threshold).numpy()).all()
