"""The commands. What they do is in the library; here words become arguments and results text."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console, Group, RenderableType

from offramp.analyse.table import WIDTH
from offramp.errors import DataError, OfframpError
from offramp.files import replaced

if TYPE_CHECKING:
    from torch import nn

__all__ = ["app", "main"]

app = typer.Typer(
    name="offramp",
    help="Early exits for any PyTorch network: a rule decides when to stop, and stopping saves "
    "the time.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Network = Annotated[
    str,
    typer.Argument(
        help="module:factory; the factory returns the network, or (network, example batch)."
    ),
]
Shape = Annotated[
    str | None, typer.Option(help="Sizes of one sample, as 3x32x32, instead of an example.")
]
Exits = Annotated[
    str,
    typer.Option(
        help="How many, or their places: layer1,layer2 or 0.25,0.5 or -3,-1. What is the name of a "
        "module is that module."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
Seed = Annotated[
    int, typer.Option(min=0, max=2**63 - 1, help="Of everything that is drawn at random.")
]

# What messages of the library call arguments in Python, and what stands for them here.
_HERE = {
    "exits='all'": "`offramp export --all-exits`",
    "resume=False": "an emptied one",
    "a smaller lr=": "a smaller `offramp fit --lr`",
    "clip=1.0": "`offramp fit --clip 1.0`",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point: an error of the library, or of a file, is one message and exit code 1."""
    try:
        app(None if arguments is None else list(arguments))
    except (OfframpError, OSError) as error:
        text = f"error: {error}"
        for argument, option in _HERE.items():
            text = text.replace(argument, option)
        Console(stderr=True, soft_wrap=True).print(text, style="red", markup=False)
        sys.exit(1)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("runs/demo"),
    seed: Seed = 0,
    quick: Annotated[
        bool, typer.Option(help="Seconds instead of a minute; proves nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train, calibrate, run and measure an early-exit network on handwritten digits."""
    from offramp.demo import QUICK, Settings, run

    messages = Console(stderr=True)
    report = run(
        out,
        seed=seed,
        settings=QUICK if quick else Settings(),
        progress=not as_json,
        say=(lambda text: None) if as_json else messages.print,
    )
    _show(report.to_dict(), report, as_json)
    if not as_json:
        messages.print(f"written to {out}: " + ", ".join(sorted(p.name for p in out.iterdir())))


@app.command()
def inspect(
    network: Network,
    shape: Shape = None,
    exits: Exits = "3",
    cost: Annotated[str, typer.Option(help="macs, params or latency.")] = "macs",
    depth: Annotated[
        int | None, typer.Option(min=0, help="Levels to show; else down to the candidates.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what a network costs as a tree, with the places for exits and where they fall."""
    from offramp.build.batch import as_call
    from offramp.build.cost import profile
    from offramp.build.model import attach
    from offramp.build.placement import resolve
    from offramp.cli.factories import backbone_of
    from offramp.cli.inspection import Inspection

    backbone, example = backbone_of(network, shape)
    wanted = _exits(exits, backbone)
    found = profile(backbone, *as_call(example), cost)
    # By name: measured again, latency would be another, and the places perhaps too.
    places = [place.name for place in resolve(found, wanted)]
    seen = Inspection(found, wanted, attach(backbone, example, exits=places))
    _show(seen.to_dict(), seen.render(depth), as_json)


@app.command()
def plan(
    network: Network,
    data: Annotated[
        str | None, typer.Option(help="module:factory of a loader, to search; the network trained.")
    ] = None,
    held_out: Annotated[
        str | None, typer.Option(help="module:factory of a loader that the network never saw.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the plan to this .json file.")] = None,
    shape: Shape = None,
    exits: Annotated[
        int | None, typer.Option(help="How many by cost (3), or in a search at most.")
    ] = None,
    heads: Annotated[
        str | None, typer.Option(help="To try at each place: pool,conv:16,conv:64.")
    ] = None,
    worth: Annotated[
        float, typer.Option(help="What an exit has to bring, as a share of the cost.")
    ] = 0.01,
    samples: Annotated[
        int, typer.Option(help="Rows of each loader that the network runs on at most.")
    ] = 8_000,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Find where exits pay in a trained network; without data, place them evenly over the cost."""
    from offramp.cli.factories import backbone_of, loader_of, running_on
    from offramp.places.search import plan as search

    if data is None and (held_out or heads):
        raise DataError(
            "--held-out and --heads are for a search, which needs --data; without it, exits are "
            "placed by cost alone."
        )
    backbone, example = backbone_of(network, shape)
    loaders = [None if name is None else loader_of(name) for name in (data, held_out)]
    sources = ", ".join(name for name in (network, data, held_out) if name is not None)
    with running_on(f"the example or the batches of {sources}"):
        found = search(
            backbone,
            example,
            loaders[0],
            method="percentiles" if data is None else "search",
            exits=exits,
            heads=None if heads is None else [name.strip() for name in heads.split(",")],
            held_out=loaders[1],
            worth=worth,
            samples=samples,
            seed=seed,
            progress=not as_json,
        )
    if out is not None:
        _write(out, (json.dumps(found.to_json(), indent=2, allow_nan=False) + "\n").encode())
    _show(found.to_json(), found, as_json)


@app.command()
def fit(
    network: Network,
    data: Annotated[str, typer.Option(help="module:factory of the training loader.")],
    out: Annotated[Path, typer.Option(help="Folder for the trained model.")],
    shape: Shape = None,
    exits: Annotated[
        str | None, typer.Option(help="As for inspect; 3 without --plan.", show_default=False)
    ] = None,
    planned: Annotated[
        Path | None, typer.Option("--plan", help="Exits and heads as `offramp plan --out` wrote.")
    ] = None,
    scheme: Annotated[
        str, typer.Option(help="How the exits learn: joint, layerwise, heads, ...")
    ] = ("joint"),
    epochs: Annotated[int, typer.Option(help="Passes over the data.")] = 10,
    rate: Annotated[float | None, typer.Option("--lr", help="Learning rate.")] = None,
    clip: Annotated[
        float | None, typer.Option(help="The largest norm that a step's gradient may have.")
    ] = None,
    cascade: Annotated[
        bool, typer.Option("--cascade", help="Exits also see the logits of the one before.")
    ] = False,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Give a network exits, train them, and keep the model in a folder."""
    import torch

    from offramp.build.model import attach
    from offramp.cli.factories import backbone_of, loader_of, running_on
    from offramp.cli.saved import read_plan, save_model
    from offramp.train.loop import fit as train

    if planned is not None and exits is not None:
        raise DataError("--plan says where the exits are; leave out --exits, or --plan.")
    out.mkdir(parents=True, exist_ok=True)  # rather now than after the training
    torch.manual_seed(seed)
    backbone, example = backbone_of(network, shape)
    places, heads = (
        (_exits(exits or "3", backbone), None) if planned is None else read_plan(planned)
    )
    model = attach(backbone, example, exits=places, heads=heads or "auto", cascade=cascade)
    loader = loader_of(data)
    with running_on(f"the batches of {data!r}"):
        history = train(
            model,
            loader,
            scheme=scheme,
            epochs=epochs,
            lr=rate,
            clip=clip,
            seed=seed,
            progress=not as_json,
        )
    save_model(model, out, network, shape, heads)
    rows = [row.to_dict() for row in history.rows]
    facts = {"out": str(out), "places": list(model.places), "history": rows}
    _show(facts, f"{history}\nwritten to {out}", as_json)


@app.command()
def record(
    model: Annotated[
        Path, typer.Argument(help="Folder that `fit`, `zoo run`, `demo` or `export` wrote.")
    ],
    data: Annotated[str, typer.Option(help="module:factory of the loader.")],
    out: Annotated[Path, typer.Option(help="The trace, a .safetensors file.")],
    source: Annotated[str | None, typer.Option(help="A name for the data.")] = None,
    as_json: AsJson = False,
) -> None:
    """Keep what every exit of a trained model, or of an artifact, says on data."""
    from offramp.cli.factories import loader_of, running_on
    from offramp.cli.saved import load_model
    from offramp.decide.record import record as keep
    from offramp.run.artifact import MANIFEST, load

    loaded = load(model) if (model / MANIFEST).is_file() else load_model(model)[0]
    loader = loader_of(data)
    with running_on(f"the batches of {data!r}"):
        trace = keep(loaded, loader, source=source, path=out, progress=not as_json)
    facts = {
        "out": str(out),
        "samples": trace.num_samples,
        "exits": trace.num_exits,
        "classes": trace.num_classes,
        "labels": trace.labels is not None,
        "source": trace.source,
        "fingerprint": trace.fingerprint,
    }
    text = f"{trace.num_samples} samples, {trace.num_exits} exits, source {trace.source!r}: {out}"
    _show(facts, text, as_json)


@app.command()
def calibrate(
    trace: Annotated[Path, typer.Argument(help="Trace of calibration data.")],
    out: Annotated[Path, typer.Option(help="The policy, a .json file.")] = Path("policy.json"),
    criterion: Annotated[
        str, typer.Option(help="confidence, entropy, margin, patience, ...")
    ] = "confidence",
    max_accuracy_drop: Annotated[
        float | None, typer.Option(help="Accuracy that may be lost, as a share: 0.005.")
    ] = None,
    max_cost: Annotated[
        float | None, typer.Option(help="Mean cost that may be spent, as a share of the full.")
    ] = None,
    min_agreement: Annotated[
        float | None, typer.Option(help="Share of answers that must be the full network's.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Choose the thresholds that meet a goal on a trace."""
    from offramp.decide.calibrate import calibrate as choose
    from offramp.decide.trace import Trace

    goals = {
        "max_accuracy_drop": max_accuracy_drop,
        "max_cost": max_cost,
        "min_agreement": min_agreement,
    }
    given: dict[str, Any] = {name: goal for name, goal in goals.items() if goal is not None}
    policy = choose(Trace.load(trace), criterion, **given)
    policy.save(out)
    _show(policy.to_json(), f"{policy.describe()}\nwritten to {out}", as_json)


@app.command()
def evaluate(
    trace: Annotated[Path, typer.Argument(help="Trace of test data.")],
    policy: Annotated[Path, typer.Argument(help="The policy, a .json file.")],
    html: Annotated[Path | None, typer.Option(help="Write a report to this HTML file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write the picture to this file.")] = None,
    tolerance: Annotated[
        float, typer.Option(help="Loss of accuracy that the verdict accepts, as a share.")
    ] = 0.01,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Show what a policy does on a trace: accuracy, cost, intervals, baselines, the verdict."""
    from offramp.analyse.plot import picture
    from offramp.analyse.report import evaluate as judge
    from offramp.decide.policy import Policy
    from offramp.decide.trace import Trace

    report = judge(Trace.load(trace), Policy.load(policy), tolerance=tolerance, seed=seed)
    if html is not None:
        _write(html, report.to_html().encode())
    if plot is not None:
        _write(plot, picture(report, plot.suffix.removeprefix(".") or "png"))
    _show(report.to_dict(), report, as_json)


@app.command()
def export(
    model: Annotated[Path, typer.Argument(help="Folder that `fit`, `zoo run` or `demo` wrote.")],
    policy: Annotated[Path, typer.Argument(help="The policy, a .json file.")],
    out: Annotated[Path, typer.Option(help="The artifact, a folder.")],
    classes: Annotated[
        str | None, typer.Option(help="Their names: cat,dog or a file with one on each line.")
    ] = None,
    preprocessing: Annotated[
        str | None,
        typer.Option(help="Of the inputs, to be told: a JSON object or a .json file."),
    ] = None,
    all_exits: Annotated[
        bool, typer.Option(help="Keep exits that are switched off, to calibrate anew.")
    ] = False,
    stages: Annotated[bool, typer.Option(help="Also write each stage as a file.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a model and its policy as one ONNX file, compared with the model before."""
    from offramp.cli.deploy import Holdings, class_names, json_object
    from offramp.cli.saved import load_model
    from offramp.decide.policy import Policy
    from offramp.run.artifact import export as write
    from offramp.run.artifact import verify as check

    rule, about = Policy.load(policy), json_object(preprocessing)
    loaded, example = load_model(model)
    names = class_names(classes)
    write(
        loaded,
        rule,
        example,
        out,
        classes=names,
        preprocessing=about,
        exits="all" if all_exits else "active",
        stages=stages,
    )
    held = Holdings(out, check(out))
    _show(held.to_dict(), Group(held.render(), f"written to {out}"), as_json)


@app.command()
def verify(
    artifact: Annotated[Path, typer.Argument(help="Folder that `offramp export` wrote.")],
    as_json: AsJson = False,
) -> None:
    """Check every part of an artifact, and show what it holds; exit code 1 where it is damaged."""
    from offramp.cli.deploy import Holdings
    from offramp.run.artifact import verify as check

    held = Holdings(artifact, check(artifact))
    _show(held.to_dict(), Group(held.render(), "intact"), as_json)


@app.command()
def bench(
    artifact: Annotated[Path, typer.Argument(help="Folder that `offramp export` wrote.")],
    engine: Annotated[str, typer.Option(help="onnxruntime or openvino.")] = "onnxruntime",
    threads: Annotated[int | None, typer.Option(help="Default: one for each core.")] = None,
    data: Annotated[
        str | None, typer.Option(help="module:factory of a loader; else random numbers are run.")
    ] = None,
    seconds: Annotated[float, typer.Option(help="About how long to measure.")] = 10.0,
    as_json: AsJson = False,
) -> None:
    """Time an artifact at several batch sizes: as calibrated, nobody and everybody leaving."""
    from offramp.cli.deploy import bench as measure
    from offramp.cli.factories import loader_of

    loader = None if data is None else loader_of(data)
    measured = measure(artifact, engine, threads, loader, seconds)
    _show(measured.to_dict(), measured.render(), as_json)


zoo_app = typer.Typer()
app.add_typer(zoo_app, name="zoo")


@zoo_app.callback(invoke_without_command=True)
def zoo(context: typer.Context, as_json: AsJson = False) -> None:
    """List the systems of the literature; `offramp zoo run NAME` trains one."""
    from offramp.cli.catalogue import Catalogue
    from offramp.zoo.systems import SYSTEMS
    from offramp.zoo.text import TEXT

    context.obj = as_json  # also where it stands before the name of a command
    if context.invoked_subcommand is None:
        listed = Catalogue(list(SYSTEMS.values()), list(TEXT.values()))
        _show(listed.to_dict(), listed.render(), as_json)


@zoo_app.command("run")
def zoo_run(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="As `offramp zoo` lists it.")],
    data: Annotated[Path, typer.Option(help="Folder with the images' or sentences' files.")],
    encoder: Annotated[
        Path | None, typer.Option(help="Folder of the encoder, for systems that read text.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for what is made; else runs/zoo/NAME.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Instead of the system's own.")] = None,
    max_accuracy_drop: Annotated[
        float, typer.Option(help="Accuracy that the thresholds may cost, as a share.")
    ] = 0.0,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Train a system, choose its thresholds, judge it; interrupted, the same command goes on."""
    from offramp.zoo.running import run as make
    from offramp.zoo.systems import SYSTEMS, system
    from offramp.zoo.text import TEXT, run_text

    as_json = as_json or bool(context.obj)
    folder = Path("runs/zoo") / name if out is None else out
    run: Callable[..., Any]
    if name not in TEXT:
        if encoder is not None and name in SYSTEMS:
            raise DataError(f"{name!r} reads images and has no encoder; leave out --encoder.")
        run = partial(make, system(name, also=TEXT), data)
    elif encoder is None:
        raise DataError(
            f"{name!r} reads text and begins with an encoder. Pass the folder that holds its "
            "config.json, weights and tokenizer.json as --encoder."
        )
    else:
        run = partial(run_text, TEXT[name], data, encoder)
    made = run(
        folder,
        epochs=epochs,
        seed=seed,
        max_accuracy_drop=max_accuracy_drop,
        progress=not as_json,
    )
    _show(made.report.to_dict(), made.report, as_json)


def _show(facts: dict[str, Any], shown: RenderableType, as_json: bool) -> None:
    """The one result of a command, on standard output."""
    if as_json:
        sys.stdout.write(json.dumps(facts, indent=2, allow_nan=False) + "\n")
        return
    console = Console()
    if console.width < WIDTH:  # a table that is cut off says less than one that is wrapped
        console = Console(width=WIDTH)
    console.print(shown, highlight=False, markup=False)


def _write(path: Path, content: bytes) -> None:
    with replaced(path) as part:
        part.write_bytes(content)


def _exits(text: str, backbone: nn.Module) -> int | list[int | float | str]:
    """A number of exits, or a list of fractions, indices and paths.

    Modules of an ``nn.Sequential`` have numbers for names: what is written as a module is called,
    is that module, and a fraction of that spelling is written without its zero, or with another.
    """
    if text.isdecimal():
        return int(text)
    modules = {name for name, _ in backbone.named_modules() if name}
    places: list[int | float | str] = []
    for word in map(str.strip, text.rstrip(",").split(",")):
        try:
            number = float(word)
        except ValueError:
            number = None
        if number is None or word in modules:
            places.append(word)
        else:
            places.append(int(number) if number.is_integer() else number)
    return places
