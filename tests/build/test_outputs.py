"""ExitOutputs and finding the logits."""

from __future__ import annotations

from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
from torch.utils import _pytree as pytree

from offramp.build.outputs import ExitOutputs, find_logits, tensors_in
from offramp.errors import DataError

LOGITS = torch.randn(2, 3)


def test_exit_outputs_are_a_sequence():
    outputs = ExitOutputs([LOGITS, LOGITS + 1])
    assert len(outputs) == 2
    assert outputs[0] is LOGITS
    assert outputs.final is outputs[-1]
    assert [z.shape for z in outputs] == [(2, 3), (2, 3)]
    assert outputs.stack().shape == (2, 2, 3)
    assert outputs.loss is None


def test_exit_outputs_are_a_pytree():
    outputs = ExitOutputs([LOGITS, LOGITS], {"logits": LOGITS}, LOGITS.mean())
    doubled = pytree.tree_map_only(torch.Tensor, lambda t: t * 2, outputs)
    assert isinstance(doubled, ExitOutputs)
    assert torch.equal(doubled[1], LOGITS * 2)
    assert torch.equal(doubled.output["logits"], LOGITS * 2)
    assert torch.equal(doubled.loss, LOGITS.mean() * 2)
    paths = [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(outputs)[0]]
    assert paths[0] == ".logits[0]"


@pytest.mark.parametrize(
    "output",
    [
        LOGITS,
        (LOGITS, "cache"),
        [LOGITS],
        ((LOGITS, 1), 2),
        {"loss": torch.zeros(()), "logits": LOGITS},
        OrderedDict(logits=LOGITS),
        SimpleNamespace(logits=LOGITS, hidden=None),
    ],
)
def test_logits_are_found(output):
    assert find_logits(output) is LOGITS


def test_logits_by_a_function():
    assert find_logits({"scores": LOGITS}, lambda out: out["scores"]) is LOGITS


@pytest.mark.parametrize("output", [None, {"scores": LOGITS}, (), "text"])
def test_logits_that_are_nowhere(output):
    with pytest.raises(DataError, match="No logits were found .* Pass logits=, a function"):
        find_logits(output)


def test_logits_of_another_rank():
    with pytest.raises(DataError, match=r"shape \(2, 3, 4\); expected \(B, C\)"):
        find_logits(torch.zeros(2, 3, 4))


def test_tensors_in_any_structure():
    a, b, c = torch.zeros(1), torch.zeros(2), torch.zeros(3)
    assert tensors_in(a) == [a]
    assert [len(t) for t in tensors_in((a, [None, b], {"x": c, "y": "text"}))] == [1, 2, 3]
    assert tensors_in(None) == []
    assert [len(t) for t in tensors_in(ExitOutputs([a, b]))] == [1, 2]
