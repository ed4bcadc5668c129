"""The tables of docs/zoo.md and of the cards, from the results of zoo.py."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.markdown import table

__all__ = ["ZOO_TABLES"]

Result = dict[str, Any]
Row = dict[str, Any]

NOT_YET = "Not measured yet."
NAMES = {
    "b-lenet": "B-LeNet",
    "b-alexnet": "B-AlexNet",
    "b-alexnet-distilled": "B-AlexNet, distilled",
    "b-resnet110": "B-ResNet-110",
    "b-resnet110-distilled": "B-ResNet-110, distilled",
}
COSTS = (0.25, 0.5, 0.75, 1.0)  # of the plain network, at which recipes are compared
WAYS = {
    "screened": "the paper's screening",
    "calibrated": "`calibrate`, confidence",
    "calibrated, ensemble": "`calibrate`, the exits' ensemble",
    "calibrated, ensemble, margin": "likewise, with a margin",
    "first exit": "as many at the first exit as in the paper",
}
HEIR_WAYS = {"joint": "all at once", "heads": "on the trained network"}
HEIR_THRESHOLDS = {
    "paper": "the paper's, no loss against its own last exit",
    "calibrated": "`calibrate`, confidence, no loss against plain",
    "calibrated, ensemble": "likewise, the exits' ensemble",
    "calibrated, ensemble, margin": "likewise, with a margin",
}
METHODS = {
    "shared": "the paper's: one for all exits",
    "geometric": "the paper's: geometric shares",
    "search": "`calibrate`'s search",
}
BARS: dict[str, tuple[str, Callable[[float], bool]]] = {
    "blenet_speedup_b1": ("≥ 2.5", lambda v: v >= 2.5),
    "blenet_speedup_b64": ("≥ 5.4", lambda v: v >= 5.4),
    "balexnet_speedup_b1": ("≥ 1.5", lambda v: v >= 1.5),
    "balexnet_speedup_b64": ("≥ 1.5", lambda v: v >= 1.5),
    "balexnet_loss": ("≤ 0", lambda v: v <= 0),
    "bresnet110_speedup_b1": ("≥ 1.9", lambda v: v >= 1.9),
    "bresnet110_speedup_b64": ("≥ 1.9", lambda v: v >= 1.9),
    "bresnet110_loss": ("≤ 1.5", lambda v: v <= 1.5),
    "text_speedup_b1": ("≥ 1.8", lambda v: v >= 1.8),
    "text_speedup_b32": ("≥ 1.8", lambda v: v >= 1.8),
    "text_loss": ("≤ 0.5", lambda v: v <= 0.5),
}


def _summary(result: Result) -> str:
    found, rows = result["summary"], []
    for name, (bar, good) in BARS.items():
        if name in found:
            met = "yes" if good(found[name]) else "**no**"
            rows.append([f"`{name}`", f"{found[name]:.2f}", bar, met])
        else:
            rows.append([f"`{name}`", "not measured", bar, "**no**"])
    return table(["figure", "measured", "bar", "met"], rows)


def _branchynet(result: Result) -> str:
    paper, rows = result["conditions"]["paper"]["branchynet"], []
    for name, title in NAMES.items():
        own = paper.get(name)
        if own is not None:
            rows.append(
                [
                    title, f"the paper, {own['data']}", f"{own['plain']:.2f}",
                    f"{own['branches']:.2f}", "", "", f"{own['gain']:.1f}×", "",
                ]
            )  # fmt: skip
        row = result["systems"].get(name)
        if row is None:
            rows.append([title, NOT_YET, *[""] * 6])
            continue
        for policy in row["policies"]:
            rows.append([title, WAYS[policy["way"]], _percent(row["plain"]), *_cells(policy)])
    head = [
        "network", "thresholds", "plain, %", "with branches, %", "left at each exit, %",
        "MACs ratio", "faster, batch 1", "faster, batch 64",
    ]  # fmt: skip
    return "\n".join([table(head, rows), "", _budgets(result)])


def _cells(policy: Row) -> list[str]:
    if not policy["found"]:
        return ["no such thresholds", *[""] * 4]
    return [
        f"{_percent(policy['accuracy'])} ({_points(policy['less_plain'])})",
        " / ".join(f"{100 * share:.0f}" for share in policy["shares"]),
        f"{policy['macs_speedup']:.2f}×",
        f"{policy['batch_1']['speedup']:.2f}×",
        f"{policy['batch_64']['speedup']:.2f}×",
    ]


def _budgets(result: Result) -> str:
    told = []
    for name, title in NAMES.items():
        row = result["systems"].get(name)
        if row is not None:
            exits = ", ".join(_percent(exit) for exit in row["exits"])
            told.append(
                f"{title}: {row['data']}, {row['training_images']} images to train on, "
                f"{row['epochs']} epochs for both{_begun(row)} ({_where(row['trained'])}), seed "
                f"{row['seed']}{_loss(row)}; its exits alone: {exits} %.{_timed_with(row)}"
            )
    return " ".join(told) or NOT_YET


def _begun(row: Row) -> str:
    """Where branches are trained on the plain network: how long that was alone."""
    phases = row["phases"]
    return f", the first {phases[0][1]} of them the plain network alone" if len(phases) > 1 else ""


def _loss(row: Row) -> str:
    return f"; the loss of its exits: {row['loss']}" if "loss" in row else ""


def _timed_with(row: Row) -> str:
    if not any("timed_with" in policy for policy in row["policies"]):
        return ""
    return (
        " Timed later, with weights drawn at random and thresholds at which as many images leave "
        "at each exit."
    )


def _where(trained: Row) -> str:
    """On what, and in how many seconds of a processor where they were counted."""
    told = []
    for name, how in trained.items():
        seconds = "" if how["seconds"] is None else f" in {how['seconds']:.0f} s"
        told.append(f"{name} on {how['on']}{seconds}")
    return ", ".join(told)


def _inception(result: Result) -> str:
    row = result["systems"].get("inception-v1")
    if row is None:
        return NOT_YET
    exits = row["exits"]
    rows = [
        ["without auxiliary classifiers", "", "", _percent(row["plain"]), ""],
        [
            "with, trained with weight 0.3", *(_percent(exit) for exit in exits),
            _points(row["last_less_plain"]),
        ],
    ]  # fmt: skip
    head = ["trained", "classifier 1, %", "classifier 2, %", "network, %", "less without, points"]
    at = ", ".join(
        f"{100 * value:.2f} % at {100 * float(budget):.0f} % of the cost"
        for budget, value in row["accuracy_at"].items()
    )
    told = (
        f"{row['data']}: {row['training_images']} images to train on, {row['epochs']} epochs for "
        f"both ({_where(row['trained'])}), "
        f"seed {row['seed']}; {row['samples']} images to be judged on. The classifiers as exits, "
        f"by confidence, thresholds from calibration images: {at}. {_inception_chosen(row)}"
    )
    return "\n".join([table(head, rows), "", told])


def _inception_chosen(row: Row) -> str:
    chosen = row["chosen"]
    if chosen is None:
        return (
            "No thresholds are as accurate on calibration images as the network trained without "
            "classifiers."
        )
    shares = " / ".join(f"{100 * share:.0f}" for share in chosen["shares"])
    return (
        f"As accurate on calibration images as the network trained without them: {shares} % leave "
        f"at each, {_points(chosen['less_plain'])} points on test images, MACs ratio "
        f"{chosen['macs_speedup']:.2f}×, measured {chosen['batch_1']['speedup']:.2f}× at batch 1 "
        f"and {chosen['batch_64']['speedup']:.2f}× at batch 64."
    )


def _gradients(result: Result) -> str:
    row = result["systems"].get("inception-v1")
    if row is None:
        return NOT_YET
    norms = row["gradient_norms"]
    rows = [
        [layer, *(_norm(norms[way][layer][k]) for k in (0, -1) for way in ("plain", "auxiliary"))]
        for layer in norms["plain"]
    ]
    head = [
        "layer", "first quarter, without", "first quarter, with", "last quarter, without",
        "last quarter, with",
    ]  # fmt: skip
    return table(head, rows)


def _norm(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _text(result: Result) -> str:
    text = result["systems"].get("text")
    if text is None:
        return NOT_YET
    rows = [
        [
            system["system"] if system["paper"] else f"{system['system']}: the library's own",
            system["summary"],
            *(_budget(system, str(budget)) for budget in (0.4, 0.5, 0.6)),
            *_chosen(system["chosen"]),
        ]
        for system in text["systems"]
    ]
    head = [
        "system", "how it learns; how it leaves", "at 40 % of the cost", "at 50 %", "at 60 %",
        "chosen: cost, %", "chosen: less plain, points",
    ]  # fmt: skip
    return "\n".join([table(head, rows), "", _text_conditions(text)])


def _budget(system: Row, budget: str) -> str:
    found = system["at"].get(budget)
    return "" if found is None else f"{found['less_plain']['points']:+.2f}"


def _chosen(chosen: Row | None) -> list[str]:
    if chosen is None:
        return ["no such thresholds", ""]
    return [f"{100 * chosen['cost']:.0f}", _points(chosen["less_plain"])]


def _text_conditions(text: Row) -> str:
    sizes = text["sentences"]
    return (
        f"{text['encoder']} on {text['data']}: {sizes['train']} sentences to train on, "
        f"{sizes['dev']} to choose thresholds on, {sizes['test']} to be judged on, of "
        f"{text['tokens']} tokens with padding; {text['epochs']} epochs for each stage, of which "
        f"those on the fine-tuned encoder have two, seed {text['seed']}. Without exits, fine-tuned "
        f"alike: {_percent(text['plain'])} %. Points are "
        f"against it, on the same sentences; in brackets 95 %. Chosen: the cheapest that lose at "
        f"most {100 * text['drop_on_dev']:g} points on the development sentences. Cost: "
        f"multiply-accumulates, heads included, as a share of the encoder's."
    )


def _truncated(result: Result) -> str:
    text = result["systems"].get("text")
    if text is None:
        return NOT_YET
    rows = [
        [str(r["layers"]), _percent(r["accuracy"]), _points(r["less_plain"])]
        for r in text["truncated"]
    ]
    told = table(["layers", "accuracy, %", "less plain, points"], rows)
    plain = _percent(text["truncated"][0].get("plain", text["plain"]))
    if plain != _percent(text["plain"]):
        told += f"\n\nOf an earlier run on another machine, whose plain encoder had {plain} %."
    return told


def _text_speed(result: Result) -> str:
    text = result["systems"].get("text")
    if text is None:
        return NOT_YET
    rows = [
        [
            row["system"], str(size), f"{row[f'batch_{size}']['plain_ms']:.2f}",
            f"{row[f'batch_{size}']['exits_ms']:.2f}", f"{row[f'batch_{size}']['speedup']:.2f}×",
        ]
        for row in text["timed"]
        for size in (1, 32)
    ]  # fmt: skip
    return table(["system", "batch", "plain, ms a sentence", "with exits", "faster"], rows)


def _recipes(result: Result) -> str:
    found = result["systems"].get("recipes")
    if found is None or not (found["references"] or found["recipes"]):
        return NOT_YET
    rows = [
        [row["title"], f"`{row['run']}`", *_at_costs(row), "", "", ""]
        for row in found["references"]
    ]
    rows += [
        [row["recipe"], f"`{row['run']}`", *_at_costs(row), row["claim"], *_verdict(row)]
        for row in found["recipes"]
    ]
    head = [
        "recipe", "exits of the run", *(f"at {100 * cost:.0f} %, %" for cost in COSTS),
        "the paper's claim", "holds", "met by, points",
    ]  # fmt: skip
    parts = [table(head, rows), "", _recipes_conditions(found)]
    if any("tolerated" in row for row in found["recipes"]):
        parts += ["", _tolerated(found)]
    return "\n".join(parts)


def _at_costs(row: Row) -> list[str]:
    return [_percent(row["at"][str(c)]) if str(c) in row["at"] else "" for c in COSTS]


def _verdict(row: Row) -> list[str]:
    verdict = row["verdict"]
    if verdict is None:
        return [f"`{row['against']}` is not trained yet", ""]
    if "points" not in verdict:
        return ["no such thresholds", ""]
    told = f"{_points(verdict)} (at {100 * verdict['at']:g} %)"
    if verdict["holds"]:
        return ["yes" if verdict["interval"][0] > 0 else "yes, within chance", told]
    if not verdict.get("cheaper", True):
        return ["**no**: not cheaper", told]
    return ["no, within chance" if verdict["interval"][1] >= 0 else "**no**", told]


def _recipes_conditions(found: Row) -> str:
    task = found["task"]
    said = (
        f"{task['network']} on {task['data']} with five exits, {task['passes']} passes over the "
        f"training images (on the plain network: as many for heads again), seed {found['seed']}; "
        f"{found['held']} images that training held out "
        f"choose thresholds (three tenths of them fit gates and ensembles instead), "
        f"{found['test']} test images judge. Costs are multiply-accumulates, heads included, as "
        f"shares of the plain network's; between two thresholds they are interpolated on the test "
        f"images. Met by: where it is met by least, or missed by most; in "
        f"points of accuracy or of risk, with 95 %."
    )
    missing = ", ".join(f"`{name}` ({title})" for name, title in found["missing"].items())
    return f"{said} Not trained yet, and so left out: {missing}." if missing else said


def _tolerated(found: Row) -> str:
    rows = []
    for row in found["recipes"]:
        for kept in row.get("tolerated", []):
            tolerated = [row["recipe"], f"{100 * kept['tolerated']:g}"]
            if kept["found"]:
                ends = " to ".join(f"{100 * end:.2f}" for end in kept["interval"])
                risk = f"{100 * kept['risk']:.2f}; {ends}"
                rows.append([*tolerated, risk, f"{100 * kept['cost']:.0f}"])
            else:
                rows.append([*tolerated, "no such thresholds", ""])
    told = f"With probability {1 - found['delta']:g} no more than what is tolerated:"
    head = ["recipe", "tolerated risk, %", "risk on test images, %", "cost, %"]
    return "\n".join([told, "", table(head, rows)])


def _heirs(result: Result, prefix: str) -> str:
    """Networks whose recipes are trained beside the network alone: exits, thresholds, budgets."""
    systems = {
        name: row
        for name, row in result["systems"].items()
        if "method" in row and name.startswith(prefix)
    }
    if not systems:
        return NOT_YET
    exits, chosen, spent = [], [], []
    for name, row in systems.items():
        for way, found in row["ways"].items():
            title = f"{name}, {HEIR_WAYS[way]}"
            exits.append([title, *_exits(row, found), *_thinking(found)])
            chosen += [
                [title, HEIR_THRESHOLDS[policy["way"]], _percent(row["plain"]), *_cells(policy)]
                for policy in found["policies"]
            ]
            spent += _spent(title, row["method"], found["at"])
    told = " ".join(_heir_conditions(name, row) for name, row in systems.items())
    return "\n\n".join(
        [
            table(
                [
                    "network, how its exits learn", "exits, %", "last, %", "less plain, points",
                    "an exit was right and the last is wrong, %", "some exit is right, %",
                    "wrong answers told by confusion; by confidence",
                ],
                exits,
            ),
            table(
                [
                    "network", "thresholds", "plain, %", "with exits, %", "left at each exit, %",
                    "MACs ratio", "faster, batch 1", "faster, batch 64",
                ],
                chosen,
            ),
            table(
                [
                    "network", "thresholds for a budget",
                    *(f"at {100 * cost:.0f} % of the cost, %" for cost in COSTS),
                ],
                spent,
            ),
            told,
        ]
    )  # fmt: skip


def _exits(row: Row, found: Row) -> list[str]:
    early = " / ".join(f"{100 * exit['accuracy']:.1f}" for exit in found["exits"][:-1])
    return [early, _percent(found["exits"][-1]), _points(found["last_less_plain"])]


def _thinking(found: Row) -> list[str]:
    known, told = found["overthinking"], found["confusion"]
    return [
        f"{100 * known['destructive']:.1f}",
        f"{100 * known['oracle_accuracy']:.1f}",
        f"{told['confusion']:.3f}; {told['unsure']:.3f}",
    ]


def _spent(title: str, method: str, at: Row) -> list[list[str]]:
    rows = []
    for name in (method, "search"):
        cells = [at[str(cost)][name] for cost in COSTS]
        told = [
            "no such thresholds" if c is None else f"{_percent(c)} ({c['cost']:.2f})" for c in cells
        ]
        rows.append([title, METHODS[name], *told])
    return rows


def _heir_conditions(name: str, row: Row) -> str:
    return (
        f"{name}: {row['data']}, {row['training_images']} images to train on, {row['epochs']} "
        f"epochs for the network alone and for all exits at once ({_where(row['trained'])}), seed "
        f"{row['seed']}; {row['samples']} images to be judged on."
    )


def _conditions(result: Result) -> str:
    about = result["conditions"]
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    machines: dict[str, list[str]] = {}
    for name, row in result["systems"].items():
        machines.setdefault(row["processor"], []).append(name)
    where = "; ".join(f"{', '.join(names)} on {machine}" for machine, names in machines.items())
    return (
        f"{about['threads']} thread ({where}), Python {about['python']}, {versions}. "
        "Times are medians, taken in turn in one run on ONNX Runtime."
    )


def _percent(share: Row) -> str:
    return f"{100 * share['accuracy']:.2f}"


def _points(paired: Row) -> str:
    low, high = paired["interval"]
    return f"{paired['points']:+.2f}; {low:+.2f} to {high:+.2f}"


ZOO_TABLES: dict[str, Callable[[Result], str]] = {
    "zoo.summary": _summary,
    "zoo.branchynet": _branchynet,
    "zoo.inception": _inception,
    "zoo.inception_gradients": _gradients,
    "zoo.text": _text,
    "zoo.truncated": _truncated,
    "zoo.text_speed": _text_speed,
    "zoo.recipes": _recipes,
    "zoo.shallow_deep": partial(_heirs, prefix="sdn"),
    "zoo.msdnet": partial(_heirs, prefix="msdnet"),
    "zoo.conditions": _conditions,
}
