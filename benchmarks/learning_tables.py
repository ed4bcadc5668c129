"""The tables of docs/evidence.md, from the results of learn.py."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from math import sqrt
from statistics import fmean, stdev
from typing import Any

from scipy.stats import t as student

from benchmarks.learning.settings import PLAIN
from benchmarks.learning.summary import best_setting, least_cost
from benchmarks.learning.tasks import DEEP_LONG, LONG, NARROW_LONG, SHALLOW_LONG, TASKS
from benchmarks.markdown import table

__all__ = ["LEARNING_TABLES"]

Result = dict[str, Any]
Row = dict[str, Any]

SHOWN = (0.25, 0.5, 0.75)  # of the plain network's cost
WATCHED = ("plain", "joint", "joint_distill", "mixed_distill", "layerwise")
NOT_YET = "Not measured yet."
HEADS = TASKS["cifar_resnet20"].heads  # where nothing is said
BARS: dict[str, tuple[str, str, Callable[[float], bool]]] = {
    "macs_at_plain_accuracy_fashion": ("of the plain network's MACs", "≤ 0.5", lambda v: v <= 0.5),
    "macs_at_plain_accuracy_cifar": ("of the plain network's MACs", "≤ 0.65", lambda v: v <= 0.65),
    "macs_at_plain_accuracy_cifar56": ("likewise, ResNet-56", "≤ 0.65", lambda v: v <= 0.65),
    "macs_at_plain_accuracy_fashion_long": ("likewise, ten passes", "≤ 0.5", lambda v: v <= 0.5),
    "macs_at_plain_accuracy_cifar_long": ("likewise, wider heads", "≤ 0.65", lambda v: v <= 0.65),
    "macs_at_plain_accuracy_cifar_short": ("likewise, few passes", "≤ 0.65", lambda v: v <= 0.65),
    "macs_at_plain_accuracy_cifar56_short": ("likewise, few passes", "≤ 0.65", lambda v: v <= 0.65),
    "measured_over_macs_speedup": ("of the MACs ratio, worst", "≥ 0.85", lambda v: v >= 0.85),
    "step_overhead": ("of the plain step, less the heads' MACs, worst", "≤ 1.05",
                      lambda v: v <= 1.05),
}  # fmt: skip


def _percent(value: float, digits: int = 2) -> str:
    return f"{100 * value:.{digits}f}"


def _spread(values: Sequence[float], samples: int) -> str:
    """A mean in %, and half of its interval: over seeds, or over samples where there is one."""
    mean = fmean(values)
    half = _half(values) if len(values) > 1 else 1.96 * sqrt(mean * (1 - mean) / samples)
    return f"{_percent(mean)} ± {_percent(half)}"


def _half(values: Sequence[float]) -> float:
    """Of the 95 % interval of a mean over seeds."""
    return float(student.ppf(0.975, len(values) - 1)) * stdev(values) / sqrt(len(values))


def _of(result: Result, task: str) -> dict[str, list[Row]]:
    """The runs of a task by setting, in the order of the queue; complete settings first."""
    found: dict[str, list[Row]] = {}
    for name in result["conditions"]["settings"]:
        own = [r for r in result["rows"]["runs"] if (r["task"], r["setting"]) == (task, name)]
        if own:
            found[name] = own
    return found


def _title(result: Result, setting: str) -> str:
    return str(result["conditions"]["settings"][setting]["title"])


def _named(result: Result, task: str) -> str:
    about = result["conditions"]["tasks"][task]
    heads = "" if about["heads"] == HEADS else f", heads {about['heads']}"
    return f"{about['network']}, {about['data']}, {about['passes']} passes{heads}"


def _at(result: Result, row: Row, budget: float) -> float:
    curve: list[float] = row["rules"][row["rule"]]["accuracy"]
    return curve[result["conditions"]["budgets"].index(budget)]


def _summary(result: Result) -> str:
    """Every bar and what was measured."""
    rows = []
    for name, (unit, bar, met) in BARS.items():
        if name in result["summary"]:
            value = result["summary"][name]
            shown = "not reached" if value is None else f"{value:.3f}"
            fine = value is not None and met(value)
            rows.append([f"`{name}`", shown, unit, bar, "yes" if fine else "**no**"])
            about = name.partition("accuracy_")[2]
            if name.startswith("macs_at") and f"calibrated_macs_{about}" in result["summary"]:
                cost, points = (
                    result["summary"][f"calibrated_{what}_{about}"] for what in ("macs", "points")
                )
                of = f"calibrated, at {points:+.2f} points beside plain"
                rows.append([f"`calibrated_macs_{about}`", f"{cost:.3f}", of, "", ""])
    for name, unit in (("memory_overhead", "of the plain training's memory, worst"),
                       ("runs", "trainings")):  # fmt: skip
        if name in result["summary"]:
            rows.append([f"`{name}`", f"{result['summary'][name]:.4g}", unit, "", ""])
    return table(["figure", "measured", "of what", "bar", "met"], rows)


def _accuracies(task: str) -> Callable[[Result], str]:
    """Accuracy of every exit, and the last one beside the plain network."""

    def make(result: Result) -> str:
        found = _of(result, task)
        if not found:
            return NOT_YET
        first = next(iter(found.values()))[0]
        rows = []
        for setting, runs in found.items():
            samples, exits = runs[0]["samples"], len(runs[0]["exits"])
            shown = [
                _spread([run["exits"][k]["accuracy"] for run in runs], samples)
                if setting != PLAIN or k == exits - 1
                else "–"
                for k in range(exits)
            ]
            gained = [run["last_less_plain"]["points"] for run in runs]
            low, high = runs[0]["last_less_plain"]["interval"]
            around = f"({100 * low:+.2f} to {100 * high:+.2f})"
            lead = f"{100 * fmean(gained):+.2f} " + (
                around if len(runs) == 1 else f"± {_percent(_half(gained))}"
            )
            rows.append(
                [_title(result, setting), str(len(runs)), *shown, "" if setting == PLAIN else lead]
            )
        spent, costs = 0.0, []
        for stage in first["stage_macs"]:
            spent += stage
            costs.append(spent / sum(first["stage_macs"]))
        head = [f"exit at {_percent(cost, 0)} %" for cost in costs[:-1]]
        return table(["scheme", "seeds", *head, "last exit", "last less plain, points"], rows)

    return make


def _frontier(task: str) -> Callable[[Result], str]:
    """Area, accuracy at shares of the cost, and the cost of the plain network's accuracy."""

    def make(result: Result) -> str:
        found = {k: runs for k, runs in _of(result, task).items() if k != PLAIN}
        if not found:
            return NOT_YET
        best = best_setting(result["rows"]["runs"], task)
        rows = []
        for setting, runs in found.items():
            samples = runs[0]["samples"]
            areas = [run["rules"][run["rule"]]["area"] for run in runs]
            shown = [_spread([_at(result, run, b) for run in runs], samples) for b in SHOWN]
            costs = [least_cost(run) for run in runs]
            reached = [cost for cost in costs if cost is not None]
            least = _percent(fmean(reached), 1) if len(reached) == len(costs) else "not reached"
            title = _title(result, setting)
            rules = sorted({run["rule"] for run in runs})
            rows.append(
                [f"**{title}**" if setting == best else title, ", ".join(rules),
                 _spread(areas, samples), *shown, least]
            )  # fmt: skip
        head = [f"at {_percent(budget, 0)} % of the cost" for budget in SHOWN]
        text = table(["scheme", "leaves by", "area", *head, "cost of plain's accuracy, %"], rows)
        return f"{text}\n\n{_rivals(result, found, best)}".rstrip()

    return make


