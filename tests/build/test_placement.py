"""Where the exits go."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from offramp.build.batch import as_call
from offramp.build.cost import CostProfile, profile
from offramp.build.placement import _closest, candidates, percentiles, resolve
from offramp.errors import PlaceError
from tests.networks import example_of, make


def profile_of(kind: str, measure: str = "macs") -> CostProfile:
    return profile(make(kind), *as_call(example_of(kind)), measure)


CNN, MLP, ENCODER = profile_of("cnn"), profile_of("mlp"), profile_of("encoder")


def names(places):
    return [str(place) for place in places]


def test_percentiles():
    assert percentiles(3) == (0.25, 0.5, 0.75)


def test_candidates_are_the_boundaries_of_blocks():
    blocks = ["stem", "layer1.0", "layer1", "layer2.0", "layer2", "layer3.0"]
    assert names(candidates(CNN)) == blocks
    assert names(candidates(MLP)) == [f"blocks.{k}" for k in range(5)]
    assert names(candidates(ENCODER)) == ["blocks.0", "blocks.1", "blocks.2"]


@pytest.mark.parametrize("found", [CNN, MLP, ENCODER], ids=["cnn", "mlp", "encoder"])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_number_is_the_percentiles_of_cost(found, n):
    places = resolve(found, n)
    assert len(places) == n
    fractions = [place.fraction for place in places]
    assert fractions == sorted(set(fractions))
    for fraction, wanted in zip(fractions, percentiles(n), strict=True):
        assert abs(fraction - wanted) < 0.2
    assert fractions[-1] <= 0.98


def test_the_encoder_is_cut_in_quarters():
    assert names(resolve(ENCODER, 3)) == ["blocks.0", "blocks.1", "blocks.2"]
    assert [round(p.fraction, 2) for p in resolve(ENCODER, 3)] == [0.25, 0.5, 0.75]


def test_by_parameters_places_move():
    by_params = profile_of("cnn", "params")
    assert names(resolve(by_params, 1)) == ["layer3.0"]  # late layers are wide
    assert names(resolve(CNN, 1)) == ["layer2.0"]


def test_by_latency():
    places = resolve(profile_of("cnn", "latency"), 3)
    assert len({p.fraction for p in places}) == 3


def test_fractions_paths_and_indices():
    assert names(resolve(CNN, [0.5])) == ["layer2.0"]
    assert names(resolve(CNN, [0.75, 0.2])) == ["layer1.0", "layer2"]
    assert names(resolve(CNN, ["layer3.0", "layer1"])) == ["layer1", "layer3.0"]
    assert names(resolve(CNN, "layer1")) == ["layer1"]
    assert names(resolve(CNN, [-1, -3])) == ["layer2.0", "layer3.0"]
    assert names(resolve(CNN, ["layer1.0.conv1", 0.5, -1])) == [
        "layer1.0.conv1",
        "layer2.0",
        "layer3.0",
    ]
    assert names(resolve(CNN, {"layer2": "auto", "layer1": "auto"})) == ["layer1", "layer2"]


def test_a_named_place_may_be_anywhere():
    assert names(resolve(CNN, ["layer1.0.bn1", "fc"])) == ["layer1.0.bn1", "fc"]


@settings(max_examples=60, deadline=None)
@given(
    offered=st.lists(st.floats(0.01, 0.99), min_size=1, max_size=7, unique=True).map(sorted),
    data=st.data(),
)
def test_the_choice_is_the_best_of_all(offered, data):
    n = data.draw(st.integers(1, len(offered)))
    gap = data.draw(st.sampled_from([0.0, 0.05, 0.2]))
    wanted = percentiles(n)
    chosen = _closest(offered, wanted, gap)

    def distance(indices):
        return sum(
            abs(torch.tensor(offered[i] / w, dtype=torch.float64).log().item())
            for i, w in zip(indices, wanted, strict=True)
        )

    every = list(itertools.combinations(range(len(offered)), n))
    spread = [
        c for c in every if all(offered[b] - offered[a] >= gap for a, b in itertools.pairwise(c))
    ]
    assert chosen in every
    assert distance(chosen) == pytest.approx(min(map(distance, spread or every)))
    if spread:
        assert chosen in spread


class Shared(nn.Module):
    """One block, called five times, as ALBERT does."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.fc = nn.Sequential(nn.Linear(8, 8), nn.ReLU()), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(5):
            x = self.block(x)
        return self.fc(x)


