"""What a loader yields."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offramp.build.batch import Batch, as_call, batch_size, fingerprints, take_rows, unpack
from offramp.errors import DataError

X, Y = torch.randn(3, 4), torch.tensor([0, 1, 2])


def test_a_pair_is_input_and_labels():
    batch = unpack((X, Y))
    assert batch.args[0] is X
    assert batch.kwargs == {}
    assert batch.labels is Y
    assert batch.size == 3


def test_a_pair_whose_input_is_a_mapping_goes_by_keyword():
    batch = unpack([{"input_ids": X, "attention_mask": Y}, Y])
    assert batch.args == ()
    assert list(batch.kwargs) == ["input_ids", "attention_mask"]
    assert batch.labels is Y


@pytest.mark.parametrize("name", ["labels", "label"])
def test_a_mapping_gives_up_its_labels(name):
    item = {"x": X, name: Y}
    batch = unpack(item)
    assert list(batch.kwargs) == ["x"]
    assert batch.labels is Y
    assert name in item  # the loader's own mapping is not edited


def test_other_label_names_and_no_labels():
    assert unpack({"x": X, "target": Y}, label_names=("target",)).labels is Y
    assert unpack({"x": X}).labels is None
    assert unpack(X).labels is None
    assert unpack((X,)).labels is None


def test_of_more_than_two_the_last_is_the_labels():
    batch = unpack((X, X + 1, Y))
    assert len(batch.args) == 2
    assert batch.labels is Y


def test_labels_in_a_list_become_a_tensor():
    assert unpack((X, [2, 1, 0])).labels.tolist() == [2, 1, 0]


@pytest.mark.parametrize("item", [3, "text", None, ()])
def test_what_is_not_understood(item):
    with pytest.raises(DataError, match="is not understood. Expected a tensor, a tuple"):
        unpack(item)


def test_labels_that_are_no_tensor():
    with pytest.raises(DataError, match="Labels of type 'list' cannot be read as a tensor"):
        unpack((X, ["cat", "dog", "cow"]))


def test_inputs_without_a_tensor():
    with pytest.raises(DataError, match="no tensor with a batch dimension"):
        unpack(({"a": 1}, Y))


def test_as_call():
    assert as_call(X) == ((X,), {})
    assert as_call([X, Y]) == ((X, Y), {})
    assert as_call({"x": X}) == ((), {"x": X})


def test_batch_moves():
    batch = Batch((X,), {"m": Y}, Y).to("meta")
    assert batch.args[0].device.type == batch.kwargs["m"].device.type == "meta"
    assert batch.labels.device.type == "meta"


def test_take_rows_leaves_what_has_no_batch():
    table = torch.arange(5)
    args, kwargs = take_rows((X, 7), {"table": table, "nested": [Y]}, torch.tensor([2, 0]))
    assert torch.equal(args[0], X[[2, 0]])
    assert args[1] == 7
    assert kwargs["table"] is table
    assert kwargs["nested"][0].tolist() == [2, 0]
    assert batch_size(args, kwargs) == 2


@settings(max_examples=30, deadline=None)
@given(
    rows=st.lists(st.integers(0, 9), min_size=1, max_size=12),
    dtype=st.sampled_from(
        [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
    ),
)
def test_a_fingerprint_belongs_to_the_sample_not_to_its_batch(rows, dtype):
    data = torch.randint(0, 2, (10, 3, 7), generator=torch.Generator().manual_seed(0)).to(dtype)
    extra = torch.arange(10)
    whole = fingerprints(Batch((data,), {"extra": extra}))
    part = fingerprints(Batch((data[rows],), {"extra": extra[rows]}, torch.zeros(len(rows))))
    assert whole.dtype == torch.int64
    assert len(set(whole.tolist())) == 10
    assert torch.equal(part, whole[rows])


def test_fingerprints_see_every_input_and_the_type():
    base = fingerprints(Batch((X,)))
    changed = X.clone()
    changed[1, 3] += 1e-6
    assert (fingerprints(Batch((changed,))) != base).tolist() == [False, True, False]
    assert not torch.equal(fingerprints(Batch((X, Y))), base)
    zeros = torch.zeros(2, 2)
    as_ints = Batch((zeros.to(torch.int32),))
    assert not torch.equal(fingerprints(Batch((zeros,))), fingerprints(as_ints))


CONTENT = torch.tensor([[0.0, 2, 0], [1, 0, 0], [0, 0, 0]])
LAYOUTS = [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc]
BETA = pytest.mark.filterwarnings("ignore:Sparse CS. tensor support is in beta")


@BETA
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fingerprints_of_sparse_inputs(layout):
    def select(rows, x):
        return x

    def marks(content):
        return fingerprints(Batch((content.to_sparse(layout=layout),)))

    found = marks(CONTENT)
    assert len(set(found.tolist())) == 3
    assert torch.equal(marks(CONTENT[[1, 2, 0]]), found[[1, 2, 0]])
    graph = Batch((CONTENT.to_sparse(layout=layout),), labels=Y[:1], select=select)
    other = Batch((CONTENT.T.to_sparse(layout=layout),), labels=Y[:1], select=select)
    assert torch.equal(fingerprints(graph), fingerprints(graph))
    assert not torch.equal(fingerprints(graph), fingerprints(other))


def test_a_fingerprint_does_not_see_the_order_of_entries():
    places, values = torch.tensor([[0, 1, 2], [1, 0, 2]]), torch.tensor([2.0, 1.0, 5.0])
    one, two = (
        torch.sparse_coo_tensor(places[:, order], values[order], (3, 3), check_invariants=True)
        for order in ([0, 1, 2], [2, 0, 1])
    )
    assert torch.equal(fingerprints(Batch((one,))), fingerprints(Batch((two,))))


@BETA
def test_rows_of_sparse_inputs():
    (taken,), _ = take_rows((CONTENT.to_sparse_coo(),), {}, torch.tensor([1, 0]))
    assert torch.equal(taken.to_dense(), CONTENT[[1, 0]])
    with pytest.raises(DataError, match=r"layout torch.sparse_csr, .*to_sparse_coo\(\).*select="):
        take_rows((CONTENT.to_sparse_csr(),), {}, torch.tensor([1, 0]))