def _rivals(result: Result, found: dict[str, list[Row]], best: str | None) -> str:
    """The best setting beside the best of the others, at each share of the cost."""
    if best is None or len(found) < 2:
        return ""
    told = []
    for budget in SHOWN:
        means = {k: fmean(_at(result, run, budget) for run in runs) for k, runs in found.items()}
        other = max((k for k in means if k != best), key=lambda k: means[k])
        points = 100 * (means[best] - means[other])
        told.append(
            f"at {_percent(budget, 0)} % it is {points:+.2f} points beside "
            f'"{_title(result, other)}", the best of the others'
        )
    return f'Best on calibration samples: "{_title(result, best)}"; {"; ".join(told)}.'


def _gradients(result: Result) -> str:
    """First and last quarter of the training, Fashion-MNIST."""
    found = _of(result, "fashion_resnet20")
    shown = [name for name in WATCHED if name in found]
    if not shown:
        return NOT_YET
    norms = {name: found[name][0]["gradient_norms"] for name in shown}
    rows = []
    for layer in norms[shown[0]]:
        cells = []
        for name in shown:
            quarters = norms[name].get(layer) or [None]
            ends = (quarters[0], quarters[-1])  # none where the layer was frozen
            cells += ["–" if norm is None else f"{norm:.3f}" for norm in ends]
        rows.append([layer, *cells])
    head = [f"{_title(result, n)}, {when}" for n in shown for when in ("first quarter", "last")]
    return table(["layer", *head], rows)


def _overthinking(result: Result) -> str:
    """Shares of all samples in %, at thresholds that are as good as plain on calibration."""
    rows = []
    for task in result["conditions"]["tasks"]:
        for setting, runs in _of(result, task).items():
            if setting == PLAIN:
                continue
            points = [run["operating"] for run in runs]
            keys = ("destructive", "rescued", "lost", "wasteful_full", "oracle_accuracy")
            shown = [_percent(fmean(p["overthinking"][key] for p in points)) for key in keys]
            cost = _percent(fmean(p["cost"] for p in points), 1)
            lead = f"{100 * fmean(p['less_plain']['points'] for p in points):+.2f}"
            rows.append([_named(result, task), _title(result, setting), *shown, cost, lead])
    head = ["network", "scheme", "destructive", "rescued", "lost", "wasteful", "oracle",
            "cost, %", "less plain, points"]  # fmt: skip
    return table(head, rows) if rows else NOT_YET