def test_a_module_that_is_called_several_times():
    found = profile(Shared(), (torch.randn(2, 8),))
    assert names(resolve(found, 2)) == ["block@1", "block@3"]
    assert names(candidates(found)) == [f"block@{k}" for k in range(5)]
    assert names(resolve(found, ["block@3", "block@1"])) == ["block@1", "block@3"]
    with pytest.raises(PlaceError, match=r"'block' is called 5 times .* 'block@0' to 'block@4'"):
        resolve(found, ["block"])
    with pytest.raises(PlaceError, match=r"'block@5' asks for call 5 .* called 5 times"):
        resolve(found, ["block@5"])
    with pytest.raises(PlaceError, match="no module 'block@01'. Near matches: block"):
        resolve(found, ["block@01"])


class Branches(nn.Module):
    """An inception module: two branches joined."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(width, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))
        self.b = nn.Conv2d(width, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.a(x), self.b(x)], 1)


def test_never_inside_a_branch():
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), Branches(8), Branches(8), Branches(8), nn.Flatten(), nn.Linear(288, 2)
    )
    found = profile(net, (torch.randn(2, 3, 8, 8),))
    assert names(candidates(found)) == ["0", "1", "2"]  # after "3" less than 2 % remain


class Strided(nn.Module):
    """A block with a skip connection only where the width stays."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.expand, self.project = nn.Linear(width, 2 * out), nn.Linear(2 * out, out)
        self.skip = width == out

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(torch.relu(self.expand(x)))
        return x + y if self.skip else y


def test_never_inside_a_block_even_where_one_of_its_kind_would_allow_it():
    net = nn.Sequential(*(Strided(*w) for w in [(8, 12), (12, 12), (12, 16), (16, 16)]))
    found = profile(nn.Sequential(net, nn.Linear(16, 16), nn.Linear(16, 2)), (torch.randn(2, 8),))
    assert names(candidates(found)) == ["0.0", "0.1", "0.2", "0"]


class Named(nn.Module):
    """A stage whose blocks are its direct children, without skip connections."""

    def __init__(self, width: int) -> None:
        super().__init__()
        for k in range(3):
            self.add_module(f"b{k}", nn.Sequential(nn.Linear(width, width), nn.ReLU()))

    def forward(self, x: Tensor) -> Tensor:
        for child in self.children():
            x = child(x)
        return x


def test_stages_are_entered():
    net = nn.Sequential(Named(8), Named(8), nn.Linear(8, 2))
    found = profile(net, (torch.randn(2, 8),))
    assert names(candidates(found)) == ["0.b0", "0.b1", "0", "1.b0", "1.b1", "1"]


class Jumping(nn.Module):
    """Sums all layers as it goes, so that no point is a strict cut."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.fc = nn.ModuleList(nn.Linear(8, 8) for _ in range(4)), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        for layer in self.layers:
            x = torch.relu(layer(x))
            total = total + x @ layer.weight
        return self.fc(total)


def test_where_nothing_is_a_strict_cut_the_weaker_rule_serves():
    found = profile(Jumping(), (torch.randn(2, 8),))
    assert names(resolve(found, 2))[0].startswith("layers.")


class Streams(nn.Module):
    """Hands on two streams, the first with windows in dimension 0."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Stream() for _ in range(4))
        self.fc = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        windows, tokens = x.reshape(-1, 8), x
        for layer in self.layers:
            windows, tokens = layer(windows, tokens)
        return self.fc(tokens.mean(1))


class Stream(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, windows: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        windows = windows + self.a(windows)
        return windows, tokens + self.b(tokens + windows.reshape(tokens.shape))


def test_of_several_streams_the_one_with_the_batch():
    places = resolve(profile(Streams(), (torch.randn(2, 5, 8),)), 3)
    assert names(places) == ["layers.0", "layers.1", "layers.2"]
    assert {place.item for place in places} == {1}


class WritesOver(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.act, self.b = nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 8)
        self.fc = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.b(self.act(self.a(x))))


def test_what_is_written_over_later_is_no_candidate_and_is_copied_if_named():
    found = profile(WritesOver(), (torch.randn(2, 8),))
    assert names(candidates(found)) == ["act", "b"]
    assert resolve(found, ["a"])[0].copied
    assert not resolve(found, ["act"])[0].copied


class Odd(nn.Module):
    """Modules that are unfit for an exit, each in its way."""

    def __init__(self) -> None:
        super().__init__()
        self.front, self.text, self.index = nn.Linear(4, 4), Says(), Argmax()
        self.turn, self.spare, self.fc = Turn(), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.front(x)
        self.text(x)
        self.index(x)
        return self.fc(self.turn(x).t())


class Says(nn.Module):
    def forward(self, x: Tensor) -> str:
        return "nothing"


