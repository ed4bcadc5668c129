"""Text encoders: exits after layers, the four systems, sentences from files."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import offramp
from offramp.cli import main
from offramp.decide.policy import replay
from offramp.errors import DataError, PlaceError, TrainingError
from offramp.run.artifact import export, load
from offramp.run.runner import Runner
from offramp.zoo.restoring import restore
from offramp.zoo.running import note
from offramp.zoo.text import (
    TEXT,
    Sentences,
    attach_to_layers,
    layers_of,
    open_encoder,
    open_sentences,
    read_tsv,
    run_text,
    tokenised,
    truncated,
)
from offramp.zoo.text.running import HEADS_RATE, _optimizer
from tests.traces import make_trace

WORDS = ["[PAD]", "[UNK]", "good", "bad", "film", "a", "very", "not"]
LAYERS = 3


def encoder(layers: int = LAYERS) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        num_labels=2,
        hidden_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(config).eval()


def sentences(count: int, seed: int, *, shuffled: bool = False) -> Sentences:
    """Positive where there is more of "good" than of "bad"."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, len(WORDS), (count, 12), generator=generator)
    lengths = torch.randint(7, 13, (count, 1), generator=generator)
    mask = (torch.arange(12) < lengths).long()
    ids = ids * mask
    labels = ((ids == 2).sum(1) > (ids == 3).sum(1)).long()
    return Sentences(ids, mask, labels, 16, shuffled)


def first(part: Sentences) -> dict[str, Tensor]:
    return next(iter(part))[0]


def test_an_exit_after_every_layer_but_the_last():
    model = attach_to_layers(encoder(), first(sentences(4, 0)))
    assert model.places == ("bert.encoder.layer.0", "bert.encoder.layer.1")
    assert layers_of(encoder()) == [f"bert.encoder.layer.{k}" for k in range(LAYERS)]
    with pytest.raises(PlaceError, match="Linear has no list of layers"):
        layers_of(nn.Linear(2, 2))


def test_a_shorter_encoder_is_its_first_layers():
    whole, part = encoder(), first(sentences(4, 0))
    shorter = truncated(whole, 2)
    assert len(layers_of(shorter)) == 2
    assert len(layers_of(whole)) == LAYERS
    hidden = whole(**part, output_hidden_states=True).hidden_states[2]
    wanted = whole.classifier(whole.bert.pooler(hidden))
    torch.testing.assert_close(shorter(**part).logits, wanted)


@pytest.mark.parametrize("name", TEXT)
def test_a_system_learns_chooses_and_runs(name: str):
    system = TEXT[name]
    train, held = sentences(96, 1, shuffled=True), sentences(80, 2)
    model = attach_to_layers(encoder(), first(held))
    offramp.fit(model, train, scheme=system.scheme, epochs=1, lr=1e-3, progress=False)
    trace = offramp.record(model, held, progress=False)
    policy = system.choose(trace, 0.2)
    part = first(sentences(16, 3))
    result = Runner(model, policy, part)(**part)
    batch = [(part, torch.zeros(16, dtype=torch.long))]
    decided = replay(offramp.record(model, batch, progress=False), policy)
    assert torch.equal(result.exit, decided.exit)
    assert torch.equal(result.prediction, decided.prediction)


@pytest.mark.filterwarnings("ignore")
def test_a_batch_with_padding_leaves_as_each_sentence_alone(tmp_path: Path):
    part = first(sentences(16, 3))
    model = attach_to_layers(encoder(), part)
    for linear in (m for m in model.heads.modules() if isinstance(m, nn.Linear)):
        nn.init.normal_(linear.weight)
    batch = [(part, torch.zeros(16, dtype=torch.long))]
    scores = offramp.record(model, batch, progress=False).logits.softmax(2).amax(2)
    ordered = scores[:-1].sort(1).values  # thresholds between two rows, so that no rounding decides
    policy = offramp.Policy("confidence", ((ordered[:, 7] + ordered[:, 8]) / 2).tolist())
    export(model, policy, part, tmp_path / "made")
    for runner in (Runner(model, policy, part), load(tmp_path / "made")):
        whole = runner(**part)
        assert len(set(whole.exit.tolist())) > 1
        for row in range(16):
            alone = runner(**{key: value[row : row + 1] for key, value in part.items()})
            assert alone.exit[0] == whole.exit[row]
            torch.testing.assert_close(alone.logits[0], whole.logits[row], rtol=1e-4, atol=1e-5)