def _places(result: Result) -> str:
    """Area for each number of exits and each way to place them."""
    found = result["rows"].get("places")
    if not found:
        return NOT_YET
    rows = []
    for number in sorted({row["exits"] for row in found}):
        own = {row["way"]: row for row in found if row["exits"] == number}
        half = result["conditions"]["budgets"].index(0.5)
        rows.append(
            [str(number)]
            + [_percent(row["area"]) for row in own.values()]
            + [_percent(row["accuracy"][half]) for row in own.values()]
            + [", ".join(f"`{place}`" for place in own["search"]["places"])]
        )
    ways = list(dict.fromkeys(row["way"] for row in found))
    head = [f"area, {w}" for w in ways] + [f"at 50 %, {w}" for w in ways]
    return table(["exits", *head, "places that the search kept"], rows)


def _steps(result: Result) -> str:
    """Time of a step, and memory."""
    if "steps" not in result["rows"]:
        return NOT_YET
    memory = {(row["task"], row["setting"]): row for row in result["rows"]["memory"]}
    rows = []
    for row in result["rows"]["steps"]:
        own = memory[row["task"], row["setting"]]
        rows.append(
            [_named(result, row["task"]), _title(result, row["setting"]), f"{row['plain_ms']:.0f}",
             f"{row['exits_ms']:.0f}", f"{row['ratio']:.3f}",
             f"{_percent(row['heads_share_of_macs'], 1)} %", f"{row['ratio_less_heads']:.3f}",
             f"{_percent(row['heads_share_of_time'], 1)} %",
             f"{own['plain_mb']:.0f}", f"{own['exits_mb']:.0f}", f"{own['ratio']:.2f}"]
        )  # fmt: skip
    head = ["network", "scheme", "plain, ms", "with exits, ms", "ratio", "heads' MACs",
            "less heads", "heads' time", "plain, MB", "with exits, MB",
            "ratio of memory"]  # fmt: skip
    return table(head, rows)


def _speed(result: Result) -> str:
    """Measured and by multiply-accumulates."""
    rows = [
        [_named(result, row["task"]), _title(result, row["setting"]), f"{row['plain_ms']:.2f}",
         f"{row['exits_ms']:.2f}", f"{row['faster']:.2f}×", f"{row['by_macs']:.2f}×",
         f"{row['measured_over_macs']:.3f}",
         row["processor"]]
        for row in result["rows"].get("speed", [])
    ]  # fmt: skip
    head = ["network", "scheme", "plain, ms", "with exits, ms", "faster", "by MACs",
            "measured over MACs", "on"]  # fmt: skip
    return table(head, rows) if rows else NOT_YET


def _energy(result: Result) -> str:
    """Estimated, and said to be."""
    found = result["rows"].get("energy")
    if not found:
        return NOT_YET
    rows = [
        [_named(result, row["task"]), _title(result, row["setting"]),
         f"{row['plain_microjoules']:.0f}", f"{row['exits_microjoules']:.0f}",
         f"{row['ratio']:.2f}", f"{_percent(row['macs_share'], 0)} %"]
        for row in found["estimates"]
    ]  # fmt: skip
    head = ["network", "scheme", "plain, µJ, estimated", "with exits, µJ, estimated", "ratio",
            "of the plain network's, by MACs"]  # fmt: skip
    told = "can" if found["rapl_readable"] else "cannot"
    return f"{table(head, rows)}\n\nThe machine's energy counters (RAPL) {told} be read here."


def _conditions(result: Result) -> str:
    given = result["conditions"]
    versions = ", ".join(f"{name} {version}" for name, version in given["versions"].items())
    rows = []
    for name, task in given["tasks"].items():
        seeds = {run["seed"] for run in result["rows"]["runs"] if run["task"] == name}
        if not seeds:
            continue
        rows.append(
            [_named(result, name), task["begins"], str(task["passes"]), f"{task['rate']:g}",
             task["calibrated_on"], str(len(seeds))]
        )  # fmt: skip
    head = ["network, data", "parameters at the start", "passes", "learning rate",
            "thresholds chosen on", "seeds, at the most"]  # fmt: skip
    machines = Counter(run["processor"] for run in result["rows"]["runs"])
    trained = "; ".join(f"{count} on {name}" for name, count in machines.most_common())
    return (
        f"{table(head, rows)}\n\n{given['optimizer']} (by SGD: {given['sgd']}); batches "
        f"of {given['batch']}, {given['precision']}. Trainings: {trained}; one thread where it is "
        f"no accelerator, and versions with each run in the result. Measured by one thread of an "
        f"{given['processor']}. Python {given['python']}, {versions}."
    )


_TASKS = (*TASKS, *(task.name for task in (LONG, SHALLOW_LONG, NARROW_LONG, DEEP_LONG)))

LEARNING_TABLES: dict[str, Callable[[Result], str]] = {
    "learn.summary": _summary,
    "learn.conditions": _conditions,
    **{f"learn.exits_{task}": _accuracies(task) for task in _TASKS},
    **{f"learn.frontier_{task}": _frontier(task) for task in _TASKS},
    "learn.gradients": _gradients,
    "learn.overthinking": _overthinking,
    "learn.places": _places,
    "learn.steps": _steps,
    "learn.speed": _speed,
    "learn.energy": _energy,
}