class Argmax(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.argmax(1)


class Turn(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.t() + 0


ODD = profile(Odd(), (torch.randn(4, 4),))


@pytest.mark.parametrize(
    ("found", "exits", "text"),
    [
        (
            CNN,
            ["layer1.7"],
            r"no module 'layer1.7'. Near matches: layer1.*Fit places: stem, layer1",
        ),
        (CNN, ["conv1"], r"no module 'conv1'.*layer1.0.conv1"),
        (CNN, [""], "no module ''"),
        (CNN, ["layer1.0", "layer1.0"], "Two exits stand at one place, 'layer1.0'"),
        (CNN, [0.5, "layer2.0"], "Two exits stand at one place, 'layer2.0'"),
        (CNN, ["layer1", "layer1.1"], "'layer1.1' and 'layer1' hand on the same tensor"),
        (CNN, 7, "7 exits were asked for and the backbone has 6 fit places: stem, layer1.0"),
        (CNN, 0, "exits=0: expected at least one exit"),
        (CNN, True, "exits=True is of type 'bool'"),
        (CNN, 2.5, "exits=2.5 is of type 'float'. Expected a number of exits, a list"),
        (CNN, [], "exits is empty"),
        (CNN, [1.5], "fraction 1.5 is not between 0 and 1"),
        (CNN, [2], "index 2 is not negative"),
        (CNN, [-9], "index -9 is out of range: the backbone has 6 candidate places: stem"),
        (CNN, [None], "place None is of type 'NoneType'. Expected a module path"),
        (CNN, {0.5: "auto"}, "exits maps 0.5. Expected module paths as keys"),
        (ODD, ["spare"], "'spare' exists and never runs in evaluation mode"),
        (ODD, ["text"], r"output of 'text' \(Says\) is no tensor and holds none"),
        (ODD, ["index"], r"output of 'index' \(Argmax\) is of type torch.int64"),
        (
            ODD,
            ["turn"],
            r"'turn' \(Turn\) has shape \(4, 2\) for 2 samples: its dimension 0 is not",
        ),
        (ODD, 3, "has 1 fit place: front. Others hand on .* such as 'turn' with"),
    ],
)
def test_bad_places(found, exits, text):
    with pytest.raises(PlaceError, match=text):
        resolve(found, exits)


def test_a_time_first_network_says_why_it_has_no_places():
    class TimeFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.fc = nn.ModuleList(nn.Linear(8, 8) for _ in range(4)), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = x.transpose(0, 1)
            for layer in self.layers:
                x = layer(x)
            return self.fc(x.mean(0))

    found = profile(TimeFirst(), (torch.randn(4, 5, 8),))
    text = r"has 0 fit places. Others .* dimension 0 is not the batch, such as 'layers.0'"
    with pytest.raises(PlaceError, match=text):
        resolve(found, 2)


class Parallel(nn.Module):
    """Three branches of four blocks, joined where hardly any work is left."""

    def __init__(self, stem: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1) if stem else nn.Identity()
        wide = 8 if stem else 3
        self.a, self.b, self.c = (self._branch(wide) for _ in range(3))
        self.fc = nn.Linear(24, 5)

    def _branch(self, wide: int) -> nn.Sequential:
        blocks = [nn.Sequential(nn.Conv2d(w, 8, 3, padding=1), nn.ReLU()) for w in (wide, 8, 8, 8)]
        return nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.fc(torch.cat([self.a(x), self.b(x), self.c(x)], 1).mean((2, 3)))


class Towers(Parallel):
    """One branch for each of two inputs."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        both = torch.cat([self.a(x), self.b(y)], 1).mean((2, 3))
        return self.fc(torch.cat([both, both[:, :8]], 1))


def test_never_in_a_branch_that_waits_for_others_or_others_for_it():
    x = torch.randn(2, 3, 8, 8)
    assert names(candidates(profile(Parallel(stem=True), (x,)), at_least=3)) == ["stem"]
    assert candidates(profile(Parallel(stem=False), (x,)), at_least=3) == ()
    assert candidates(profile(Towers(stem=False), (x, x)), at_least=3) == ()


class Rereads(nn.Module):
    """Every layer looks at the inputs again, which is less work than what it does itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
        self.looks = nn.ModuleList(nn.Linear(4, 16) for _ in range(4))
        self.fc = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.looks[0](x)
        for layer, look in zip(self.layers, self.looks, strict=True):
            h = (layer(h) + look(x)).relu()
        return self.fc(h)


def test_a_network_that_reads_its_inputs_again_is_one_stream():
    found = candidates(profile(Rereads(), (torch.randn(2, 4),)), at_least=2)
    assert len(found) >= 2


def test_a_module_by_its_second_name():
    block = nn.Linear(4, 4)
    net = nn.Sequential(nn.ModuleList([block] * 3)[0], block, nn.Linear(4, 2))
    found = profile(net, (torch.randn(2, 4),))
    with pytest.raises(PlaceError, match="'1' is the same object as '0'. Name it so: '0', or"):
        resolve(found, ["1"])
    assert names(resolve(found, ["0@0"])) == ["0@0"]
