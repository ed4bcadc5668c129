"""Features computed once, and rows set aside."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from offramp.build.batch import fingerprints, unpack
from offramp.errors import DataError, HeadError, PlaceError
from offramp.places import features as gathering
from offramp.places.dense import attach_densely
from offramp.places.features import gather, held_out_rows, record_held_out, spread
from offramp.train.data import EpochLoader
from tests.networks import example_of, make

KINDS = {"cnn": 5, "mlp": 4, "encoder": 3}


def batches_of(kind, count=5, size=20):
    classes = KINDS[kind]
    return [(example_of(kind, size, seed), torch.arange(size) % classes) for seed in range(count)]


def gathered(dense, loader, **settings):
    options = {"samples": 10_000, "divide": True, "seed": 0, "progress": False} | settings
    return gather(dense, loader, **options)


def marks_of(batches):
    return torch.cat([fingerprints(batch) for batch in batches])


@pytest.mark.parametrize("kind", KINDS)
def test_heads_say_of_kept_features_what_they_say_in_a_model(kind):
    heads = ["linear", "mlp"] if kind == "mlp" else None
    dense = attach_densely(make(kind), example_of(kind), heads)
    loader = batches_of(kind)
    kept, aside = gathered(dense, loader, divide=False)
    assert aside == []
    assert len(kept.labels) == kept.population == 100
    rows = {int(mark): i for i, mark in enumerate(kept.marks)}
    batch = unpack(loader[2])
    order = [rows[int(mark)] for mark in fingerprints(batch)]
    assert torch.equal(kept.labels[order], batch.labels)
    features, _ = dense.model.features(*batch.args, **batch.kwargs)
    for k, candidate in enumerate(dense.candidates):
        got = candidate.head.eval().classify(kept.condensed[kept.index[k]][order])
        inputs = {}
        if kind == "encoder":
            inputs["attention_mask"] = batch.kwargs["attention_mask"]
        expected = candidate.head(features[candidate.place], **inputs)
        torch.testing.assert_close(got, expected)
    if kind != "cnn":  # two heads of a place that condense alike share what is kept
        assert len(kept.condensed) == len(dense.model.places) < len(dense.candidates)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_recorded_is_what_the_backbone_and_the_heads_say(kind):
    dense = attach_densely(make(kind), example_of(kind))
    batch = unpack(batches_of(kind)[0])
    held = record_held_out(dense, [batch], 10, progress=False)
    assert held.logits.shape == (len(dense.candidates) + 1, 10, KINDS[kind])
    features, output = dense.model.features(*batch.args, **batch.kwargs)
    final = output["logits"] if isinstance(output, dict) else output
    torch.testing.assert_close(held.logits[-1], final[:10])
    assert torch.equal(held.labels, batch.labels[:10])


def test_the_parts_share_no_sample_and_lose_none():
    dense = attach_densely(make("mlp"), example_of("mlp"))
    loader = batches_of("mlp")
    everything = marks_of([unpack(item) for item in loader])
    kept, aside = gathered(dense, loader)
    assert len(kept.labels) == 60
    set_aside = marks_of(aside)
    assert not torch.isin(set_aside, kept.marks).any()
    both = torch.cat([set_aside, kept.marks])
    assert torch.equal(both.sort().values, everything.sort().values)
    again, _ = gathered(dense, loader)
    assert torch.equal(again.marks, kept.marks)
    other, _ = gathered(dense, loader, seed=1)
    assert not torch.equal(other.marks, kept.marks)


def test_samples_that_come_twice_are_judged_on_no_side():
    dense = attach_densely(make("mlp"), example_of("mlp"))
    loader = [*batches_of("mlp", 2), *batches_of("mlp", 2)]
    kept, aside = gathered(dense, loader)
    assert torch.isin(marks_of(aside), kept.marks).any()
    left = list(held_out_rows(aside, kept.marks))
    assert not torch.isin(marks_of(left), kept.marks).any()
    assert sum(batch.size for batch in left) > 0
    once = marks_of(held_out_rows([*aside, *aside], kept.marks[:0]))
    assert len(once.unique()) == len(once)


def test_rows_are_set_aside_from_batches_of_one():
    dense = attach_densely(make("mlp"), example_of("mlp"))
    singles = [(x[k : k + 1], y[k : k + 1]) for x, y in batches_of("mlp", 1) for k in range(20)]
    kept, aside = gathered(dense, singles)
    assert (len(kept.labels), sum(batch.size for batch in aside)) == (12, 8)


@pytest.mark.parametrize("most", [30, 1000])
def test_held_out_rows_are_drawn_from_all_of_a_loader(most):
    loader = batches_of("mlp", 20, 10)
    read = EpochLoader(loader, seed=0, num_classes=KINDS["mlp"], role="held-out")
    drawn = marks_of(spread(read, most, 0))
    assert len(drawn) == len(drawn.unique()) == min(most, 200)
    whose = torch.stack([fingerprints(unpack(item)) for item in loader])
    assert torch.isin(whose, drawn).any(1).all()


@pytest.mark.parametrize("sized", [True, False])
def test_some_rows_of_a_large_loader_spread_over_it(sized):
    dense = attach_densely(make("mlp"), example_of("mlp"))
    loader = batches_of("mlp", 20, 10)
    if not sized:

        class Stream(list):
            def __len__(self):
                raise TypeError

        loader = Stream(loader)
    kept, aside = gathered(dense, loader, samples=50)
    assert len(kept.labels) + sum(batch.size for batch in aside) == 50
    assert kept.population == 200
    whose = torch.stack([fingerprints(unpack(item)) for item in loader])
    used = torch.isin(whose, torch.cat([kept.marks, marks_of(aside)])).any(1)
    assert int(used.sum()) == 5
    if sized:
        assert used.nonzero().flatten().max() > 10  # not the first batches alone


def test_the_backbone_runs_once_for_each_row():
    backbone, rows = make("mlp"), []
    dense = attach_densely(backbone, example_of("mlp"))
    handle = backbone.register_forward_hook(lambda m, args, out: rows.append(len(args[0])))
    kept, aside = gathered(dense, batches_of("mlp"))
    record_held_out(dense, held_out_rows(aside, kept.marks), 1000, progress=False)
    handle.remove()
    assert sum(rows) == 100


def test_a_backbone_is_left_as_found():
    backbone = make("cnn").train()
    state = {k: v.clone() for k, v in backbone.state_dict().items()}
    dense = attach_densely(backbone, example_of("cnn"))
    gathered(dense, batches_of("cnn", 2))
    dense.model.detach()
    assert all(m.training for m in backbone.modules())
    assert all(torch.equal(v, state[k]) for k, v in backbone.state_dict().items())
    assert not any(m._forward_hooks for m in backbone.modules())


def test_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(gathering, "MEMORY", 40 * 4 * 32 * 5)  # 40 rows of five vectors of 32
    dense = attach_densely(make("mlp"), example_of("mlp"), heads=["linear"])
    assert len(dense.candidates) == 5
    data = torch.cat([x for x, _ in batches_of("mlp", 10)])
    loader = DataLoader(TensorDataset(data, torch.arange(200) % 4), batch_size=10, shuffle=True)
    kept, aside = gathered(dense, loader)
    assert len(kept.labels) <= 40
    assert len(kept.labels) + sum(batch.size for batch in aside) in range(60, 67)


def test_sizes_of_heads():
    names = {}
    for kind in KINDS:
        dense = attach_densely(make(kind), example_of(kind))
        names[kind] = [c.name for c in dense.candidates if c.place == 2]
        macs = [c.macs for c in dense.candidates if c.place == 2]
        assert macs == sorted(macs)
    assert names == {
        "cnn": ["pool", "conv:16"],  # and "conv", which is the same here
        "mlp": ["linear"],  # two layers would cost a fifth of the network
        "encoder": ["pool", "mlp"],
    }
    twice = attach_densely(make("mlp"), example_of("mlp"), heads=["pool", "linear", "mlp:7"])
    assert [c.name for c in twice.candidates if c.place == 0] == ["pool", "mlp:7"]


def test_what_cannot_be_searched():
    one = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 4))
    with pytest.raises(PlaceError, match="'Sequential' has no place that is fit .*exits="):
        attach_densely(one, torch.randn(4, 12))
    backbone = make("cnn")
    for heads, text in (
        (["linear"], "'linear' takes vectors"),
        (["identity"], "turns a feature|nothing to learn"),
        ([], "heads is empty"),
        (["con:3"], "Unknown head 'con'"),
    ):
        with pytest.raises(HeadError, match=text):
            attach_densely(backbone, example_of("cnn"), heads=heads)
    assert not any(m._forward_hooks for m in backbone.modules())
    dense = attach_densely(make("mlp"), example_of("mlp"))
    with pytest.raises(DataError, match="Batch 0 of the search loader has no labels"):
        gathered(dense, [example_of("mlp", 20)])
    with pytest.raises(DataError, match="No row is left to judge exits on.*held_out="):
        record_held_out(dense, [], 10, progress=False)
    sizes = [(torch.randn(8, 3, side, side), torch.arange(8) % 5) for side in (16, 24)]
    dense = attach_densely(make("cnn"), example_of("cnn"), heads=["conv:8"])
    with pytest.raises(DataError, match="samples are all of one size"):
        gathered(dense, sizes)
