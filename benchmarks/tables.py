"""Write the tables of the documents from the results; no figure in them is typed.

A document has a table where it says ``<!-- table: NAME -->`` and ``<!-- /table -->``; what stands
between is replaced by what the function of that name makes of ``results/NAME.json`` (where the name
has a dot, of the file that is named before it). With
``--check``, nothing is written, and a table that differs ends the program with 1.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.deciding_tables import DECIDING_TABLES
from benchmarks.learning_tables import LEARNING_TABLES
from benchmarks.runtime_tables import RUNTIME_TABLES
from benchmarks.zoo_tables import ZOO_TABLES

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MARKED = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- /table -->)", re.DOTALL)

Table = Callable[[dict[str, Any]], str]


def digits(result: dict[str, Any]) -> str:
    """One line a seed."""
    reports = result["reports"]
    time, versions = reports[0]["time"], reports[0]["versions"]
    lines = [
        "| seed | full network, accuracy (95 % interval) | early exits | cost | faster, batch 1 "
        "| faster, batch 64 | same as replay |",
        "|---|---|---|---|---|---|---|",
    ]
    for report in reports:
        times = report["time"]
        lines.append(
            f"| {report['seed']} | {_scored(report['full'])} | {_scored(report['early'])} "
            f"| {report['cost_ratio']:.2f} | {times['batch_1']['speedup']:.2f}× "
            f"| {times['batch_64']['speedup']:.2f}× | {100 * report['agreement']:.1f} % |"
        )
    settings = reports[0]["settings"]
    lines.append(
        f"\nHandwritten digits as 1×32×32 images, {reports[0]['samples']} test samples; residual "
        f"network of {settings['depth']} layers, three exits trained jointly for "
        f"{settings['epochs']} epochs; {time['engine']} {versions['onnxruntime']}, "
        f'{time["threads"]} threads, torch {versions["torch"]}. "Cost" is estimated: mean '
        f'multiply-accumulates with heads that ran, over the backbone\'s. "Faster" is measured: '
        f"the whole network without heads against the early-exit network, on the same engine, in "
        f"turn in one run. `make bench` makes [the results](benchmarks/results/digits.json)."
    )
    return "\n".join(lines)


TABLES: dict[str, Table] = {
    "digits": digits,
    **DECIDING_TABLES,
    **LEARNING_TABLES,
    **RUNTIME_TABLES,
    **ZOO_TABLES,
}


def _scored(scored: dict[str, Any]) -> str:
    low, high = scored["interval"]
    return f"{100 * scored['accuracy']:.1f} % ({100 * low:.1f} to {100 * high:.1f})"


def _holds(result: dict[str, Any], part: str) -> bool:
    return part in result["parts"] or part in result["parts"].get("stages", {})


def filled(text: str) -> str:
    """The document with its tables as the results have them."""

    def put(match: re.Match[str]) -> str:
        begin, name, end = match.groups()
        source = RESULTS / f"{name.partition('.')[0]}.json"
        if not source.exists():
            return begin + end
        result = json.loads(source.read_text("utf-8"))
        group, _, part = name.partition(".")
        if group == "runtime" and part != "conditions" and not _holds(result, part):
            return f"{begin}\nNot measured yet.\n\n{end}"
        return f"{begin}\n{TABLES[name](result)}\n\n{end}"

    return MARKED.sub(put, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="only say what differs")
    check = parser.parse_args().check
    stale = []
    cards = sorted((ROOT / "src" / "offramp" / "zoo").glob("*/card.md"))
    for document in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *cards]:
        text = document.read_text("utf-8")
        wanted = filled(text)
        if wanted != text:
            stale.append(document.name)
            if not check:
                document.write_text(wanted, "utf-8")
    if check and stale:
        sys.exit(f"tables that are not those of the results: {', '.join(stale)}; run `make docs`")


if __name__ == "__main__":
    main()