def test_sentences_from_a_file(tmp_path: Path):
    tokenizers = pytest.importorskip("tokenizers")
    path = tmp_path / "some.tsv"
    path.write_text("a good film\t1\nnot\ta bad film\t0\n", "utf-8")
    texts, labels = read_tsv(path)
    assert (texts, labels) == (["a good film", "not\ta bad film"], [1, 0])
    other = tmp_path / "other.tsv"
    other.write_text("a fine\x85\u2028film\t1\nbad\t0\n", "utf-8")
    assert read_tsv(other) == (["a fine\x85\u2028film", "bad"], [1, 0])
    model = tokenizers.models.WordLevel({word: k for k, word in enumerate(WORDS)}, "[UNK]")
    tokenizer: Any = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    found = tokenised(tokenizer, texts, labels, length=5)
    assert found.ids.tolist() == [[5, 2, 4, 0, 0], [7, 5, 3, 4, 0]]
    assert found.mask.tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]
    shuffled = tokenised(tokenizer, texts[:1], labels[:1], length=5, shuffled=True)
    assert first(shuffled)["input_ids"].tolist() == [[5, 2, 4]]  # no longer than need be


@pytest.mark.parametrize(
    ("content", "words"),
    [("", "is empty"), ("good\t1\nno label here\n", "Line 2 of"), ("good\tyes\n", "Line 1 of")],
)
def test_files_that_are_not_as_expected(tmp_path: Path, content: str, words: str):
    path = tmp_path / "some.tsv"
    path.write_text(content, "utf-8")
    with pytest.raises(DataError, match=words):
        read_tsv(path)
    with pytest.raises(DataError, match="There is no file"):
        read_tsv(tmp_path / "none.tsv")
    path.write_bytes("très bon\t1\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"some\.tsv is not UTF-8"):
        read_tsv(path)


def run_main(words: list[str]) -> Any:
    with pytest.raises(SystemExit) as ended:
        main(words)
    return ended.value.code


def saved(folder: Path) -> Path:
    """An encoder as transformers saves one, with a tokenizer."""
    tokenizers = pytest.importorskip("tokenizers")
    encoder().save_pretrained(folder)
    vocabulary = {word: k for k, word in enumerate(WORDS)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(folder / "tokenizer.json"))
    return folder


def written(folder: Path) -> Path:
    """Sentences to train on, to choose by, to judge by."""
    folder.mkdir()
    for seed, part in enumerate(("train", "dev", "test")):
        drawn = sentences(96, seed)
        lines = [
            " ".join(WORDS[k] for k in row if k) + f"\t{label}"
            for row, label in zip(drawn.ids.tolist(), drawn.labels.tolist(), strict=True)
        ]
        (folder / f"films_{part}.tsv").write_text("\n".join(lines), "utf-8")
    return folder


@pytest.mark.parametrize("name", ["deebert", "pabee", "berxit"])
def test_a_system_is_run_from_files(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offramp.zoo.text.running.LENGTH", 16)
    data, network, out = written(tmp_path / "data"), saved(tmp_path / "bert"), tmp_path / "out"
    words = ["zoo", "run", name, "--data", str(data), "--encoder", str(network), "--out", str(out)]
    words += ["--epochs", "1", "--max-accuracy-drop", "0.5", "--json"]
    tolerances = []

    def judged(*given: Any, **settings: Any) -> offramp.Report:
        tolerances.append(settings["tolerance"])
        return offramp.evaluate(*given, **settings)

    monkeypatch.setattr("offramp.zoo.running.evaluate", judged)
    capsys.readouterr()  # what saving the encoder showed
    assert run_main(words) == 0
    first, noise = capsys.readouterr()
    assert noise == ""
    assert (out / "policy.json").is_file()
    assert (out / "report.json").read_text("utf-8") == first
    assert tolerances == [0.5]  # the verdict accepts the drop that was asked for
    assert (out / "plain" / "training.safetensors").is_file() is TEXT[name].tuned
    if TEXT[name].tuned:  # the second stage learns heads alone
        first_stage, second = (load_file(p / "training.safetensors") for p in (out / "plain", out))
        for key, value in first_stage.items():
            if key.startswith("model/"):
                assert torch.equal(value, second[key]) is key.startswith("model/backbone."), key
    assert run_main(words) == 0  # what is done is read
    assert capsys.readouterr().out == first
    other = "elasticbert" if name == "pabee" else "pabee"
    words[2] = other  # another training in the same folder
    assert run_main(words) != 0
    assert "training" in capsys.readouterr().err


def test_what_was_run_is_made_again_without_the_encoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offramp.zoo.text.running.LENGTH", 16)
    data, network, out = written(tmp_path / "data"), saved(tmp_path / "bert"), tmp_path / "out"
    settings: dict[str, Any] = {"epochs": 1, "max_accuracy_drop": 0.5, "progress": False}
    made = run_text(TEXT["pabee"], data, network, out, **settings)
    parts = open_sentences(data, network)
    shutil.rmtree(network)
    model, example = restore(out)
    assert set(example) == {"input_ids", "attention_mask"}
    with torch.no_grad():
        for ours, wanted in zip(model(**example), made.model(**example), strict=True):
            assert torch.equal(ours, wanted)
    trained = offramp.record(model, replace(parts["train"], shuffled=False), progress=False)
    assert trained.source == "training"
    assert offramp.record(model, parts["test"], progress=False).fingerprint == made.test.fingerprint
    (out / "config.json").write_text("{}", "utf-8")
    with pytest.raises(DataError, match="out holds no encoder"):
        restore(out)


def test_layers_that_share_their_weights_are_calls_of_one_module() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.AlbertConfig(
        vocab_size=len(WORDS),
        embedding_size=8,
        hidden_size=16,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
    )
    torch.manual_seed(0)
    shared = transformers.AlbertForSequenceClassification(config).eval()
    part = first(sentences(4, 0))
    model = attach_to_layers(shared, part)
    group = "albert.encoder.albert_layer_groups.0"
    assert model.places == (f"{group}@0", f"{group}@1")
    hidden = shared(**part, output_hidden_states=True).hidden_states
    for feature, wanted in zip(model.features(**part)[0], hidden[1:], strict=False):
        torch.testing.assert_close(feature, wanted)
    with pytest.raises(PlaceError, match="Linear has no list of layers"):
        attach_to_layers(nn.Linear(2, 2), {"input": torch.zeros(2, 2)})


def test_a_label_that_training_lacks_is_refused(tmp_path: Path) -> None:
    data, network = written(tmp_path / "data"), saved(tmp_path / "bert")
    (data / "films_test.tsv").write_text("good film\t1\nbad\t2\n", "utf-8")
    with pytest.raises(
        DataError, match=r"films_test\.tsv has the classes \[2\], which no sample of"
    ):
        open_sentences(data, network)


def test_a_training_is_not_taken_for_one_on_other_sentences_or_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offramp.zoo.text.running.LENGTH", 16)
    data, network, out = written(tmp_path / "data"), saved(tmp_path / "bert"), tmp_path / "out"

    def run(seed: int = 0) -> None:
        settings: dict[str, Any] = {"epochs": 1, "max_accuracy_drop": 0.5, "progress": False}
        run_text(TEXT["deebert"], data, network, out, seed=seed, **settings)

    run()
    with pytest.raises(TrainingError, match="another training: seed was"):
        run(seed=1)
    train = data / "films_train.tsv"
    before = train.read_text("utf-8")
    train.write_text(before.replace("film", "very", 1), "utf-8")
    refused = r"holds another training: sentences \(sha256\)"
    with pytest.raises(TrainingError, match=f"plain {refused}"):
        run()
    (out / "plain" / "training.safetensors").unlink()  # the second stage has a note of its own
    with pytest.raises(TrainingError, match=f"out {refused}"):
        run()
    shutil.rmtree(out)
    train.write_text(before, "utf-8")
    run()
    weights = load_file(network / "model.safetensors")
    weights["bert.embeddings.word_embeddings.weight"][0, 0] += 1
    save_file(weights, network / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TrainingError, match=r"holds another training: encoder \(sha256\)"):
        run()


def test_what_is_lost_is_measured_on_the_samples_that_choose() -> None:
    """Also where a part of them is set aside for the rule."""
    trace = make_trace(classes=2)
    for name in ("berxit", "elasticbert"):
        policy = TEXT[name].choose(trace, 0.0)
        rest = trace.split(0.3)[1] if name == "berxit" else trace
        full = (rest.logits[-1].argmax(1) == rest.labels).double().mean()
        decided = replay(rest, policy)
        assert (decided.prediction == rest.labels).double().mean() >= full - 1e-12


def test_what_a_text_system_lacks_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(["zoo", "run", "pabee", "--data", str(tmp_path)]) != 0
    assert "--encoder" in capsys.readouterr().err
    words = ["zoo", "run", "pabee", "--data", str(tmp_path), "--encoder", str(tmp_path)]
    assert run_main(words) != 0
    assert "tokenizer.json" in capsys.readouterr().err
    assert run_main(["zoo", "run", "pabe", "--data", str(tmp_path)]) != 0
    assert "pabee" in capsys.readouterr().err
    network = saved(tmp_path / "bert")
    with pytest.raises(DataError, match=r"train\.tsv"):
        open_sentences(tmp_path, network)
    with pytest.raises(DataError, match="holds no encoder"):
        open_encoder(tmp_path / "nothing", 2)


@pytest.mark.parametrize("classes", [2, 3])
def test_a_classifier_that_was_saved_is_drawn_anew(tmp_path: Path, classes: int) -> None:
    """It is for two labels, and perhaps not for these."""
    network, wanted = saved(tmp_path / "bert"), encoder().state_dict()
    first, again, other = (open_encoder(network, classes, seed) for seed in (1, 1, 2))
    for name, value in first.state_dict().items():
        ours = name.startswith("classifier.")
        assert torch.equal(value, again.state_dict()[name])
        assert ours or torch.equal(value, wanted[name])
    assert first.classifier.weight.shape == (classes, 16)
    assert not torch.equal(first.classifier.weight, other.classifier.weight)
    assert not torch.equal(first.classifier.weight[:2], wanted["classifier.weight"])
    assert not first.training


def test_files_of_an_encoder_that_are_damaged_are_named(tmp_path: Path) -> None:
    network = saved(tmp_path / "bert")
    weights = network / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises(DataError, match=r"bert holds no encoder: SafetensorError: .* Pass the fol"):
        open_encoder(network, 2)
    (network / "tokenizer.json").write_text("{", "utf-8")
    with pytest.raises(DataError, match=r"tokenizer\.json holds no tokenizer: .*EOF while parsing"):
        open_sentences(tmp_path, network)


def test_a_note_on_a_training_that_is_damaged(tmp_path: Path) -> None:
    note(tmp_path, {"seed": 1})
    (tmp_path / "training.safetensors").write_bytes(b"")
    note(tmp_path, {"seed": 1})
    for content in ("{", "[]"):
        (tmp_path / "recipe.json").write_text(content, "utf-8")
        with pytest.raises(TrainingError, match=r"recipe\.json is damaged: .* or remove this one"):
            note(tmp_path, {"seed": 1})


def test_heads_learn_at_a_rate_of_their_own() -> None:
    model = attach_to_layers(encoder(), first(sentences(4, 0)))
    heads = set(model.heads.parameters())
    made = _optimizer(heads, list(model.parameters()))
    for group in made.param_groups:
        assert {p in heads for p in group["params"]} == {group["lr"] == HEADS_RATE}
    assert sum(len(group["params"]) for group in made.param_groups) == len(list(model.parameters()))
