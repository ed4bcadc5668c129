"""Data flow: what is needed, what is a cut."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from offramp.build.flow import _EXTRA, FlowRecorder, count_macs


def test_macs_agree_with_the_flop_counter_of_torch():
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, groups=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)
    )
    x = torch.randn(2, 3, 6, 6)
    with FlopCounterMode(display=False) as counter:
        net(x)
    assert count_macs(lambda: net(x)) == counter.get_total_flops() / 2
    assert count_macs(lambda: net(x)) == 2 * (6 * 6 * 8 * 3 * 9 + 8 * 36 * 5)


def test_attention_counts_on_any_kernel():
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 7, 8), torch.randn(2, 4, 7, 8)
    by_hand = 2 * 4 * 5 * 7 * (8 + 8)
    mask = torch.ones(2, 1, 5, 7, dtype=torch.bool)
    attention = nn.functional.scaled_dot_product_attention
    assert count_macs(lambda: attention(q, k, v)) == by_hand
    assert count_macs(lambda: attention(q, k, v, attn_mask=mask)) == by_hand
    assert count_macs(lambda: torch.softmax(q @ k.mT, -1) @ v) == by_hand


def test_recurrent_layers_count():
    x = torch.randn(3, 6, 4)  # batch, steps, features
    lstm, gru = nn.LSTM(4, 5, batch_first=True), nn.GRU(4, 5, batch_first=True)
    assert count_macs(lambda: lstm(x)) == 3 * 6 * 4 * 5 * (4 + 5)
    assert count_macs(lambda: gru(x)) == 3 * 6 * 3 * 5 * (4 + 5)


def test_composite_operations_are_seen_under_inference_mode():
    x, w = torch.randn(2, 3, 4), torch.randn(5, 4)
    with torch.inference_mode():
        assert count_macs(lambda: nn.functional.linear(x.clone(), w)) == 2 * 3 * 4 * 5


def test_a_matrix_times_a_vector_counts():
    assert count_macs(lambda: torch.mv(torch.randn(3, 4), torch.randn(4))) == 12


def _recorded(function, x):
    """Marks (time, value) that the function sets, and the flow of its result."""
    marks = []
    with torch.no_grad(), FlowRecorder() as recorder:
        out = function(x, lambda t: marks.append((recorder.time, recorder.value_of(t))))
        return recorder.flow(out), marks


W = torch.randn(8, 8)


def test_an_open_skip_connection_is_no_cut():
    def residual(x, mark):
        x = x @ W
        mark(x)
        y = x @ W
        mark(y)
        z = x + y @ W
        mark(z)
        return z @ W

    flow, marks = _recorded(residual, torch.randn(2, 8))
    assert [flow.is_cut(t, {v}) for t, v in marks] == [True, False, True]
    assert all(flow.needed(v) for _, v in marks)


def test_a_branch_is_no_cut_and_does_not_feed_its_sibling():
    def branches(x, mark):
        x = x @ W
        a = x @ W
        mark(a)
        b = x @ W
        mark(b)
        joined = torch.cat([a, b], 1)
        mark(joined)
        return joined[:, :8] @ W

    flow, marks = _recorded(branches, torch.randn(2, 8))
    assert [flow.is_cut(t, {v}) for t, v in marks] == [False, False, True]
    assert [flow.all_later_work_needs(t, {v}) for t, v in marks] == [False, True, True]


def test_what_costs_nothing_to_make_does_not_count():
    def masked(x, mark):
        mask = (x > 0).float() + 1
        y = x @ W
        mark(y)
        return (y * mask) @ W

    flow, [(time, value)] = _recorded(masked, torch.randn(2, 8))
    assert flow.is_cut(time, {value})


def test_what_is_kept_for_the_end_does_not_count():
    def knowledge(x, mark):
        layers = []
        for _ in range(3):
            x = x @ W
            layers.append(x)
            mark(x)
        return torch.cat(layers, 1)[:, ::24]

    flow, marks = _recorded(knowledge, torch.randn(2, 8))
    assert all(flow.is_cut(t, {v}) for t, v in marks)


def test_side_results_are_not_needed():
    def cached(x, mark):
        y = x @ W
        mark(y * 2)
        return y @ W

    flow, [(_, value)] = _recorded(cached, torch.randn(2, 8))
    assert not flow.needed(value)
    assert not flow.needed(None)


def test_views_are_the_value_they_look_at():
    def viewing(x, mark):
        y = x @ W
        mark(y)
        mark(y.view(2, 2, 4).transpose(1, 2))
        return y @ W

    _, [(_, first), (_, second)] = _recorded(viewing, torch.randn(2, 8))
    assert first == second


def test_writing_in_place_is_a_new_value_and_is_noticed():
    def inplace(x, mark):
        y = x @ W
        mark(y)
        y.relu_()
        mark(y)
        return y @ W

    flow, [(t0, v0), (t1, v1)] = _recorded(inplace, torch.randn(2, 8))
    assert v0 != v1
    assert flow.overwritten(v0, t0)
    assert not flow.overwritten(v1, t1)


def test_parameters_are_noted_at_their_first_use():
    layer = nn.Linear(8, 8)
    with torch.no_grad(), FlowRecorder(layer.named_parameters()) as recorder:
        x = torch.randn(2, 8) + 1
        before = recorder.time
        layer(x)
    assert set(recorder.first_use) == {"weight", "bias"}
    assert min(recorder.first_use.values()) >= before


def test_an_input_handed_through_has_no_flow():
    x = torch.randn(2, 8)
    with FlowRecorder() as recorder:
        assert recorder.value_of(x) is None
        assert recorder.flow(x) is None


def test_bilinear_layers_count():
    layer = nn.Bilinear(3, 5, 7)
    by_hand = 2 * 7 * (3 * 5 + 5)
    assert count_macs(lambda: layer(torch.randn(2, 3), torch.randn(2, 5))) == by_hand


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("directions", [1, 2])
def test_the_formula_of_recurrent_layers_on_a_device(kind, directions):
    x = torch.randn(3, 6, 4)
    layer = kind(4, 5, num_layers=2, batch_first=True, bidirectional=directions == 2)
    weights = [p.detach() for p in layer.parameters()]
    here = count_macs(lambda: layer(x))  # torch's own layers on the processor
    assert _EXTRA[torch.ops.aten._cudnn_rnn](x, weights, 4) == 2 * here


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc])
@pytest.mark.filterwarnings("ignore:Sparse CS. tensor support is in beta")
def test_a_sparse_matrix_counts_what_it_stores(layout):
    dense = torch.zeros(5, 6)
    dense[0, 1] = dense[0, 4] = dense[3, 3] = 1.0
    sparse, x = dense.to_sparse(layout=layout), torch.randn(6, 4)
    assert count_macs(lambda: dense @ x) == 5 * 6 * 4
    assert count_macs(lambda: sparse @ x) == 3 * 4
    assert count_macs(lambda: torch.sparse.mm(sparse, x)) == 3 * 4
    assert count_macs(lambda: torch.addmm(torch.ones(5, 4), sparse, x)) == 3 * 4
    assert count_macs(lambda: torch.ones(2, 5) @ sparse) == 3 * 2
    assert count_macs(lambda: sparse @ x[:, 0]) == 3
