"""The demo for several seeds: accuracy, cost and time of early exits on handwritten digits.

A config in, a JSON out::

    python benchmarks/digits.py --config benchmarks/digits.json --out benchmarks/results/digits.json
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from offramp.demo import run
from offramp.files import replaced

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config", type=Path, default=HERE / "digits.json")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "digits.json")
    given = parser.parse_args()
    config = json.loads(given.config.read_text("utf-8"))
    reports = []
    for seed in config["seeds"]:
        with tempfile.TemporaryDirectory() as folder:
            report = run(Path(folder), seed=seed, say=lambda text: print(text, file=sys.stderr))
        print(f"seed {seed}\n{report}\n")
        reports.append(report.to_dict())
    result = {"schema": 1, "benchmark": "digits", "config": config, "reports": reports}
    with replaced(given.out) as part:
        part.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
